"""The interface for authors of movable programs.

    from corefw_machine_python import guest

    class Heat(guest.Program):
        grid = guest.array("grid", shape=(4096, 4096), dtype="float64")
        step = guest.field("u64")

        def tick(self):
            ...
            self.step += 1

Between two calls of tick(), the declared state is the whole state of the program; nothing else moves. The program runs
in the main thread of a process of its own, and its methods are called one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Final, TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

from corefw_machine_python import values
from corefw_machine_python.declarations import Array, Field, Option, Options, Shape, Value, size
from corefw_machine_python.disks import DeclaredDisk, DiskPath, DiskSize

__all__ = ["Options", "Program", "array", "disk", "field", "option", "rng", "section", "size", "touch", "value"]

PAGE_SIZE: Final = 4096
_Buffer = TypeVar("_Buffer", bound="NDArray[Any] | memoryview")


def array(name: str, shape: Shape | Callable[[Any], Shape], dtype: DTypeLike = "float64") -> Array:
    """A NumPy array in RAM that moves while the program writes to it. Initially zero.

    name    of the RAM block in the stream
    shape   a number, a tuple, or a function of the program's options that returns one
    dtype   any dtype without Python objects
    """
    return Array(name, shape, dtype)


def field(kind: str, default: Value | None = None, *, since: int = 0) -> Field:
    """A value of fixed size that moves while the program is stopped.

    kind      "u8" to "u64", "i8" to "i64", "f64" (or "double"), "bool", "bytes[N]" (exactly N, shorter ones are padded
              with zeros), "str[N]" (at most N bytes of UTF-8)
    default   the value until setup() sets it; by default zero or empty
    since     the first `version` of the program that has the field; it keeps its default if an older version arrives

    Assigning a value that does not fit raises TypeError or ValueError.
    """
    return Field(kind, default, since)


def value(default: Any = None, *, limit: int = values.DEFAULT_LIMIT, since: int = 0) -> values.Value:
    """A JSON-like value: dict, list, str, int, float, bool, None; also bytes and tuple, nested to any depth.

    Change it in place or assign it, as in `self.items.append(1)`. The keys of a dict are str. It is sent while the
    program is stopped, so keep it small and put numbers into arrays.

    limit   maximum bytes as text, at most 64 MiB. A program with a larger value cannot move, and keeps running
    since   see field()

    Assigning a value that does not fit raises TypeError or ValueError. Changes in place are checked before a migration.
    An object that a value contains twice arrives as two objects.
    """
    return values.Value(default, limit, since)


def rng(seed: int | None = None, *, kind: values.Kind = "numpy", since: int = 0) -> values.Rng:
    """A random generator that continues its sequence at the destination.

    seed   initial seed; None for a different sequence in every run
    kind   "numpy" for a numpy.random.Generator (that of default_rng()), "random" for a random.Random
    since  see field()
    """
    return values.Rng(seed, kind, since)


def section(
    make: Callable[[], Any],
    *,
    save: Callable[[Any], bytes],
    load: Callable[[bytes, int], Any],
    version: int = 1,
    minimum_version: int | None = None,
    limit: int = values.DEFAULT_LIMIT,
    since: int = 0,
) -> values.OwnSection:
    """Any object, in a section of its own and in the program's own format. Change it in place or assign it.

    The object is saved in the program's process when the program is stopped, after before_stop(), and loaded when it is
    started at the destination, before after_start(). If save() raises, the stop fails and the program keeps running. If
    load() raises, the migration fails and the program continues at the source.

    make              creates the first object
    save              object -> bytes; must not change the object
    load              (bytes, version) -> object. The bytes come from the source: check them, and do not unpickle
    version           of the format that save() writes; given to load()
    minimum_version   the oldest version that load() reads; `version` by default
    limit             maximum bytes, at most 64 MiB
    since             see field()
    """
    oldest = version if minimum_version is None else minimum_version
    return values.OwnSection(make, save, load, (oldest, version), limit, since)


def disk(name: str, path: DiskPath, size: DiskSize = None) -> DeclaredDisk:
    """A disk: a raw file, or a block device, that the program reads and writes with `self.NAME.pread(length, offset)`,
    `pwrite(data, offset)` and `flush()`. What it writes sets the disk's dirty bitmaps.

    The file does not move with the program. A destination needs the same file, on shared storage or as a copy. It is
    open only while the program runs.

    name   of the block node and its device
    path   or a function of the program's options that returns it
    size   bytes, a multiple of 512, or a function of the options; a file that does not exist is created with it where
           the program begins. None: as large as the file is
    """
    return DeclaredDisk(name, path, size)


def touch(buffer: _Buffer) -> _Buffer:
    """Wait until every page of an array has arrived in postcopy, and return the array.

        file.readinto(guest.touch(self.grid))

    Needed before a system call reads or writes an array (file.readinto, array.tofile, socket.send, ...), unless the
    destination's host has system calls wait: there they fail with EFAULT on a missing page. Reads one byte of each
    page, which takes about 10 ms per GiB once everything has arrived. Raises ValueError if the array is not contiguous.
    """
    array = np.asarray(buffer)
    if not array.flags.c_contiguous:
        raise ValueError("guest.touch() expects a contiguous array, as system calls do")
    if array.size:
        data = array.reshape(-1).view(np.uint8)
        int(data[::PAGE_SIZE].max())
        int(data[-1])
    return buffer


def option(
    name: str,
    default: object,
    *,
    kind: Callable[[str], object] | None = None,
    help: str = "",  # noqa: A002 - as in every other option API
) -> Option:
    """An option set with `--opt NAME=VALUE` and read as `self.options.name`. It has to be the same on both sides.

    kind   converts the text to the value; by default the type of the default. `guest.size` accepts "512M"
    """
    return Option(name, default, kind, help)


class Program:
    """A guest. Subclass it, declare its state, define tick().

    version           version of the program's fields, sent with them
    minimum_version   the oldest version that this program accepts; `version` by default
    stop_timeout      seconds that a tick may take before a stop fails
    requires          versions that the program needs, such as {"numpy": ">=1.26,<3", "python": ">=3.11"}; "same"
    demands
                      the same version on both sides of a migration
    options           see option()
    """

    requires: ClassVar[Mapping[str, str]] = {}
    version: ClassVar[int] = 1
    minimum_version: ClassVar[int | None] = None
    stop_timeout: ClassVar[float] = 10.0

    def __init__(self, options: Options) -> None:
        self.options = options

    def tick(self) -> None:
        """Do one step; called repeatedly. Keep it much shorter than the downtime limit: the program can only be stopped
        between two ticks."""
        raise NotImplementedError(f"{type(self).__name__} has to define tick()")

    def setup(self) -> None:
        """Prepare the initial state; called once, before the first tick, and not at the destination."""

    def after_start(self) -> None:
        """Open files and sockets, start threads; called after every start, on either host."""

    def before_stop(self) -> None:
        """Undo after_start(); called before every stop. Raise to refuse the stop: the program then keeps running."""

    def verify(self) -> Mapping[str, object]:
        """Check the state between two ticks. Return what was checked, as JSON values; raise if something is wrong."""
        raise NotImplementedError(f"{type(self).__name__} has no verify()")

    def finish(self) -> None:
        """End the program after this tick."""
        self.__dict__["finished"] = True
