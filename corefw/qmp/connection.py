"""One client of the server: its socket, two threads, and queues that cannot grow without bound.

Invariant: no client makes anybody else wait, the engine least of all. Output is queued, and a thread of this client's
own sends it. A client that does not read its replies is not read from either, and one that lets events pile up beyond
the limit is disconnected.

A client whose first byte cannot begin a QMP message is disconnected before anything is parsed. Any web page can make a
browser POST to a port of this host, with QMP commands in the body: such a request begins with its method, and the
characters of FIRST_BYTES cannot be in one.

    the io thread     reads, parses, writes; answers what overtakes (exec-oob)
    the worker        runs the other commands, one after the other, in the order in which they came

A client that only ends its sending side still gets its answers. When one disconnects, what it asked for and has not
begun is dropped, as in QEMU.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Final

from corefw.net.fdpassing import receive_with_fds
from corefw.qmp.json_stream import JsonStream
from corefw.qmp.session import Handed, Session

log = logging.getLogger(__name__)

CHUNK: Final = 1 << 16
OUTPUT_PAUSE: Final = 1 << 16
"""Bytes waiting to be sent from which on no further request is taken."""

OUTPUT_LIMIT: Final = 1 << 20
"""Bytes waiting beyond which nothing is added, and the client is disconnected. Replies alone never get there."""

REQUESTS: Final = 8
"""In-band requests that may wait where out-of-band ones can overtake them (QEMU's QMP_REQ_QUEUE_LEN_MAX)."""

DESCRIPTORS: Final = 16
"""File descriptors that may come with one message; the kernel drops the others."""

FIRST_BYTES: Final = b"{["
"""What a client's first byte may be, after white space. QEMU's parser would take more, but no client sends it, and an
HTTP method (RFC 9110, a token) may begin with every other character that begins JSON."""

_WHITE_SPACE: Final = b" \t\r\n"


class Connection:
    """Start with `start`. `post` and `close` may be called from any thread; `ended(self)` is called when it is over.

    peer     where the client is, for people
    host     whom it counts against when there are too many: its host, or its process on this one
    active   when it last sent something (time.monotonic())
    """

    def __init__(self, sock: socket.socket, peer: str, session: Session, ended: Callable[[Connection], None]) -> None:
        self._socket = sock
        self.peer: Final = peer
        self.host: Final = _host(sock)
        self.active = time.monotonic()
        self._begun = False
        self._session = session
        self._ended = ended
        self._stream = JsonStream()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lock = threading.Lock()
        self._output: deque[memoryview] = deque()
        self._output_size = 0
        self._wants_events = False
        self._overflowed = False
        self._items: Iterator[object] | None = None
        self._descriptors: deque[int] = deque()
        self._jobs: queue.SimpleQueue[tuple[object, Handed] | None] = queue.SimpleQueue()
        self._waiting = 0
        self._end_of_input = False
        self._deadline: float | None = None
        self._threads = (
            threading.Thread(target=self._io, name=f"qmp-io {peer}", daemon=True),
            threading.Thread(target=self._work, name=f"qmp-worker {peer}", daemon=True),
        )

    def start(self, greeting: bytes) -> None:
        self._socket.setblocking(False)
        self._post(greeting)
        for thread in self._threads:
            thread.start()

    def post(self, line: bytes) -> None:
        """Send an event, if the client gets events yet. Never blocks."""
        if self._wants_events:
            self._post(line)

    def close(self, seconds: float) -> None:
        """Read no more; let what is queued go out for up to `seconds`, then disconnect. Returns at once: see `join`."""
        self._deadline = time.monotonic() + seconds
        self._notify()

    def join(self, seconds: float) -> None:
        self._threads[0].join(seconds)

    @property
    def negotiated(self) -> bool:
        return self._session.negotiated

    @property
    def idle(self) -> bool:
        """It waits for no answer, as far as it has been read."""
        with self._lock:
            return not self._waiting and self._items is None

    # -- output ----------------------------------------------------------------------------------------------------

    def _post(self, line: bytes, *, answers: bool = False) -> None:
        """Queue a line; `answers` says that it is the reply to what the worker was given."""
        with self._lock:
            self._overflowed = self._overflowed or self._output_size > OUTPUT_LIMIT
            if not self._overflowed:
                self._output.append(memoryview(line))
                self._output_size += len(line)
            if answers:
                self._waiting -= 1
                # From the reply to qmp_capabilities on: clients do not expect an event before it.
                self._wants_events = self._session.negotiated
        self._notify()

    def _notify(self) -> None:
        with self._lock, contextlib.suppress(BlockingIOError):
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)

    def _send(self) -> None:
        """Send what the socket takes. Raises OSError when the client is gone."""
        while self._output:
            try:
                sent = self._socket.send(self._output[0])
            except BlockingIOError:
                return
            with self._lock:
                self._output_size -= sent
                if sent == len(self._output[0]):
                    self._output.popleft()
                else:
                    self._output[0] = self._output[0][sent:]

    # -- the io thread ---------------------------------------------------------------------------------------------

    def _io(self) -> None:
        try:
            while self._turn():
                pass
        except OSError as error:
            log.debug("QMP client %s is gone: %s", self.peer, error)
        finally:
            self._clean_up()

    def _turn(self) -> bool:
        """Do what can be done, then wait until more can. False when the conversation is over."""
        self._send()
        if self._overflowed:
            log.warning("QMP client %s does not read its messages: disconnected", self.peer)
            return False
        self._take_requests()
        if self._is_over():
            return False
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        interest = (select.POLLIN if self._may_read() else 0) | (select.POLLOUT if self._output else 0)
        poll.register(self._socket, interest)
        for fd, ready in poll.poll(self._patience()):
            if fd == self._wake:
                os.eventfd_read(self._wake)
            elif ready & select.POLLIN:
                if not self._read():
                    return False
            elif ready & (select.POLLHUP | select.POLLERR | select.POLLNVAL):
                return False
        return True

    def _patience(self) -> float | None:
        """Milliseconds."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic()) * 1000

    def _is_over(self) -> bool:
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return True
        reading = self._items is not None or not (self._end_of_input or self._deadline is not None)
        with self._lock:
            return not reading and not self._waiting and not self._output

    def _may_read(self) -> bool:
        return self._items is None and not self._end_of_input and self._deadline is None

    def _read(self) -> bool:
        """Take what has come. False when this is no QMP client."""
        data, descriptors = receive_with_fds(self._socket, CHUNK, DESCRIPTORS)
        self.active = time.monotonic()
        if descriptors:  # they wait for a `getfd`, until newer ones come: QEMU's way, and its clients rely on it
            self._close_descriptors()
            self._descriptors.extend(descriptors)
        if not self._begun and not self._begins(data):
            return False
        self._end_of_input = not data
        self._items = self._stream.feed(data)
        return True

    def _begins(self, data: bytes) -> bool:
        first = data.lstrip(_WHITE_SPACE)[:1]
        self._begun = bool(first)
        if self._begun and first not in FIRST_BYTES:
            log.warning(
                "QMP client %s disconnected, and nothing that it sent was run: its first byte is %#04x, expected '{'"
                " (a web browser or a port scanner?)",
                self.peer,
                first[0],
            )
            return False
        return True

    def _take_requests(self) -> None:
        """Hand what was read to the worker, as long as it may."""
        while self._items is not None and self._deadline is None and self._has_room():
            item = next(self._items, _NO_MORE)
            if item is _NO_MORE:
                self._items = None
            elif self._session.overtakes(item):
                self._post(self._session.answer(item, Handed()))
            else:
                with self._lock:
                    self._waiting += 1
                self._jobs.put((item, self._handed_to(item)))
        if self._deadline is not None:
            self._items = None

    def _has_room(self) -> bool:
        with self._lock:
            room = REQUESTS if self._session.out_of_band else 1
            return self._waiting < room and self._output_size < OUTPUT_PAUSE

    def _handed_to(self, item: object) -> Handed:
        if self._descriptors and isinstance(item, dict) and item.get("execute") == "getfd":
            return Handed(self._descriptors.popleft())
        return Handed()

    def _close_descriptors(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popleft())

    def _clean_up(self) -> None:
        while not self._jobs.empty():
            with contextlib.suppress(queue.Empty):
                if (job := self._jobs.get_nowait()) is not None:
                    job[1].close()
        self._jobs.put(None)
        self._close_descriptors()
        self._socket.close()
        with self._lock:
            self._wants_events = False
            self._output.clear()
            os.close(self._wake)
            self._wake = -1
        self._ended(self)

    # -- the worker ------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._post(self._session.answer(*job), answers=True)


_CREDENTIALS: Final = struct.calcsize("3i")
_NO_MORE: Final = object()


def _host(sock: socket.socket) -> str:
    """Whom a client counts against. Raises OSError when it is gone already."""
    if sock.family == socket.AF_UNIX:
        pid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS))
        return f"process {pid} of user {uid}"
    return str(sock.getpeername()[0])
