"""One migration of one section, without an engine: what the contract kit for section handlers is written with.

Invariant: a recording holds the bodies exactly as the source wrote them; a replay gives them to a destination framed as
in a stream, through one reader, and lets the destination clean up whatever happens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from corefw.channel import Channel, Interrupt
from corefw.errors import ChannelError, MachineError
from corefw.section import LiveHandler, Pending, SectionHandler, StateHandler
from corefw.settings import Settings
from corefw.wire.constants import BE32, SectionType
from corefw.wire.stream import MemorySink, StreamReader, StreamWriter

FOOTER: Final = bytes([SectionType.FOOTER]) + BE32.pack(7)
"""What follows every body, as in a stream: a handler that reads too much takes some of it."""

EXACT: Final = 1 << 62
"""A threshold below which every estimate lies, so that pending() has to be exact."""

PASSES: Final = 10_000
READS_AFTER_END: Final = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class HandlerCase:
    """A section handler, and how to make both sides of it.

    source        makes a source's handler that has something to send; a new one, with the same state, each time
    destination   makes the handler of a destination that waits; a new one each time
    state         what has to be the same on both sides at the end: a value with ==. A StateHandler may leave it out;
                  then the destination has to save the bytes that it loaded
    change        a LiveHandler's guest writes: called on the source's handler between passes
    close         lets go of what source() or destination() made around the handler
    budget        bytes that iterate() is given
    samples       at most so many places in the stream are cut and damaged
    memory        bytes of memory that a damaged stream may make a destination take, beside what the stream itself takes
    """

    source: Callable[[], SectionHandler]
    destination: Callable[[], SectionHandler]
    state: Callable[[Any], object] | None = None
    change: Callable[[Any], object] | None = None
    close: Callable[[Any], object] | None = None
    settings: Callable[[], Settings] = Settings
    budget: int = 64 << 10
    samples: int = 300
    memory: int = 64 << 20


class KitContext:
    """What the kit offers to a handler on either side: one channel, a guest that cannot be throttled."""

    def __init__(self, settings: Settings, interrupt: Interrupt) -> None:
        self.settings = settings
        self.interrupt = interrupt
        self.stream_capabilities: frozenset[str] = frozenset()
        self.messages: list[tuple[int, bytes]] = []

    def open_channel(self) -> Channel:
        raise ChannelError("this transport has only one channel")

    def accept_channel(self) -> Channel:
        raise ChannelError("this transport has only one channel")

    def throttle_guest(self, percent: int) -> None:
        raise MachineError(f"this guest cannot be throttled by {percent} %")

    def send_return_message(self, message: int, body: bytes) -> None:
        self.messages.append((message, body))


class Pieces:
    """A Source that gives at most `size` bytes a time, and finds out who reads on for ever after the end."""

    def __init__(self, data: bytes, size: int = 1 << 20) -> None:
        self._rest = memoryview(data)
        self._size = size
        self._reads_after_end = 0

    def receive_into(self, view: memoryview, /) -> int:
        count = min(len(view), len(self._rest), self._size)
        if not count:
            self._reads_after_end += 1
            assert self._reads_after_end < READS_AFTER_END, "load() reads on and on after the end of the stream"
        view[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count


@dataclass(frozen=True, slots=True)
class Body:
    """What a source wrote between a section's header and its footer."""

    kind: str
    data: bytes

    def __str__(self) -> str:
        return f"the {self.kind} body of {len(self.data)} bytes"


@dataclass(slots=True)
class Recording:
    """A source's whole section. `description` is a StateHandler's."""

    version_id: int
    bodies: list[Body] = field(default_factory=list)
    description: dict[str, Any] | None = None
    state: object = None

    @property
    def size(self) -> int:
        return sum(len(body.data) for body in self.bodies)


@contextmanager
def opened(case: HandlerCase, make: Callable[[], SectionHandler]) -> Iterator[tuple[Any, KitContext]]:
    """A new handler and its context, cleared away at the end."""
    with ExitStack() as mine:
        interrupt = Interrupt()
        mine.callback(interrupt.close)
        handler = make()
        if case.close is not None:
            mine.callback(case.close, handler)
        yield handler, KitContext(case.settings(), interrupt)


