"""docs/write-a-machine.md: its machine runs and keeps the contract, as its last block says."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from corefw import machine
from corefw.machine import DirtyLog, Machine
from corefw.testing.machine import CHECKS

PAGE = Path(__file__).parents[2] / "docs" / "write-a-machine.md"


def test_the_code_runs(capsys: pytest.CaptureFixture[str]) -> None:
    namespace: dict[str, object] = {}
    for block in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        exec(compile(block, str(PAGE), "exec", dont_inherit=True), namespace)
    assert capsys.readouterr().out.splitlines() == [f"{check}: holds" for check in CHECKS]


def test_the_page_names_every_base_class() -> None:
    text = PAGE.read_text()
    kinds = [kind for kind in vars(machine).values() if inspect.isclass(kind)]
    more = [kind.__name__ for kind in kinds if issubclass(kind, Machine | DirtyLog)]
    assert {"Machine", "DirtyLog", "VerifiableMachine"} <= set(more)
    assert [name for name in more if f"`{name}`" not in text] == []
