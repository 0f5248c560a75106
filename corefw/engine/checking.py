"""`migfw check`: would a migration succeed, and what would it be like? Nothing is changed on either side.

The source dials the destination as for a migration, but begins with another magic number. The destination compares the
source's facts with its own, answers, takes in some padding so that the source can measure the path, and goes on waiting
for a migration. Messages are a u32 length and a JSON object:

    source        "MGCK", message {facts}         padding: u32 length, bytes; ...; u32 0
    destination   message {"facts", "problems", "notes"}                                  message {"received"}

The source also measures how fast its guest writes, with the dirty logs that a migration would use. So no migration runs
at the same time: `migrate` ends a check.

Threads: the caller's; `end` is called from others. The destination answers in its incoming thread.
"""

from __future__ import annotations

import json
import os
import platform
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import version as installed
from typing import Any, Final, TypeGuard

from corefw import __version__
from corefw.channel import Channel, Interrupt, Transport
from corefw.control import CheckReport
from corefw.engine.estimate import Estimate, Rates, estimate
from corefw.engine.guestarrival import obstacle_to_postcopy
from corefw.engine.tails import tail_of
from corefw.errors import ChannelError, Interrupted, StateError, StreamError, one_line
from corefw.jsontext import JsonError, parse_json
from corefw.machine import Machine, PostcopyMachine, RunState
from corefw.memory.host import spare_memory
from corefw.memory.preallocation import allocated_bytes
from corefw.quantities import format_size
from corefw.registry import LoaderRegistry, SaverRegistry
from corefw.section import Section
from corefw.settings import QMP_MAX_BANDWIDTH, UNLIMITED, Settings
from corefw.wire.constants import BE32
from corefw.wire.stream import StreamReader

MAGIC: Final = b"MGCK"
MESSAGE_LIMIT: Final = 2 << 20
"""Bytes of a message, at most."""
CHUNK: Final = 1 << 18
"""Bytes of padding that are sent at once."""
PADDING_LIMIT: Final = 1 << 30
"""Bytes of padding that a destination takes in, at most."""

PROBE_SECONDS: Final = 1.0
PROBE_BYTES: Final = 256 << 20
PATIENCE: Final = 30.0
"""Seconds that a conversation with a destination may take."""

HARVESTS: Final = (0.1, 0.9)
"""Seconds until the first harvest of the dirty logs, and from there to the second."""

_COMPARED: Final = ("send-configuration", "send-section-footer")
"""Properties that have to be the same on both sides."""
_SHOWN: Final = 20
"""Problems and notes in an answer, at most."""
_LONGEST: Final = 500
"""Characters of each, at most."""
_SHARED_FACTS: Final = ("host", "migfw", "python", "numpy", "memory")
"""What a destination says of itself in its answer."""


