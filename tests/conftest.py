"""What holds for every test in this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers.cli import ending_commands


@pytest.fixture(autouse=True)
def commands_end_with_their_test() -> Iterator[None]:
    with ending_commands():
        yield
