"""docs/make-your-program-movable.md: its programs load, move while they run, and prove that they arrived."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest

from corefw.engine import Engine
from corefw.machine import MachineConfig, VerifiableMachine
from corefw.plugins import Plugins
from corefw.states import MigrationStatus
from corefw.testing.tasks import wait_until

PAGE = Path(__file__).parents[2] / "docs" / "make-your-program-movable.md"


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """The page's programs in a file, from which a guest can be loaded."""
    path = tmp_path / "heat.py"
    path.write_text("\n".join(blocks()[:-1]))
    return path


def test_the_program_moves(program: Path, capfd: pytest.CaptureFixture[str]) -> None:
    namespace: dict[str, object] = {}
    exec(compile(blocks()[-1], str(PAGE), "exec", dont_inherit=True), namespace)
    move = namespace["move"]
    assert callable(move)
    move(f"{program}:Heat")
    assert re.search(r"^completed \{'step': [0-9]+, 'hottest': [0-9.]+\}$", capfd.readouterr().out, re.MULTILINE)


def test_the_newer_program_loads_and_has_its_field(program: Path) -> None:
    machine = Plugins.load().machine("python", MachineConfig(f"{program}:HeatWithLimit", {"size": "8"}))
    try:
        (device,) = machine.devices()
        assert (device.vmstate.version_id, device.vmstate.oldest) == (2, 1)
        assert vars(device.state)["limit"] == 0.5
    finally:
        machine.close()


@pytest.mark.parametrize("name", ["Walk", "CarefulHeat"])
def test_the_other_programs_run(program: Path, name: str) -> None:
    machine = Plugins.load().machine("python", MachineConfig(f"{program}:{name}"))
    try:
        machine.start()
        assert isinstance(machine, VerifiableMachine)
        first = machine.verify()
        assert wait_until(lambda: machine.verify() != first)
        assert machine.information()["fields"]
    finally:
        machine.close()


def test_the_example_moves_and_proves_it(capfd: pytest.CaptureFixture[str]) -> None:
    """examples/heat.py: the README's program."""
    program = PAGE.parents[1] / "examples" / "heat.py"
    plugins = Plugins.load()
    source, destination = (
        Engine(plugins.machine("python", MachineConfig(f"{program}:Heat", {}, incoming)), plugins, plugins.settings())
        for incoming in (False, True)
    )
    with contextlib.closing(source), contextlib.closing(destination):
        source.cont()
        assert source.verify()["step"] is not None
        source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
        assert destination.wait_incoming(120) is MigrationStatus.COMPLETED
        steps = int(str(destination.verify()["step"]))
        assert wait_until(lambda: int(str(destination.verify()["step"])) > steps)
    assert "would not move" not in capfd.readouterr().err


def test_the_page_speaks_of_everything_that_a_program_may_define() -> None:
    from corefw_machine_python import guest

    text = PAGE.read_text()
    names = [name for name, one in vars(guest.Program).items() if callable(one) and not name.startswith("_")]
    for name in [*names, *(f"guest.{one}" for one in guest.__all__ if one.islower()), "stop_timeout", "requires"]:
        assert name in text, f"the page says nothing of {name}"
