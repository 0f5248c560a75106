"""An engine in the background (`run --detach`), and its log.

The command forks before anything is created. The child becomes the engine. It reports over a pipe, one JSON document a
line: first where its log is, then what it announces when it is ready. If the engine ends before that, the command ends
with the same status and shows what was written to the log.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Final

import click

from corefw.cli.console import ExitStatus, Finished, note, print_json
from corefw.errors import MigfwError, UsageError, one_line
from corefw.net.sockets import reason
from corefw.qmp.address import log_directory

LOG_LIMIT: Final = 8 << 20
"""Bytes of a log. When it grows beyond, its older half is dropped."""

LOG_DAYS: Final = 30
"""Days that the log of an engine that has ended is kept."""

_TRIM_SECONDS: Final = 2.0
GRACE_SECONDS = 10.0
"""How long an engine may take to end if it is interrupted before it is ready. Then it gets SIGTERM again, and SIGKILL
after as long again."""

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Background:
    """The child: an engine without a terminal. The command that started it waits until it is ready."""

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe

    def redirect(self, name: str) -> Path:
        """Redirect stdout and stderr, the guest's included, to the engine's log. Raises UsageError."""
        path, fd = _open_log(name)
        self._tell({"log": str(path)})
        sys.stdout.flush()
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        threading.Thread(target=_keep_short, args=(fd,), name="log", daemon=True).start()
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


def go_to_background(*, as_json: bool, tied: bool = False) -> Background:
    """Fork and return in the child. The parent waits until the child is ready, then raises Finished or MigfwError.

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
            _wait(pid, reader, interrupted, as_json=as_json)
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


def _wait(pid: int, reader: int, interrupted: Callable[[], bool], *, as_json: bool) -> None:
    """Wait, in the parent, until the engine is ready or has ended. Always raises Finished or MigfwError."""
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
                    _announce(message, log, as_json=as_json)
                    raise Finished(ExitStatus.DONE)
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if interrupted():
        _remove(log)
        note("interrupted; nothing was started")
        raise Finished(ExitStatus.INTERRUPTED)
    output = _remove(log)
    click.echo(output, nl=False, err=status != 0)
    if status < 0:
        raise MigfwError(f"the engine was ended by {signal.Signals(-status).name} before it was ready")
    raise click.exceptions.Exit(status)


def _announce(message: Mapping[str, Any], log: Path | None, *, as_json: bool) -> None:
    if as_json:
        print_json({**message["facts"], "log": str(log)})
    else:
        click.echo(f"migfw: {one_line(message['ready'])}")


def _remove(log: Path | None) -> str:
    """Delete the log and return what was in it."""
    if log is None:
        return ""
    with contextlib.suppress(OSError):
        text = log.read_text(errors="replace")
        log.unlink()
        return text
    return ""


# -- the log -------------------------------------------------------------------------------------------------------


def _open_log(name: str) -> tuple[Path, int]:
    """Open an empty log that no other engine writes to, with mode 0600. Raises UsageError."""
    try:
        folder = log_directory()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _remove_old_logs(folder)
        number = 1
        while True:
            path = folder / (f"{name}.log" if number == 1 else f"{name}-{number}.log")
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                number += 1
                continue
            os.fchmod(fd, 0o600)
            os.ftruncate(fd, 0)
            return path, fd
    except OSError as error:
        where = f"'{error.filename}'" if error.filename else "a file"
        raise UsageError(f"cannot use {where} as the engine's log: {reason(error)} (set XDG_STATE_HOME)") from None


def _remove_old_logs(folder: Path) -> None:
    """Delete logs that nothing was written to for LOG_DAYS, unless their engine still runs: it has them locked."""
    oldest = time.time() - LOG_DAYS * 86400
    for path in folder.glob("*.log"):
        with contextlib.suppress(OSError):
            if path.lstat().st_mtime < oldest:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
                finally:
                    os.close(fd)


def _keep_short(fd: int) -> None:
    """Trim the log regularly while the process lives. Output written at that moment may be lost."""
    waiting = threading.Event()
    while not waiting.wait(_TRIM_SECONDS):
        with contextlib.suppress(OSError):
            trim(fd)


def trim(fd: int, limit: int = LOG_LIMIT) -> None:
    """Keep the newer half of a log (open for appending) that is longer than `limit`. Raises OSError."""
    size = os.fstat(fd).st_size
    if size <= limit:
        return
    tail = os.pread(fd, limit // 2, size - limit // 2)
    os.ftruncate(fd, 0)
    os.write(fd, b"(the log was longer; this is its end)\n" + tail[tail.find(b"\n") + 1 :])