class Check:
    """One check, at the source: ask() if there is a destination to ask, then report()."""

    def __init__(
        self,
        machine: Machine,
        settings: Settings,
        savers: SaverRegistry,
        blockers: Sequence[str],
        *,
        postcopy: bool,
    ) -> None:
        """`blockers`: what keeps the guest from migrating at all. `postcopy`: the migration may switch to postcopy."""
        self.done: Final = threading.Event()
        self._machine = machine
        self._settings = settings
        self._savers = savers
        self._postcopy = postcopy
        self._interrupt = Interrupt()
        self._channel: Channel | None = None
        self._problems = list(blockers)
        self._notes: list[str] = []
        self._destination: Mapping[str, Any] | None = None
        self._bandwidth: float | None = None
        self._round_trip: float | None = None

    def end(self) -> None:
        """From another thread: end the check, and wait until it has let go of the guest."""
        self._interrupt.set()
        if self._channel is not None:
            self._channel.abort()
        self.done.wait()

    def run(self, transport: Transport | None) -> CheckReport:
        """Ask the destination there, if any, and measure the guest. Raises StateError if a migration began."""
        try:
            if transport is not None:
                self._ask(transport)
            return self._report()
        except Interrupted:
            raise StateError("a migration began, and ended the check") from None

    def _report(self) -> CheckReport:
        """Measure the guest, and put together what is known. Raises Interrupted if a migration began."""
        self._interrupt.check()
        rates = self._measure()
        self._interrupt.check()
        used = allocated_bytes(self._machine.ram_blocks())
        expected = self._estimate(used, rates)
        return CheckReport(
            problems=tuple(self._problems),
            notes=tuple(self._notes),
            ram=sum(block.length for block in self._machine.ram_blocks()),
            ram_used=used,
            dirty_rate=int(rates.second) if rates is not None else None,
            destination=self._destination,
            bandwidth=int(self._bandwidth) if self._bandwidth else None,
            round_trip=round(self._round_trip * 1000, 3) if self._round_trip is not None else None,
            converges=expected.converges if expected else None,
            expected_time=expected.milliseconds if expected else None,
            expected_downtime=expected.downtime if expected else None,
            passes=expected.passes if expected else None,
        )

    # -- the destination -------------------------------------------------------------------------------------------

    def _ask(self, transport: Transport) -> None:
        """Ask the destination there; what is wrong goes into the report. Raises Interrupted if a migration began."""
        if (obstacle := self._obstacle(transport)) is not None:
            self._notes.append(f"{transport.uri} was not dialled: {obstacle}")
            return
        try:
            with transport.connect(self._interrupt) as channel:
                self._channel = channel
                self._interrupt.check()
                limit = threading.Timer(PATIENCE, channel.abort)
                limit.daemon = True
                limit.start()
                try:
                    self._talk(channel)
                finally:
                    limit.cancel()
        except (ChannelError, StreamError) as error:
            self._interrupt.check()
            late = isinstance(error, Interrupted)
            self._problems.append(f"{transport.uri}: no answer within {PATIENCE:g} seconds" if late else str(error))

    def _obstacle(self, transport: Transport) -> str | None:
        """Why the destination cannot be asked; None if it can."""
        if (obstacle := tail_of(self._machine).obstacle_to_checking()) is not None:
            return obstacle
        if not (transport.features.return_path and transport.features.multi_channel):
            return f"'{transport.uri.scheme}:' has one connection, or one direction; only this side was checked"
        return None

    def _talk(self, channel: Channel) -> None:
        here = facts_of(self._machine, self._settings, self._savers)
        channel.send(MAGIC, pack({**here, "postcopy": self._postcopy}))
        reader = StreamReader(channel, where="the answer to the check")
        if reader.at_end():
            raise ChannelError(
                f"{channel.peer}: the listener does not answer a check: it is not a migfw that waits for a guest,"
                " or it has another version"
            )
        answer = read_message(reader)
        facts, problems, notes = (answer.get(name) for name in ("facts", "problems", "notes"))
        if not (isinstance(facts, dict) and _is_texts(problems) and _is_texts(notes)):
            raise reader.error("the facts, problems and notes of a destination", "something else")
        self._destination = {name: facts[name] for name in _SHARED_FACTS if _is_short(facts.get(name))}
        assert isinstance(problems, list)
        assert isinstance(notes, list)
        self._problems += [f"the destination: {one}" for one in _shortened(problems)]
        self._notes += [f"the destination: {one}" for one in _shortened(notes)]
        self._probe(channel, reader)

    def _probe(self, channel: Channel, reader: StreamReader) -> None:
        """Measure the path: send padding for a second. An empty round first shows how long an answer takes. Bytes that
        only fill buffers on the way do not count, because the answer comes after them."""
        began = time.monotonic()
        channel.send(BE32.pack(0))
        read_message(reader)
        self._round_trip = time.monotonic() - began
        padding = os.urandom(CHUNK)  # a tunnel may compress
        began, sent = time.monotonic(), 0
        while time.monotonic() - began < PROBE_SECONDS and sent < PROBE_BYTES:
            channel.send(BE32.pack(CHUNK), padding)
            sent += CHUNK
        channel.send(BE32.pack(0))
        read_message(reader)
        self._bandwidth = sent / max(1e-6, time.monotonic() - began - self._round_trip)
        channel.send_eof()

    # -- the guest -------------------------------------------------------------------------------------------------

    def _measure(self) -> Rates | None:
        """How fast the guest writes; None if it does not run."""
        if self._machine.run_state is not RunState.RUNNING:
            self._notes.append(f"the guest is {self._machine.run_state}: its dirty rate cannot be measured")
            return None
        blocks = self._machine.ram_blocks()
        with ExitStack() as stop:
            for block in blocks:
                stop.callback(block.dirty_log.stop)
                block.dirty_log.start()
            rates = []
            for seconds in HARVESTS:
                began = time.monotonic()
                self._interrupt.wait(seconds)
                self._interrupt.check()
                dirty = sum(_dirty_bytes(block.dirty_log.harvest(), block.page_size) for block in blocks)
                rates.append(dirty / max(seconds, time.monotonic() - began))
        return Rates(*rates)

    def _estimate(self, used: int, rates: Rates | None) -> Estimate | None:
        if not self._bandwidth:
            return None
        limit = self._settings.integer("max-bandwidth")
        if limit not in (UNLIMITED, QMP_MAX_BANDWIDTH):  # `migfw migrate` takes the default for no limit
            self._bandwidth = min(self._bandwidth, limit)
        downtime = self._settings.integer("downtime-limit")
        expected = estimate(used, self._bandwidth, rates or Rates(0.0, 0.0), downtime)
        if not expected.converges:
            found = self._notes if self._postcopy else self._problems  # a migration in postcopy need not converge
            found.append(
                f"it will not converge: the guest writes {format_size(expected.pending)} while that much is sent at"
                f" {format_size(self._bandwidth)}/s, and {format_size(int(self._bandwidth * downtime / 1000))} fit into"
                f" the downtime limit of {downtime} ms (set downtime-limit to {expected.downtime} ms or more, or let it"
                " write less)"
            )
        return expected


