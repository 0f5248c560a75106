"""The base of the contract kits: threads with a deadline, and the detection of what is left behind.

A kit never hangs, and its failures say where they happened. Deadlines are far longer than any correct program needs;
nothing here measures speed.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Generic, TypeVar

DEADLINE = 60.0
"""Seconds for one step."""

POLL: Final = 0.02

_T = TypeVar("_T")


class Task(Generic[_T]):
    """`function(*arguments)` in a daemon thread. `what` names it in messages."""

    def __init__(self, what: str, function: Callable[..., _T], *arguments: object) -> None:
        self.what = what
        self._call = (function, arguments)
        self._results: list[_T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=f"kit: {what}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        function, arguments = self._call
        try:
            self._results.append(function(*arguments))
        except BaseException as error:  # noqa: BLE001 - it is raised again where the result is asked for
            self._error = error

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def let_block(self, seconds: float = 0.1) -> None:
        """Give it time to reach the point where it blocks."""
        self._thread.join(seconds)

    def result(self, seconds: float | None = None) -> _T:
        """The function's result. Raises what it raised, or AssertionError with its stack if it is still running after
        `seconds` (DEADLINE)."""
        error = self.error(seconds)
        if error is not None:
            raise error
        return self._results[0]

    def error(self, seconds: float | None = None) -> BaseException | None:
        """The exception that it raised, or None. Raises AssertionError as result() does."""
        seconds = DEADLINE if seconds is None else seconds
        self._thread.join(seconds)
        if self._thread.is_alive():
            raise AssertionError(f"{self.what} did not end within {seconds:g} s; it is at {self._where()}")
        return self._error

    def _where(self) -> str:
        frame = sys._current_frames().get(self._thread.ident or 0)
        stack = traceback.extract_stack(frame)[-4:] if frame else []
        return " > ".join(f"{Path(one.filename).name}:{one.lineno} {one.name}" for one in stack)


def described(error: BaseException | None) -> str:
    """An error for a message, such as "ValueError: no"."""
    return "no error" if error is None else f"{type(error).__name__}: {error}"


def wait_until(condition: Callable[[], bool], seconds: float | None = None) -> bool:
    """Poll the condition for up to `seconds` (DEADLINE); return whether it became true."""
    deadline = time.monotonic() + (DEADLINE if seconds is None else seconds)
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL)
    return True


def settled(value: Callable[[], int], quiet: float = 0.4) -> int:
    """Wait until `value()` has not changed for `quiet` seconds; return that value."""
    last, since = value(), time.monotonic()
    while time.monotonic() - since < quiet:
        time.sleep(POLL)
        if (now := value()) != last:
            last, since = now, time.monotonic()
    return last


def private_memory() -> int:
    """Bytes of this process's own memory (RssAnon)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("/proc/self/status has no RssAnon")


@dataclass(frozen=True, slots=True)
class Possessions:
    """The resources that a process has to release: descriptors with their targets, child processes, threads."""

    descriptors: frozenset[str]
    children: frozenset[int]
    threads: frozenset[threading.Thread]

    @classmethod
    def now(cls) -> Possessions:
        return cls(_descriptors(), _children(), frozenset(threading.enumerate()))

    def assert_no_more(self, seconds: float | None = None) -> None:
        """Raise AssertionError that names resources that this process has gained since and does not release within
        `seconds` (DEADLINE)."""
        gained: list[str] = []

        def nothing() -> bool:
            now = Possessions.now()
            gained[:] = [
                *(f"descriptor {one}" for one in sorted(now.descriptors - self.descriptors)),
                *(f"child process {_command(one)}" for one in sorted(now.children - self.children)),
                *(f"thread '{one.name}'" for one in now.threads - self.threads),
            ]
            return not gained

        assert wait_until(nothing, seconds), "left behind: " + ", ".join(gained)


def _descriptors() -> frozenset[str]:
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found.add(f"{entry.name} -> {entry.readlink()}")
        except FileNotFoundError:
            continue  # the listing's own
    return frozenset(found)


def _children() -> frozenset[int]:
    me, found = os.getpid(), set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[1]) == me:
                found.add(int(entry.name))
    return frozenset(found)


def _command(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()
    except OSError:
        words = "gone"
    return f"{pid} ({words or 'a zombie'})"
