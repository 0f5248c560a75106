"""What the author of a movable program writes against.

    from corefw_machine_python import guest

    class Heat(guest.Program):
        grid = guest.array("grid", shape=(4096, 4096), dtype="float64")
        step = guest.field("u64")

        def tick(self):
            ...
            self.step += 1

Between two calls of tick(), what is declared here is the whole state of the program; nothing else moves. The program
runs in a process of its own, in its main thread; no method is called while another one runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from numpy.typing import DTypeLike

from corefw_machine_python import values
from corefw_machine_python.declarations import Array, Field, Option, Options, Shape, Value, size

__all__ = ["Options", "Program", "array", "field", "option", "rng", "size", "value"]


def array(name: str, shape: Shape | Callable[[Any], Shape], dtype: DTypeLike = "float64") -> Array:
    """RAM: a NumPy array that moves while the program writes to it. Starts as zeros.

    name    of the RAM block in the stream
    shape   a number, a tuple, or a function of the program's options that returns one
    dtype   anything without Python objects in it
    """
    return Array(name, shape, dtype)


def field(kind: str, default: Value | None = None, *, since: int = 0) -> Field:
    """A value that moves while the program is stopped.

    kind      "u8" to "u64", "i8" to "i64", "f64" (or "double"), "bool", "bytes[N]" (exactly N, shorter ones are padded
              with zeros), "str[N]" (at most N bytes of UTF-8)
    default   before setup() sets it; zero or empty
    since     the `version` of the program that was the first to have it; it keeps its default when an older one comes

    Assigning a value that does not fit raises TypeError or ValueError.
    """
    return Field(kind, default, since)


def value(default: Any = None, *, limit: int = values.DEFAULT_LIMIT, since: int = 0) -> values.Value:
    """Any value as JSON has it: dict, list, str, int, float, bool, None; also bytes and tuple, nested as you like.

    Change it in place or assign it, as in `self.items.append(1)`. The keys of a dict are str. It is sent while the
    program is stopped, so keep it small and put numbers into arrays.

    limit   bytes that it may have as text, at most 64 MiB. A program with a larger one cannot move, and runs on
    since   see field()

    Assigning what does not fit raises TypeError or ValueError; what is changed in place is checked when it is to move.
    An object that is in a value twice arrives as two.
    """
    return values.Value(default, limit, since)


def rng(seed: int | None = None, *, kind: values.Kind = "numpy", since: int = 0) -> values.Rng:
    """A random generator that goes on with the same sequence where it arrives.

    seed   for the first numbers; None: different ones in every run
    kind   "numpy" for a numpy.random.Generator (that of default_rng()), "random" for a random.Random
    since  see field()
    """
    return values.Rng(seed, kind, since)


def option(
    name: str,
    default: object,
    *,
    kind: Callable[[str], object] | None = None,
    help: str = "",  # noqa: A002 - as in every other option API
) -> Option:
    """What `--opt NAME=VALUE` sets, read as `self.options.name`. Give both sides of a migration the same.

    kind   turns the text into the value; that of the default's type unless given. `guest.size` reads "512M"
    """
    return Option(name, default, kind, help)


class Program:
    """A guest. Subclass it, declare its state, define tick().

    version           of the program's fields, sent with them
    minimum_version   the oldest that this program takes over; `version` unless given
    stop_timeout      seconds that a tick may take before a stop is given up
    requires          versions that the program needs, as in {"numpy": ">=1.26,<3", "python": ">=3.11"}; "same" demands
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
        """One step; called again and again. Keep it well under the downtime that a migration may have: the program is
        stopped between two ticks only."""
        raise NotImplementedError(f"{type(self).__name__} has to define tick()")

    def setup(self) -> None:
        """Once in the life of the program, before the first tick; not again where it arrives."""

    def after_start(self) -> None:
        """After every start, here or where it arrived: open what the process needs and no state holds."""

    def before_stop(self) -> None:
        """Before every stop: the counterpart. To refuse the stop, raise; the program then runs on."""

    def verify(self) -> Mapping[str, object]:
        """Check the state, between two ticks; JSON values that tell what was checked. Raise to say what is wrong."""
        raise NotImplementedError(f"{type(self).__name__} has no verify()")

    def finish(self) -> None:
        """End the program after this tick: its work is done."""
        self.__dict__["finished"] = True
