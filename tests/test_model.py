"""The model of the switchover (docs/model): spin verifies it, its mutants fail, and it has the statuses of the code."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import pytest

from corefw.engine import incoming, outgoing
from corefw.states import TRANSITIONS, MigrationStatus, Side

MODEL: Final = Path(__file__).parents[1] / "docs" / "model" / "switchover.pml"
SECONDS: Final = 120.0

_S = MigrationStatus
IDLE_AGAIN: Final = frozenset({(old, _S.SETUP) for old in (_S.NONE, _S.CANCELLED, _S.COMPLETED, _S.FAILED)})
"""Transitions that the model lacks, because it describes one migration: it begins in setup and ends once."""
STEPS: Final[Mapping[Side, str]] = {
    Side.SOURCE: r"\b(?:SOURCE|source_goes)\((\w+), (\w+)\)",
    Side.DESTINATION: r"\b(?:DESTINATION|destination_pauses)\((\w+), (\w+)\)",
}
"""The statement with which the model changes a status."""
PHASES: Final[Mapping[Side, tuple[str, frozenset[MigrationStatus]]]] = {
    Side.SOURCE: (r"^\t\t:: s == (\w+) ->", frozenset(outgoing.PHASES)),
    Side.DESTINATION: (r"^\t\t:: d == (\w+) ->", frozenset(incoming.PHASES)),
}
"""How the model begins a phase, and the phases of the code."""

MUTANTS: Final[Mapping[str, tuple[str, str, str]]] = {
    "the source takes the guest back after a handover": (
        "if :: !handed_over || refused -> source_runs = true :: else fi",
        "if :: source_runs = true fi",
        "at_most_one",
    ),
    "the source believes every SHUT 1": (
        "peer_failed = true; refused = !started_there",
        "peer_failed = true; refused = true",
        "at_most_one",
    ),
    "the source forgets that the destination answered RECV_BITMAP": (
        "message == PONG_3 || message == BITMAP",
        "message == PONG_3",
        "at_most_one",
    ),
    "the source sends RUN before it hands over": (
        "hand_over(); tell(forward, forward_up, PACKAGE)",
        "tell(forward, forward_up, PACKAGE); hand_over()",
        "at_most_one",
    ),
    "the source sends the end of the stream before it hands over": (
        "\t\t\thand_over();\n\t\t\tall_sent = true;\n\t\t\ttell(forward, forward_up, END_OF_STREAM);\n",
        "\t\t\tall_sent = true;\n\t\t\ttell(forward, forward_up, END_OF_STREAM);\n\t\t\thand_over();\n",
        "at_most_one",
    ),
    "the user takes a guest that does not run yet for one that never will": (
        "(!destination_lives || d == FAILED || d == CANCELLED)",
        "(!destination_runs)",
        "at_most_one",
    ),
    "the source never takes the guest back": (
        "refused -> source_runs = true :: else fi",
        "refused -> skip :: else fi",
        "one_in_the_end",
    ),
    "a destination that has failed answers nobody": (
        "(!qemu && (d == COMPLETED || d == FAILED || d == CANCELLED))",
        "(!qemu && d == COMPLETED)",
        "one_in_the_end",
    ),
    "a destination that has completed answers nobody": (
        "(!qemu && (d == COMPLETED || d == FAILED || d == CANCELLED))",
        "(!qemu && (d == FAILED || d == CANCELLED))",
        "one_in_the_end",
    ),
    "the source takes no SHUT 0 in a recovery": (
        "message == SHUT_0 -> confirmed = all_sent",
        "message == SHUT_0 -> confirmed = all_sent && s != POSTCOPY_RECOVER",
        "one_in_the_end",
    ),
}
"""What is wrong: a line of the model, what it becomes, and the property that no longer holds."""


def spin(model: str, folder: Path, *properties: str, optimize: str = "-O0") -> list[str]:
    """The properties that do not hold, found by an exhaustive search. (Optimizing takes gcc three seconds.)"""
    if missing := [program for program in ("spin", "gcc") if shutil.which(program) is None]:
        pytest.skip(f"needs {' and '.join(missing)}")
    (folder / "model.pml").write_text(model)
    _run(folder, "spin", "-a", "model.pml")
    _run(folder, "gcc", optimize, "-w", "-DNFAIR=3", "-o", "pan", "pan.c")
    return [name for name in properties if not _holds(folder, name)]


def _holds(folder: Path, name: str) -> bool:
    fair = () if name == "at_most_one" else ("-a", "-f")
    output = _run(folder, "./pan", "-E", "-m100000", *fair, "-N", name)
    errors = re.search(r"errors: (\d+)", output)
    assert errors and "max search depth too small" not in output, output
    return errors[1] == "0"


def _run(folder: Path, *command: str) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def test_the_guest_runs_once_and_runs_in_the_end(tmp_path: Path) -> None:
    assert spin(MODEL.read_text(), tmp_path, "at_most_one", "one_in_the_end", optimize="-O1") == []


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_model_that_is_wrong_fails(mutant: str, tmp_path: Path) -> None:
    old, new, broken = MUTANTS[mutant]
    model = MODEL.read_text()
    assert model.count(old) == 1
    assert spin(model.replace(old, new), tmp_path, broken) == [broken]


@pytest.mark.parametrize("side", Side)
def test_the_model_changes_its_statuses_as_the_code_does(side: Side) -> None:
    found = {
        (MigrationStatus[old], MigrationStatus[new])
        for old, new in re.findall(STEPS[side], MODEL.read_text())
        if old.isupper()
    }
    table = {
        (old, new) for old, following in TRANSITIONS[side].items() for new in following if _S.COLO not in (old, new)
    }
    assert found == {step for step in table if _S.COLO not in step} - IDLE_AGAIN


@pytest.mark.parametrize("side", Side)
def test_the_model_has_the_phases_of_the_code(side: Side) -> None:
    pattern, phases = PHASES[side]
    found = {MigrationStatus[name] for name in re.findall(pattern, MODEL.read_text(), re.MULTILINE)}
    assert found - {_S.CANCELLING} == phases
