"""Nothing needs root: a guest, its dirty log, its page faults and a move as user 65534."""

from __future__ import annotations

import os

import pytest

from corefw.memory import pagemap
from tests.helpers.users import NOBODY, run_as_an_ordinary_user

SCENARIO = """
import os, sys, time
import numpy as np
from corefw.machine import MachineConfig, RunState
from corefw.testing.machine import MachineCase, check_machine
from corefw_machine_python import PythonMachine

assert os.geteuid() == int(sys.argv[1]) != 0
options = {"ram": "2M", "working-set": "512K"}
case = MachineCase(lambda incoming: PythonMachine(MachineConfig("stress", options, incoming)), seconds=0.05)
check_machine(
    case, only=["the-dirty-log-finds-every-write", "state-moves-to-another-machine", "page-faults-are-served"]
)
machine = case.make(False)
assert machine.postcopy_unsupported() is None
print(machine.information()["dirty-log"]["ram"])
machine.close()
"""


@pytest.mark.skipif(pagemap.unsupported() is not None, reason=f"PAGEMAP_SCAN: {pagemap.unsupported()}")
def test_as_an_ordinary_user() -> None:
    assert run_as_an_ordinary_user(SCENARIO, str(os.geteuid() or NOBODY)) == "pagemap"
