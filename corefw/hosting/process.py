"""The life of an engine's process once everything in it has been put together.

Invariant: the first reason to end is the only one that counts, and everything is cleaned up after it. When the guest
has moved, the process ends, but only after the clients that watch the migration could read the result. If the
destination never confirmed the guest, the process stays, because it may hold the only copy.
"""

from __future__ import annotations

import logging
import os
import queue
import select
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Final

from corefw.control import RunStateChanged
from corefw.dispatch import Event
from corefw.engine import Engine
from corefw.errors import MigfwError
from corefw.machine import DEAD, RunState
from corefw.qmp.address import QmpAddress
from corefw.qmp.server import QmpServer
from corefw.states import POSTCOPY, MigrationStatus, Side, StatusChanged
from corefw.uri import UnixAddress

if TYPE_CHECKING:
    from corefw.hosting.background import Background

LINGER: Final = 10.0
"""Seconds that a source waits, at most, for clients to disconnect after its guest has moved."""

UNCONFIRMED: Final = (
    "the guest was sent, but nothing confirmed its arrival, so it is kept here, stopped: 'migfw quit' ends it"
)

UNHEARD: Final = (
    "this engine stays, because the source starts the guest only once it has heard of this: if the source is paused,"
    " run 'migfw recover URI' here and 'migfw migrate URI --resume' there, then 'migfw quit'"
)

LOSES_GUEST: Final = (
    "this engine keeps running: in postcopy, part of the guest is here and the rest on the other host, so the guest is"
    " lost if either side ends"
)

_POLL: Final = 0.02
_INTERRUPTED: Final = 128 + signal.SIGINT


class Ending(Enum):
    """Why the process ends; or, with DECLINED, why it does not although it got a signal."""

    DECLINED = auto()

    QUIT = auto()
    GUEST_ENDED = auto()
    GUEST_FAILED = auto()
    MOVED = auto()
    NOT_ARRIVED = auto()
    INTERRUPTED = auto()
    TERMINATED = auto()


@dataclass(frozen=True, slots=True)
class Plan:
    """How the process begins, and whether it outlives its guest.

    incoming     URI at which to wait for a guest; None if the guest is here
    deferred     wait for migrate-incoming to give the URI
    paused       do not start the guest
    stay         stay after the guest has moved or has failed to arrive
    background   set if the process is detached: the command that started it waits until it is ready
    """

    incoming: str | None
    deferred: bool
    paused: bool
    stay: bool
    background: Background | None = None


@dataclass(frozen=True, slots=True)
class Output:
    """Where the process prints. Neither function may raise: failing to print must not end the guest.

    announce   prints a line on stdout: what has become of the guest
    note       prints a line on stderr: what the user should know or do
    """

    announce: Callable[[str], None]
    note: Callable[[str], None]


