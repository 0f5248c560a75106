"""A bare copy of memory through a socket: the lower bound for any migration on this machine.

Memory, network and order of steps are those of a migration, but there are no records, no dirty log and no engine. If
this takes longer per GiB for a larger guest, so does any migration.

`python -m bench.bare BYTES` prints "ready", waits for a line, and prints how many seconds it took.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from typing import Final

from bench.migrating import EXTRA
from bench.warming import GIB, MIB, warm
from corefw.memory.blocks import MemfdBlock

SENT: Final = 32 * MIB
RECEIVED: Final = 2 * MIB
"""Bytes in a call, about as many as in the engine's calls."""


def seconds_per_gib(size: int) -> float:
    """Copy `size` bytes of memory that is allocated on both sides. Raises CalledProcessError."""
    command = [sys.executable, "-m", "bench.bare", str(size)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdout.readline()
        warm(size + EXTRA)
        output, _ = process.communicate("go\n")
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return float(output) / (size / GIB)


def _copy(size: int) -> float:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as out:
        source, destination = MemfdBlock("source", size), MemfdBlock("destination", size)
        source.pages[:] = 1
        destination.pages[:] = 0
        into, _ = listener.accept()
        with into:
            if (child := os.fork()) == 0:
                listener.close()
                out.close()  # or this process would not see the other one end
                try:
                    _receive(into, destination.view)
                finally:
                    os._exit(0)
        print("ready", flush=True)
        sys.stdin.readline()
        began = time.monotonic()
        for at in range(0, size, SENT):
            out.sendall(source.view[at : at + SENT])
        if out.recv(1) != b".":
            raise ChildProcessError("the receiving process has failed")
        spent = time.monotonic() - began
    os.waitpid(child, 0)
    return spent


def _receive(sock: socket.socket, view: memoryview) -> None:
    at = 0
    while at < len(view):
        got = sock.recv_into(view[at : at + RECEIVED], 0, socket.MSG_WAITALL)
        if got == 0:
            return  # the other side has failed
        at += got
    sock.sendall(b".")


if __name__ == "__main__":
    print(_copy(int(sys.argv[1])))
