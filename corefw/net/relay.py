"""Join two transports: forward what arrives from one peer to the other, both ways if both have a return path.

Invariant: a cut stream cannot look whole. The end of a stream is forwarded as an end; when one side breaks, the other
is aborted. Each direction ends separately (half-close), in either order, and the relay is over when all have ended.
Each direction has one buffer.

    waiting -> dialling -> relaying -> done
        any of them -> failed

A relay understands a single message of the stream: SHUT, by which the destination reports the outcome. Once SHUT 0 has
been forwarded to the source the guest has moved, and nothing that breaks afterwards makes the relay fail. The
destination may then close with bytes unread that it does not need; SHUT is forwarded first, and the rest of the stream
is discarded. A return path that ends without SHUT 0 is a failure, even if both ends were clean.

A QEMU that sends does not end its direction: it waits for SHUT and closes. So the return path ends first.
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
from corefw.wire.outcome import Outcome, OutcomeMonitor

BUFFER_SIZE: Final = 1 << 20
"""Bytes of each direction's buffer."""

ANSWER_SECONDS: Final = 10.0
"""How long to wait for the rest of the return path after sending to the destination has failed."""

UNDECIDED: Final = {
    Outcome.OPEN: "the destination ended the return path without confirming that it has the guest",
    Outcome.REFUSED: "the destination reported that it failed to load the guest (its log says why)",
}
"""Outcomes with which the relay fails although both streams ended cleanly."""


class Phase(StrEnum):
    WAITING = "waiting"
    DIALLING = "dialling"
    RELAYING = "relaying"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class RelayProgress:
    """Bytes forwarded from FROM to TO and back, and seconds since FROM's peer connected."""

    phase: Phase
    forward: int
    backward: int
    seconds: float


class _SideBroke(ChannelError):
    """The message names the side and what happened there."""


class _SourceBroke(_SideBroke):
    """Receiving failed."""


class _SinkBroke(_SideBroke):
    """Sending failed."""


class _Pump:
    """One direction. `sent` counts the bytes that were sent on.

    watch   called with everything that arrives, before it is sent on
    """

    def __init__(
        self,
        source: tuple[str, Channel],
        sink: tuple[str, Channel],
        watch: Callable[[memoryview], None] = lambda _: None,
    ) -> None:
        self._source_side, self._source = source
        self._sink_side, self._sink = sink
        self._watch = watch
        self._buffer = memoryview(bytearray(BUFFER_SIZE))
        self.sent = 0

    def run(self) -> None:
        """Forward until the end of the stream. Raises _SourceBroke, _SinkBroke, Interrupted."""
        while count := self._receive():
            try:
                self._sink.send(self._buffer[:count])
            except MigfwError as error:
                raise _broken(_SinkBroke, self._sink_side, error) from error
            self.sent += count

    def end(self) -> None:
        """Forward the end. Raises _SinkBroke, Interrupted."""
        try:
            self._sink.send_eof()
        except MigfwError as error:
            raise _broken(_SinkBroke, self._sink_side, error) from error

    def drain(self) -> None:
        """Receive until the end of the stream, and discard it. Raises _SourceBroke, Interrupted."""
        while self._receive():
            pass

    def _receive(self) -> int:
        try:
            count = self._source.receive_into(self._buffer)
        except MigfwError as error:
            raise _broken(_SourceBroke, self._source_side, error) from error
        self._watch(self._buffer[:count])
        return count


def _broken(kind: type[_SideBroke], side: str, error: MigfwError) -> MigfwError:
    if isinstance(error, Interrupted):
        return error
    return kind(f"the {side} side of the relay broke: {error}")


