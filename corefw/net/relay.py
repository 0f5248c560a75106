"""Joins two transports: what arrives from one peer goes to the other, both ways where both have a return path.

The law: a stream is passed on whole or is seen to be broken. An end is passed on as an end; when one side breaks, the
other is aborted, never ended, so that a cut stream cannot look whole. Each direction ends by itself (half-close), in
either order; the relay is over when all have ended. Memory is one buffer for each direction, whoever is slow.

    waiting -> dialling -> relaying -> done
        any of them -> failed

Of the bytes it understands one thing: the destination's last word. SHUT 0 decides, once it was passed on to the source:
the guest has moved, and nothing that breaks afterwards makes a failure of it. A destination may close when it has said
that, with bytes unread that it has no use for; its last word is brought to the source first, and the rest of the stream
goes nowhere. A return path that ends without SHUT 0 is a failure, however orderly the ends were.

A QEMU that sends does not end its direction; it waits for SHUT on the return path, and closes. The destination closes
when it has said that, so that the end comes back first here; that is the other order.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from corefw.channel import Channel, Interrupt, Listener, Transport
from corefw.closing import Closing
from corefw.errors import ChannelError, Interrupted, MigfwError
from corefw.net.channelset import ChannelSet
from corefw.uri import MigrationUri
from corefw.wire.verdict import Overhearing, Verdict

BUFFER_SIZE: Final = 1 << 20
"""Bytes of one direction's buffer."""

LAST_WORDS: Final = 10.0
"""Seconds that a destination which takes no more may still talk. One that has gone is done with that at once."""

UNDECIDED: Final = {
    Verdict.OPEN: "the destination ended the return path without confirming that it has the guest",
    Verdict.REFUSED: "the destination reported that it failed to load the guest (its log says why)",
}
"""What both ends of a stream in good order do not make up for."""


class Phase(StrEnum):
    WAITING = "waiting"
    DIALLING = "dialling"
    RELAYING = "relaying"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class RelayProgress:
    """How far a relay is: bytes from FROM to TO and back again, seconds since FROM's peer came."""

    phase: Phase
    forward: int
    backward: int
    seconds: float


class _SideBroke(ChannelError):
    """Names the side, and what happened there."""


class _SourceBroke(_SideBroke):
    """It is the side that the bytes come from."""


class _SinkBroke(_SideBroke):
    """It is the side that the bytes go to."""


class _Pump:
    """One direction. `sent` counts the bytes that the receiving side has taken.

    hear   is called with all that comes, before it is passed on: whoever acts on it finds it heard
    """

    def __init__(
        self,
        source: tuple[str, Channel],
        sink: tuple[str, Channel],
        hear: Callable[[memoryview], None] = lambda _: None,
    ) -> None:
        self._source_side, self._source = source
        self._sink_side, self._sink = sink
        self._hear = hear
        self._buffer = memoryview(bytearray(BUFFER_SIZE))
        self.sent = 0

    def run(self) -> None:
        """Until the source's end. Raises _SourceBroke, _SinkBroke, Interrupted."""
        while count := self._receive():
            try:
                self._sink.send(self._buffer[:count])
            except MigfwError as error:
                raise _broken(_SinkBroke, self._sink_side, error) from error
            self.sent += count

    def end(self) -> None:
        """Pass the end on. Raises _SinkBroke, Interrupted."""
        try:
            self._sink.send_eof()
        except MigfwError as error:
            raise _broken(_SinkBroke, self._sink_side, error) from error

    def drain(self) -> None:
        """Receive until the source's end, for nobody. Raises _SourceBroke, Interrupted."""
        while self._receive():
            pass

    def _receive(self) -> int:
        try:
            count = self._source.receive_into(self._buffer)
        except MigfwError as error:
            raise _broken(_SourceBroke, self._source_side, error) from error
        self._hear(self._buffer[:count])
        return count


def _broken(kind: type[_SideBroke], side: str, error: MigfwError) -> MigfwError:
    if isinstance(error, Interrupted):
        return error
    return kind(f"the {side} side of the relay broke: {error}")


