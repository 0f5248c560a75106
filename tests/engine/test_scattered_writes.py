"""A guest that writes at random moves twice: each harvest has thousands of separate dirty pages."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest
from corefw_machine_python import PythonMachine

from corefw.engine import Engine
from corefw.machine import MachineConfig
from corefw.plugins import Plugins
from tests.helpers.engines import arrived, ended

PROGRAM = Path(__file__).parents[2] / "plugins/machine_python/tests/programs/scattered.py"
HOPS = 4


@pytest.mark.parametrize("transport", ["tcp:127.0.0.1:0", "unix:{folder}/{hop}"])
def test_no_write_is_lost(plugins: Plugins, folder: Path, transport: str) -> None:
    with ExitStack() as stack:

        def engine(*, incoming: bool) -> Engine:
            settings = plugins.settings()
            settings.set_capabilities({"return-path": True})
            settings.set_parameters({"max-bandwidth": 0})
            # On a busy machine the guest may write faster than it is sent.
            settings.set_parameters({"x-migfw-timeout": 1000, "x-migfw-on-timeout": "switchover"})
            machine = PythonMachine(MachineConfig(f"{PROGRAM}:Scattered", {}, incoming))
            made = Engine(machine, plugins, settings)
            stack.callback(made.close)
            return made

        here = engine(incoming=False)
        here.cont()
        for hop in range(HOPS):
            there = engine(incoming=True)
            here.migrate(there.migrate_incoming(transport.format(folder=folder, hop=hop)))
            assert (ended(here), arrived(there)) == ("completed", "completed")
            there.verify()
            here.close()
            here = there
        assert here.verify()["writes"]
