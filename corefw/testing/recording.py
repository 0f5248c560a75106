"""Tools of the contract kit for sections: one migration of one section, without an engine.

A recording holds the bodies exactly as a saver wrote them. A replay passes them to a loader through one reader, each
with a footer as in a stream, and always cleans up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from corefw.channel import Channel, Interrupt
from corefw.errors import ChannelError, MachineError
from corefw.section import (
    IncomingContext,
    LiveSaver,
    OutgoingContext,
    Pending,
    RamSaver,
    Section,
    SectionLoader,
    SectionSaver,
    StateSaver,
)
from corefw.settings import Settings
from corefw.wire.constants import BE32, SectionType
from corefw.wire.stream import MemorySink, StreamReader, StreamWriter

FOOTER: Final = bytes([SectionType.FOOTER]) + BE32.pack(7)
"""Follows every body, as in a stream. A loader that reads too much consumes some of it."""

PASSES: Final = 10_000
READS_AFTER_END: Final = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class SectionCase:
    """The section to check.

    saver     makes a saver that has something to send; a new one, with the same state, each time
    loader    makes the loader of a waiting destination; a new one each time
    state     the state of a saver or loader, which has to be equal on both sides at the end: a value with ==
    change    writes as the guest would; called on a LiveSaver between passes
    close     releases what saver() or loader() created in addition
    budget    bytes that iterate() is given
    samples   at most this many places in the stream are cut and damaged
    memory    bytes of memory that a damaged stream may make a loader take, beside what the stream itself takes
    """

    saver: Callable[[], SectionSaver]
    loader: Callable[[], SectionLoader]
    state: Callable[[Any], object]
    change: Callable[[Any], object] | None = None
    close: Callable[[Any], object] | None = None
    settings: Callable[[], Settings] = Settings
    budget: int = 64 << 10
    samples: int = 300
    memory: int = 64 << 20


class KitContext(OutgoingContext, IncomingContext):
    """The context on either side: one channel, and a guest that cannot be throttled."""

    def __init__(self, settings: Settings, interrupt: Interrupt) -> None:
        self.settings = settings
        self.interrupt = interrupt
        self.stream_capabilities = frozenset()
        self.messages: list[tuple[int, bytes]] = []
        self.commands: list[tuple[int, bytes]] = []

    def open_channel(self) -> Channel:
        raise ChannelError("this transport has only one channel")

    def accept_channel(self) -> Channel:
        raise ChannelError("this transport has only one channel")

    def send_command(self, number: int, payload: bytes) -> None:
        self.commands.append((number, payload))

    def throttle_guest(self, percent: int) -> None:
        raise MachineError(f"this guest cannot be throttled by {percent} %")

    def send_return_message(self, message: int, body: bytes) -> None:
        self.messages.append((message, body))


class Pieces:
    """A Source that returns at most `size` bytes at a time, and detects endless reads after the end."""

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
    """The bytes between a section's header and its footer."""

    kind: str
    data: bytes

    def __str__(self) -> str:
        return f"the {self.kind} body of {len(self.data)} bytes"


@dataclass(slots=True)
class Recording:
    """A whole section as its saver wrote it. `description` is a StateSaver's."""

    version_id: int
    bodies: list[Body] = field(default_factory=list)
    description: dict[str, Any] | None = None
    state: object = None

    @property
    def size(self) -> int:
        return sum(len(body.data) for body in self.bodies)


@contextmanager
def opened(case: SectionCase, make: Callable[[], Section]) -> Iterator[tuple[Any, KitContext]]:
    """A new saver or loader and its context, cleared away at the end."""
    with ExitStack() as mine:
        interrupt = Interrupt()
        mine.callback(interrupt.close)
        section = make()
        if case.close is not None:
            mine.callback(case.close, section)
        yield section, KitContext(case.settings(), interrupt)


Outcome = Literal["committed", "abandoned"]


def record(case: SectionCase, *, outcome: Outcome = "committed") -> Recording:
    """Let a saver send its section, and report the outcome to it. Raises AssertionError if it does not finish."""
    with opened(case, case.saver) as (saver, context):
        recording = Recording(saver.version_id)
        if isinstance(saver, StateSaver):
            _record_state(saver, recording)
        else:
            _record_live(case, saver, context, recording)
        recording.state = case.state(saver)
        tell(saver, outcome)
        return recording


def tell(section: Section, outcome: Outcome) -> None:
    """Report the outcome of the migration to a section. Raises AssertionError if that fails."""
    try:
        section.committed() if outcome == "committed" else section.abandoned()
    except Exception as error:
        raise AssertionError(f"{outcome}() raised {type(error).__name__}: {error}") from error


