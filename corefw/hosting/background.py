"""Go to the background (`run --detach`): fork before anything is created, and wait until the child is ready.

The child becomes the engine. It reports over a pipe, one JSON document a line: first where its log is, then what it
announces when it is ready. If the engine ends before that, the waiting parent gets its status and what was written to
the log.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Final

from corefw.errors import MigfwError
from corefw.hosting.log import keep_short, open_log
from corefw.net.sockets import reason

GRACE_SECONDS = 10.0
"""How long an engine may take to end if it is interrupted before it is ready. Then it gets SIGTERM again, and SIGKILL
after as long again."""

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True, slots=True)
class Started:
    """What the parent learns of an engine that is ready.

    line    what the engine announced
    facts   "name", "pid", "qmp", "incoming-uri", "log"
    """

    line: str
    facts: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class NotStarted:
    """What the parent learns of an engine that ended before it was ready. Its log has been deleted.

    status        exit status; -N if signal N ended it
    output        what was in its log
    interrupted   whether the parent had forwarded a signal to it
    """

    status: int
    output: str
    interrupted: bool


class Background:
    """The child: an engine without a terminal. The command that started it waits until it is ready."""

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe

    def redirect(self, name: str) -> Path:
        """Redirect stdout and stderr, the guest's included, to the engine's log. Raises UsageError."""
        path, fd = open_log(name)
        self._tell({"log": str(path)})
        sys.stdout.flush()
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        threading.Thread(target=keep_short, args=(fd,), name="log", daemon=True).start()
        return path

    def ready(self, line: str, facts: Mapping[str, object]) -> bool:
        """Let the command return. Returns False if the command has gone; the engine must end then."""
        try:
            self._tell({"ready": line, "facts": dict(facts)})
        except OSError:
            return False
        os.close(self._pipe)
        return True

    def _tell(self, message: Mapping[str, object]) -> None:
        os.write(self._pipe, json.dumps(message).encode() + b"\n")


def go_to_background(*, tied: bool = False) -> Background | Started | NotStarted:
    """Fork. The child gets Background at once; the parent Started or NotStarted, when it is decided. Raises MigfwError.

    If `tied`, the end of standard input counts as Ctrl-C: the user who started the command from another host has gone.
    Call this while the process has one thread and has not created anything yet.
    """
    sys.stdout.flush()
    reader, writer = os.pipe()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        pid = os.fork()
    except OSError as error:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        raise MigfwError(f"cannot go to the background: {reason(error)}") from None
    if pid:
        os.close(writer)
        with _forwarded(pid, before) as interrupted:
            if tied:
                threading.Thread(target=_end_with_stdin, name="stdin", daemon=True).start()
            return _wait(pid, reader, interrupted)
    os.close(reader)
    os.setsid()
    os.umask(os.umask(0o077) | 0o022)
    nowhere = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    os.dup2(nowhere, 0)
    os.close(nowhere)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return Background(writer)


@contextlib.contextmanager
def _forwarded(pid: int, mask: set[signal.Signals | int]) -> Iterator[Callable[[], bool]]:
    """Forward signals to the engine, which has no terminal, as SIGTERM. Yields a function: has there been one?

    SIGTERM raises KeyboardInterrupt in an engine that starts, and other people's code may swallow that. So an engine
    that does not end is sent further signals; it has nothing to lose before it is ready.
    """
    received: list[int] = []
    further = [signal.SIGKILL, signal.SIGTERM]

    def forward(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        _send(pid, signal.SIGTERM)
        signal.setitimer(signal.ITIMER_REAL, GRACE_SECONDS, GRACE_SECONDS)

    def insist(_number: int, _frame: FrameType | None) -> None:
        _send(pid, further.pop() if len(further) > 1 else further[0])

    old = {number: signal.signal(number, forward) for number in _SIGNALS} | {
        signal.SIGALRM: signal.signal(signal.SIGALRM, insist)
    }
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    try:
        yield lambda: bool(received)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in old.items():
            if signal.getsignal(number) in (forward, insist):
                signal.signal(number, handler)


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _end_with_stdin() -> None:
    with contextlib.suppress(OSError):
        while os.read(0, 4096):
            pass
    os.kill(os.getpid(), signal.SIGTERM)


def _wait(pid: int, reader: int, interrupted: Callable[[], bool]) -> Started | NotStarted:
    """Wait, in the parent, until the engine is ready or has ended."""
    log: Path | None = None
    with open(reader) as lines:
        for line in lines:
            message: dict[str, Any] = json.loads(line)
            if "log" in message:
                log = Path(message["log"])
            else:
                # A signal that came before ends the engine; one that comes from here on leaves it alone.
                before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
                if not interrupted():
                    for number in _SIGNALS:
                        signal.signal(number, signal.SIG_IGN)
                    return Started(message["ready"], {**message["facts"], "log": str(log)})
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return NotStarted(status, _remove(log), interrupted())


def _remove(log: Path | None) -> str:
    """Delete the log and return what was in it."""
    if log is None:
        return ""
    with contextlib.suppress(OSError):
        text = log.read_text(errors="replace")
        log.unlink()
        return text
    return ""
