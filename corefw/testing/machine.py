"""The contract kit for machines: run it on yours, and what corefw.machine promises holds.

    from corefw.testing.machine import CHECKS, MachineCase, check_machine

    CASE = MachineCase(lambda incoming: MyMachine(MachineConfig(incoming=incoming)))

    @pytest.mark.parametrize("check", CHECKS)
    def test_contract(check):
        check_machine(CASE, only=[check])

The law: every check states one promise of the interface, finds out by using machines for real, and fails with an
AssertionError that says in one line what was promised and what happened. After each of them every machine is closed and
nothing may be left behind: no descriptor, process or thread. It needs no test framework.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from corefw.errors import MigfwError
from corefw.machine import Machine, RamBlock, RunState, SupportsThrottle, SupportsVerify
from corefw.testing.tasks import Possessions, Task
from corefw.wire.constants import TARGET_PAGE_SIZE
from corefw.wire.stream import MemorySink, MemorySource, StreamReader, StreamWriter

__all__ = ["CHECKS", "MachineCase", "check_machine"]

CHECK_DEADLINE: Final = 90.0
"""Seconds for one whole check."""

SETTLE: Final = 10.0
"""Seconds that may pass until what a closed machine had is gone."""

ROUNDS: Final = 5
"""Harvests of a dirty log while the guest runs."""


@dataclass(frozen=True, slots=True)
class MachineCase:
    """What to check.

    make      a new machine, as `factory(config)` makes one; the argument is whether it is incoming. Two of them have
              to fit each other: same name, same RAM blocks. Keep the RAM small
    seconds   that the guest runs for at a time, enough to write to its RAM
    """

    make: Callable[[bool], Machine]
    seconds: float = 0.1


class Bench:
    """The machines of one check."""

    def __init__(self, case: MachineCase) -> None:
        self._case = case
        self._made: list[Machine] = []

    def machine(self, *, incoming: bool = False) -> Machine:
        machine = self._case.make(incoming)
        self._made.append(machine)
        return machine

    def running(self) -> Machine:
        """A machine whose guest has run for a while."""
        machine = self.machine()
        machine.start()
        self.wait()
        return machine

    def wait(self) -> None:
        time.sleep(self._case.seconds)

    def close(self) -> None:
        for machine in self._made:
            machine.close()


Check = Callable[[Bench], None]
CHECKS: Final[dict[str, Check]] = {}
"""Every check by name, in the order in which they run."""


def _check(function: Check) -> Check:
    CHECKS[function.__name__.removeprefix("_").replace("_", "-")] = function
    return function


def check_machine(case: MachineCase, *, only: Collection[str] | None = None) -> list[str]:
    """Run every check (or `only` these) on machines of this case; the names of those that were run.

    Raises AssertionError on the first promise that is broken.
    """
    unknown = set(only or ()) - CHECKS.keys()
    assert not unknown, f"no check is called {', '.join(sorted(unknown))}: expected some of {', '.join(CHECKS)}"
    _run(case, "a first machine", _a_first_machine, None)
    done = [name for name in CHECKS if only is None or name in only]
    for name in done:
        _run(case, name, CHECKS[name], Possessions.now())
    return done


def _a_first_machine(bench: Bench) -> None:
    """Before anything is counted: what libraries make once for a whole process is not left behind."""
    bench.machine()


def _run(case: MachineCase, name: str, check: Check, before: Possessions | None) -> None:
    bench = Bench(case)
    try:
        Task("the check", check, bench).result(CHECK_DEADLINE)
        bench.close()
        if before is not None:
            before.assert_no_more(SETTLE)
    except AssertionError as error:
        raise AssertionError(f"{name}: {error}") from error
    except Exception as error:
        raise AssertionError(f"{name}: {type(error).__name__}: {error}") from error
    finally:
        with contextlib.suppress(Exception):  # what close() raises was raised above, unless the check failed before
            bench.close()


# -- what it is --------------------------------------------------------------------------------------------------------


@_check
def _a_new_machine_says_what_it_is(bench: Bench) -> None:
    """Kind, name, the run state it begins in, and `information()` as JSON with the RAM by block."""
    for incoming, expected in ((False, RunState.PRELAUNCH), (True, RunState.INMIGRATE)):
        machine = bench.machine(incoming=incoming)
        assert machine.run_state is expected, (
            f"a machine with incoming={incoming} is {machine.run_state}, not {expected}"
        )
        assert machine.kind, "its kind is empty"
        assert 0 < len(machine.name.encode()) < 256, f"its name '{machine.name}' has not 1 to 255 bytes"
        information = json.loads(json.dumps(dict(machine.information())))
        sizes = {block.idstr: block.length for block in machine.ram_blocks()}
        assert information.get("ram") == sizes, f"information()['ram'] is {information.get('ram')}, not {sizes}"


@_check
def _two_machines_fit_each_other(bench: Bench) -> None:
    """The same program makes the same name, blocks and devices on both sides."""
    here, there = bench.machine(), bench.machine(incoming=True)
    assert here.name == there.name, f"the source is '{here.name}', the destination '{there.name}'"
    for what, describe in (("RAM blocks", _block_sizes), ("devices", _device_names)):
        left, right = describe(here), describe(there)
        assert left == right, f"the source has the {what} {left}, the destination {right}"
        assert len(dict(left)) == len(left), f"two {what} have one name: {left}"


def _block_sizes(machine: Machine) -> list[tuple[object, int]]:
    return [(block.idstr, block.length) for block in machine.ram_blocks()]


def _device_names(machine: Machine) -> list[tuple[object, int]]:
    return [((device.name, device.instance_id), device.vmstate.version_id) for device in machine.devices()]


# -- RAM ---------------------------------------------------------------------------------------------------------------


@_check
def _a_block_is_one_memory(bench: Bench) -> None:
    """`view`, `pages` and `fd` are the same bytes, as long as the block, in pages as the stream has them."""
    for block in bench.machine(incoming=True).ram_blocks():
        size = block.page_size
        assert 0 < len(block.idstr.encode()) < 256, f"the block's name '{block.idstr}' has not 1 to 255 bytes"
        assert size == TARGET_PAGE_SIZE, f"pages of '{block.idstr}' have {size} bytes, not {TARGET_PAGE_SIZE}"
        assert block.length % size == 0, f"block '{block.idstr}' of {block.length} bytes has broken pages of {size}"
        assert len(block.view) == block.length, f"the view of '{block.idstr}' has {len(block.view)} bytes"
        assert block.pages.shape == (block.length // size, size), f"pages of '{block.idstr}': {block.pages.shape}"
        block.view[block.length - 3 :] = b"end"
        assert block.pages[-1, -3:].tobytes() == b"end", f"what view got of '{block.idstr}' is not in pages"
        assert os.pread(block.fd, 3, block.length - 3) == b"end", f"what view got of '{block.idstr}' is not behind fd"


@_check
def _pages_are_stored_and_filled(bench: Bench) -> None:
    """store() takes rows that lie apart; fill() with zero leaves alone what nobody touched, and clears the rest."""
    for block in bench.machine(incoming=True).ram_blocks():
        count, size = len(block.pages), block.page_size
        numbers = np.array(sorted({0, count // 3, count // 2, count - 1}), dtype=np.int64)
        before = _hole_pages(block)
        block.fill(np.arange(count), 0)
        assert _hole_pages(block) == before, f"zeroes touched pages of '{block.idstr}' that were holes"
        buffer = np.random.default_rng(1).integers(1, 256, (len(numbers), size + 8), dtype=np.uint8)
        block.store(numbers, buffer[:, 8:])
        assert np.array_equal(block.pages[numbers], buffer[:, 8:]), (
            f"store() did not store what it got in '{block.idstr}'"
        )
        assert not _hole_pages(block) & set(numbers.tolist()), f"pages of '{block.idstr}' are holes after store()"
        block.fill(numbers[:1], 0xA5)
        block.fill(numbers[1:], 0)
        assert (block.pages[numbers[0]] == 0xA5).all(), f"fill() with 0xa5 did not fill in '{block.idstr}'"
        assert not block.pages[numbers[1:]].any(), f"fill() with zero left something in '{block.idstr}'"


def _hole_pages(block: RamBlock) -> set[int]:
    return {page for first, end in block.holes().tolist() for page in range(first, end)}


@_check
def _holes_read_as_zero(bench: Bench) -> None:
    """holes() are runs, ascending and apart, of pages that hold nothing."""
    machine = bench.running()
    machine.stop(RunState.PAUSED)
    for block in machine.ram_blocks():
        holes = block.holes()
        _assert_runs(holes, len(block.pages), f"holes() of '{block.idstr}'")
        for first, end in holes.tolist():
            assert not block.pages[first:end].any(), f"pages {first} to {end} of '{block.idstr}' are no hole"


def _assert_runs(runs: NDArray[np.int64], count: int, what: str) -> None:
    assert runs.ndim == 2 and runs.shape[1] == 2, f"{what} has the shape {runs.shape}, not (n, 2)"
    assert (runs[:, 0] < runs[:, 1]).all(), f"{what} has an empty run"
    assert (runs[1:, 0] > runs[:-1, 1]).all(), f"{what} has runs that are not ascending and apart"
    assert len(runs) == 0 or (runs[0, 0] >= 0 and runs[-1, 1] <= count), f"{what} has pages outside the block"


@_check
def _the_dirty_log_finds_every_write(bench: Bench) -> None:
    """Who copies a block once, and then what each harvest names, has the block when the guest has stopped."""
    machine = bench.running()
    blocks = machine.ram_blocks()
    _follow(bench, machine, blocks)


@_check
def _a_dirty_log_can_start_again(bench: Bench) -> None:
    """stop() twice is fine, and start() begins anew: also on a guest that was stopped in between."""
    machine = bench.running()
    blocks = machine.ram_blocks()
    for block in blocks:
        block.dirty_log.start()
        block.dirty_log.stop()
        block.dirty_log.stop()
    machine.stop(RunState.PAUSED)
    machine.start()
    _follow(bench, machine, blocks)


def _follow(bench: Bench, machine: Machine, blocks: Sequence[RamBlock]) -> None:
    """Keep a copy of the RAM by the dirty log, stop the guest, compare."""
    copies = []
    for block in blocks:
        block.dirty_log.start()
        copies.append(block.pages.copy())
    for _ in range(ROUNDS):
        bench.wait()
        _copy_dirty(blocks, copies)
    machine.stop(RunState.FINISH_MIGRATE)
    _copy_dirty(blocks, copies)
    for block, copy in zip(blocks, copies, strict=True):
        lost = np.flatnonzero((copy != block.pages).any(axis=1))
        assert len(lost) == 0, (
            f"the dirty log of '{block.idstr}' lost writes to {len(lost)} pages, the first is {lost[0]}"
        )
        again = block.dirty_log.harvest()
        assert len(again) == 0, (
            f"the dirty log of '{block.idstr}' names pages again that nobody wrote: {again.tolist()[:3]}"
        )
        block.dirty_log.stop()


def _copy_dirty(blocks: Sequence[RamBlock], copies: Sequence[NDArray[np.uint8]]) -> None:
    for block, copy in zip(blocks, copies, strict=True):
        runs = block.dirty_log.harvest()
        _assert_runs(runs, len(block.pages), f"a harvest of '{block.idstr}'")
        for first, end in runs.tolist():
            copy[first:end] = block.pages[first:end]


# -- start and stop ----------------------------------------------------------------------------------------------------


@_check
def _start_and_stop_can_be_repeated(bench: Bench) -> None:
    """A second start() or stop() is fine; stop() enters the state that it is given; a stopped guest starts again."""
    machine = bench.machine()
    for _ in range(2):
        machine.start()
        machine.start()
        _assert_state(machine, RunState.RUNNING, "start()")
        bench.wait()
        machine.stop(RunState.PAUSED)
        _assert_state(machine, RunState.PAUSED, "stop(PAUSED)")
        machine.stop(RunState.FINISH_MIGRATE)
        _assert_state(machine, RunState.FINISH_MIGRATE, "stop(FINISH_MIGRATE) of a stopped guest")
    machine.set_run_state(RunState.POSTMIGRATE)
    _assert_state(machine, RunState.POSTMIGRATE, "set_run_state(POSTMIGRATE)")
    machine.start()
    _assert_state(machine, RunState.RUNNING, "start() after a migration")


def _assert_state(machine: Machine, expected: RunState, after: str) -> None:
    assert machine.run_state is expected, f"the run state after {after} is {machine.run_state}, not {expected}"


@_check
def _nothing_changes_while_stopped(bench: Bench) -> None:
    """When stop() has returned, neither RAM nor devices change."""
    machine = bench.running()
    machine.stop(RunState.PAUSED)
    ram, devices = [block.pages.copy() for block in machine.ram_blocks()], _saved(machine)
    bench.wait()
    bench.wait()
    for block, copy in zip(machine.ram_blocks(), ram, strict=True):
        assert np.array_equal(block.pages, copy), f"block '{block.idstr}' changed while the guest was stopped"
    assert _saved(machine) == devices, "a device's state changed while the guest was stopped"


@_check
def _observers_hear_every_change_once(bench: Bench) -> None:
    """watch() calls back with (old, new) after each change of run state, when it is in force, and not without one."""
    machine = bench.machine()
    heard: list[tuple[RunState, RunState]] = []
    in_force: list[bool] = []

    def observer(old: RunState, new: RunState) -> None:
        heard.append((old, new))
        in_force.append(machine.run_state is new)

    machine.watch(observer)
    machine.start()
    machine.start()
    machine.stop(RunState.FINISH_MIGRATE)
    machine.stop(RunState.FINISH_MIGRATE)
    machine.set_run_state(RunState.POSTMIGRATE)
    states = [RunState.PRELAUNCH, RunState.RUNNING, RunState.FINISH_MIGRATE, RunState.POSTMIGRATE]
    expected = list(itertools.pairwise(states))
    assert heard == expected, f"observers heard {_told(heard)}, expected {_told(expected)}"
    assert all(in_force), "an observer was called before run_state had changed"


def _told(changes: Sequence[tuple[RunState, RunState]]) -> str:
    return ", ".join(f"{old} -> {new}" for old, new in changes) or "nothing"


# -- the move ----------------------------------------------------------------------------------------------------------


@_check
def _state_moves_to_another_machine(bench: Bench) -> None:
    """RAM and devices of a stopped guest, put into an incoming machine, start there; the same bytes come out again."""
    source, destination = bench.running(), bench.machine(incoming=True)
    source.stop(RunState.FINISH_MIGRATE)
    blocks = {block.idstr: block for block in destination.ram_blocks()}
    for block in source.ram_blocks():
        data = block.pages.copy()
        blocks[block.idstr].store(np.arange(len(data)), data)
    saved = _saved(source)
    _load(destination, saved)
    assert _saved(destination) == saved, "a device that was loaded does not save what was loaded"
    destination.start()
    bench.wait()
    _assert_state(destination, RunState.RUNNING, "start() on the destination")
    destination.stop(RunState.PAUSED)
    if isinstance(destination, SupportsVerify):
        destination.verify()
    source.set_run_state(RunState.POSTMIGRATE)
    source.start()
    _assert_state(source, RunState.RUNNING, "start() on the source, whose migration was called off")


def _saved(machine: Machine) -> dict[tuple[str, int], bytes]:
    """What each device writes into its section."""
    saved = {}
    for device in machine.devices():
        assert device.vmstate.unmigratable is None, f"device '{device.name}': {device.vmstate.unmigratable}"
        sink = MemorySink()
        writer = StreamWriter(sink)
        device.vmstate.save(writer, device.state)
        writer.flush()
        saved[device.name, device.instance_id] = bytes(sink.data)
    return saved


def _load(machine: Machine, saved: dict[tuple[str, int], bytes]) -> None:
    for device in machine.devices():
        # In a stream something always follows a section, and the reader looks at it.
        reader = StreamReader(
            MemorySource(saved[device.name, device.instance_id] + b"\0"), where=f"device '{device.name}'"
        )
        device.vmstate.load(reader, device.state, device.vmstate.version_id)


# -- what only some can ------------------------------------------------------------------------------------------------


@_check
def _verify_leaves_the_guest_as_it_was(bench: Bench) -> None:
    """verify(), where there is one, works on a guest that runs and on one that is stopped, and changes neither."""
    machine = bench.running()
    if not isinstance(machine, SupportsVerify):
        return
    json.dumps(dict(machine.verify()))
    _assert_state(machine, RunState.RUNNING, "verify() of a guest that runs")
    machine.stop(RunState.PAUSED)
    before = _saved(machine)
    machine.verify()
    _assert_state(machine, RunState.PAUSED, "verify() of a stopped guest")
    assert _saved(machine) == before, "verify() changed a device's state"


@_check
def _throttle_can_be_ended(bench: Bench) -> None:
    """throttle(), where there is one: a guest that is slowed down still stops, and 0 lets it go."""
    machine = bench.running()
    if not isinstance(machine, SupportsThrottle):
        return
    machine.throttle(99)
    bench.wait()
    machine.stop(RunState.PAUSED)
    machine.throttle(0)
    machine.start()
    _assert_state(machine, RunState.RUNNING, "start() after throttle(0)")


# -- the end -----------------------------------------------------------------------------------------------------------


@_check
def _close_can_be_repeated(bench: Bench) -> None:
    """close() in any state, and again; afterwards start() raises an error of migfw's and does not hang."""
    for machine in (bench.machine(), bench.machine(incoming=True), bench.running()):
        machine.close()
        machine.close()
        try:
            machine.start()
        except MigfwError:
            continue
        raise AssertionError(f"start() after close() raised nothing; the machine is {machine.run_state}")
