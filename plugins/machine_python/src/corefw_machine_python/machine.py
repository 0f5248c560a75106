"""PythonMachine: a program in a process of its own, with its arrays in memfds that the engine maps too.

Invariant: while the guest runs, its process holds the current fields; while it is stopped, the state object behind
devices() does. start() passes them to the process, stop() takes them back. If a request to the guest fails or times
out, the guest stays in its previous state.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

from corefw.block import bitmaps_of
from corefw.errors import MachineError, UsageError
from corefw.machine import (
    DEAD,
    BlockMachine,
    Device,
    FaultSource,
    MachineConfig,
    PostcopyMachine,
    RamBlock,
    RunState,
    ThrottlableMachine,
    VerifiableMachine,
)
from corefw.memory.blocks import MemfdBlock
from corefw.memory.faults import FaultQueue
from corefw.memory.logs import LogKind, best_dirty_log
from corefw.memory.pagemap import PagemapLog, Tracker
from corefw_machine_python import undeclared
from corefw_machine_python.disknode import DiskNode
from corefw_machine_python.layout import Layout, compare
from corefw_machine_python.loading import BUNDLED, EXPECTED
from corefw_machine_python.process import START_TIMEOUT, Ending, GuestProcess, GuestTimeout
from corefw_machine_python.protocol import Message, StopCost
from corefw_machine_python.table import SET_UP, get_values, make_devices, set_values, show_values, value_sizes

log = logging.getLogger(__name__)

PAGE_SIZE: Final = 4096
VERIFY_TIMEOUT: Final = 600.0
ORDER_TIMEOUT: Final = 60.0
LOOK_TIMEOUT: Final = 1.0
"""Seconds to wait for the answer of a running guest, which may be in the middle of a tick."""
BRIEF_LOOK: Final = 0.1
"""The same while it may wait for pages in postcopy."""

SYSTEM_CALLS: Final = (
    "in postcopy a system call on an array fails with EFAULT while its pages are missing: the program has to call"
    " guest.touch() first, or give the engine's user access to /dev/userfaultfd"
)

Observer = Callable[[RunState, RunState], None]


class PythonMachine(PostcopyMachine, BlockMachine, VerifiableMachine, ThrottlableMachine):
    """A machine that runs a Python program; see corefw.machine.Machine for the contract of each method.

    `config.program` is the name of a program (see loading), `config.options` are the options that its class declares.
    Raises UsageError for a wrong name or option, MachineError if the process or the memory cannot be created.
    """

    kind = "python"
    programs = tuple(sorted(BUNDLED))

    def __init__(self, config: MachineConfig) -> None:
        if config.program is None:
            raise UsageError(f"which program? {EXPECTED}")
        self._program = config.program
        self._closed = False
        self._run_state = RunState.INMIGRATE if config.incoming else RunState.PRELAUNCH
        self._reason: str | None = None
        self._observers: list[Observer] = []
        self._lock = threading.Lock()
        self._no_order = threading.Event()  # cleared while start() or stop() is under way
        self._no_order.set()
        self._blocks: list[MemfdBlock] = []
        self._disks: list[DiskNode] = []
        self._tracker: Tracker | None = None
        self._faults: FaultQueue | None = None
        self._serves_system_calls = True
        self._allow_undeclared = config.allow_undeclared
        self._undeclared: Sequence[str] = ()
        self._warned: set[str] = set()
        self._unmovable = ""
        self.stop_cost: StopCost | None = None
        self._last_values: Sequence[Any] = ()
        self._guest = GuestProcess(self._guest_ended, self._note_undeclared)
        try:
            self._load(config)
            self._map()
        except BaseException:
            self.close()
            raise

    def _load(self, config: MachineConfig) -> None:
        self._loaded, _ = self._guest.ask(
            "load",
            START_TIMEOUT,
            program=config.program,
            options=dict(config.options),
            incoming=config.incoming,
            only_migratable=config.only_migratable and not config.allow_undeclared,
        )
        try:
            self._devices = tuple(make_devices(self._loaded))
        except ValueError as error:
            raise UsageError(str(error)) from None
        for array in self._loaded["arrays"]:
            length = -(-array["length"] // PAGE_SIZE) * PAGE_SIZE
            self._blocks.append(MemfdBlock(array["name"], length, PAGE_SIZE))
        for disk in self._loaded["disks"]:
            self._disks.append(DiskNode(disk))

    def _map(self) -> None:
        if self._disks:
            self._guest.ask("disks", START_TIMEOUT, fds=[disk.log_fd for disk in self._disks])
        answer, fds = self._guest.ask("map", START_TIMEOUT, fds=[block.fd for block in self._blocks])
        if fds:
            self._tracker = Tracker(*fds)
        self._addresses = answer["addresses"]
        for block, address in zip(self._blocks, self._addresses, strict=True):
            block.dirty_log = best_dirty_log(block, self._tracker, address, answer["reason"])

    @property
    def _device(self) -> Device:
        """The device with the fields; it shares its state with those of the sections."""
        return self._devices[0]

    @property
    def layout(self) -> Layout:
        """The layout of the program."""
        return Layout.of(self._loaded)

    def layout_document(self) -> bytes:
        return self.layout.pack()

    def compare_layout(self, there: bytes) -> tuple[list[str], list[str]]:
        try:
            comparison = compare(self.layout, Layout.unpack(there))
        except ValueError as error:
            return [f"the source does not describe its program ({error})"], []
        return list(comparison.refusals), list(comparison.notes)

    # -- what it is ------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return f"python/{self._loaded['name']}"

    @property
    def pid(self) -> int:
        """Process id of the guest."""
        return self._guest.pid

    def ram_blocks(self) -> Sequence[RamBlock]:
        return tuple(self._blocks)

    def block_nodes(self) -> Sequence[DiskNode]:
        return tuple(self._disks)

    def devices(self) -> Sequence[Device]:
        return self._devices

    def information(self) -> Mapping[str, object]:
        return {
            "program": BUNDLED.get(self._program, self._program),
            "pid": self._guest.pid,
            "ram": {block.idstr: block.length for block in self._blocks},
            "dirty-log": {block.idstr: _log_kind(block) for block in self._blocks},
            **({"disks": {disk.name: disk.filename for disk in self._disks}} if self._disks else {}),
            **({"bitmaps": bitmaps} if (bitmaps := bitmaps_of(self._disks)) else {}),
            **self._shown_fields(),
            **({"before-stop": str(self.stop_cost)} if self.stop_cost else {}),
            **({"error": self._reason} if self._reason else {}),
        }

    def _shown_fields(self) -> dict[str, object]:
        """Field values for display: current ones, or the last known ones if a tick takes long."""
        self._look()
        fields, values = self._loaded["fields"], self._last_values
        sizes = value_sizes(fields, values)
        return {"fields": show_values(fields, values), **({"value-sizes": sizes} if sizes else {})}

    def _look(self) -> None:
        """Ask the guest for its values and its undeclared state."""
        if self._run_state is not RunState.RUNNING or not self._last_values:
            self._last_values = get_values(self._device, self._loaded["fields"])
        if self._run_state in DEAD or self._closed:
            return
        try:
            answer, _ = self._guest.ask("look", BRIEF_LOOK if self._awaits_pages else LOOK_TIMEOUT)
        except MachineError as error:  # keep the last known values; a stop asks again
            log.debug("the guest did not report its status: %s", error)
            return
        self._unmovable = answer["unmovable"]
        self._note_undeclared(answer["undeclared"])
        if answer["values"] is not None and self._run_state is RunState.RUNNING:
            self._last_values = answer["values"]

    # -- run states ------------------------------------------------------------------------------------------------

    @property
    def run_state(self) -> RunState:
        return self._run_state

    def watch(self, observer: Observer) -> None:
        self._observers.append(observer)

    def set_run_state(self, state: RunState) -> None:
        if self._run_state is RunState.RUNNING:
            raise MachineError(f"the guest is running: stop it before its state becomes '{state}'")
        self._change(state)

    def _change(self, new: RunState) -> None:
        """Change the run state, unless the guest is dead: no state follows that."""
        with self._lock:
            old = self._run_state
            if old is new or old in DEAD:
                return
            self._run_state = new
        for observer in list(self._observers):
            observer(old, new)

    def _guest_ended(self, ending: Ending) -> None:
        # A guest may die as soon as it runs, and observers have to hear first that it ran.
        self._no_order.wait(ORDER_TIMEOUT)
        if ending.values is not None:
            set_values(self._device, self._loaded["fields"], ending.values)
        for disk in self._disks:
            disk.guest_ended()
        self._reason = ending.reason
        if ending.reason is None:
            log.info("the program has finished")
            self._change(RunState.SHUTDOWN)
            return
        if ending.traceback:
            log.error("the guest's program failed:\n%s", ending.traceback.rstrip())
        log.info("the guest has ended: %s", ending.reason)  # information() reports it
        self._change(RunState.INTERNAL_ERROR)

    # -- start and stop --------------------------------------------------------------------------------------------

    def start(self) -> None:
        if self._closed:
            raise MachineError("the guest was terminated")
        if self._run_state is RunState.RUNNING:
            return
        with self._order():
            try:
                # No limit for a guest that is not running until setup() has returned, nor while it may wait for pages.
                fresh = not getattr(self._device.state, SET_UP)
                patience = None if fresh else self._patience
                answer, _ = self._guest.ask("start", patience, excused=lambda: self._awaits_pages, **self._fields())
            except GuestTimeout:
                self._guest.tell("stop", whole=False)
                raise MachineError(
                    f"the guest did not start within {self._patience:g} s: after_start() takes longer"
                    f" (give '{self._loaded['name']}' a larger stop_timeout)"
                ) from None
            self._note_undeclared(answer.get("undeclared", ()))
            self._change(RunState.RUNNING)

    def stop(self, state: RunState) -> None:
        if self._run_state in DEAD:
            raise MachineError(f"the guest has ended{f': {self._reason}' if self._reason else ''}")
        if self._run_state is not RunState.RUNNING:
            self._change(state)
            return
        with self._order():
            answer = self._ask_to_stop(whole=state is RunState.FINISH_MIGRATE and not self._allow_undeclared)
            set_values(self._device, self._loaded["fields"], answer["values"])
            setattr(self._device.state, SET_UP, answer["set_up"])
            self._note_undeclared(answer["undeclared"])
            self.stop_cost = answer["before_stop"] and StopCost(**answer["before_stop"])
            self._change(state)

    def _ask_to_stop(self, *, whole: bool) -> Message:
        try:
            answer, _ = self._guest.ask("stop", self._patience, whole=whole)
        except GuestTimeout:
            # After the tick the guest finds both requests, so it keeps running.
            self._guest.tell("resume")
            slow = "its tick() or flushing its disks takes" if self._disks else "its tick() takes"
            if self._awaits_pages:
                raise MachineError(
                    f"the guest did not stop within {self._patience:g} s, because it waits for pages that have not"
                    " arrived in postcopy; it keeps running"
                ) from None
            raise MachineError(
                f"the guest did not stop within {self._patience:g} s, because {slow} longer; it keeps running"
                f" (do less in a tick, or give '{self._loaded['name']}' a larger stop_timeout)"
            ) from None
        return answer

    @contextmanager
    def _order(self) -> Iterator[None]:
        self._no_order.clear()
        try:
            yield
        finally:
            self._no_order.set()

    @property
    def _patience(self) -> float:
        return float(self._loaded["stop_timeout"])

    def _fields(self) -> dict[str, Any]:
        values = get_values(self._device, self._loaded["fields"])
        return {"values": values, "set_up": getattr(self._device.state, SET_UP)}

    # -- postcopy --------------------------------------------------------------------------------------------------

    def postcopy_unsupported(self) -> str | None:
        try:
            self.watch_faults().release()
        except MachineError as error:
            return str(error)
        return None

    def postcopy_notes(self) -> Sequence[str]:
        return () if self._serves_system_calls else (SYSTEM_CALLS,)

    def watch_faults(self) -> FaultSource:
        answer, (fd,) = self._guest.ask("faults", ORDER_TIMEOUT)
        self._serves_system_calls = answer["system_calls"]
        self._faults = FaultQueue(fd, self._blocks, self._addresses, self.pid)
        return self._faults

    @property
    def _awaits_pages(self) -> bool:
        return self._faults is not None and self._faults.is_open

    # -- what would not move ---------------------------------------------------------------------------------------

    def blockers(self) -> list[str]:
        """The reasons why the guest cannot migrate now."""
        self._look()
        reasons = [f"program '{self._loaded['name']}': {self._unmovable}"] if self._unmovable else []
        if self._undeclared and not self._allow_undeclared:
            reasons.append(self._undeclared_state)
        return reasons

    def _note_undeclared(self, names: Sequence[str]) -> None:
        self._undeclared = names
        if not self._warned.issuperset(names):
            self._warned.update(names)
            log.warning("%s", self._undeclared_state)

    @property
    def _undeclared_state(self) -> str:
        return undeclared.message(self._loaded["name"], self._undeclared)

    # -- VerifiableMachine, ThrottlableMachine -------------------------------------------------------------------------

    def verify(self) -> Mapping[str, object]:
        """Verify the guest between two ticks; its run state does not change."""
        running = self._run_state is RunState.RUNNING
        fields: dict[str, Any] = {"values": None, "set_up": None} if running else self._fields()
        answer, _ = self._guest.ask("verify", VERIFY_TIMEOUT, **fields)
        facts: Mapping[str, object] = answer["facts"]
        return facts

    def throttle(self, percent: int) -> None:
        """Slow the guest down: it sleeps between ticks."""
        self._guest.ask("throttle", self._patience, percent=percent)

    def close(self) -> None:
        if not self._closed and self._run_state is RunState.RUNNING and self._loaded["has_before_stop"]:
            self._call_before_stop()
        self._closed = True
        self._guest.close()
        for disk in self._disks:
            disk.close()
        for block in self._blocks:
            block.close()
        if self._tracker is not None:
            self._tracker.close()
            self._tracker = None

    def _call_before_stop(self) -> None:
        """Let a running guest call before_stop() before its process ends."""
        try:
            self._guest.ask("stop", self._patience, whole=False)
        except GuestTimeout:
            log.warning(
                "the guest did not stop within %g s: its process is killed without before_stop() (give '%s' a larger"
                " stop_timeout)",
                self._patience,
                self._loaded["name"],
            )
        except MachineError as error:
            log.warning("the guest was ended, but its before_stop() failed: %s", error)


def _log_kind(block: RamBlock) -> LogKind:
    return LogKind.PAGEMAP if isinstance(block.dirty_log, PagemapLog) else LogKind.HASHES