class Relay(Closing):
    """One relay, used once. `with` it, so that everything is closed.

    source      FROM: listened at; one peer is accepted
    target      TO: dialled when that peer has come
    uri         what FROM's peer has to dial (port 0 has become the real one); None before listen(), and for a source
                that nobody dials (exec:, fd:, file:)
    two_way     whether bytes flow back
    failure     why it failed, once the phase is FAILED

    Threads: run() blocks in the caller's; start() runs it in one of its own; all else may be called from any.
    """

    def __init__(self, source: Transport, target: Transport) -> None:
        """Raises UriError when one cannot wait at the source, or not dial the target."""
        source.check_incoming()
        target.check_outgoing()
        self.source: Final = source
        self.target: Final = target
        self.two_way: Final = source.features.return_path and target.features.return_path
        self.uri: MigrationUri | None = None
        self.failure: MigfwError | None = None
        self._interrupt = Interrupt()
        self._lock = threading.Lock()
        self._aborted = False
        self._phase = Phase.WAITING
        self._began: float | None = None
        self._ended: float | None = None
        self._listener: Listener | None = None
        self._channels = ChannelSet()
        self._forward: _Pump | None = None
        self._backward: _Pump | None = None
        self._answers = Overhearing()
        self._answers_lost = False
        self._failures: list[BaseException] = []
        self._thread: threading.Thread | None = None

    # -- use -------------------------------------------------------------------------------------------------------

    def listen(self) -> MigrationUri | None:
        """Begin to wait for FROM's peer; what it has to dial. Raises ChannelError."""
        if self._listener is None:
            self._listener = self.source.listen()
            self.uri = self._listener.uri if self.source.features.multi_channel else None
        return self.uri

    def run(self) -> None:
        """Relay until both directions have ended. Raises ChannelError (the side that broke, what the destination said),
        Interrupted."""
        try:
            self._try(self._relay)
            self._conclude()
        finally:
            self._ended = time.monotonic()
            self._close_ends()

    def start(self) -> None:
        """listen(), and run() in a thread; wait() tells when it is over and `failure` how. Raises ChannelError."""
        self.listen()
        self._thread = threading.Thread(target=self._run_quietly, name="migfw-relay", daemon=True)
        self._thread.start()

    def wait(self, seconds: float | None = None) -> bool:
        """After start(): True when it is over, False after `seconds`."""
        assert self._thread, "wait() before start()"
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def abort(self) -> None:
        """Break both sides off; run() raises Interrupted. Idempotent."""
        with self._lock:
            if not self._aborted:
                self._aborted = True
                self._interrupt.set()
        self._channels.abort()

    def progress(self) -> RelayProgress:
        now = self._ended or time.monotonic()
        return RelayProgress(
            self._phase,
            self._forward.sent if self._forward else 0,
            self._backward.sent if self._backward else 0,
            now - self._began if self._began else 0.0,
        )

    def close(self) -> None:
        """End it, whatever it does, and let go of everything. Idempotent; never raises."""
        with self._lock:
            closed, self._aborted = self._aborted, True
            if not closed:
                self._interrupt.set()
        self._channels.abort()
        if self._thread:
            self._thread.join()
        self._close_ends()
        self._interrupt.close()

    # -- work ------------------------------------------------------------------------------------------------------

    def _meet(self) -> tuple[Channel, Channel]:
        """Both channels, FROM's first. The listener is closed then: there is one peer."""
        assert self._listener
        source = self._channels.add(self._listener.accept(self._interrupt))
        self._listener.close()
        self._began = time.monotonic()
        self._phase = Phase.DIALLING
        target = self._channels.add(self.target.connect(self._interrupt))
        self._phase = Phase.RELAYING
        return source, target

    def _relay(self) -> None:
        self.listen()
        source, target = self._meet()
        here, there = ("FROM", source), ("TO", target)
        self._forward = forward = _Pump(here, there)
        if not self.two_way:
            forward.run()
            return forward.end()
        self._backward = backward = _Pump(there, here, self._answers.hear)
        answering = threading.Thread(target=self._try, args=(self._bring_back, backward), name="migfw-relay-back")
        answering.start()
        self._try(self._pass_on, forward, answering)
        return answering.join()

    def _pass_on(self, forward: _Pump, answering: threading.Thread) -> None:
        """FROM's direction, in run()'s thread."""
        try:
            forward.run()
            forward.end()
        except _SinkBroke:
            # Why it takes no more it may have said, and that may be still on its way to us and to the source.
            answering.join(LAST_WORDS)
            if not self._accepted:
                raise
            forward.drain()

    def _bring_back(self, backward: _Pump) -> None:
        """TO's direction, in a thread of its own."""
        try:
            backward.run()
        except _SinkBroke as broke:
            # A source that takes no answers may have sent all it has, and gone: its own direction tells. The
            # destination is not cut off because nobody hears what it says.
            self._answers_lost = True
            self._failures.append(broke)
            backward.drain()
        except _SourceBroke:
            if not self._accepted:
                raise
        with contextlib.suppress(_SinkBroke):  # a source that has gone loses nothing when it is not told of the end
            backward.end()

    @property
    def _accepted(self) -> bool:
        """Whether the destination has the guest, and the source was told."""
        return self._answers.verdict is Verdict.ACCEPTED and not self._answers_lost

    def _forgiven(self, failure: BaseException) -> bool:
        return self._accepted and isinstance(failure, _SideBroke)

    def _try(self, work: Callable[..., None], *arguments: object) -> None:
        """What goes wrong is kept, and seen as a break by both sides, whatever it was."""
        try:
            work(*arguments)
        except BaseException as error:  # noqa: BLE001 - _conclude raises it
            self._failures.append(error)
            if not self._forgiven(error):
                self._channels.abort()

    def _conclude(self) -> None:
        """Both directions are over: raise why it failed, if it did."""
        why = self._why_failed()
        if why is None:
            self._phase = Phase.DONE
            return
        self.failure = why if isinstance(why, MigfwError) else MigfwError(f"the relay failed: {why!r}")
        self._phase = Phase.FAILED
        raise why

    def _why_failed(self) -> BaseException | None:
        """The first one broke something; what was said after it follows from that. The destination knows it best."""
        said = UNDECIDED.get(self._answers.verdict)
        for failure in self._failures:
            if not self._forgiven(failure):
                refused = self._answers.verdict is Verdict.REFUSED and isinstance(failure, _SideBroke)
                return ChannelError(said) if refused else failure
        return ChannelError(said) if said else None

    def _run_quietly(self) -> None:
        with contextlib.suppress(MigfwError):  # it is in `failure`
            self.run()

    def _close_ends(self) -> None:
        if self._listener:
            self._listener.close()
        self._channels.close()
