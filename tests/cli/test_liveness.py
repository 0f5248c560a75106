"""An engine that hangs, in each phase of a migration: the other one notices, and nothing is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator

import pytest

from corefw.testing.tasks import wait_until
from tests.cli.conftest import SMALL, Engine, Engines

BUSY = ("stress", "--opt=ram=16M", "--opt=working-set=8M", "--opt=dirty-rate=400M")
LIVENESS = 4
"""Seconds: longer than a busy machine keeps a ready process from running."""


@contextlib.contextmanager
def stopped(engine: Engine) -> Iterator[None]:
    """Stop the process with SIGSTOP. Its guest, another process, keeps running."""
    os.kill(engine.process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(engine.process.pid, signal.SIGCONT)


def status(engine: Engine) -> str:
    return str(engine.ask("query-migrate").get("status"))


def pair(engines: Engines, *guest: str) -> tuple[Engine, Engine]:
    source = engines(*guest, "--name=from", "--stay", f"--param=x-migfw-liveness={LIVENESS}")
    return source, engines(*guest, "--name=to", "--incoming=tcp:127.0.0.1:0", f"--param=x-migfw-liveness={LIVENESS}")


def begin(source: Engine, destination: Engine, *options: str) -> None:
    begun = source.call("migrate", destination.uri, "--detach", *options)
    assert begun.returncode == 0, begun.stderr


@pytest.mark.parametrize("silent", ["source", "destination"])
def test_in_postcopy_the_other_one_pauses_and_they_find_each_other_again(engines: Engines, silent: str) -> None:
    source, destination = pair(engines, *BUSY)
    slow = ("--param=max-bandwidth=1M", "--param=max-postcopy-bandwidth=1M")
    begin(source, destination, "--postcopy=now", "--reconnect=forever", *slow)
    assert wait_until(lambda: {status(source), status(destination)} == {"postcopy-active"})
    still, other = (source, destination) if silent == "source" else (destination, source)
    with stopped(still):
        assert wait_until(lambda: status(other) in ("postcopy-paused", "postcopy-recover-setup"))
    assert source.call("set", "max-postcopy-bandwidth=0").returncode == 0
    assert wait_until(lambda: {status(source), status(destination)} == {"completed"})
    verified = destination.call("verify")
    assert verified.returncode == 0, verified.stderr


def test_in_precopy_the_guest_goes_on_at_the_source(engines: Engines) -> None:
    source, destination = pair(engines, *BUSY)
    begin(source, destination, "--param=max-bandwidth=8M")
    assert wait_until(lambda: status(destination) == "active")
    with stopped(destination):
        assert wait_until(lambda: status(source) == "failed")
        why = source.ask("query-migrate")["error-desc"]  # the kernel may be the first to notice
        assert "no sign of life" in why or "no answer from the peer" in why, why
        assert source.ask("query-status")["running"]


def test_before_the_switchover_both_wait_for_the_user_and_not_for_each_other(engines: Engines) -> None:
    source, destination = pair(engines, *SMALL)
    begin(source, destination, "--cap=pause-before-switchover")
    assert wait_until(lambda: status(source) == "pre-switchover")
    time.sleep(LIVENESS + 1)
    assert status(source) == "pre-switchover" and status(destination) == "active"
    with stopped(destination):
        assert wait_until(lambda: status(source) == "failed")
    assert source.ask("query-status")["running"]


def test_a_source_that_stands_still_before_the_switchover(engines: Engines) -> None:
    source, destination = pair(engines, *SMALL)
    begin(source, destination, "--cap=pause-before-switchover")
    assert wait_until(lambda: status(source) == "pre-switchover")
    with stopped(source):
        code, _, errors = destination.finish()
    assert code == 1 and f"the source gave no sign of life in {LIVENESS} s" in errors
    assert wait_until(lambda: status(source) == "failed")
    assert source.ask("query-status")["running"]
