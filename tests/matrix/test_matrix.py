"""Faults at every point: the guest never runs twice, and runs in the end. docs/matrix.md lists the cases."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.helpers.sshd import Sshd, running_sshd
from tests.matrix.cases import CASES, SUBSET, Case
from tests.matrix.page import FAILED, PAGE, cases_part, note_result
from tests.matrix.running import run

ALL = bool(os.environ.get("MIGFW_MATRIX"))


@pytest.fixture(scope="session")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    with running_sshd(tmp_path_factory.mktemp("sshd")) as running:
        yield running


@pytest.mark.parametrize("case", CASES if ALL else SUBSET, ids=lambda case: case.name)
def test_fault(case: Case, request: pytest.FixtureRequest) -> None:
    outcome = FAILED
    try:
        outcome = run(case, request.getfixturevalue("sshd") if case.way.transport == "ssh" else None)
    finally:
        if ALL:
            note_result(case, outcome)


def test_the_page_lists_the_cases_of_the_code() -> None:
    """If not: `make matrix`, or `python -m tests.matrix.page` without running them."""
    assert PAGE.read_text().startswith(cases_part())
