"""The machine keeps the contract of corefw.machine, with each dirty log, and with programs of several kinds."""

from __future__ import annotations

from pathlib import Path

import pytest
from corefw_machine_python import PythonMachine

from corefw.machine import MachineConfig
from corefw.memory import logs, pagemap
from corefw.testing.machine import CHECKS, MachineCase, check_machine

needs_pagemap = pytest.mark.skipif(pagemap.unsupported() is not None, reason=f"PAGEMAP_SCAN: {pagemap.unsupported()}")

PLAIN = Path(__file__).parent / "programs" / "plain.py"
DISKS = Path(__file__).parent / "programs" / "disks.py"

STRESS = {"ram": "2M", "working-set": "512K", "dirty-rate": "100M"}


def case(program: str, options: dict[str, str]) -> MachineCase:
    return MachineCase(lambda incoming: PythonMachine(MachineConfig(program, options, incoming)), seconds=0.05)


@needs_pagemap
@pytest.mark.parametrize("check", CHECKS)
def test_stress(check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(logs.VARIABLE, logs.LogKind.PAGEMAP)
    check_machine(case("stress", STRESS), only=[check])


def test_stress_with_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(logs.VARIABLE, logs.LogKind.HASHES)
    checks = ["the-dirty-log-finds-every-write", "a-dirty-log-can-start-again", "state-moves-to-another-machine"]
    check_machine(case("stress", STRESS), only=checks)


def test_a_program_of_every_kind_of_field() -> None:
    check_machine(case(f"{PLAIN}:Plain", {}), only=["state-moves-to-another-machine", "nothing-changes-while-stopped"])


def test_life() -> None:
    check_machine(case("life", {"size": "40x20", "fps": "500"}), only=["state-moves-to-another-machine"])


@pytest.mark.parametrize("check", [check for check in CHECKS if "disks" in check or "bitmaps" in check])
def test_a_program_with_a_disk(check: str, tmp_path: Path) -> None:
    (tmp_path / "disk.raw").write_bytes(bytes(4096 * 512))  # a destination creates none
    check_machine(case(f"{DISKS}:Writer", {"image": str(tmp_path / "disk.raw")}), only=[check])
