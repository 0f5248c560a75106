"""A program that hands its arrays to system calls in every tick."""

from __future__ import annotations

import os
import socket
import tempfile
import time
from collections.abc import Mapping
from typing import Any

from corefw_machine_python import guest
from numpy.typing import NDArray

PAGE = 4096
LENGTH = 8 * PAGE
FIRST = 5


class SystemCalls(guest.Program):
    """Reads a file and a socket into arrays, and writes arrays to them."""

    touch = guest.option("touch", True, help="touch arrays first")
    read = guest.array("read", shape=LENGTH, dtype="uint8")
    gathered = guest.array("gathered", shape=LENGTH, dtype="uint8")
    received = guest.array("received", shape=LENGTH, dtype="uint8")
    written = guest.array("written", shape=LENGTH, dtype="uint8")
    saved = guest.array("saved", shape=LENGTH // 8, dtype="float64")
    sent = guest.array("sent", shape=(2, LENGTH // 2), dtype="uint8")
    rounds = guest.field("u64")

    def _ready(self, array: NDArray[Any]) -> Any:
        return guest.touch(array) if self.options.touch else array

    def tick(self) -> None:
        with tempfile.TemporaryFile(buffering=0) as file:
            file.write(bytes([FIRST]) * LENGTH)
            file.seek(0)
            assert file.readinto(self._ready(self.read)) == LENGTH
            assert os.preadv(file.fileno(), [self._ready(self.gathered)], 0) == LENGTH
            assert file.write(self._ready(self.written)) == LENGTH
            file.seek(0)
            self._ready(self.saved).tofile(file)
        here, there = socket.socketpair()
        with here, there:
            here.sendall(self._ready(self.sent))
            into = memoryview(self._ready(self.received))
            while into:
                into = into[there.recv_into(into) :]
        self.rounds += 1
        time.sleep(0.001)

    def verify(self) -> Mapping[str, object]:
        if self.rounds:
            assert (self.read == FIRST).all() and (self.gathered == FIRST).all()
            assert (self.received == self.sent.ravel()).all()
        return {"rounds": self.rounds}
