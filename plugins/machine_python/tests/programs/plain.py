"""Programs for the tests: good ones, and some with one fault each."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from corefw_machine_python import guest


class Plain(guest.Program):
    """Two arrays whose sizes are no multiple of a page, and a field of every kind."""

    rows = guest.option("rows", 3, help="of the first array")
    fast = guest.option("fast", True)

    small = guest.array("small", shape=lambda options: (options.rows, 7), dtype="int32")
    large = guest.array("large", shape=100_001, dtype=np.uint8)
    u8 = guest.field("u8", 200)
    i64 = guest.field("i64", -5)
    real = guest.field("double", 0.1)
    flag = guest.field("bool", True)
    raw = guest.field("bytes[5]", b"ab")
    text = guest.field("str[9]", "Grüße")
    steps = guest.field("u64")
    starts = guest.field("u32")

    def setup(self) -> None:
        self.small[:] = 1
        self.real = 0.0

    def after_start(self) -> None:
        self.starts += 1

    def tick(self) -> None:
        self.small += 1
        self.large[self.steps % 100_001] += 1
        self.steps += 1
        self.u8 = self.steps % 256
        self.real = self.steps / 3
        self.flag = not self.flag
        self.raw = (self.steps % 2**32).to_bytes(4, "big")
        self.text = f"{self.steps % 1000} ä"
        time.sleep(0.001)

    def verify(self) -> Mapping[str, object]:
        if int(self.small[0, 0]) != self.steps + 1 or self.real != self.steps / 3:
            raise AssertionError(f"{self.steps} steps, but the array has {self.small[0, 0]}")
        return {"steps": self.steps, "u8": self.u8, "starts": self.starts, "text": self.text}


class LooksAround(Plain):
    """Reads its arrays when it starts, with a short time limit."""

    stop_timeout = 0.1

    def after_start(self) -> None:
        self.steps += int(self.small[0, 0])


class Dawdles(Plain):
    """Takes too long to start at the destination."""

    stop_timeout = 0.3

    def after_start(self) -> None:
        self.began = getattr(self, "began", self.steps)
        if self.began:
            time.sleep(2)


class Silent(guest.Program):
    """Has neither arrays nor verify()."""

    steps = guest.field("u64")

    def tick(self) -> None:
        self.steps += 1
        time.sleep(0.001)


class Verdict(Silent):
    """Returns from verify() what its option names."""

    verdict = guest.option("verdict", "nothing")

    def verify(self) -> Any:
        return {"nothing": None, "number": 7, "no": False, "numpy": {"sum": np.int64(3)}, "nan": {"mean": np.nan}}[
            self.options.verdict
        ]


class Fails(Silent):
    """Raises in its tenth tick."""

    def tick(self) -> None:
        super().tick()
        if self.steps == 10:
            raise ZeroDivisionError("ten is enough")


class Overflows(Silent):
    """Assigns what its field cannot hold."""

    small = guest.field("u8")

    def tick(self) -> None:
        self.small = 256  # one too many


class FailsInSetup(Silent):
    def setup(self) -> None:
        raise RuntimeError("no setup today")


class FailsInAfterStart(Silent):
    def after_start(self) -> None:
        if self.steps:
            raise RuntimeError("the printer is on fire")


class Counted(Silent):
    """Reports its progress."""

    def verify(self) -> Mapping[str, object]:
        return {"steps": self.steps}


class Refuses(Counted):
    """Refuses the first stop."""

    asked = guest.field("u32")

    def before_stop(self) -> None:
        self.asked += 1
        if self.asked == 1:
            raise RuntimeError("in the middle of something")


class Finishes(Silent):
    def tick(self) -> None:
        super().tick()
        if self.steps == 5:
            self.finish()


class Exits(Silent):
    """Exits like a program that does not know about migfw."""

    code = guest.option("code", 0)

    def tick(self) -> None:
        raise SystemExit(self.options.code)


class Dies(Silent):
    def tick(self) -> None:
        os.abort()


class Slow(Silent):
    """A tick that takes longer than a stop may."""

    stop_timeout = 0.3
    seconds = guest.option("seconds", 1.0)

    def tick(self) -> None:
        super().tick()
        time.sleep(self.options.seconds)


class Wide(Silent):
    """An array whose shape is an option, even if the memory is not available."""

    size = guest.option("size", 1)
    grid = guest.array("grid", shape=lambda options: (8 // options.size,), dtype="u1")


class NoProgram:
    pass


class NoTick(guest.Program):
    """Has no tick()."""


class Twice(Silent):
    one = guest.array("same", shape=3)
    two = guest.array("same", shape=3)


class WrongVersion(Silent):
    version = 1
    minimum_version = 2
