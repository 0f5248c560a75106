"""Where a postcopy's destination waits for its source to come back, and how it recognizes it.

From RUN on the destination listens: at the address over which the guest came, until migrate-recover gives another one.
A source may come back before the destination has noticed that the connection broke. Each connection is examined in a
thread of its own, so one that stays silent keeps no other waiting; the first that shows that it is the source wins, and
all others are closed with a warning.

Threads: one that accepts, one for each connection; every method may be called from any.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Final

from corefw.channel import Channel, Interrupt, Listener
from corefw.engine.connection import Connection
from corefw.engine.identity import check_source
from corefw.errors import FOREIGN, ChannelError, Interrupted, MigfwError
from corefw.settings import Settings

log = logging.getLogger(__name__)

Relisten = Callable[[], Listener]
"""Listens again at an address. Raises ChannelError."""

PATIENCE: Final = 10.0
"""Seconds that a connection has to show that it is the source."""
MOST: Final = 16
"""Connections that are examined at the same time; the oldest makes room for one more."""
RETRY: Final = 1.0
"""Seconds between two attempts to listen again."""


class Readmission:
    """Waits for the source of one migration."""

    def __init__(
        self,
        settings: Settings,
        interrupt: Interrupt,
        take_channel: Callable[[Channel], bool],
        on_found: Callable[[], None],
    ) -> None:
        """`take_channel` has a channel if it belongs to the present connection, and returns whether. `on_found` is
        called when the source has come back: its former connection has broken. From threads of this."""
        self._settings = settings
        self._interrupt = interrupt
        self._take_channel = take_channel
        self._on_found = on_found
        self._changed = threading.Condition()  # guards all that follows
        self._wake = Interrupt()
        self._listener: Listener | None = None
        self._relisten: Relisten | None = None
        self._suspended = False
        self._paused = False
        self._ended = False
        self._secret: bytes | None = None
        self._candidates: list[Connection] = []
        self._chosen: Connection | None = None  # it is the source
        self._found: Connection | None = None  # and await_source() may return it
        self._thread: threading.Thread | None = None

    # -- where it listens ------------------------------------------------------------------------------------------

    def listen_at(self, listener: Listener, relisten: Relisten | None) -> None:
        """Listen here from now on, and nowhere else. `relisten` is None where no second connection can come."""
        with self._changed:
            before, self._listener = self._listener, listener
            self._relisten, self._suspended = relisten, False
            self._wake_up()
        if before is not None and before is not listener:
            before.close()

    def inherit(self, listener: Listener, relisten: Relisten) -> None:
        """Listen where the migration did until now; if suspend() was called meanwhile, only close that."""
        with self._changed:
            self._relisten = relisten
            if not self._suspended:
                self._listener = listener
                self._wake_up()
                return
        listener.close()

    def listen_by(self, relisten: Relisten | None) -> None:
        """Listen where this does, as soon as it can; None: nowhere."""
        with self._changed:
            self._relisten = relisten
            self._wake_up()

    @property
    def relisten(self) -> Relisten | None:
        """Listens again at the present address; None where no second connection can come."""
        return self._relisten

    def suspend(self) -> None:
        """Listen nowhere until listen_at() or resume() is called."""
        with self._changed:
            before, self._listener = self._listener, None
            self._suspended = True
            self._wake_up()
        if before is not None:
            before.close()

    def resume(self) -> None:
        """Listen again where it did before suspend()."""
        with self._changed:
            self._suspended = False
            self._wake_up()

    @property
    def listener(self) -> Listener | None:
        """The present one, for the source's further channels; None if it listens nowhere."""
        return self._listener

    # -- whom it waits for -----------------------------------------------------------------------------------------

    def begin(self, secret: bytes | None, *, paused: bool) -> None:
        """Wait for the source that knows this secret. Without one it can only be recognized while it is `paused`: until
        then all connections are closed. If it is waited for already, only note that."""
        with self._changed:
            self._paused = paused
            self._secret = secret
            if self._thread is None and not self._ended:
                self._thread = threading.Thread(target=self._run, name="readmission", daemon=True)
                self._thread.start()

    def await_source(self) -> Connection:
        """Block until it has come back. Raises Interrupted after end()."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self._found is not None)
            if self._ended:
                raise Interrupted("cancelled")
            found, self._found, self._chosen = self._found, None, None
            self._paused = False
        assert found is not None
        return found

    def end(self) -> None:
        """Wait no more, and end await_source(). Idempotent; does not raise."""
        with self._changed:
            self._ended = True
            self._wake_up()

    def close(self) -> None:
        """end(), and close everything. Idempotent; does not raise."""
        self.end()
        if self._thread is not None:
            self._thread.join()
        with self._changed:
            listener, self._listener = self._listener, None
            found, self._found = self._found, None
        if listener is not None:
            listener.close()
        if found is not None:
            found.close()

    # -- the thread that accepts -----------------------------------------------------------------------------------

    def _wake_up(self) -> None:
        self._wake.set()
        self._changed.notify_all()

    def _run(self) -> None:
        while (waiting := self._next_listener()) is not None:
            listener, wake = waiting
            try:
                self._receive(listener.accept(wake))
            except Interrupted:
                pass
            except ChannelError as error:
                self._drop(listener, error)
            except FOREIGN as bug:
                log.exception("cannot wait for the source")
                self._drop(listener, ChannelError(f"internal error: {type(bug).__name__}"))
        self._dismiss()

    def _dismiss(self) -> None:
        """Examine no connection any more."""
        with self._changed:
            others, self._candidates = self._candidates, []
        for one in others:
            one.abort()

    def _next_listener(self) -> tuple[Listener, Interrupt] | None:
        """The one to accept from, with what wakes that; None when there is nothing more to wait for."""
        complained = False
        while True:
            with self._changed:
                if self._ended:
                    return None
                self._wake = Interrupt()
                if self._listener is not None:
                    return self._listener, self._wake
                relisten = self._relisten
                if relisten is None or self._suspended or complained:
                    self._changed.wait(RETRY if complained else None)
                    complained = False
                    continue
            try:
                listener = relisten()
            except MigfwError as error:
                log.warning("cannot listen for the source at present: %s (trying again)", error)
                complained = True
                continue
            self._take(listener, relisten)

    def _take(self, listener: Listener, relisten: Relisten) -> None:
        """Listen here, unless another address was given meanwhile."""
        with self._changed:
            wanted = self._listener is None and not self._suspended and self._relisten is relisten
            if wanted:
                self._listener = listener
        if not wanted:
            listener.close()

    def _drop(self, listener: Listener, error: ChannelError) -> None:
        """Nothing more comes from this one."""
        with self._changed:
            mine = self._listener is listener
            if mine:
                self._listener = None
        if mine:
            log.warning("no longer listening for the source: %s", error)
            listener.close()

    # -- the threads that examine ----------------------------------------------------------------------------------

    def _receive(self, channel: Channel) -> None:
        if self._take_channel(channel):
            return
        with self._changed:
            unwanted = "it listens no more" if self._suspended else ""
            if self._secret is None and not self._paused:
                unwanted = "the one that the guest comes over has not broken"
            oldest = self._candidates.pop(0) if len(self._candidates) >= MOST else None
        if oldest is not None:
            oldest.abort()
        if unwanted:
            log.warning("closed a connection from %s: %s", channel.peer, unwanted)
            channel.close()
            return
        connection = Connection(channel, self._settings, self._interrupt)
        with self._changed:
            self._candidates.append(connection)
        threading.Thread(target=self._examine, args=(connection,), name="readmission check", daemon=True).start()

    def _examine(self, connection: Connection) -> None:
        late = threading.Timer(PATIENCE, connection.abort)
        late.daemon = True
        late.start()
        peer, problem = connection.channel.peer, ""
        try:
            check_source(connection.reader, connection.channel, self._secret)
            connection.from_migfw = self._secret is not None
        except Interrupted:
            problem = f"it did not show within {PATIENCE:.0f} s that it is the source of this migration"
        except MigfwError as error:
            problem = str(error).removeprefix(f"{peer}: ")
        except FOREIGN as bug:
            log.exception("a connection from %s could not be examined", peer)
            problem = f"internal error: {type(bug).__name__}"
        late.cancel()
        with self._changed:
            wanted = connection in self._candidates and self._chosen is None
            wanted = wanted and not self._ended and not self._suspended
            if connection in self._candidates:
                self._candidates.remove(connection)
            if wanted and not problem:
                self._chosen = connection
        if not wanted or problem:
            if wanted:
                log.warning("closed a connection from %s: %s (still waiting for the source)", peer, problem)
            connection.close()
            return
        self._dismiss()
        self._on_found()
        with self._changed:
            ended = self._ended
            if not ended:  # close() closes it from here on
                self._found = connection
                self._changed.notify_all()
        if ended:
            connection.close()
