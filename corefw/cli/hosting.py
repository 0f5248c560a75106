"""The life of an engine's process after `migfw run` has put it together.

Invariant: the first reason to end is the only one that counts, and everything is cleaned up after it. When the guest
has moved, the process ends, but only after the clients that watch the migration could read the result. If the
destination never confirmed the guest, the process stays, because it may hold the only copy.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Final

import click

from corefw.cli import ending_signals
from corefw.cli.console import ExitStatus, Finished, StdoutError, discard_output, note
from corefw.control import RunStateChanged
from corefw.dispatch import Event
from corefw.engine import Engine
from corefw.errors import MigfwError, one_line
from corefw.machine import DEAD, RunState
from corefw.qmp.address import QmpAddress
from corefw.qmp.server import QmpServer
from corefw.states import POSTCOPY, MigrationStatus, Side, StatusChanged
from corefw.uri import UnixAddress

if TYPE_CHECKING:
    from corefw.cli.background import Background

LINGER: Final = 10.0
"""Seconds that a source waits, at most, for clients to disconnect after its guest has moved."""

UNCONFIRMED: Final = (
    "the guest was sent, but nothing confirmed its arrival, so it is kept here, stopped: 'migfw quit' ends it"
)

UNHEARD: Final = (
    "this engine stays, since the source starts the guest only after it has heard that: if it is paused,"
    " 'migfw recover URI' here and 'migfw migrate URI --resume' there; then 'migfw quit'"
)

LOSES_GUEST: Final = (
    "this engine goes on: in postcopy a part of the guest is here and the rest on the other host, and the guest is lost"
    " if either side ends"
)

_POLL: Final = 0.02


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


Endings = queue.SimpleQueue[Ending | MigfwError]
"""Reasons to end the process; an error is one, too."""


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


def announce(text: str) -> None:
    """Print a line on stdout. Failing to do so must not end the guest."""
    try:
        click.echo(f"migfw: {one_line(text)}")
    except BrokenPipeError:
        discard_output(sys.stdout.fileno())
    except StdoutError as error:
        note(str(error))


class Arrivals:
    """Prints that a guest has arrived, but not before the line that says where the engine listens.

    A guest may arrive earlier than that; its line is held back until `begin`.
    """

    def __init__(self) -> None:
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._begun = threading.Event()

    def add(self, line: str) -> None:
        self._lines.put(line)
        if self._begun.is_set():
            self.begin()

    def begin(self) -> None:
        """Print the lines that were held back. Further lines are printed at once."""
        self._begun.set()
        with suppress(queue.Empty):
            while True:
                announce(self._lines.get_nowait())


def host(engine: Engine, address: QmpAddress, listen: Callable[[], QmpServer], plan: Plan) -> None:
    """Run the engine until there is a reason to end, and print it. Raises MigfwError or Finished if it is a failure.

    `listen` creates the QMP server at `address`. A destination listens for its guest first, so that a script that waits
    for the QMP socket to appear can migrate at once.
    """
    endings: Endings = queue.SimpleQueue()
    _handle_signals(endings, address, lambda: engine.has_part_of_guest)
    _silence_repeated_warning()
    arrivals = Arrivals()
    ending_now = threading.Event()
    _watch(engine, endings, plan, arrivals, ending_now)
    dialled = engine.migrate_incoming(plan.incoming) if plan.incoming is not None else None
    server = listen()
    threading.Thread(target=_wait_quit, args=(server, endings), name="quit", daemon=True).start()
    _begin(engine, server, endings, plan, dialled)
    arrivals.begin()
    while (ending := endings.get()) is Ending.DECLINED:
        note(f"{LOSES_GUEST}; the same signal again ends it all the same")
    ending_now.set()
    if isinstance(ending, MigfwError):
        raise ending
    _report(engine, server, ending)


def _silence_repeated_warning() -> None:
    """Do not log why an incoming migration failed: it is printed here, as the reason to end."""
    if not logging.getLogger().isEnabledFor(logging.INFO):
        logging.getLogger("corefw.engine.incoming").setLevel(logging.ERROR)


def _begin(engine: Engine, server: QmpServer, endings: Endings, plan: Plan, dialled: str | None) -> None:
    def ready(what: str) -> None:
        line = f"'{engine.name}', QMP at {server.address}; {what}"
        announce(line)
        facts = {"name": engine.name, "pid": os.getpid(), "qmp": str(server.address), "incoming-uri": dialled}
        if plan.background is not None and not plan.background.ready(line, facts):
            endings.put(Ending.TERMINATED)

    if dialled is not None:
        ready(f"waiting for a migration at {dialled}")
    elif plan.deferred:
        ready("waiting for migrate-incoming to give the address")
    elif plan.paused:
        ready("the guest is not started yet: start it with 'migfw cont'")
    else:
        # In a thread: a guest may take long to start, and Ctrl-C and QMP have to work meanwhile.
        threading.Thread(target=_start, args=(engine, endings, ready), name="start", daemon=True).start()


def _start(engine: Engine, endings: Endings, ready: Callable[[str], None]) -> None:
    try:
        engine.cont()
        ready("the guest is running")
    except MigfwError as error:
        if engine.machine.run_state not in DEAD:  # otherwise there was an event with the guest's own reason
            endings.put(error)


def _wait_quit(server: QmpServer, endings: Endings) -> None:
    server.wait_quit()
    endings.put(Ending.QUIT)


def _watch(engine: Engine, endings: Endings, plan: Plan, arrivals: Arrivals, ending_now: threading.Event) -> None:
    """Put every reason to end into the queue when it occurs. What happens because the process ends is none."""

    def status_changed(side: Side, new: MigrationStatus) -> None:
        if ending_now.is_set():
            return
        if side is Side.SOURCE and new is MigrationStatus.COMPLETED and not plan.stay:
            if engine.has_left:
                endings.put(Ending.MOVED)
            else:
                announce(UNCONFIRMED)
        if side is Side.SOURCE and new in (MigrationStatus.FAILED, MigrationStatus.CANCELLED):
            _note_end(engine, endings)
        if side is Side.DESTINATION and new is MigrationStatus.FAILED:
            _note_failed_load(engine, endings, stay=plan.stay)
        if side is Side.DESTINATION and new is MigrationStatus.CANCELLED:
            note("the incoming migration was cancelled; waiting for migrate-incoming")
        if side is Side.DESTINATION and new is MigrationStatus.COMPLETED:
            arrivals.add(f"the guest has arrived, and is {engine.machine.run_state}")

    def happened(event: Event) -> None:
        match event:
            case StatusChanged():
                status_changed(event.side, event.new)
            case RunStateChanged():
                _note_end(engine, endings)

    engine.observe(happened)


def _note_failed_load(engine: Engine, endings: Endings, *, stay: bool) -> None:
    """End the process, unless it is needed."""
    if engine.inbound.owes_outcome:
        note(f"{_why_not_arrived(engine)}; {UNHEARD}")
    elif stay or not engine.inbound.exit_on_error:
        note(f"{_why_not_arrived(engine)}; waiting for migrate-incoming")
    else:
        endings.put(Ending.NOT_ARRIVED)


def _note_end(engine: Engine, endings: Endings) -> None:
    """Put a reason into the queue if the guest has ended here; but what a postcopy has still to send is needed."""
    state = engine.machine.run_state
    if state not in DEAD:
        return
    if engine.outgoing.status in POSTCOPY:
        note("the process of the guest that has left has ended; its RAM is still sent to the destination")
    else:
        endings.put(Ending.GUEST_ENDED if state is RunState.SHUTDOWN else Ending.GUEST_FAILED)


def _handle_signals(endings: Endings, address: QmpAddress, loses_guest: Callable[[], bool]) -> None:
    """Make the first Ctrl-C, SIGTERM or SIGHUP end the process cleanly, and a second one at once, with the guest.

    While `loses_guest()`, the first one of all is declined. A second SIGHUP is ignored, because a closing terminal
    sends one from the kernel and one from the shell.
    """
    received: list[int] = []
    declined: list[int] = []

    def handler(number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGHUP and (received or declined):
            return
        if not received and not declined and loses_guest():
            declined.append(number)
            endings.put(Ending.DECLINED)
            return
        if received:
            if isinstance(address, UnixAddress):
                Path(address.path).unlink(missing_ok=True)
            os._exit(ExitStatus.INTERRUPTED)
        received.append(number)
        endings.put(Ending.INTERRUPTED if number == signal.SIGINT else Ending.TERMINATED)

    for number in ending_signals():
        signal.signal(number, handler)


def _report(engine: Engine, server: QmpServer, ending: Ending) -> None:
    match ending:
        case Ending.DECLINED | Ending.QUIT | Ending.TERMINATED:
            return
        case Ending.GUEST_ENDED:
            announce("the guest has ended")
        case Ending.GUEST_FAILED:
            reason = engine.machine.information().get("error", "its process ended")
            raise MigfwError(f"the guest failed: {reason}")
        case Ending.MOVED:
            announce("the guest has moved")
            _linger(server)
        case Ending.NOT_ARRIVED:
            raise MigfwError(_why_not_arrived(engine))
        case Ending.INTERRUPTED:
            note("interrupted; ending the guest")
            raise Finished(ExitStatus.INTERRUPTED)


def _why_not_arrived(engine: Engine) -> str:
    reason = engine.report().error or "no reason given"
    return f"the guest could not be loaded: {reason.removeprefix('load of migration failed: ')}"


def _linger(server: QmpServer) -> None:
    end = time.monotonic() + LINGER
    while server.clients and time.monotonic() < end:
        time.sleep(_POLL)
