"""Objects with close() end with a `with` block, and no class defines that a second time."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from corefw.closing import Closing

CORE = Path(__file__).parents[1] / "corefw"


class Door(Closing):
    closed = 0

    def close(self) -> None:
        self.closed += 1


def test_the_end_of_the_block_closes_however_it_ended() -> None:
    door = Door()
    with door as same:
        assert same is door
        assert door.closed == 0
    assert door.closed == 1
    with pytest.raises(KeyboardInterrupt), door:
        raise KeyboardInterrupt
    assert door.closed == 2


def test_nobody_writes_it_again() -> None:
    again = [
        f"{file.relative_to(CORE)}:{node.lineno}"
        for file in sorted(CORE.rglob("*.py"))
        if file.name != "closing.py"
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name == "__exit__"
        if [ast.unparse(line) for line in node.body] == ["self.close()"]
    ]
    assert again == [], "derive from corefw.closing.Closing"
