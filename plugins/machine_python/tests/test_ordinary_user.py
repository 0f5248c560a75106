"""Nothing here needs root: the same guest, its dirty log, its page faults and its move, as the user 65534."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from corefw.memory import pagemap

NOBODY = 65534

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


def as_an_ordinary_user() -> list[str]:
    """What to put before a command. Of root's rights one is left, to search folders: Python may be in root's home."""
    if os.geteuid() != 0:
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("setpriv (util-linux) is not here")
    caps = "-all,+dac_read_search"
    who = ["--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups"]
    return ["setpriv", *who, f"--inh-caps={caps}", f"--ambient-caps={caps}", f"--bounding-set={caps}"]


@pytest.mark.skipif(pagemap.unsupported() is not None, reason=f"PAGEMAP_SCAN: {pagemap.unsupported()}")
def test_as_an_ordinary_user() -> None:
    done = subprocess.run(
        [*as_an_ordinary_user(), sys.executable, "-c", SCENARIO, str(os.geteuid() or NOBODY)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd="/",
        env={**os.environ, "HOME": "/nonexistent", "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "pagemap"
