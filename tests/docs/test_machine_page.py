"""docs/write-a-machine.md: its machine runs and keeps the contract."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from corefw import machine
from corefw.machine import DirtyLog, Machine
from corefw.testing.machine import CHECKS

PAGE = Path(__file__).parents[2] / "docs" / "write-a-machine.md"


def test_the_code_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    namespace: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        exec(compile(block, str(PAGE), "exec", dont_inherit=True), namespace)
    assert capsys.readouterr().out.splitlines() == [f"{check}: holds" for check in CHECKS]
    with (tmp_path / "image").open("w+b") as file:
        file.truncate(1 << 20)
        image = namespace["Image"]("disk", file.fileno())
        bitmap = image.add_bitmap("one", 512)
        image.write(b"abc", 1000)
        assert bitmap.runs().tolist() == [[512, 1024]]
        file.seek(1000)
        assert file.read(3) == b"abc"


def test_the_page_names_every_base_class() -> None:
    text = PAGE.read_text()
    kinds = [kind for kind in vars(machine).values() if inspect.isclass(kind)]
    more = [kind.__name__ for kind in kinds if issubclass(kind, Machine | DirtyLog)]
    assert {"Machine", "DirtyLog", "VerifiableMachine"} <= set(more)
    assert [name for name in more if f"`{name}`" not in text] == []
