"""Messages between the engine and the guest's process, over a socketpair.

The engine sends requests and the guest answers each one once, in order; an answer has the id of its request. The guest
sends two events by itself: "undeclared" after its first tick, and "ended", once, as its last message. A message is a
u32 length (host byte order) and JSON; file descriptors travel with the first byte.

    request     fields                        answer
    load        program, options, incoming,   name, version, minimum_version, stop_timeout, arrays, fields, disks
                only_migratable           has_before_stop, values, requires, versions
    disks       (descriptors of the logs of   -
                writes)
    map         (descriptors of the memfds)   addresses, reason (why the memory cannot be watched, or "")
                                              (descriptors: userfaultfd, pagemap, unless there is a reason)
    faults      -                             system_calls (whether these wait for missing pages, too)
                                              (descriptor: a userfaultfd for page faults; nothing is mapped any more)
    start       values, set_up                undeclared (once setup() has been called)
    resume      -                             -              (a stop was given up: run on with what is there)
    stop        whole                         values, set_up, undeclared    (whole: fails where something is undeclared)
                                              before_stop: seconds, written (bytes of arrays, null: not known), or null
    look        -                             undeclared, values, unmovable (values is null where unmovable says why)
    verify      values, set_up                facts          (null: as it is, for a guest that runs)
    throttle    percent                       -
    quit        -                             -              (and the process ends)

    event       fields
    undeclared  names
    ended       reason, traceback             reason null: the program finished; its values come along

An answer has "ok", or "error" with "usage" (true if the request was wrong) and "traceback" (may be ""). Values are a
list in the order of the fields: numbers, booleans, hexadecimal digits for bytes and text, and the text of guest.value
and guest.rng (see jsonlike), "VERSION:BASE64" for guest.section (null in the answer to "look").
"""

from __future__ import annotations

import json
import os
import select
import socket
from dataclasses import dataclass
from struct import Struct
from typing import Any, Final

from corefw.net.fdpassing import receive_with_fds, send_with_fds
from corefw.quantities import format_milliseconds, format_size

Message = dict[str, Any]

_LENGTH: Final = Struct("=I")
MAX_MESSAGE: Final = 256 << 20
MAX_FDS: Final = 253


@dataclass(frozen=True, slots=True)
class StopCost:
    """Cost of the program's before_stop() at the last stop: seconds, and bytes of arrays written (None: unknown)."""

    seconds: float
    written: int | None

    def __str__(self) -> str:
        took = f"took {format_milliseconds(round(1000 * self.seconds))}"
        return f"{took} and wrote {format_size(self.written)}" if self.written else took


class Link:
    """One end of the link. One thread at a time per direction. Raises OSError if the other end has gone."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    def fileno(self) -> int:
        return self._socket.fileno()

    def receive(self) -> tuple[Message, list[int]] | None:
        """Receive a message and its descriptors, which the caller then owns; None if the other end has closed."""
        head, fds = receive_with_fds(self._socket, _LENGTH.size, MAX_FDS)
        try:
            if not head:
                return None
            (length,) = _LENGTH.unpack(head + self._exactly(_LENGTH.size - len(head)))
            if length > MAX_MESSAGE:
                raise ConnectionError(f"a message of {length} bytes")
            message: Message = json.loads(self._exactly(length))
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        return message, fds

    def send(self, message: Message, fds: list[int] | None = None) -> None:
        body = json.dumps(message).encode()
        send_with_fds(self._socket, _LENGTH.pack(len(body)) + body, fds or [])

    def _exactly(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            piece = self._socket.recv(min(count - len(data), 1 << 16))
            if not piece:
                raise ConnectionError("the message ended early")
            data += piece
        return bytes(data)

    def ready(self, seconds: float | None) -> bool:
        """Wait up to `seconds` (None: no limit) until receive() would not block; whether it would not."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(None if seconds is None else seconds * 1000))

    def close(self) -> None:
        self._socket.close()
