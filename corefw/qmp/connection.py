"""One client of the server: its socket, two threads, and queues that cannot grow without bound.

Invariant: no client keeps another one waiting, or the engine. Output is queued, and a thread of this client sends it.
If a client does not read its replies, no more requests are read from it; if it lets events pile up beyond the limit, it
is disconnected.

A client is disconnected before anything is parsed if its first byte cannot begin a QMP message. Any web page can make a
browser POST to a port of this host with QMP commands in the body. Such a request begins with an HTTP method, which
cannot have the characters of FIRST_BYTES in it.

    the io thread     reads, parses and writes; answers out-of-band requests
    the worker        runs the other commands one after the other, in the order in which they came

A client that shuts down only its sending side still gets its answers. If it disconnects, its requests that have not
begun are dropped, as in QEMU.
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
"""While more bytes than this wait to be sent, no further request is taken."""

OUTPUT_LIMIT: Final = 1 << 20
"""If more bytes than this wait to be sent, the client is disconnected. Replies alone never add up to it."""

REQUESTS: Final = 8
"""In-band requests that may wait once out-of-band ones can overtake them (QEMU's QMP_REQ_QUEUE_LEN_MAX)."""

DESCRIPTORS: Final = 16
"""File descriptors that may come with one message; the kernel drops any others."""

FIRST_BYTES: Final = b"{["
"""What may be a client's first byte, after white space. QEMU's parser accepts more, but no client sends that, and an
HTTP method (RFC 9110, a token) can begin with any other character that begins a JSON value."""

_WHITE_SPACE: Final = b" \t\r\n"


class Connection:
    """Begin with `start`. `post` and `close` may be called from any thread; `ended(self)` is called at the end.

    peer     where the client is, for people
    host     what its connections are counted by if there are too many: its host, or on this one its process
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
        """Raises RuntimeError if the process has no thread left for it; then it is closed."""
        self._socket.setblocking(False)
        self._post(greeting)
        try:
            for thread in reversed(self._threads):
                thread.start()
        except RuntimeError:
            self._clean_up()
            raise

    def post(self, line: bytes) -> None:
        """Send an event, if the client has negotiated. Never blocks."""
        if self._wants_events:
            self._post(line)

    def close(self, seconds: float) -> None:
        """Stop reading; send what is queued for up to `seconds`, then disconnect. Returns at once (see `join`)."""
        self._deadline = time.monotonic() + seconds
        self._notify()

    def join(self, seconds: float) -> None:
        self._threads[0].join(seconds)

    @property
    def negotiated(self) -> bool:
        return self._session.negotiated

    @property
    def idle(self) -> bool:
        """Whether every request that was read from it has been answered."""
        with self._lock:
            return not self._waiting and self._items is None

    # -- output ----------------------------------------------------------------------------------------------------

    def _post(self, line: bytes, *, answers: bool = False) -> None:
        """Queue a line. `answers`: it is the reply to a request that the worker was given."""
        with self._lock:
            self._overflowed = self._overflowed or self._output_size > OUTPUT_LIMIT
            if not self._overflowed:
                self._output.append(memoryview(line))
                self._output_size += len(line)
            if answers:
                self._waiting -= 1
                # Clients do not expect an event before the reply to qmp_capabilities.
                self._wants_events = self._session.negotiated
        self._notify()

    def _notify(self) -> None:
        with self._lock, contextlib.suppress(BlockingIOError):
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)

    def _send(self) -> None:
        """Send as much as the socket takes. Raises OSError if the client is gone."""
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
        """Do what can be done without waiting, then wait until there is more. False once the conversation is over."""
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
        """Read what has come. False if this is no QMP client."""
        data, descriptors = receive_with_fds(self._socket, CHUNK, DESCRIPTORS)
        self.active = time.monotonic()
        if descriptors:  # kept for a `getfd` until newer ones come, as in QEMU: clients rely on it
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
        """Give what was read to the worker, as far as it has room."""
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
    """What a client's connections are counted by. Raises OSError if it is gone already."""
    if sock.family == socket.AF_UNIX:
        pid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS))
        return f"process {pid} of user {uid}"
    return str(sock.getpeername()[0])