def _dirty_bytes(runs: Any, page_size: int) -> int:
    return int((runs[:, 1] - runs[:, 0]).sum()) * page_size


# -- both sides ----------------------------------------------------------------------------------------------------


def facts_of(machine: Machine, settings: Settings, sections: Iterable[Section]) -> dict[str, Any]:
    """Describe one side to the other. What a destination has allocated for the guest is part of its free memory."""
    waits = machine.run_state is RunState.INMIGRATE
    return {
        "host": platform.node(),
        "migfw": __version__,
        "python": platform.python_version(),
        "numpy": installed("numpy"),
        "kind": machine.kind,
        "name": machine.name,
        "ram": {block.idstr: block.length for block in machine.ram_blocks()},
        "layout": machine.layout_document().decode(),
        "sections": [str(section.key) for section in sections],
        "properties": {name: settings.property(name) for name in _COMPARED},
        "memory": spare_memory() + (allocated_bytes(machine.ram_blocks()) if waits else 0),
    }


def pack(document: Mapping[str, object]) -> bytes:
    """A message's bytes."""
    text = json.dumps(document).encode()
    return BE32.pack(len(text)) + text


def read_message(reader: StreamReader) -> dict[str, Any]:
    """One message. Raises StreamError for anything but a JSON object of at most MESSAGE_LIMIT bytes."""
    length = reader.be32("the length of a message")
    text = reader.read(length, "a message", MESSAGE_LIMIT)
    try:
        document = parse_json(bytes(text))
    except JsonError:
        raise reader.error("a JSON object", "something else") from None
    if not isinstance(document, dict):
        raise reader.error("a JSON object", "something else")
    return document


def answer_check(
    reader: StreamReader, channel: Channel, machine: Machine, settings: Settings, loaders: LoaderRegistry
) -> None:
    """The destination's side, behind the magic number. Raises StreamError, ChannelError."""
    there = read_message(reader)
    here = facts_of(machine, settings, loaders)
    problems, notes = _compare(here, there, machine)
    shared = {name: here[name] for name in _SHARED_FACTS}
    channel.send(pack({"facts": shared, "problems": _shortened(problems), "notes": _shortened(notes)}))
    total = 0
    for _ in range(2):  # the empty round, and the padding
        while length := reader.be32("the length of some padding"):
            total += length
            if length > CHUNK or total > PADDING_LIMIT:
                raise reader.error(f"at most {PADDING_LIMIT} bytes of padding", str(total))
            reader.read(length, "padding", CHUNK)
        channel.send(pack({"received": total}))


def _compare(here: Mapping[str, Any], there: Mapping[str, Any], machine: Machine) -> tuple[list[str], list[str]]:
    """Problems and notes, from the destination's point of view. `there` came from the peer and may hold anything."""
    if (there.get("kind"), there.get("name")) != (here["kind"], here["name"]):
        return [f"this is a machine '{here['name']}', but the incoming machine is '{there.get('name')}'"], []
    layout = there.get("layout")
    problems, notes = machine.compare_layout(layout.encode(errors="replace") if isinstance(layout, str) else b"")
    if not problems and there.get("ram") != here["ram"]:
        problems.append("its RAM blocks have different names or lengths (give both sides the same options)")
    named = there.get("sections")
    mine, theirs = set(here["sections"]), set(named if _is_texts(named) else ())
    if mine != theirs:
        problems += [f"no plugin here loads section {one}" for one in sorted(theirs - mine)[:_SHOWN]]
        notes += [f"no plugin there sends section {one}" for one in sorted(mine - theirs)[:_SHOWN]]
    properties = there.get("properties")
    for name, value in here["properties"].items():
        if isinstance(properties, dict) and properties.get(name, value) != value:
            problems.append(f"property {name} is {'on' if value else 'off'} here and must be the same on both sides")
    if there.get("postcopy") is True:
        obstacle = obstacle_to_postcopy(machine)
        problems += [obstacle] if obstacle is not None else []
        notes += machine.postcopy_notes() if obstacle is None and isinstance(machine, PostcopyMachine) else ()
    needed = sum(here["ram"].values())
    if needed > here["memory"]:
        problems.append(
            f"the guest has {format_size(needed)} of RAM, and this host has {format_size(here['memory'])} to spare"
        )
    return problems, notes


def _shortened(texts: Sequence[str]) -> list[str]:
    """Keep an answer short enough for the buffers of a peer that does not read it: names that it sent may be long."""
    return [one_line(text)[:_LONGEST] for text in texts[:_SHOWN]]


def _is_texts(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _is_short(value: object) -> bool:
    return isinstance(value, int) or (isinstance(value, str) and len(value) < _LONGEST)
