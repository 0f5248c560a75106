"""Programs with disks."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping

import numpy as np
from corefw_machine_python import guest

SECTOR = 512


class Writer(guest.Program):
    """Writes its step number to sectors in an order that looks random, one or more at a time."""

    image = guest.option("image", "disk.raw")
    sectors = guest.option("sectors", 4096)
    disk = guest.disk("disk0", path=lambda options: options.image, size=lambda options: options.sectors * SECTOR)
    rng = guest.rng(1)
    step = guest.field("u64")

    def tick(self) -> None:
        for _ in range(20):
            self.step += 1
            count = int(self.rng.integers(1, 9))
            first = int(self.rng.integers(0, self.options.sectors - count + 1))
            self.disk.pwrite(np.full(count * SECTOR // 8, self.step, dtype="<u8"), first * SECTOR)

    def verify(self) -> Mapping[str, object]:
        steps = np.frombuffer(self.disk.pread(self.disk.length, 0), dtype="<u8").reshape(-1, SECTOR // 8)
        if (steps != steps[:, :1]).any():
            raise AssertionError("a sector is torn")
        if int(steps.max()) != self.step:
            raise AssertionError(f"the disk ends with step {steps.max()}, the program with {self.step}")
        return {"step": self.step}


class Bulk(guest.Program):
    """Writes its whole disk in one go, with a number that changes."""

    image = guest.option("image", "disk.raw")
    disk = guest.disk("disk0", path=lambda options: options.image, size=64 << 20)
    step = guest.field("u64")

    def tick(self) -> None:
        self.step += 1
        self.disk.pwrite(bytes([1 + self.step % 255]) * self.disk.length, 0)


class Counter(guest.Program):
    """Writes one sector per tick, in order, and then waits, so that a test knows what is dirty."""

    image = guest.option("image", "disk.raw")
    upto = guest.option("upto", 100)
    disk = guest.disk("disk0", path=lambda options: options.image, size=1 << 20)
    second = guest.disk("disk1", path=lambda options: options.image + ".2", size=SECTOR)
    step = guest.field("u64")

    def tick(self) -> None:
        if self.step < self.options.upto:
            self.disk.pwrite(bytes([1 + self.step % 255]) * SECTOR, self.step * SECTOR)
            self.step += 1


class Grid(guest.Program):
    """Writes a whole array to its disk at every start, in postcopy before its pages have arrived."""

    image = guest.option("image", "disk.raw")
    grid = guest.array("grid", shape=1 << 20, dtype="u8")
    disk = guest.disk("disk0", path=lambda options: options.image, size=8 << 20)
    starts = guest.field("u32")
    ticks = guest.field("u64")

    def setup(self) -> None:
        self.grid[:] = np.arange(1, len(self.grid) + 1)

    def after_start(self) -> None:
        self.starts += 1
        self.disk.pwrite(self.grid, 0)

    def tick(self) -> None:
        self.ticks += 1

    def verify(self) -> Mapping[str, object]:
        if self.disk.pread(self.disk.length, 0) != self.grid.tobytes():
            raise AssertionError("the disk differs from the array")
        return {"starts": self.starts}


class Careless(guest.Program):
    """Uses its disk in the way that `what` names, and ends with the error."""

    what = guest.option("what", "")
    image = guest.option("image", "disk.raw")
    disk = guest.disk("disk0", path=lambda options: options.image, size=2048)

    def tick(self) -> None:
        getattr(self, self.options.what)()
        self.finish()

    def beyond_the_end(self) -> None:
        self.disk.pwrite(b"12", 2047)

    def before_the_beginning(self) -> None:
        self.disk.pread(1, -1)

    def replaces(self) -> None:
        self.disk = None

    def forks(self) -> None:
        child = os.fork()
        if child == 0:
            try:
                self.disk.pwrite(b"1", 0)
            except RuntimeError as error:
                os._exit(7 if "forked" in str(error) else 1)
            os._exit(0)
        raise ZeroDivisionError(f"the child ended with {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}")


class Background(guest.Program):
    """A thread writes, also while the program is stopped, and records the error."""

    image = guest.option("image", "disk.raw")
    disk = guest.disk("disk0", path=lambda options: options.image, size=SECTOR)
    ticks = guest.field("u64")
    refused = guest.field("str[200]")

    def after_start(self) -> None:
        if not hasattr(self, "thread"):
            self.thread = threading.Thread(target=self._write, daemon=True)
            self.thread.start()

    def _write(self) -> None:
        try:
            while True:
                self.disk.pwrite(b"x", 0)
        except RuntimeError as error:
            self.refused = str(error)

    def tick(self) -> None:
        self.ticks += 1


class Forks(guest.Program):
    """Forks a child that inherits everything and lives until the guest ends."""

    image = guest.option("image", "disk.raw")
    disk = guest.disk("disk0", path=lambda options: options.image, size=SECTOR)
    ticks = guest.field("u64")

    def after_start(self) -> None:
        reading, writing = os.pipe()
        if os.fork() == 0:
            os.close(writing)
            os.read(reading, 1)
            os._exit(0)

    def tick(self) -> None:
        self.disk.pwrite(b"x" * SECTOR, 0)
        self.ticks += 1


class Readers(guest.Program):
    """Threads read all the time, also while the program is stopped, and check the contents."""

    image = guest.option("image", "disk.raw")
    disk = guest.disk("disk0", path=lambda options: options.image, size=1 << 16)
    ticks = guest.field("u64")
    wrong = guest.field("str[200]")

    def setup(self) -> None:
        self.disk.pwrite(b"x" * self.disk.length, 0)

    def after_start(self) -> None:
        if not hasattr(self, "threads"):
            self.threads = [threading.Thread(target=self._read, daemon=True) for _ in range(4)]
            for thread in self.threads:
                thread.start()

    def _read(self) -> None:
        try:
            while True:
                assert self.disk.pread(4096, 4096) == b"x" * 4096
        except BaseException as error:
            self.wrong = repr(error)
            raise

    def tick(self) -> None:
        self.disk.pwrite(b"x", self.ticks % self.disk.length)
        self.ticks += 1


class Twice(guest.Program):
    """Two disks with the same name."""

    one = guest.disk("disk0", "one.raw")
    two = guest.disk("disk0", "two.raw")

    def tick(self) -> None:
        pass


class Odd(guest.Program):
    """A disk whose size is no multiple of a sector."""

    disk = guest.disk("disk0", "odd.raw", size=1000)

    def tick(self) -> None:
        pass
