"""Where a postcopy's destination waits for its source to come back, and how it recognizes it.

From RUN on the destination listens: at the address over which the guest came, until migrate-recover gives another one.
A source may come back before the destination has noticed that the connection broke. Every connection is examined; the
first that shows that it is the source wins, and all others are closed with a warning. What shows that it is the channel
of requested pages is passed on.

Threads: one that accepts, one for each connection; every method may be called from any.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Final

from corefw.channel import Channel, Interrupt, Listener
from corefw.engine.connection import Connection
from corefw.engine.examination import Examination, Examinations
from corefw.engine.identity import Purpose, check_first_command, check_source
from corefw.engine.preempt import RequestedReceiver
from corefw.errors import FOREIGN, ChannelError, Interrupted, MigfwError, StreamError
from corefw.settings import Settings

log = logging.getLogger(__name__)

Relisten = Callable[[], Listener]
"""Listens again at an address. Raises ChannelError."""

RETRY: Final = 1.0
"""Seconds between two attempts to listen again."""
LOOK: Final = 0.05
"""Seconds between two looks at whether a silent connection may be the channel of requested pages."""


class Readmission:
    """Waits for the source of one migration."""

    def __init__(
        self,
        settings: Settings,
        interrupt: Interrupt,
        requested: Callable[[], RequestedReceiver | None],
        on_found: Callable[[], None],
    ) -> None:
        """`requested` returns what reads the requested pages of the present connection; None if they have no channel of
        their own. `on_found` is called when the source has come back: its former connection has broken. From threads of
        this."""
        self._settings = settings
        self._interrupt = interrupt
        self._requested = requested
        self._on_found = on_found
        self._changed = threading.Condition()  # guards all that follows
        self._wake = Interrupt()
        self._listener: Listener | None = None
        self._relisten: Relisten | None = None
        self._suspended = False
        self._paused = False
        self._ended = False
        self._secret: bytes | None = None
        self._examinations = Examinations(settings, "readmission check", self._examine)
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
            self._start()

    def _start(self) -> bool:
        """Start to accept, if that has not begun; False if the process has no thread left for it. Under the lock."""
        if self._thread is None and not self._ended:
            thread = threading.Thread(target=self._run, name="readmission", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                log.warning("cannot listen for the source at present: %s (trying again)", error)
                return False
            self._thread = thread
        return True

    def await_source(self) -> Connection:
        """Block until it has come back. Raises Interrupted after end()."""
        with self._changed:
            while not self._ended and self._found is None:
                self._changed.wait(None if self._start() else RETRY)
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
        broke = False  # the listener before this one did, at once
        while (waiting := self._next_listener()) is not None:
            listener, wake = waiting
            try:
                self._receive(listener.accept(wake))
                broke = False
                continue
            except Interrupted:
                continue
            except ChannelError as error:
                problem = error
            except FOREIGN as bug:
                log.exception("cannot wait for the source")
                problem = ChannelError(f"internal error: {type(bug).__name__}")
            self._drop(listener, problem)
            if broke:
                with self._changed:
                    self._changed.wait_for(lambda: self._ended or self._listener is not None, RETRY)
            broke = True
        self._examinations.dismiss()

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
        if self._secret is None and self._offer(channel):
            return
        with self._changed:
            unwanted = "it listens no more" if self._suspended else ""
            if self._secret is None and not self._paused:
                unwanted = "the one that the guest comes over has not broken"
        if unwanted:
            log.warning("closed a connection from %s: %s", channel.peer, unwanted)
            channel.close()
            return
        self._examinations.begin(channel)

    def _offer(self, channel: Channel) -> bool:
        requested = self._requested()
        return requested is not None and requested.offer(channel)

    def _examine(self, examination: Examination) -> None:
        channel = examination.channel
        if self._secret is not None:
            if check_source(channel, self._secret) is Purpose.REQUESTED:
                self._pass_on(examination)
                return
            connection = Connection(channel, self._settings, self._interrupt)
            connection.from_migfw = True
        else:
            while not channel.wait_readable(LOOK):
                if self._offer(channel):  # the source has come back over another one meanwhile
                    examination.keep()
                    return
            connection = Connection(channel, self._settings, self._interrupt)
            check_first_command(connection.reader)
        self._admit(examination, connection)

    def _pass_on(self, examination: Examination) -> None:
        requested = self._requested()
        if requested is None:
            raise StreamError("expected the stream of this migration, got its channel of requested pages")
        examination.keep_for(requested.take)

    def _admit(self, examination: Examination, connection: Connection) -> None:
        """It is the source, unless another one was."""
        with self._changed:
            wanted = self._chosen is None and not self._ended and not self._suspended
            wanted = wanted and (self._secret is not None or self._paused)
            if not wanted or not examination.keep():
                return
            self._chosen = connection
        if self._secret is not None:
            self._examinations.dismiss()
        self._on_found()
        with self._changed:
            ended = self._ended
            if not ended:  # close() closes it from here on
                self._found = connection
                self._changed.notify_all()
        if ended:
            connection.close()
