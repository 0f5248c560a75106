"""docs/write-a-transport.md: its code runs as printed, and the example that it names passes its own tests."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from corefw.channel import Interrupt
from corefw.testing.transport import applicable

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "write-a-transport.md"


@pytest.fixture(scope="module")
def page() -> ModuleType:
    """All of the page's Python, one block after the other, as one module: it runs the whole contract kit."""
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 4
    module = ModuleType("page")
    exec(compile("\n".join(blocks), str(PAGE), "exec"), module.__dict__)
    return module


def test_the_transport_leaves_from_its_address(page: ModuleType) -> None:
    interrupt = Interrupt()
    with (
        page.plugins.transport("via:127.0.0.2/127.0.0.1:0").listen() as listener,
        page.plugins.transport(listener.uri).connect(interrupt),
        listener.accept(interrupt) as channel,
    ):
        assert channel.peer.startswith("via:127.0.0.2:")
    interrupt.close()


def test_every_check_is_a_test(page: ModuleType) -> None:
    (mark,) = page.test_contract.pytestmark
    assert mark.args == ("check", applicable(page.CASE))


def test_the_example_passes_its_own_tests(page: ModuleType) -> None:
    """As its README says to run them, from its own folder."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider"],
        cwd=ROOT / "examples" / "transport",
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.findall(r"^PASSED \S+::(\w+)(?:\[(\S+)\])?$", done.stdout, re.MULTILINE)
    assert re.search(rf"^{len(passed)} passed in ", done.stdout, re.MULTILINE), "none is skipped"
    kit = {check for name, check in passed if name == "test_contract"}
    assert kit == set(applicable(page.CASE)), "its channels can do what those of the page can"
    assert len(passed) > len(kit), "it has tests beside the kit's"
