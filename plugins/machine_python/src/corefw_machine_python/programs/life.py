"""`life`: Conway's game of life in the terminal, on a world without edges. It can move to another host while you watch.

On a terminal it draws every generation; elsewhere it prints a line from time to time.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from corefw_machine_python import guest

NAP: Final = 0.02
"""Longest sleep in a tick, so that a stop does not wait for the next frame."""

BLOCKS: Final = np.array(list(" ▄▀█"))
PLAIN: Final = np.array(list(" .'#"))
"""One character shows two cells, one above the other."""

HOME, CLEAR, REST_OF_LINE, REST_OF_SCREEN = "\x1b[H", "\x1b[2J\x1b[H", "\x1b[K", "\x1b[J"
GREEN, DIM, NORMAL = "\x1b[32m", "\x1b[2m", "\x1b[0m"


def world_size(text: str) -> tuple[int, int]:
    """ "96x48" -> (width, height)."""
    match = re.fullmatch(r"([0-9]+)x([0-9]+)", text)
    if match is None or not (4 <= int(match[1]) <= 100_000 and 4 <= int(match[2]) <= 100_000):
        raise ValueError(text)
    return int(match[1]), int(match[2])


def frames_per_second(text: str) -> float:
    """ "12.5" -> 12.5, between 0.1 and 1000."""
    fps = float(text)
    if not 0.1 <= fps <= 1000:
        raise ValueError(text)
    return fps


class Life(guest.Program):
    """Cells that live, die and travel."""

    size = guest.option("size", "78x44", kind=world_size, help="WIDTHxHEIGHT in cells")
    fps = guest.option("fps", "12", kind=frames_per_second, help="generations in a second")
    seed_option = guest.option("seed", 7, help="of the first generation")

    cells = guest.array("cells", shape=lambda options: (options.size[1], options.size[0]), dtype="uint8")
    before = guest.array("before", shape=lambda options: (options.size[1], options.size[0]), dtype="uint8")
    generation = guest.field("u64")
    alive = guest.field("u64")
    seed = guest.field("u32")
    moves = guest.field("u32")
    home = guest.field("str[128]")

    def setup(self) -> None:
        self.seed = self.options.seed
        self.cells[:] = self._random().random(self.cells.shape) < 0.3
        self.alive = int(self.cells.sum())

    def after_start(self) -> None:
        here = f"{socket.gethostname()[:80]}, process {os.getpid()}"
        if self.home not in ("", here):
            self.moves += 1
        self.home = here
        self._due = time.monotonic()
        self._terminal = sys.stdout.isatty()
        unicode = (sys.stdout.encoding or "").lower().startswith("utf")
        self._characters = BLOCKS if unicode else PLAIN
        if self._terminal:
            print(CLEAR, end="")  # noqa: T201 - this program's whole purpose
        else:
            print(self._caption(), flush=True)  # noqa: T201

    def before_stop(self) -> None:
        if self._terminal:
            print(f"{DIM}stopped on {self.home}{NORMAL}{REST_OF_LINE}", flush=True)  # noqa: T201

    def tick(self) -> None:
        wait = self._due - time.monotonic()
        if wait > 0:
            time.sleep(min(wait, NAP))
            return
        # Do not catch up on frames missed while the guest was stopped or the terminal slow.
        self._due = max(self._due + 1 / self.options.fps, time.monotonic() - 1 / self.options.fps)
        self._next_generation()
        if self._terminal:
            print(self.frame(), end="", flush=True)  # noqa: T201
        elif self.generation % max(1, round(10 * self.options.fps)) == 0:
            print(self._caption(), flush=True)  # noqa: T201

    def _next_generation(self) -> None:
        cells = self.cells
        neighbours = -cells
        for rows in (-1, 0, 1):
            shifted = np.roll(cells, rows, axis=0)
            for columns in (-1, 0, 1):
                neighbours += np.roll(shifted, columns, axis=1)
        after = ((neighbours == 3) | ((neighbours == 2) & (cells == 1))).astype(np.uint8)
        if np.array_equal(after, self.before):
            self._sprinkle(after)
        self.before[:] = cells
        cells[:] = after
        self.generation += 1
        self.alive = int(after.sum())

    def _sprinkle(self, cells: NDArray[np.uint8]) -> None:
        """Add cells to a world that only blinks."""
        random = self._random()
        height, width = min(12, cells.shape[0]), min(12, cells.shape[1])
        top, left = random.integers(0, cells.shape[0] - height + 1), random.integers(0, cells.shape[1] - width + 1)
        cells[top : top + height, left : left + width] = random.random((height, width)) < 0.4

    def _random(self) -> np.random.Generator:
        """A random number that depends only on the state, so the world evolves the same way on every host."""
        return np.random.default_rng([self.seed, self.generation])

    def _caption(self) -> str:
        moved = f", moved {self.moves} time{'' if self.moves == 1 else 's'}" if self.moves else ""
        return f"generation {self.generation}: {self.alive} alive on {self.home}{moved}"

    def frame(self) -> str:
        """The part of the world that fits the terminal, and a line about it."""
        columns, lines = shutil.get_terminal_size()
        cells: NDArray[Any] = self.cells[: 2 * max(1, lines - 3), : max(1, columns - 1)]
        if len(cells) % 2:
            cells = np.vstack([cells, np.zeros((1, cells.shape[1]), dtype=np.uint8)])
        drawn = self._characters[2 * cells[::2] + cells[1::2]]
        rows = [f"{GREEN}{''.join(row)}{NORMAL}{REST_OF_LINE}" for row in drawn]
        return HOME + "\n".join([*rows, self._caption()[: columns - 1] + REST_OF_LINE]) + "\n" + REST_OF_SCREEN

    def verify(self) -> Mapping[str, object]:
        found = int(self.cells.sum())
        if found != self.alive or int(self.cells.max()) > 1:
            raise AssertionError(f"{self.alive} cells were alive when they were counted, now {found} are")
        return {"generation": self.generation, "alive": found}