def written(recording: Recording, kind: str, write: Callable[[StreamWriter], object]) -> None:
    """Record what `write` writes as another body."""
    sink = MemorySink()
    writer = StreamWriter(sink)
    write(writer)
    writer.flush()
    recording.bodies.append(Body(kind, bytes(sink.data)))


def _record_state(saver: StateSaver, recording: Recording) -> None:
    reason = saver.blocked()
    assert reason is None, f"the saver has to be one that can migrate, but blocked() says: {reason}"
    assert saver.needed() is True, "the saver has to be one with something to send, but needed() does not say True"
    written(recording, "FULL", saver.save)
    recording.description = saver.describe()


def _record_live(case: SectionCase, saver: LiveSaver, context: KitContext, recording: Recording) -> None:
    def guest_writes() -> None:
        if case.change is not None:
            case.change(saver)

    assert saver.active() is True, "the saver has to be one with something to send, but active() does not say True"
    try:
        written(recording, "START", lambda writer: saver.setup(writer, context))
        guest_writes()
        for number in range(PASSES):
            left = pending(saver)
            if left.total == 0:
                break
            written(recording, "PART", lambda writer: saver.iterate(writer, case.budget))
            if number == 0:
                guest_writes()
        else:
            raise AssertionError(
                f"pending_exact() still says {left} after {PASSES} calls of iterate(), with the guest idle"
            )
        guest_writes()
        written(recording, "END", saver.complete)
        left = pending(saver)
        assert left.total == 0, f"pending_exact() says {left} after complete(), which has to send everything"
    finally:
        saver.cleanup()


def pending(saver: LiveSaver) -> Pending:
    """Bytes left after a harvest. Also checks the estimates before and after it."""
    passes = _passes(saver)
    known = saver.pending_estimate()
    assert saver.pending_estimate() == known, "pending_estimate() gives two answers in a row"
    assert _passes(saver) == passes, "pending_estimate() harvests the dirty log, which only pending_exact() may do"
    left = saver.pending_exact()
    assert passes is None or _passes(saver) == passes + 1, "pending_exact() begins no pass (dirty_sync_count)"
    known = saver.pending_estimate()
    assert left.must_precopy >= 0 and left.can_postcopy >= 0, f"pending_exact() gives {left}: bytes are never negative"
    assert known == left, f"pending_exact() gives {left}, but pending_estimate() right after it {known}"
    return left


def _passes(saver: LiveSaver) -> int | None:
    """Harvests so far; None if the saver does not count them."""
    return saver.ram_statistics().dirty_sync_count if isinstance(saver, RamSaver) else None


@dataclass(slots=True)
class Replay:
    """The result of replaying a stream.

    error   what load() raised, or None
    body    the number of the last body that load() was called for
    taken   the bytes of it that were consumed
    state   the loader's in the end, if everything was loaded as it was recorded
    """

    error: Exception | None = None
    body: int = 0
    taken: int = 0
    state: object = None


def replay(
    case: SectionCase,
    recording: Recording,
    bodies: list[bytes],
    *,
    piece: int = 1 << 20,
    outcome: Outcome | None = None,
) -> Replay:
    """Pass these bodies to a new loader, each followed by a footer, except one that was cut."""
    sent = [body.data for body in recording.bodies]
    stream = b"".join(data + (FOOTER if len(data) == len(sent[i]) else b"") for i, data in enumerate(bodies))
    found = Replay()
    with opened(case, case.loader) as (loader, context):
        try:
            loader.setup(context)
            reader = StreamReader(Pieces(stream, piece), where=f"section {loader.key}")
            for found.body, data in enumerate(bodies):
                start = reader.offset
                found.error = loading_error(loader, reader, recording.version_id)
                found.taken = reader.offset - start
                if found.error is not None or found.taken != len(data) or reader.peek(len(FOOTER)) != FOOTER:
                    break
                reader.read(len(FOOTER), "the footer")
            else:
                found.state = case.state(loader) if bodies == sent else None
        finally:
            loader.cleanup()
            loader.cleanup()
        tell(loader, outcome or ("committed" if found.error is None and bodies == sent else "abandoned"))
    return found


def loading_error(loader: SectionLoader, reader: StreamReader, version_id: int) -> Exception | None:
    try:
        loader.load(reader, version_id)
    except Exception as error:  # noqa: BLE001 - whatever a loader may raise is what is to be found out
        return error
    return None
