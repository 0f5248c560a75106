"""Postcopy of an ordinary user: if the destination's kernel does not permit it, that is reported before RAM is sent."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tests.helpers.users import run_as_an_ordinary_user

ROOT = Path(__file__).parents[2]

SCENARIO = """
import ctypes, json, os, struct, sys
sys.path.insert(0, sys.argv[1])
from corefw.memory.userfault import SYSCALL
from corefw.plugins import Plugins
from tests.helpers.engines import Pair, arrived, ended, query_migrate
from tests.helpers.moving import LISTEN, Move

ALLOW, REFUSE = 0x7FFF0000, 0x00050000 | 1  # with EPERM
SET_SECCOMP, FILTER, NO_NEW_PRIVILEGES = 22, 2, 38

def forbid(number):
    '''Have a system call refused, in this process and those that it starts, as a container's seccomp profile does.'''
    code = b"".join(struct.pack("=HBBI", *one) for one in [
        (0x20, 0, 0, 0),  # load the number of the system call
        (0x15, 0, 1, number), (0x06, 0, 0, REFUSE), (0x06, 0, 0, ALLOW),
    ])
    kept = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("=H6xQ", len(code) // 8, ctypes.addressof(kept))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0) == 0
    assert libc.prctl(SET_SECCOMP, FILTER, program, 0, 0) == 0, os.strerror(ctypes.get_errno())

if sys.argv[2] == "refused":
    forbid(SYSCALL[os.uname().machine])
with Pair(Plugins.load()) as pair:
    move = Move(pair)
    uri = move.destination.migrate_incoming(LISTEN)
    move.source.set_capabilities({"postcopy-ram": False})
    found = move.source.check(uri, postcopy=True)
    move.source.set_capabilities({"postcopy-ram": True})
    move.source.migrate(uri)
    move.source.start_postcopy()
    print(json.dumps({
        "problems": found.problems, "notes": found.notes,
        "ends": [ended(move.source), arrived(move.destination)],
        "error": move.source.report().error,
        "guest": move.source.machine.run_state,
        "sent": query_migrate(move.source).get("ram", {}).get("normal", 0),
    }))
"""


def move(permission: str) -> dict[str, Any]:
    """Check and move a guest; return the outcome."""
    found: dict[str, Any] = json.loads(run_as_an_ordinary_user(SCENARIO, str(ROOT), permission))
    return found


def test_a_kernel_that_refuses_page_faults() -> None:
    found = move("refused")
    assert found["ends"] == ["failed", "failed"]
    assert (found["guest"], found["sent"]) == ("running", 0)
    remedies = ("seccomp", "CAP_SYS_PTRACE", "/dev/userfaultfd", "vm.unprivileged_userfaultfd", "'postcopy-ram' off")
    for text in (found["error"], " ".join(found["problems"])):
        assert "userfaultfd is not permitted" in text
        assert all(remedy in text for remedy in remedies), text


def test_an_ordinary_user_may_move_in_postcopy() -> None:
    found = move("permitted")
    assert found["ends"] == ["completed", "completed"], found["error"]
    assert not [problem for problem in found["problems"] if "page faults" in problem]
    if os.geteuid() == 0:  # the other user may not open /dev/userfaultfd
        assert "guest.touch()" in " ".join(found["notes"])
