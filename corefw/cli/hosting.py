"""The life of an engine's process, from its first word to its end.

Invariant: exactly one reason ends the process, the first that comes; then everything that was made is undone. A guest
that has moved takes its old process with it, but not before clients that watch the migration could read how it went. A
guest whose arrival nobody confirmed stays: it may be the only copy.
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

from corefw.cli.console import ExitStatus, Finished, StdoutError, discard_output, note
from corefw.cli.signals import ending_signals
from corefw.control import RunStateChanged
from corefw.dispatch import Event
from corefw.engine import Engine
from corefw.errors import MigfwError, one_line
from corefw.machine import DEAD, RunState
from corefw.qmp.address import QmpAddress
from corefw.qmp.server import QmpServer
from corefw.states import MigrationStatus, Side, StatusChanged
from corefw.uri import UnixAddress

if TYPE_CHECKING:
    from corefw.cli.background import Background

LINGER: Final = 10.0
"""Seconds that a source stays, at most, for clients that are still connected when its guest has moved."""

UNCONFIRMED: Final = (
    "the guest was sent, but nothing confirmed its arrival, so it is kept here, stopped: 'migfw quit' ends it"
)

_LOOK: Final = 0.02


class Ending(Enum):
    """Why the process ends."""

    QUIT = auto()
    GUEST_ENDED = auto()
    GUEST_FAILED = auto()
    MOVED = auto()
    NOT_ARRIVED = auto()
    INTERRUPTED = auto()
    TERMINATED = auto()


Endings = queue.SimpleQueue[Ending | MigfwError]
"""What the process ends for: one of those, or an error."""


@dataclass(frozen=True, slots=True)
class Plan:
    """incoming   where to wait for a guest; None: it is here
    deferred   wait for migrate-incoming instead
    paused     do not start the guest
    stay       outlive a guest that moved, or that failed to arrive
    background the process is detached, and whoever started it waits for the word that it is ready"""

    incoming: str | None
    deferred: bool
    paused: bool
    stay: bool
    background: Background | None = None


def say(text: str) -> None:
    """A line on stdout. Nobody reading it is no reason to end a guest."""
    try:
        click.echo(f"migfw: {one_line(text)}")
    except BrokenPipeError:
        discard_output(sys.stdout.fileno())
    except StdoutError as error:
        note(str(error))


class Arrivals:
    """Lines about guests that have arrived. One may arrive before the engine has said where it listens; its line is
    held until then."""

    def __init__(self) -> None:
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._begun = threading.Event()

    def say(self, line: str) -> None:
        self._lines.put(line)
        if self._begun.is_set():
            self.begin()

    def begin(self) -> None:
        """Say the lines that are held, and every further one at once."""
        self._begun.set()
        with suppress(queue.Empty):
            while True:
                say(self._lines.get_nowait())


def host(engine: Engine, address: QmpAddress, listen: Callable[[], QmpServer], plan: Plan) -> None:
    """Begin, wait for the end, and say why it came. Raises MigfwError or Finished when that is no good one.

    `listen` makes the QMP server at `address`. A destination that was told where to wait does that first: a script that
    waits for the QMP socket to appear may migrate at once.
    """
    endings: Endings = queue.SimpleQueue()
    _hear_signals(endings, address)
    _say_it_once()
    arrivals = Arrivals()
    _watch(engine, endings, plan, arrivals)
    dialled = engine.migrate_incoming(plan.incoming) if plan.incoming is not None else None
    server = listen()
    threading.Thread(target=_wait_quit, args=(server, endings), name="quit", daemon=True).start()
    _begin(engine, server, endings, plan, dialled)
    arrivals.begin()
    ending = endings.get()
    if isinstance(ending, MigfwError):
        raise ending
    _last_words(engine, server, ending)


def _say_it_once() -> None:
    """What failed an incoming migration is said here, as the reason to end; the engine's warning would repeat it."""
    if not logging.getLogger().isEnabledFor(logging.INFO):
        logging.getLogger("corefw.engine.incoming").setLevel(logging.ERROR)


def _begin(engine: Engine, server: QmpServer, endings: Endings, plan: Plan, dialled: str | None) -> None:
    def ready(what: str) -> None:
        line = f"'{engine.name}', QMP at {server.address}; {what}"
        say(line)
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
        # A guest may take its time to start; Ctrl-C and QMP are heard meanwhile.
        threading.Thread(target=_start, args=(engine, endings, ready), name="start", daemon=True).start()


def _start(engine: Engine, endings: Endings, ready: Callable[[str], None]) -> None:
    try:
        engine.cont()
        ready("the guest is running")
    except MigfwError as error:
        if engine.machine.run_state not in DEAD:  # else there was an event, with the guest's own reason
            endings.put(error)


def _wait_quit(server: QmpServer, endings: Endings) -> None:
    server.wait_quit()
    endings.put(Ending.QUIT)


def _watch(engine: Engine, endings: Endings, plan: Plan, arrivals: Arrivals) -> None:
    """Put every reason to end into the queue when it comes."""

    def status_changed(side: Side, new: MigrationStatus) -> None:
        if side is Side.SOURCE and new is MigrationStatus.COMPLETED and not plan.stay:
            if engine.has_left:
                endings.put(Ending.MOVED)
            else:
                say(UNCONFIRMED)
        if side is Side.DESTINATION and new is MigrationStatus.FAILED:
            if plan.stay or not engine.inbound.exit_on_error:
                note(f"{_why_not_arrived(engine)}; waiting for migrate-incoming")
            else:
                endings.put(Ending.NOT_ARRIVED)
        if side is Side.DESTINATION and new is MigrationStatus.CANCELLED:
            note("the incoming migration was cancelled; waiting for migrate-incoming")
        if side is Side.DESTINATION and new is MigrationStatus.COMPLETED:
            arrivals.say(f"the guest has arrived, and is {engine.machine.run_state}")

    def happened(event: Event) -> None:
        match event:
            case StatusChanged():
                status_changed(event.side, event.new)
            case RunStateChanged() if event.new in DEAD:
                endings.put(Ending.GUEST_ENDED if event.new is RunState.SHUTDOWN else Ending.GUEST_FAILED)

    engine.observe(happened)


def _hear_signals(endings: Endings, address: QmpAddress) -> None:
    """From now on the first Ctrl-C, SIGTERM or SIGHUP ends the process in order, and a second one that is no SIGHUP at
    once, and the guest with it: a terminal that closes sends SIGHUP from the kernel and from the shell."""
    heard: list[int] = []

    def handler(number: int, _frame: FrameType | None) -> None:
        if heard and number == signal.SIGHUP:
            return
        if heard:
            if isinstance(address, UnixAddress):
                Path(address.path).unlink(missing_ok=True)
            os._exit(ExitStatus.INTERRUPTED)
        heard.append(number)
        endings.put(Ending.INTERRUPTED if number == signal.SIGINT else Ending.TERMINATED)

    for number in ending_signals():
        signal.signal(number, handler)


def _last_words(engine: Engine, server: QmpServer, ending: Ending) -> None:
    match ending:
        case Ending.QUIT | Ending.TERMINATED:
            return
        case Ending.GUEST_ENDED:
            say("the guest has ended")
        case Ending.GUEST_FAILED:
            reason = engine.machine.information().get("error", "its process ended")
            raise MigfwError(f"the guest failed: {reason}")
        case Ending.MOVED:
            say("the guest has moved")
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
        time.sleep(_LOOK)
