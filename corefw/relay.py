"""Joins two transports: what arrives from one peer goes to the other, both ways where both have a return path.

The law: a stream is passed on whole or is seen to be broken. An end is passed on as an end; when one side breaks, the
other is aborted, never ended, so that a cut stream cannot look whole. Each direction ends by itself (half-close), in
either order; the relay is over when all have ended. Memory is one buffer for each direction, whoever is slow.

    waiting -> dialling -> relaying -> done
        any of them -> failed

A QEMU that sends does not end its direction; it waits for SHUT on the return path, and closes. The destination closes
when it has said that, so that the end comes back first here; that is the other order.
"""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType
from typing import Final, Self

from corefw.channel import Channel, Interrupt, Listener, Transport
from corefw.errors import ChannelError, Interrupted, MigfwError, UsageError
from corefw.uri import MigrationUri

BUFFER_SIZE: Final = 1 << 20
"""Bytes of one direction's buffer."""


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


class _Pump:
    """One direction. `sent` counts the bytes that the receiving side has taken."""

    def __init__(self, source: tuple[str, Channel], sink: tuple[str, Channel], *, forward: bool) -> None:
        self._source_side, self._source = source
        self._sink_side, self._sink = sink
        self._forward = forward
        self.sent = 0

    def run(self) -> None:
        """Until the source's end, which is passed on. Raises ChannelError naming the side that broke."""
        buffer = memoryview(bytearray(BUFFER_SIZE))
        while True:
            try:
                count = self._source.receive_into(buffer)
            except MigfwError as error:
                raise _broken(self._source_side, error) from error
            try:
                if count == 0:
                    return self._end()
                self._sink.send(buffer[:count])
            except MigfwError as error:
                raise _broken(self._sink_side, error) from error
            self.sent += count

    def _end(self) -> None:
        try:
            self._sink.send_eof()
        except Interrupted:
            raise
        except ChannelError:
            # A source that ended its stream and went away loses nothing when it is not told of the answer's end.
            if self._forward:
                raise


def _broken(side: str, error: MigfwError) -> MigfwError:
    if isinstance(error, Interrupted):
        return error
    return ChannelError(f"the {side} side of the relay broke: {error}")


class Relay:
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
        if not source.features.incoming:
            raise UsageError(f"cannot relay from '{source.uri}': that transport only dials out")
        if not target.features.outgoing:
            raise UsageError(f"cannot relay to '{target.uri}': that transport only receives")
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
        self._channels: list[Channel] = []
        self._forward: _Pump | None = None
        self._backward: _Pump | None = None
        self._thread: threading.Thread | None = None

    # -- use -------------------------------------------------------------------------------------------------------

    def listen(self) -> MigrationUri | None:
        """Begin to wait for FROM's peer; what it has to dial. Raises ChannelError."""
        if self._listener is None:
            self._listener = self.source.listen()
            self.uri = self._listener.uri if self.source.features.multi_channel else None
        return self.uri

    def run(self) -> None:
        """Relay until both directions have ended. Raises ChannelError naming the side that broke, Interrupted."""
        try:
            self.listen()
            self._relay(*self._meet())
            self._phase = Phase.DONE
        except BaseException as error:  # Ctrl-C too must not look like an end to anybody
            self._abort_channels()
            self.failure = error if isinstance(error, MigfwError) else MigfwError(f"the relay failed: {error!r}")
            self._phase = Phase.FAILED
            raise
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
        self._abort_channels()

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
        self._abort_channels()
        if self._thread:
            self._thread.join()
        self._close_ends()
        self._interrupt.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- work ------------------------------------------------------------------------------------------------------

    def _meet(self) -> tuple[Channel, Channel]:
        """Both channels, FROM's first. The listener is closed then: there is one peer."""
        assert self._listener
        source = self._keep(self._listener.accept(self._interrupt))
        self._listener.close()
        self._began = time.monotonic()
        self._phase = Phase.DIALLING
        target = self._keep(self.target.connect(self._interrupt))
        self._phase = Phase.RELAYING
        return source, target

    def _relay(self, source: Channel, target: Channel) -> None:
        here, there = ("FROM", source), ("TO", target)
        self._forward = _Pump(here, there, forward=True)
        if not self.two_way:
            return self._forward.run()
        self._backward = _Pump(there, here, forward=False)
        failures: list[BaseException] = []
        answering = threading.Thread(target=self._pump, args=(self._backward, failures), name="migfw-relay-back")
        answering.start()
        self._pump(self._forward, failures)
        answering.join()
        if failures:
            # The first one broke something; what the other direction then says follows from that.
            raise failures[0]
        return None

    def _pump(self, pump: _Pump, failures: list[BaseException]) -> None:
        try:
            pump.run()
        except BaseException as error:  # noqa: BLE001 - _relay raises it
            failures.append(error)
            self._abort_channels()

    def _run_quietly(self) -> None:
        with contextlib.suppress(MigfwError):  # it is in `failure`
            self.run()

    def _keep(self, channel: Channel) -> Channel:
        with self._lock:
            self._channels.append(channel)
            aborted = self._aborted
        if aborted:
            channel.abort()
        return channel

    def _abort_channels(self) -> None:
        with self._lock:
            channels = tuple(self._channels)
        for channel in channels:
            channel.abort()

    def _close_ends(self) -> None:
        if self._listener:
            self._listener.close()
        for channel in self._channels:
            channel.close()
