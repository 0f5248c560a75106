"""Parsing of names and values on the command line."""

from __future__ import annotations

import pytest

from corefw.client.changes import parse_switches, read_changes, read_mixed, split_pairs
from corefw.errors import UsageError
from corefw.qmp.engines import suggest


@pytest.mark.parametrize(
    ("program", "name"),
    [
        ("stress", "stress"),
        ("sims/heat.py:Heat", "heat"),
        ("/tmp/My Sim.py:Heat", "my-sim"),
        ("package.module:TheClass", "theclass"),
        ("x" * 100, "x" * 40),
        ("...", "guest"),
    ],
)
def test_a_name_is_made_from_the_program(program: str, name: str) -> None:
    assert suggest(program) == name


def test_pairs() -> None:
    assert split_pairs(["a=1", "b=x=y", "c="], "NAME=VALUE") == {"a": "1", "b": "x=y", "c": ""}
    for wrong in (["a"], ["=1"], ["a=1", "a=1"]):
        with pytest.raises(UsageError):
            split_pairs(wrong, "NAME=VALUE")


def test_switches() -> None:
    assert parse_switches(["a", "b=off", "c=YES"], "NAME") == {"a": True, "b": False, "c": True}
    with pytest.raises(UsageError, match="expected a=on or a=off"):
        parse_switches(["a=1"], "NAME")


def test_changes_read_by_the_table_and_take_the_later_names() -> None:
    changes = read_changes(["x-multifd"], ["max-bandwidth=1K", "x-multifd-channels=3"], plugins=False)
    assert changes.capabilities == {"multifd": True}
    assert changes.parameters == {"max-bandwidth": 1024, "multifd-channels": 3}


def test_what_the_tables_do_not_have_is_guessed_for_a_qemu() -> None:
    changes = read_changes(
        ["later-capability"], ["later-count=50", "later-mode=normal", "later-switch=on", "later-size=1M"], plugins=False
    )
    assert changes.capabilities == {"later-capability": True}
    assert changes.parameters == {
        "later-count": 50,
        "later-mode": "normal",
        "later-switch": True,
        "later-size": 1 << 20,
    }


def test_mixed_changes_are_told_apart() -> None:
    changes = read_mixed(
        ["events=on", "switchover-ack=off", "mode=normal"], frozenset({"switchover-ack"}), plugins=False
    )
    assert changes.capabilities == {"events": True, "switchover-ack": False}
    assert changes.parameters == {"mode": "normal"}
