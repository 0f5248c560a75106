"""The engine's handle on the guest's process: spawn it, send requests, notice its death.

Every request ends with an answer, an error, or the death of the guest; none waits for ever. One thread reads all
messages of the guest and reaps it. It calls `on_undeclared`, and `on_end` once, unless close() was called first.

The guest is an interpreter in a session of its own, so the terminal's Ctrl-C only reaches the engine.
"""

from __future__ import annotations

import itertools
import logging
import os
import queue
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from corefw.errors import MachineError, UsageError
from corefw_machine_python.protocol import Link, Message

log = logging.getLogger(__name__)

START_TIMEOUT = 60.0
"""Seconds that a new interpreter may take to import the program's module."""

QUIT_TIMEOUT = 1.0
POLL = 0.1
"""Seconds between two looks at whether the guest is excused from answering."""


class GuestTimeout(MachineError):
    """The guest did not answer in time; it keeps running."""


@dataclass(frozen=True, slots=True)
class Ending:
    """How the guest ended. `reason` is None if the program finished; `values` are its last fields, None if unknown."""

    reason: str | None
    traceback: str = ""
    values: Sequence[object] | None = None


class GuestProcess:
    """The process of one guest. Thread-safe."""

    def __init__(self, on_end: Callable[[Ending], None], on_undeclared: Callable[[Sequence[str]], None]) -> None:
        """Raises MachineError if the process cannot be created."""
        self._on_end = on_end
        self._on_undeclared = on_undeclared
        self._ids = itertools.count(1)
        self._sending = threading.Lock()
        self._waiting: dict[int, queue.SimpleQueue[tuple[Message, list[int]] | None]] = {}
        self._lock = threading.Lock()
        self._ended = False
        self._closing = False
        self._ending: Ending | None = None
        ours, theirs = socket.socketpair()
        lifeline, self._lifeline = os.pipe()
        try:
            # The engine's own interpreter, so the guest has the same packages.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "corefw_machine_python.guestmain", str(theirs.fileno()), str(lifeline)],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), lifeline),
                start_new_session=True,
            )
        except OSError as error:
            ours.close()
            os.close(self._lifeline)
            raise MachineError(f"cannot start a process for the guest: {error.strerror}") from None
        finally:
            theirs.close()
            os.close(lifeline)
        self._link = Link(ours)
        self._pidfd = os.pidfd_open(self._process.pid)
        self._reader = threading.Thread(target=self._read, name=f"guest-{self._process.pid}", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    # -- asking ----------------------------------------------------------------------------------------------------

    def ask(
        self,
        command: str,
        seconds: float | None,
        *,
        fds: Sequence[int] = (),
        excused: Callable[[], bool] | None = None,
        **fields: object,
    ) -> tuple[Message, list[int]]:
        """Send a request and wait for the answer and its descriptors, which the caller owns. `seconds` None: no limit.
        They begin to count once `excused()` is false.

        Raises UsageError or MachineError as the guest answered, MachineError when it is dead, GuestTimeout.
        """
        number = next(self._ids)
        answers: queue.SimpleQueue[tuple[Message, list[int]] | None] = queue.SimpleQueue()
        with self._lock:
            if self._ended or self._closing:
                raise self._dead()
            self._waiting[number] = answers
        try:
            self._send({"command": command, "id": number, **fields}, fds)
            got = _next(answers, seconds, excused)
        except queue.Empty:
            raise GuestTimeout(f"the guest did not answer '{command}' within {seconds:g} s") from None
        finally:
            with self._lock:
                self._waiting.pop(number, None)
        if got is None:
            raise self._dead()
        answer, received = got
        if "error" in answer:
            if answer["traceback"]:
                log.error("the guest's program failed in '%s':\n%s", command, answer["traceback"].rstrip())
            raise (UsageError if answer["usage"] else MachineError)(answer["error"])
        return answer, received

    def tell(self, command: str, **fields: object) -> None:
        """Send a request and ignore the answer. Does not raise."""
        try:
            self._send({"command": command, "id": 0, **fields}, ())
        except MachineError:
            log.debug("the guest has ended before it received '%s'", command)

    def _send(self, message: Message, fds: Sequence[int]) -> None:
        try:
            with self._sending:
                self._link.send(message, list(fds))
        except OSError:
            self._reader.join(QUIT_TIMEOUT)
            raise self._dead() from None

    def _dead(self) -> MachineError:
        reason = self._ending.reason if self._ending else None
        return MachineError(f"the guest has ended{f': {reason}' if reason else ''}")

    # -- listening -------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        poll = select.poll()
        poll.register(self._link, select.POLLIN)
        poll.register(self._pidfd, select.POLLIN)
        try:
            while any(fd == self._link.fileno() for fd, _ in poll.poll()) or self._link.ready(0):
                received = self._link.receive()
                if received is None:
                    break
                self._received(*received)
        except (OSError, ValueError) as error:
            log.debug("the connection to the guest process broke: %s", error)
        self._reap()

    def _received(self, message: Message, fds: list[int]) -> None:
        if message.get("event") == "ended":
            self._ending = Ending(message["reason"], message["traceback"], message["values"])
            return
        if message.get("event") == "undeclared":
            self._on_undeclared(message["names"])
            return
        with self._lock:
            waiting = self._waiting.get(message.get("id", 0))
        if waiting is not None:
            waiting.put((message, fds))
            return
        for fd in fds:
            os.close(fd)

    def _reap(self) -> None:
        """Close the link, wait for the process, and fail all pending requests."""
        try:
            status = self._process.wait(QUIT_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        ending = self._ending or Ending(_how(status))
        with self._lock:
            self._ending = ending
            self._ended = True
            waiting = list(self._waiting.values())
            closing = self._closing
        for answers in waiting:
            answers.put(None)
        if not closing:
            self._on_end(ending)

    # -- the end ---------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End the guest, first by request and then by SIGKILL. Idempotent; does not raise."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
        self.tell("quit")
        try:
            self._process.wait(QUIT_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
        if threading.current_thread() is not self._reader:
            self._reader.join()
        os.close(self._lifeline)
        os.close(self._pidfd)
        self._link.close()


def _next(
    answers: queue.SimpleQueue[tuple[Message, list[int]] | None],
    seconds: float | None,
    excused: Callable[[], bool] | None,
) -> tuple[Message, list[int]] | None:
    """The answer; see GuestProcess.ask(). Raises queue.Empty."""
    while excused is not None and seconds is not None and excused():
        try:
            return answers.get(timeout=POLL)
        except queue.Empty:
            continue
    return answers.get(timeout=seconds)


def _how(status: int) -> str:
    if status < 0:
        return f"its process was killed by {signal.Signals(-status).name}"
    return f"its process ended with status {status}"
