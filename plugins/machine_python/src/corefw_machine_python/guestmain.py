"""The guest's process: `python -m corefw_machine_python.guestmain LINK LIFELINE`, two descriptor numbers.

It serves the engine's requests between two ticks; the program's code runs in no other process. The guest dies with the
engine: LIFELINE is a pipe of which only the engine holds the other end, and the kernel kills this process when that end
is closed, whatever it is doing (PR_SET_PDEATHSIG would depend on the thread that spawned it).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import mmap
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from typing import Final, NoReturn

import numpy as np
from numpy.typing import NDArray

from corefw.errors import MigfwError, UsageError
from corefw.memory import pagemap
from corefw.memory.faults import open_faults
from corefw_machine_python import blame, requirements
from corefw_machine_python.declarations import Declarations, Options
from corefw_machine_python.disks import Disks
from corefw_machine_python.forking import Mapped, watch_forks
from corefw_machine_python.guest import Program
from corefw_machine_python.handover import Handover, Unmovable, reason
from corefw_machine_python.loading import load_program
from corefw_machine_python.protocol import Link, Message
from corefw_machine_python.undeclared import Watch
from corefw_machine_python.undeclared import message as undeclared_message

Answer = tuple[Message, list[int]]

F_SETSIG: Final = 10

MAX_SCANNED: Final = 1 << 30
"""Largest arrays, in bytes, for which the writes of before_stop() are counted: a scan takes up to 5 ms per GiB."""


class _Stranger(MigfwError):
    """A request that is not in the protocol, or that came at the wrong time."""


class Guest:
    """The program and its run state."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._program_made: Program | None = None
        self._handover_made: Handover | None = None
        self._declared = Declarations((), (), ())
        self._disks = Disks(Program, Options({}), incoming=False)
        self._mappings: list[mmap.mmap] = []
        self._memory: list[NDArray[np.uint8]] = []  # of each mapping
        self._pagemap: int | None = None
        self._userfaultfd: int | None = None
        self._forked = False  # True in a process that the program has forked
        self._running = False
        self._set_up = False
        self._started = False  # after_start() was called and before_stop() was not
        self._watch_made: Watch | None = None
        self._only_migratable = False
        self._ticked = False  # since the process began
        self._percent = 0
        self._nap = 0.0
        self._commands: dict[str, Callable[[Message, list[int]], Answer]] = {
            "load": self._load,
            "disks": self._take_disks,
            "map": self._map,
            "faults": self._faults,
            "start": self._start,
            "resume": self._resume,
            "stop": self._stop,
            "look": self._look,
            "verify": self._verify,
            "throttle": self._throttle,
        }

    @property
    def _program(self) -> Program:
        if self._program_made is None:
            raise _Stranger("there is no program yet")
        return self._program_made

    @property
    def _handover(self) -> Handover:
        if self._handover_made is None:
            raise _Stranger("there is no program yet")
        return self._handover_made

    @property
    def _watch(self) -> Watch:
        if self._watch_made is None:
            raise _Stranger("the program has no memory yet")
        return self._watch_made

    def serve(self) -> int:
        """Serve until the engine sends "quit" or goes away, or the program ends. Returns the exit status of the
        process."""
        while True:
            if self._running and not self._link.ready(self._nap):
                try:
                    self._step()
                except BaseException as error:  # noqa: BLE001 - a user's code: whatever it raises ends the guest
                    return self._ended(error)
                if self._program.__dict__.get("finished"):
                    return self._ended(None)
                continue
            received = self._link.receive()
            if received is None or received[0].get("command") == "quit":
                return 0
            answer = self._answer(*received)
            if self._running and not self._set_up:
                # The guest only runs once setup() has returned: a migration that began earlier would have nothing to
                # send, and would wait for setup() with the guest on neither side.
                try:
                    self._begin()
                    answer[0]["undeclared"] = self._undeclared()
                except BaseException as error:  # noqa: BLE001 - as above
                    return self._ended(error)
            self._link.send(*answer)

    def _step(self) -> None:
        began = time.monotonic()
        self._begin()
        self._program.tick()
        if self._forked:
            self._end_of_fork(None)
        if not self._ticked:
            self._ticked = True
            self._link.send({"event": "undeclared", "names": self._undeclared()})
        took = time.monotonic() - began
        self._nap = took * self._percent / (100 - self._percent) if self._percent else 0.0

    def _begin(self) -> None:
        """Do what has to precede the first tick after a start."""
        if not self._set_up:
            self._program.setup()
            self._set_up = True
        if not self._started:
            self._after_start()

    def _after_start(self) -> None:
        self._started = True
        if type(self._program).after_start is Program.after_start:
            return
        with self._watch.after_start():
            self._program.after_start()

    def _undeclared(self) -> list[str]:
        """Return the names of undeclared state. Raises Unmovable if the guest may have none."""
        names = self._watch.found()
        if names and self._only_migratable:
            raise Unmovable(f"only-migratable was asked for, but {undeclared_message(self._program_name, names)}")
        return names

    @property
    def _program_name(self) -> str:
        return type(self._program).__name__

    def _leave_the_engine(self) -> None:
        """Close the link to the engine in a process that the program has forked; only the guest may use it."""
        self._forked = True
        self._link.close()

    def _end_of_fork(self, error: BaseException | None) -> NoReturn:
        """End a forked process in which the program's code returned to the guest's main loop."""
        if error is not None and not isinstance(error, SystemExit):
            sys.stderr.write(blame.traceback_of(error))
        sys.stdout.flush()
        code = error.code if isinstance(error, SystemExit) else int(error is not None)
        os._exit(code if isinstance(code, int) else int(code is not None))

    def _ended(self, error: BaseException | None) -> int:
        if self._forked:
            self._end_of_fork(error)
        finished = error is None or (isinstance(error, SystemExit) and not error.code)
        message: Message = {"event": "ended", "values": None, "reason": None, "traceback": ""}
        with contextlib.suppress(Unmovable):
            message["values"] = self._handover.values()
        if error is not None and not finished:
            message |= {"reason": reason(error) + self._hint(error), "traceback": blame.traceback_of(error)}
        sys.stdout.flush()
        self._link.send(message)
        return 0 if finished else 1

    def _hint(self, error: BaseException) -> str:
        """What to do about an error that missing pages may have caused; "" for any other."""
        if self._userfaultfd is None or not isinstance(error, OSError) or error.errno != errno.EFAULT:
            return ""
        return " (its pages may not have arrived yet in postcopy: give the array to guest.touch() first)"

    # -- requests --------------------------------------------------------------------------------------------------

    def _answer(self, request: Message, fds: list[int]) -> Answer:
        identity: Message = {"id": request.get("id")}
        try:
            command = self._commands.get(str(request.get("command")))
            if command is None:
                raise _Stranger(f"no request '{request.get('command')}'")
            answer, sent = command(request, fds)
        except MigfwError as error:
            usage = isinstance(error, UsageError)
            return identity | {"error": str(error), "usage": usage, "traceback": blame.traceback_of(error)}, []
        except Exception as error:  # noqa: BLE001 - a user's code may raise anything; it is reported to the engine
            return identity | {"error": reason(error), "usage": False, "traceback": blame.traceback_of(error)}, []
        return identity | {"ok": True} | answer, sent

    def _load(self, request: Message, _fds: list[int]) -> Answer:
        kind = load_program(request["program"])
        try:
            self._declared = Declarations.of(kind)
        except ValueError as error:
            raise UsageError(f"program '{kind.__name__}': {error}") from None
        requirements.check(kind.__name__, kind.requires)
        options = self._declared.parse_options(request["options"])
        self._program_made = kind(options)
        self._handover_made = Handover(self._program, self._declared.fields)
        self._only_migratable = request["only_migratable"]
        sizes = [(array, array.shape(options)) for array in self._declared.arrays]
        self._disks = Disks(kind, options, incoming=request["incoming"])
        return {
            "name": kind.__name__,
            "version": kind.version,
            "minimum_version": kind.version if kind.minimum_version is None else kind.minimum_version,
            "stop_timeout": kind.stop_timeout,
            "has_before_stop": kind.before_stop is not Program.before_stop,
            "arrays": [
                {
                    "name": array.name,
                    "dtype": array.dtype.descr,
                    "type": str(array.dtype),
                    "shape": shape,
                    "length": array.dtype.itemsize * math.prod(map(int, shape)),
                }
                for array, shape in sizes
            ],
            "disks": self._disks.described(),
            "fields": self._handover.described(),
            "values": self._handover.values(),
            "requires": dict(kind.requires),
            "versions": {
                name: requirements.installed(name)
                for name in dict.fromkeys(("python", "numpy", *kind.requires, "migfw"))
            },
        }, []

    def _take_disks(self, _request: Message, fds: list[int]) -> Answer:
        self._disks.bind(self._program, fds)
        return {}, []

    def _map(self, _request: Message, fds: list[int]) -> Answer:
        mapped: list[Mapped] = []
        for array, fd in zip(self._declared.arrays, fds, strict=True):
            mapping = mmap.mmap(fd, os.fstat(fd).st_size)
            # The dirty log only sees the writes of this process.
            mapping.madvise(mmap.MADV_DONTFORK)
            self._mappings.append(mapping)
            self._memory.append(np.frombuffer(mapping, dtype=np.uint8))
            array.bind(self._program, self._memory[-1])
            mapped.append(Mapped(fd, self._memory[-1].ctypes.data))
        watch_forks(self._program, self._declared.arrays, mapped, self._leave_the_engine)
        self._watch_made = Watch(self._program, self._declared.attributes | self._disks.attributes)
        addresses = [memory.address for memory in mapped]
        if reason := pagemap.unsupported():
            return {"addresses": addresses, "reason": reason}, []
        tracker = pagemap.open_tracker()
        self._pagemap = tracker.pagemap
        return {"addresses": addresses, "reason": ""}, [tracker.userfaultfd, tracker.pagemap]

    def _faults(self, _request: Message, _fds: list[int]) -> Answer:
        if self._userfaultfd is not None:
            os.close(self._userfaultfd)
        opened = open_faults()
        self._userfaultfd = opened.fd  # stays open: see corefw.memory.faults
        for mapping in self._mappings:
            mapping.madvise(mmap.MADV_DONTNEED)  # what was mapped before would be seen without a fault
        return {"system_calls": opened.system_calls}, [opened.fd]

    def _start(self, request: Message, _fds: list[int]) -> Answer:
        self._take_over(request)
        return self._resume(request, [])

    def _resume(self, _request: Message, _fds: list[int]) -> Answer:
        self._disks.open()
        try:
            if self._set_up and not self._started:
                self._after_start()
        except BaseException:
            self._disks.close()
            raise
        self._running = True
        return {}, []

    def _stop(self, request: Message, _fds: list[int]) -> Answer:
        stop_cost = self._before_stop() if self._started else None
        try:
            undeclared = self._watch.found() if self._set_up else []
            if undeclared and request["whole"]:
                raise Unmovable(undeclared_message(self._program_name, undeclared))
            values = self._handover.values()
            self._disks.close()
        except MigfwError:
            if self._running:
                self._disks.open()
                if self._set_up:
                    self._after_start()
            raise
        self._running = False
        sys.stdout.flush()
        return {"values": values, "set_up": self._set_up, "undeclared": undeclared, "before_stop": stop_cost}, []

    def _before_stop(self) -> Message | None:
        """Call before_stop() and measure its cost, which adds to the downtime of a migration."""
        if type(self._program).before_stop is Program.before_stop:
            self._started = False
            return None
        began, written = time.monotonic(), self._written()
        self._program.before_stop()
        self._started = False
        seconds, now = time.monotonic() - began, self._written()
        return {"seconds": seconds, "written": None if written is None or now is None else max(0, now - written)}

    def _written(self) -> int | None:
        """Bytes of the arrays that the dirty log shows as written; None if that cannot be found out quickly."""
        length = sum(len(memory) for memory in self._memory)
        if self._pagemap is None or length > MAX_SCANNED:
            return None
        try:
            return sum(pagemap.written_bytes(self._pagemap, one.ctypes.data, len(one)) for one in self._memory)
        except MigfwError:
            return None

    def _look(self, _request: Message, _fds: list[int]) -> Answer:
        answer: Message = {"undeclared": self._watch.found() if self._set_up else [], "values": None, "unmovable": ""}
        try:
            answer["values"] = self._handover.shown()
        except Unmovable as error:
            answer["unmovable"] = str(error)
        return answer, []

    def _verify(self, request: Message, _fds: list[int]) -> Answer:
        if type(self._program).verify is Program.verify:
            raise UsageError(f"program '{type(self._program).__name__}' cannot verify itself: it has no verify()")
        if self._running:
            self._begin()
        else:
            self._take_over(request)
        if not self._set_up:
            return {"facts": {"set-up": False}}, []  # nothing to verify before setup()
        return {"facts": self._facts(self._program.verify())}, []

    def _facts(self, returned: object) -> Message:
        """What verify() returned, to be sent as JSON. Raises MigfwError for what JSON does not have: the guest has to
        live on."""
        if returned is None:
            return {}
        problem = f"this is of type {type(returned).__name__}"
        if isinstance(returned, Mapping):
            try:
                json.dumps(facts := dict(returned), allow_nan=False)
            except (TypeError, ValueError, RecursionError) as error:
                problem = str(error)
            else:
                return facts
        raise MigfwError(f"verify() of program '{self._program_name}' has to return a dict of JSON values: {problem}")

    def _take_over(self, request: Message) -> None:
        """Set the values that the engine has passed."""
        self._handover.restore(request["values"])
        self._set_up = request["set_up"]

    def _throttle(self, request: Message, _fds: list[int]) -> Answer:
        self._percent = min(99, max(0, int(request["percent"])))
        self._nap = 0.0
        return {}, []


# -- the process -------------------------------------------------------------------------------------------------------


def die_with_the_engine(lifeline: int) -> None:
    """Have the kernel send SIGKILL when the last writer of this pipe closes it."""
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(lifeline, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
    poll = select.poll()
    poll.register(lifeline, 0)
    if poll.poll(0):  # the engine went away before the signal was set up
        os._exit(1)


def main(link: int, lifeline: int) -> int:
    die_with_the_engine(lifeline)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the engine, which ends this process
    for fd in (link, lifeline):
        os.set_inheritable(fd, False)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # a real file, here in a process of our own
    try:
        return Guest(Link(socket.socket(fileno=link))).serve()
    except OSError:
        return 1  # the engine is gone


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:3])))
