"""A process that waits for the pages of its memory, and the engine's view of it."""

from __future__ import annotations

import mmap
import multiprocessing
import os
import select
import socket
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np

from corefw.memory.blocks import MemfdBlock
from corefw.memory.faults import FaultQueue, open_faults
from corefw.memory.runs import runs_of_pages

PAGE = 4096
PATIENCE = 20.0

fork = multiprocessing.get_context("fork")


def run_guest(ram: int, link: socket.socket, touch: Callable[[np.ndarray[Any, Any]], Any]) -> None:
    """Be the guest's process: pass the userfaultfd to the engine, wait for its message, then use the memory."""
    memory = mmap.mmap(ram, os.fstat(ram).st_size)
    pages = np.frombuffer(memory, dtype=np.uint8).reshape(-1, PAGE)
    fd = open_faults().fd
    socket.send_fds(link, [str(pages.ctypes.data).encode()], [fd])
    link.recv(1)
    link.send(repr(touch(pages)).encode())
    os._exit(0)


class Guest:
    """A process with one block, and the engine's view of both."""

    def __init__(self, pages: int, touch: Callable[[np.ndarray[Any, Any]], Any]) -> None:
        self.block = MemfdBlock("ram", pages * PAGE)
        self.link, theirs = socket.socketpair()
        self.link.settimeout(PATIENCE)
        self.process: BaseProcess = fork.Process(target=run_guest, args=(self.block.fd, theirs, touch), daemon=True)
        self.process.start()
        theirs.close()
        address, (fd,), _, _ = socket.recv_fds(self.link, 64, 1)
        self.faults = FaultQueue(fd, [self.block], [int(address)], self.process.pid or 0)

    def run(self) -> None:
        self.link.send(b".")

    def next_faults(self) -> list[int]:
        ready, _, _ = select.select([self.faults], [], [], PATIENCE)
        assert ready, "the guest does not wait for a page"
        waiting = self.faults.poll()["ram"]
        assert (waiting[:, 1] == self.process.pid).all(), "the process has one thread"
        return [int(page) for page in waiting[:, 0]]

    def install(self, *pages: int) -> None:
        self.faults.install(self.block, runs_of_pages(np.array(pages)))

    def result(self) -> str:
        return self.link.recv(1000).decode()

    def close(self) -> None:
        self.process.kill()
        self.process.join()
        self.faults.close()
        self.link.close()
        self.block.close()