class EngineProcess:
    """Runs an engine in this process until there is a reason to end."""

    def __init__(self, engine: Engine, address: QmpAddress, plan: Plan, output: Output) -> None:
        self._engine = engine
        self._address = address
        self._plan = plan
        self._output = output
        self._arrivals = _Arrivals(output.announce)
        self._endings = _Endings()
        self._ending = threading.Event()

    def run(self, listen: Callable[[], QmpServer]) -> Ending:
        """Wait for a reason to end, print it and return it. Raises MigfwError if it is a failure.

        `listen` creates the QMP server. A destination listens for its guest first, so that a script that waits for the
        QMP socket to appear can migrate at once. Call this in the main thread, since it handles signals.
        """
        self._handle_signals()
        _silence_repeated_warning()
        self._engine.observe(self._happened)
        incoming = self._plan.incoming
        dialled = self._engine.migrate_incoming(incoming) if incoming is not None else None
        server = listen()
        threading.Thread(target=self._wait_quit, args=(server,), name="quit", daemon=True).start()
        self._begin(server, dialled)
        self._arrivals.begin()
        while (ending := self._endings.get()) is Ending.DECLINED:
            self._output.note(f"{LOSES_GUEST}; send the signal again to end it anyway")
        self._ending.set()
        if isinstance(ending, MigfwError):
            raise ending
        self._report(server, ending)
        return ending

    # -- the beginning ---------------------------------------------------------------------------------------------

    def _begin(self, server: QmpServer, dialled: str | None) -> None:
        def ready(what: str) -> None:
            name, background = self._engine.name, self._plan.background
            line = f"'{name}', QMP at {server.address}; {what}"
            self._output.announce(line)
            facts = {"name": name, "pid": os.getpid(), "qmp": str(server.address), "incoming-uri": dialled}
            if background is not None and not background.ready(line, facts):
                self._endings.put(Ending.TERMINATED)

        if dialled is not None:
            ready(f"waiting for a migration at {dialled}")
        elif self._plan.deferred:
            ready("waiting for migrate-incoming to give the address")
        elif self._plan.paused:
            ready("the guest is not started yet: start it with 'migfw cont'")
        else:
            # In a thread: a guest may take long to start, and Ctrl-C and QMP have to work meanwhile.
            threading.Thread(target=self._start, args=(ready,), name="start", daemon=True).start()

    def _start(self, ready: Callable[[str], None]) -> None:
        try:
            self._engine.cont()
            ready("the guest is running")
        except MigfwError as error:
            if self._engine.machine.run_state not in DEAD:  # otherwise there was an event with the guest's own reason
                self._endings.put(error)

    # -- reasons to end --------------------------------------------------------------------------------------------

    def _wait_quit(self, server: QmpServer) -> None:
        server.wait_quit()
        self._endings.put(Ending.QUIT)

    def _happened(self, event: Event) -> None:
        """Put every reason to end into the queue when it occurs. What happens because the process ends is none."""
        match event:
            case StatusChanged(side=Side.SOURCE):
                if not self._ending.is_set():
                    self._source_changed(event.new)
            case StatusChanged(side=Side.DESTINATION):
                if not self._ending.is_set():
                    self._destination_changed(event.new)
            case RunStateChanged():
                self._note_end()

    def _source_changed(self, new: MigrationStatus) -> None:
        if new is MigrationStatus.COMPLETED and not self._plan.stay:
            if self._engine.has_left:
                self._endings.put(Ending.MOVED)
            else:
                self._output.announce(UNCONFIRMED)
        if new in (MigrationStatus.FAILED, MigrationStatus.CANCELLED):
            self._note_end()

    def _destination_changed(self, new: MigrationStatus) -> None:
        if new is MigrationStatus.FAILED:
            self._note_failed_load()
        if new is MigrationStatus.CANCELLED:
            self._output.note("the incoming migration was cancelled; waiting for migrate-incoming")
        if new is MigrationStatus.COMPLETED:
            self._arrivals.add(f"the guest has arrived, and is {self._engine.machine.run_state}")

    def _note_failed_load(self) -> None:
        """End the process, unless it is needed."""
        if self._engine.inbound.owes_outcome:
            self._output.note(f"{self._why_not_arrived()}; {UNHEARD}")
        elif self._plan.stay or not self._engine.inbound.exit_on_error:
            self._output.note(f"{self._why_not_arrived()}; waiting for migrate-incoming")
        else:
            self._endings.put(Ending.NOT_ARRIVED)

    def _note_end(self) -> None:
        """Put a reason into the queue if the guest has ended here; but what a postcopy has still to send is needed."""
        state = self._engine.machine.run_state
        if state not in DEAD:
            return
        if self._engine.outgoing.status in POSTCOPY:
            self._output.note(
                "the guest runs on the destination, and its process here has ended; the rest of its RAM is still"
                " being sent"
            )
        else:
            self._endings.put(Ending.GUEST_ENDED if state is RunState.SHUTDOWN else Ending.GUEST_FAILED)

    def _handle_signals(self) -> None:
        """Make the first Ctrl-C, SIGTERM or SIGHUP end the process cleanly, and a second one at once, with the guest.

        While that would lose the guest, the first one of all is declined. A second SIGHUP is ignored, because a closing
        terminal sends one from the kernel and one from the shell.
        """
        received: list[int] = []
        declined: list[int] = []

        def handler(number: int, _frame: FrameType | None) -> None:
            if number == signal.SIGHUP and (received or declined):
                return
            if not received and not declined and self._engine.has_part_of_guest:
                declined.append(number)
                self._endings.put(Ending.DECLINED)
                return
            if received:
                if isinstance(self._address, UnixAddress):
                    Path(self._address.path).unlink(missing_ok=True)
                os._exit(_INTERRUPTED)
            received.append(number)
            self._endings.put(Ending.INTERRUPTED if number == signal.SIGINT else Ending.TERMINATED)

        for number in ending_signals():
            signal.signal(number, handler)

    # -- the end ---------------------------------------------------------------------------------------------------

    def _report(self, server: QmpServer, ending: Ending) -> None:
        match ending:
            case Ending.GUEST_ENDED:
                self._output.announce("the guest has ended")
            case Ending.GUEST_FAILED:
                reason = self._engine.machine.information().get("error", "its process ended")
                raise MigfwError(f"the guest failed: {reason}")
            case Ending.MOVED:
                self._output.announce("the guest has moved")
                _linger(server)
            case Ending.NOT_ARRIVED:
                raise MigfwError(self._why_not_arrived())
            case Ending.INTERRUPTED:
                self._output.note("interrupted; ending the guest")

    def _why_not_arrived(self) -> str:
        reason = self._engine.report().error or "no reason given"
        return f"the guest could not be loaded: {reason.removeprefix('load of migration failed: ')}"


