"""Settings for all tests.

Hypothesis has no deadlines, so that a busy machine does not make tests fail. And the programs under test start with the
usual signals, also under `nohup` or in a shell's background, where SIGHUP and SIGINT are ignored: what is caught here
is not inherited.
"""

import logging
import signal
from collections.abc import Iterator
from types import FrameType

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("migfw", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("migfw")


def _go_on(_number: int, _frame: FrameType | None) -> None:
    """What the tests themselves do about it."""


for _number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _go_on)


@pytest.fixture(autouse=True)
def _no_handler_outlives_its_stream() -> Iterator[None]:
    """A command that a test runs in this process logs to stderr as it is then, which is closed after the test."""
    yield
    for handler in logging.root.handlers[:]:
        if type(handler) is logging.StreamHandler:  # those of pytest are of derived classes
            logging.root.removeHandler(handler)