def record(case: HandlerCase) -> Recording:
    """Let a source send its section. Raises AssertionError where it does not come to an end."""
    with opened(case, case.source) as (source, context):
        recording = Recording(source.version_id)
        if isinstance(source, StateHandler):
            _record_state(source, recording)
        else:
            _record_live(case, source, context, recording)
        recording.state = _state(case, source)
        return recording


def written(recording: Recording, kind: str, write: Callable[[StreamWriter], object]) -> None:
    """Keep what `write` writes as one more body."""
    sink = MemorySink()
    writer = StreamWriter(sink)
    write(writer)
    writer.flush()
    recording.bodies.append(Body(kind, bytes(sink.data)))


def _record_state(source: StateHandler, recording: Recording) -> None:
    reason = source.blocked()
    assert reason is None, f"the source has to be one that can migrate, but blocked() says: {reason}"
    assert source.needed() is True, "the source has to be one with something to send, but needed() does not say True"
    written(recording, "FULL", source.save)
    recording.description = source.describe()


def _record_live(case: HandlerCase, source: LiveHandler, context: KitContext, recording: Recording) -> None:
    def guest_writes() -> None:
        if case.change is not None:
            case.change(source)

    assert source.active() is True, "the source has to be one with something to send, but active() does not say True"
    try:
        written(recording, "START", lambda writer: source.setup(writer, context))
        guest_writes()
        for number in range(PASSES):
            left = pending(source)
            if left.total == 0:
                break
            written(recording, "PART", lambda writer: source.iterate(writer, case.budget))
            if number == 0:
                guest_writes()
        else:
            raise AssertionError(f"pending() still says {left} after {PASSES} calls of iterate(), with the guest idle")
        guest_writes()
        written(recording, "END", source.complete_precopy)
        left = pending(source)
        assert left.total == 0, f"pending() says {left} after complete_precopy(), which has to send everything"
    finally:
        source.cleanup()


def pending(source: LiveHandler) -> Pending:
    left = source.pending(EXACT)
    assert left.must_precopy >= 0 and left.can_postcopy >= 0, f"pending() gives {left}: bytes are never negative"
    return left


def _state(case: HandlerCase, handler: SectionHandler) -> object:
    if case.state is not None:
        return case.state(handler)
    assert isinstance(handler, StateHandler), "give the case of a LiveHandler a `state`, to compare the two sides"
    saved = Recording(handler.version_id)
    written(saved, "FULL", handler.save)
    return saved.bodies[0].data


@dataclass(slots=True)
class Replay:
    """What became of a stream on a destination.

    error   what load() raised, or None
    body    the number of the last body that load() was called for
    taken   the bytes of it that were consumed
    state   the destination's in the end, where everything was loaded as it was recorded
    """

    error: Exception | None = None
    body: int = 0
    taken: int = 0
    state: object = None


def replay(case: HandlerCase, recording: Recording, bodies: list[bytes], *, piece: int = 1 << 20) -> Replay:
    """Give a new destination these bodies, each followed by a footer but for one that was cut: nothing follows it."""
    sent = [body.data for body in recording.bodies]
    stream = b"".join(data + (FOOTER if len(data) == len(sent[i]) else b"") for i, data in enumerate(bodies))
    found = Replay()
    with opened(case, case.destination) as (destination, context):
        try:
            destination.load_setup(context)
            reader = StreamReader(Pieces(stream, piece), where=f"section {destination.key}")
            for found.body, data in enumerate(bodies):
                start = reader.offset
                found.error = loading_error(destination, reader, recording.version_id)
                found.taken = reader.offset - start
                if found.error is not None or found.taken != len(data) or reader.peek(len(FOOTER)) != FOOTER:
                    break
                reader.read(len(FOOTER), "the footer")
            else:
                found.state = _state(case, destination) if bodies == sent else None
        finally:
            destination.load_cleanup()
            destination.load_cleanup()
    return found


def loading_error(destination: SectionHandler, reader: StreamReader, version_id: int) -> Exception | None:
    try:
        destination.load(reader, version_id)
    except Exception as error:  # noqa: BLE001 - whatever a handler may raise is what is to be found out
        return error
    return None
