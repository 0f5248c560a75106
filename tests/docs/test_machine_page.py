"""docs/write-a-machine.md: its machine runs and keeps the contract, as its last block says."""

from __future__ import annotations

import re
from pathlib import Path

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
    for name in ("SupportsVerify", "SupportsThrottle", "MakesRamBlocks", "AdoptsStreams"):
        assert hasattr(machine, name)
        assert name in text
