"""docs/write-a-machine.md: its machine runs and keeps the contract, as its last block says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Protocol

import pytest

from corefw import machine
from corefw.testing.machine import CHECKS

PAGE = Path(__file__).parents[2] / "docs" / "write-a-machine.md"


def test_the_code_runs(capsys: pytest.CaptureFixture[str]) -> None:
    namespace: dict[str, object] = {}
    for block in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        exec(compile(block, str(PAGE), "exec", dont_inherit=True), namespace)
    assert capsys.readouterr().out.splitlines() == [f"{check}: holds" for check in CHECKS]


def test_the_page_names_every_protocol() -> None:
    text = PAGE.read_text()
    protocols = [name for name, kind in vars(machine).items() if Protocol in getattr(kind, "__bases__", ())]
    assert "SupportsVerify" in protocols
    assert [name for name in protocols if f"`{name}`" not in text] == []