class Relay(Closing):
    """A single relay. Use it with `with`, so that everything is closed.

    source      FROM: the relay listens there and accepts one peer
    target      TO: dialled once that peer has connected
    uri         what FROM's peer has to dial, with the real port; None before listen(), and for a source that cannot be
                dialled (exec:, fd:, file:)
    two_way     whether there is a return path
    failure     why it failed, once the phase is FAILED

    Threads: run() blocks; start() runs it in a thread of its own. Everything else may be called from any thread.
    """

    def __init__(self, source: Transport, target: Transport) -> None:
        """Raises UriError if the source cannot listen or the target cannot be dialled."""
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
        self._monitor = OutcomeMonitor()
        self._answers_lost = False
        self._failures: list[BaseException] = []
        self._thread: threading.Thread | None = None

    # -- use -------------------------------------------------------------------------------------------------------

    def listen(self) -> MigrationUri | None:
        """Start to listen at FROM. Returns what its peer has to dial. Raises ChannelError."""
        if self._listener is None:
            self._listener = self.source.listen()
            self.uri = self._listener.uri if self.source.features.multi_channel else None
        return self.uri

    def run(self) -> None:
        """Relay until both directions have ended. Raises Interrupted, or ChannelError that names the side that broke or
        what the destination reported."""
        try:
            self._try(self._relay)
            self._conclude()
        finally:
            self._ended = time.monotonic()
            self._close_ends()

    def start(self) -> None:
        """Call listen(), and run() in a thread: see wait() and `failure`. Raises ChannelError."""
        self.listen()
        self._thread = threading.Thread(target=self._run_quietly, name="migfw-relay", daemon=True)
        self._thread.start()

    def wait(self, seconds: float | None = None) -> bool:
        """After start(): True once the relay is over, False after `seconds`."""
        assert self._thread, "wait() before start()"
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def abort(self) -> None:
        """Abort both sides; run() raises Interrupted. Idempotent."""
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
        """Abort the relay if it still runs, and release everything. Idempotent; never raises."""
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

    def _connect(self) -> tuple[Channel, Channel]:
        """Accept FROM's peer, close the listener, and dial TO. Returns both channels."""
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
        source, target = self._connect()
        here, there = ("FROM", source), ("TO", target)
        self._forward = forward = _Pump(here, there)
        if not self.two_way:
            forward.run()
            return forward.end()
        self._backward = backward = _Pump(there, here, self._monitor.feed)
        answering = threading.Thread(target=self._try, args=(self._pass_back, backward), name="migfw-relay-back")
        answering.start()
        self._try(self._pass_on, forward, answering)
        return answering.join()

    def _pass_on(self, forward: _Pump, answering: threading.Thread) -> None:
        """Forward FROM's stream, in run()'s thread."""
        try:
            forward.run()
            forward.end()
        except _SinkBroke:
            # The destination may have said why it takes no more. Wait until that has reached the source.
            answering.join(ANSWER_SECONDS)
            if not self._accepted:
                raise
            forward.drain()

    def _pass_back(self, backward: _Pump) -> None:
        """Forward the return path, in a thread of its own."""
        try:
            backward.run()
        except _SinkBroke as broke:
            # A source that does not read the answers may have sent everything and closed; the other direction shows
            # whether it has. Go on for the destination's sake.
            self._answers_lost = True
            self._failures.append(broke)
            backward.drain()
        except _SourceBroke:
            if not self._accepted:
                raise
        with contextlib.suppress(_SinkBroke):  # the source has already closed
            backward.end()

    @property
    def _accepted(self) -> bool:
        """Whether the destination has the guest and the source has been told so."""
        return self._monitor.outcome is Outcome.ACCEPTED and not self._answers_lost

    def _no_longer_matters(self, failure: BaseException) -> bool:
        return self._accepted and isinstance(failure, _SideBroke)

    def _try(self, work: Callable[..., None], *arguments: object) -> None:
        """Run a direction. Keep its error, and abort both sides unless it no longer matters."""
        try:
            work(*arguments)
        except BaseException as error:  # noqa: BLE001 - _conclude raises it
            self._failures.append(error)
            if not self._no_longer_matters(error):
                self._channels.abort()

    def _conclude(self) -> None:
        """Set the final phase, and raise the reason of a failure."""
        why = self._why_failed()
        if why is None:
            self._phase = Phase.DONE
            return
        self.failure = why if isinstance(why, MigfwError) else MigfwError(f"the relay failed: {why!r}")
        self._phase = Phase.FAILED
        raise why

    def _why_failed(self) -> BaseException | None:
        """The first failure, which caused the others; or, better, what the destination reported."""
        said = UNDECIDED.get(self._monitor.outcome)
        for failure in self._failures:
            if not self._no_longer_matters(failure):
                refused = self._monitor.outcome is Outcome.REFUSED and isinstance(failure, _SideBroke)
                return ChannelError(said) if refused else failure
        return ChannelError(said) if said else None

    def _run_quietly(self) -> None:
        with contextlib.suppress(MigfwError):  # run() has set `failure`
            self.run()

    def _close_ends(self) -> None:
        if self._listener:
            self._listener.close()
        self._channels.close()
