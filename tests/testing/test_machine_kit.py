"""The contract kit for machines catches every way to break the contract, and lets a good machine pass.

Each broken machine is the good one with one thing changed; the kit has to name that thing, in the check made for it.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from corefw.block import BlockNode, ByteRuns
from corefw.errors import MachineError
from corefw.machine import (
    BlockMachine,
    Device,
    DirtyLog,
    FaultSource,
    Machine,
    PostcopyMachine,
    RamBlock,
    RunState,
    ThrottlableMachine,
    VerifiableMachine,
)
from corefw.memory.blocks import MemfdBlock
from corefw.memory.hashes import HashLog
from corefw.memory.runs import no_runs
from corefw.testing import kit
from corefw.testing.machine import CHECKS, MachineCase, UncheckedExecution, check_machine
from corefw.wire.vmstate import Kind, Scalar, VMState

PAGES = 16


class Count:
    total = 0


COUNT = VMState("count", fields=(Scalar("total", Kind.U64),))


class Unverified(Machine):
    """A thread that adds one to its pages, round and round, without verify()."""

    kind = "count"

    def __init__(self, incoming: bool) -> None:
        self._state = RunState.INMIGRATE if incoming else RunState.PRELAUNCH
        self.observers: list[Callable[[RunState, RunState], None]] = []
        self.count = Count()
        self.block = MemfdBlock("counters", PAGES * 4096)
        self.block.dirty_log = HashLog(self.block)
        self.wanted = threading.Event()
        self.thread: threading.Thread | None = None
        self.slowly = 0.0

    @property
    def name(self) -> str:
        return "count-1"

    @property
    def run_state(self) -> RunState:
        return self._state

    def ram_blocks(self) -> Sequence[MemfdBlock]:
        return (self.block,)

    def devices(self) -> Sequence[Device]:
        return (Device("count", 0, COUNT, self.count),)

    def start(self) -> None:
        if self.block.fd < 0:
            raise MachineError("closed")
        if self.thread is None:
            self.go()
            self.set_run_state(RunState.RUNNING)

    def go(self) -> None:
        self.wanted.set()
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self) -> None:
        counters = self.block.pages.view(np.uint64)
        while self.wanted.is_set():
            counters[self.count.total % (PAGES // 2), 0] += np.uint64(1)
            self.count.total += 1
            time.sleep(0.0005 + self.slowly)

    def stop(self, state: RunState) -> None:
        self.hold()
        self.set_run_state(state)

    def hold(self) -> None:
        if self.thread is not None:
            self.wanted.clear()
            self.thread.join()
            self.thread = None

    def set_run_state(self, state: RunState) -> None:
        old, self._state = self._state, state
        if old is not state:
            for observer in self.observers:
                observer(old, state)

    def watch(self, observer: Callable[[RunState, RunState], None]) -> None:
        self.observers.append(observer)

    def information(self) -> Mapping[str, object]:
        return {"ram": {"counters": self.block.length}}

    def close(self) -> None:
        if self.block.fd >= 0:
            self.stop(RunState.SHUTDOWN)
            self.block.close()


class Good(Unverified, VerifiableMachine, ThrottlableMachine):
    def verify(self) -> Mapping[str, object]:
        runs = self.thread is not None
        self.hold()
        try:
            counters = self.block.pages.view(np.uint64)[: PAGES // 2, 0]
            rounds, rest = divmod(self.count.total, PAGES // 2)
            wrong = np.flatnonzero(counters != rounds + (np.arange(PAGES // 2) < rest))
            if len(wrong):
                raise MachineError(f"counters {wrong.tolist()} are wrong")
        finally:
            if runs:
                self.go()
        return {"total": self.count.total}

    def throttle(self, percent: int) -> None:
        self.slowly = percent / 10000


def case(kind: Callable[[bool], Machine]) -> MachineCase:
    return MachineCase(kind, seconds=0.02)


def test_a_good_machine_passes_every_check() -> None:
    assert check_machine(case(Good)) == list(CHECKS)


def test_a_check_that_is_none() -> None:
    with pytest.raises(AssertionError, match=r"no check is called nonsense: expected some of .*a-block-is-one-memory"):
        check_machine(case(Good), only=["nonsense"])


# -- one thing wrong in each -------------------------------------------------------------------------------------------


class _BrokenLog(HashLog):
    """Leaves out the last page that it should report."""

    def harvest(self) -> NDArray[np.int64]:
        runs = super().harvest()
        return runs[:-1] if len(runs) else runs


class _Unsorted(HashLog):
    def harvest(self) -> NDArray[np.int64]:
        return np.array([[4, 5], [1, 2]]) if len(super().harvest()) else no_runs()


class _Forever(HashLog):
    """Reports a page whether it was written or not."""

    def harvest(self) -> NDArray[np.int64]:
        super().harvest()
        return np.array([[0, len(self._block.pages)]])


class _Block(MemfdBlock):
    """Writes where it should not."""

    def fill(self, pages: NDArray[np.int64], value: int) -> None:
        self.pages[pages] = value


class _HalfStore(MemfdBlock):
    def store(self, pages: NDArray[np.int64], data: NDArray[np.uint8]) -> None:
        super().store(pages[:-1], data[:-1])


class _NoHoles(MemfdBlock):
    def holes(self) -> NDArray[np.int64]:
        return np.array([[0, self.page_count]])


def with_log(log: Callable[[MemfdBlock], DirtyLog]) -> type[Good]:
    class WithLog(Good):
        def __init__(self, incoming: bool) -> None:
            super().__init__(incoming)
            self.block.dirty_log = log(self.block)

    return WithLog


def with_block(block: type[MemfdBlock]) -> type[Good]:
    class WithBlock(Good):
        def __init__(self, incoming: bool) -> None:
            super().__init__(incoming)
            self.block.close()
            self.block = block("counters", PAGES * 4096)
            self.block.dirty_log = HashLog(self.block)

    return WithBlock


class StartsRunning(Good):
    def __init__(self, incoming: bool) -> None:
        super().__init__(incoming)
        self._state = RunState.PAUSED


class NoSizes(Good):
    def information(self) -> Mapping[str, object]:
        return {"ram": 12}


class TwoNames(Good):
    made = 0

    @property
    def name(self) -> str:
        TwoNames.made += 1
        return f"count-{TwoNames.made}"


class ForgetsState(Good):
    def stop(self, state: RunState) -> None:
        if self.thread is not None:
            super().stop(state)


class RunsOn(Good):
    """stop() does not wait for the guest."""

    def stop(self, state: RunState) -> None:
        self.wanted.clear()
        self.thread = None
        self.set_run_state(state)

    def run(self) -> None:
        counters, until = self.block.pages.view(np.uint64), time.monotonic() + 0.5
        while self.wanted.is_set() or time.monotonic() < until:
            counters[0, 0] += np.uint64(1)
            time.sleep(0.002)


class DeviceMoves(Good):
    def devices(self) -> Sequence[Device]:
        self.count.total += 1
        return super().devices()


class TellsTooOften(Good):
    def set_run_state(self, state: RunState) -> None:
        old, self._state = self._state, state
        for observer in self.observers:
            observer(old, state)


class TellsTooEarly(Good):
    def set_run_state(self, state: RunState) -> None:
        for observer in self.observers:
            if state is not self._state:
                observer(self._state, state)
        self._state = state


class LosesDevices(Good):
    """Does not keep what was loaded."""

    def devices(self) -> Sequence[Device]:
        count = Count()
        count.total = self.count.total
        return (Device("count", 0, COUNT, count),)


class PausesToVerify(Good):
    def verify(self) -> Mapping[str, object]:
        if self.thread is not None:
            self.stop(RunState.PAUSED)
        return {}


class StaysThrottled(Good):
    def throttle(self, percent: int) -> None:
        if percent == 0:
            raise MachineError("too late")


class StaysSilent(Good):
    """start() of a machine that is closed does nothing."""

    def start(self) -> None:
        if self.block.fd >= 0:
            super().start()


def with_large_pages(incoming: bool) -> Good:
    made = Good(incoming)
    made.block.close()
    made.block = MemfdBlock("counters", PAGES * 4096, page_size=8192)
    return made


class Faults(FaultSource):
    """Reports nothing."""

    def __init__(self) -> None:
        self.reading, self.writing = os.pipe()

    def fileno(self) -> int:
        return self.reading

    def poll(self) -> Mapping[str, NDArray[np.int64]]:
        return {}

    def install(self, block: RamBlock, runs: NDArray[np.int64]) -> None:
        pass

    def release(self) -> None:
        self.close()

    def close(self) -> None:
        if self.reading >= 0:
            os.close(self.reading)
            os.close(self.writing)
            self.reading = -1


class NeverWaits(Good, PostcopyMachine):
    def postcopy_unsupported(self) -> str | None:
        return None

    def watch_faults(self) -> FaultSource:
        return Faults()


class ClosesOnce(Good):
    def close(self) -> None:
        if self.block.fd < 0:
            raise MachineError("closed already")
        super().close()


class Leaks(Good):
    def close(self) -> None:
        if self.block.fd >= 0:
            self.kept = os.dup(self.block.fd)
            self.leaked.append(self.kept)
        super().close()

    leaked: list[int] = []  # noqa: RUF012 - the test closes them


class _Node(BlockNode):
    """A disk of 64 KiB in a temporary file."""

    def __init__(self, name: str) -> None:
        self.file = tempfile.NamedTemporaryFile()  # noqa: SIM115 - closed by the machine
        self.file.write(bytes(1 << 16))
        self.file.flush()
        super().__init__(name, 1 << 16, device=name, filename=self.file.name)
        self.written: list[tuple[int, int]] = []

    def write(self, number: int) -> None:
        at = number * 4096 % (1 << 16)
        os.pwrite(self.file.fileno(), number.to_bytes(8, "little"), at)
        self.written.append((at, at + 8))

    def collect(self) -> ByteRuns:
        written = self.written[:]
        del self.written[: len(written)]
        return np.array(written, dtype=np.int64).reshape(-1, 2)


class _Forgetful(_Node):
    """Records only the writes to the first half."""

    def collect(self) -> ByteRuns:
        return np.array([run for run in super().collect().tolist() if run[1] < 1 << 15], dtype=np.int64).reshape(-1, 2)


def with_disks(*names: str, kind: Callable[[str], _Node] = _Node) -> Callable[[bool], Machine]:
    class WithDisks(Good, BlockMachine):
        """Writes its count to its disks, too."""

        def __init__(self, incoming: bool) -> None:
            super().__init__(incoming)
            self.disks = [kind(name) for name in names]

        def block_nodes(self) -> Sequence[BlockNode]:
            return self.disks

        def run(self) -> None:
            counters = self.block.pages.view(np.uint64)
            while self.wanted.is_set():
                counters[self.count.total % (PAGES // 2), 0] += np.uint64(1)
                self.count.total += 1
                for disk in self.disks:
                    disk.write(self.count.total)

        def close(self) -> None:
            super().close()
            for disk in self.disks:
                disk.file.close()

    return WithDisks


class WritesOn(Good, BlockMachine):
    """Writes to the disk also while the guest is stopped."""

    def __init__(self, incoming: bool) -> None:
        super().__init__(incoming)
        self.disk = _Node("disk")
        self.writes = True
        self.writer = threading.Thread(target=self.write)
        self.writer.start()

    def block_nodes(self) -> Sequence[BlockNode]:
        return [self.disk]

    def write(self) -> None:
        number = 0
        while self.writes:
            number += 1
            self.disk.write(number)
            time.sleep(0.001)

    def close(self) -> None:
        self.writes = False
        self.writer.join()
        super().close()
        self.disk.file.close()


def test_a_good_machine_with_disks() -> None:
    check_machine(case(with_disks("one", "two")), only=["disks-have-names", "dirty-bitmaps-find-every-write"])


@pytest.mark.parametrize(
    ("kind", "check", "message"),
    [
        (StartsRunning, "a-new-machine-says-what-it-is", "is paused, not prelaunch"),
        (NoSizes, "a-new-machine-says-what-it-is", r"information\(\)\['ram'\] is 12"),
        (TwoNames, "two-machines-fit-each-other", "the source is 'count-"),
        (with_block(_Block), "pages-are-stored-and-filled", "zeroes touched pages of 'counters' that were holes"),
        (with_block(_HalfStore), "pages-are-stored-and-filled", r"store\(\) did not store what it got"),
        (with_block(_NoHoles), "holes-read-as-zero", "pages 0 to 16 of 'counters' are no hole"),
        (with_log(_BrokenLog), "the-dirty-log-finds-every-write", "the dirty log of 'counters' lost writes to"),
        (with_log(_Unsorted), "the-dirty-log-finds-every-write", "has runs that are not ascending and apart"),
        (with_log(_Forever), "the-dirty-log-finds-every-write", "names pages again that were not written"),
        (ForgetsState, "start-and-stop-can-be-repeated", r"after stop\(FINISH_MIGRATE\) of a stopped guest is paused"),
        (RunsOn, "nothing-changes-while-stopped", "block 'counters' changed while the guest was stopped"),
        (DeviceMoves, "nothing-changes-while-stopped", "a device's state changed while the guest was stopped"),
        (
            TellsTooOften,
            "observers-hear-every-change-once",
            "observers heard prelaunch -> running, .*finish-migrate ->",
        ),
        (TellsTooEarly, "observers-hear-every-change-once", "an observer was called before run_state had changed"),
        (LosesDevices, "state-moves-to-another-machine", "does not save what was loaded"),
        (PausesToVerify, "verify-leaves-the-guest-as-it-was", r"after verify\(\) of a guest that runs is paused"),
        (StaysThrottled, "throttle-can-be-ended", "MachineError: too late"),
        (NeverWaits, "page-faults-are-served", "the guest saw pages that were not installed"),
        (with_large_pages, "a-block-is-one-memory", "pages of 'counters' have 8192 bytes, not 4096"),
        (with_disks("one", "one"), "disks-have-names", r"find_node\('one'\) finds another"),
        (with_disks("disk", kind=_Forgetful), "dirty-bitmaps-find-every-write", "has no writes to the granules "),
        (WritesOn, "dirty-bitmaps-find-every-write", "disk 'disk' was written while the guest was stopped"),
        (StaysSilent, "close-can-be-repeated", r"start\(\) after close\(\) raised nothing; the machine is"),
        (ClosesOnce, "close-can-be-repeated", "MachineError: closed already"),
    ],
)
def test_a_broken_machine_is_caught(kind: Callable[[bool], Machine], check: str, message: str) -> None:
    with pytest.raises(AssertionError, match=f"{check}: .*{message}"):
        check_machine(case(kind), only=[check])


class Believing(Good):
    """verify() accepts anything."""

    def verify(self) -> Mapping[str, object]:
        return {"total": self.count.total}


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (Unverified, r"machine 'count' has no verify\(\), so no test shows .*: make it a VerifiableMachine"),
        (Believing, r"verify\(\) of machine 'count' does not notice that page \d of 'counters' is older than the rest"),
    ],
)
def test_execution_that_cannot_be_checked_is_said_loudly(kind: Callable[[bool], Machine], says: str) -> None:
    with pytest.warns(UncheckedExecution, match=says):
        assert check_machine(case(kind)) == list(CHECKS)


def test_what_is_left_behind_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kit, "LETTING_GO", 0.3)
    try:
        with pytest.raises(AssertionError, match=r"close-can-be-repeated: left behind: descriptor .* /memfd:counters"):
            check_machine(case(Leaks), only=["close-can-be-repeated"])
    finally:
        for fd in Leaks.leaked:
            os.close(fd)
