"""Faults at every message: the guest never runs twice, and runs in the end (docs/matrix.md)."""

from __future__ import annotations

import pytest

from tests.matrix.cases import CASES, Case
from tests.matrix.running import run


@pytest.mark.parametrize("case", CASES[:2], ids=lambda case: case.name)
def test_fault(case: Case) -> None:
    run(case)