class _Endings:
    """A queue of reasons to end. Any thread and any signal handler may add one; the main thread waits for them.

    It waits in poll(2) for a pipe, to which the interpreter also writes when a signal arrives. A lock would not do: a
    signal that arrives just before a thread goes to sleep, or in another thread, does not wake it.
    """

    def __init__(self) -> None:
        self._added: queue.SimpleQueue[Ending | MigfwError] = queue.SimpleQueue()
        self._awake, self._wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def put(self, ending: Ending | MigfwError) -> None:
        self._added.put(ending)
        with suppress(BlockingIOError):  # full, so it wakes the main thread anyway
            os.write(self._wake, b"\0")

    def get(self) -> Ending | MigfwError:
        before = signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        poll = select.poll()
        poll.register(self._awake, select.POLLIN)
        try:
            while True:
                with suppress(queue.Empty):
                    return self._added.get_nowait()
                poll.poll()
                with suppress(BlockingIOError):
                    os.read(self._awake, 4096)
        finally:
            signal.set_wakeup_fd(before)


class _Arrivals:
    """Announces that a guest has arrived, but not before the line that says where the engine listens.

    A guest may arrive earlier than that; its line is held back until `begin`.
    """

    def __init__(self, announce: Callable[[str], None]) -> None:
        self._announce = announce
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._begun = threading.Event()

    def add(self, line: str) -> None:
        self._lines.put(line)
        if self._begun.is_set():
            self.begin()

    def begin(self) -> None:
        """Announce the lines that were held back. Further ones are announced at once."""
        self._begun.set()
        with suppress(queue.Empty):
            while True:
                self._announce(self._lines.get_nowait())


def ending_signals() -> tuple[signal.Signals, ...]:
    """Signals that end an engine cleanly: SIGINT, SIGTERM, and SIGHUP unless it is ignored (nohup)."""
    hangup = () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)
    return (signal.SIGINT, signal.SIGTERM, *hangup)


def _silence_repeated_warning() -> None:
    """Do not log why an incoming migration failed: it is printed here, as the reason to end."""
    if not logging.getLogger().isEnabledFor(logging.INFO):
        logging.getLogger("corefw.engine.incoming").setLevel(logging.ERROR)


def _linger(server: QmpServer) -> None:
    end = time.monotonic() + LINGER
    while server.clients and time.monotonic() < end:
        time.sleep(_POLL)
