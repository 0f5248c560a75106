"""The contract kit for machines: RAM blocks and their dirty logs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from corefw.machine import Machine, RamBlock, RunState
from corefw.testing.machine_bench import Bench, check
from corefw.wire.constants import TARGET_PAGE_SIZE

ROUNDS: Final = 5
"""Harvests of a dirty log while the guest runs."""


@check
def _a_block_is_one_memory(bench: Bench) -> None:
    """`view`, `pages` and `fd` are the same memory, as long as the block, in pages of the stream's size."""
    for block in bench.machine(incoming=True).ram_blocks():
        size = block.page_size
        assert 0 < len(block.idstr.encode()) < 256, f"the block's name '{block.idstr}' has not 1 to 255 bytes"
        assert size == TARGET_PAGE_SIZE, f"pages of '{block.idstr}' have {size} bytes, not {TARGET_PAGE_SIZE}"
        assert block.length % size == 0, f"block '{block.idstr}' of {block.length} bytes has broken pages of {size}"
        assert len(block.view) == block.length, f"the view of '{block.idstr}' has {len(block.view)} bytes"
        assert block.pages.shape == (block.length // size, size), f"pages of '{block.idstr}': {block.pages.shape}"
        block.view[block.length - 3 :] = b"end"
        assert block.pages[-1, -3:].tobytes() == b"end", f"what view got of '{block.idstr}' is not in pages"
        assert os.pread(block.fd, 3, block.length - 3) == b"end", f"what view got of '{block.idstr}' is not behind fd"


@check
def _pages_are_stored_and_filled(bench: Bench) -> None:
    """store() takes strided rows; fill() with zero leaves untouched pages alone and clears the others."""
    for block in bench.machine(incoming=True).ram_blocks():
        count, size = len(block.pages), block.page_size
        numbers = np.array(sorted({0, count // 3, count // 2, count - 1}), dtype=np.int64)
        before = _hole_pages(block)
        block.fill(np.arange(count), 0)
        assert _hole_pages(block) == before, f"zeroes touched pages of '{block.idstr}' that were holes"
        buffer = np.random.default_rng(1).integers(1, 256, (len(numbers), size + 8), dtype=np.uint8)
        block.store(numbers, buffer[:, 8:])
        assert np.array_equal(block.pages[numbers], buffer[:, 8:]), (
            f"store() did not store what it got in '{block.idstr}'"
        )
        assert not _hole_pages(block) & set(numbers.tolist()), f"pages of '{block.idstr}' are holes after store()"
        block.fill(numbers[:1], 0xA5)
        block.fill(numbers[1:], 0)
        assert (block.pages[numbers[0]] == 0xA5).all(), f"fill() with 0xa5 did not fill in '{block.idstr}'"
        assert not block.pages[numbers[1:]].any(), f"fill() with zero left something in '{block.idstr}'"


def _hole_pages(block: RamBlock) -> set[int]:
    return {page for first, end in block.holes().tolist() for page in range(first, end)}


@check
def _holes_read_as_zero(bench: Bench) -> None:
    """holes() returns runs, ascending and apart, of pages that are zero."""
    machine = bench.running()
    machine.stop(RunState.PAUSED)
    for block in machine.ram_blocks():
        holes = block.holes()
        _assert_runs(holes, len(block.pages), f"holes() of '{block.idstr}'")
        for first, end in holes.tolist():
            assert not block.pages[first:end].any(), f"pages {first} to {end} of '{block.idstr}' are no hole"


def _assert_runs(runs: NDArray[np.int64], count: int, what: str) -> None:
    assert runs.ndim == 2 and runs.shape[1] == 2, f"{what} has the shape {runs.shape}, not (n, 2)"
    assert (runs[:, 0] < runs[:, 1]).all(), f"{what} has an empty run"
    assert (runs[1:, 0] > runs[:-1, 1]).all(), f"{what} has runs that are not ascending and apart"
    assert len(runs) == 0 or (runs[0, 0] >= 0 and runs[-1, 1] <= count), f"{what} has pages outside the block"


@check
def _the_dirty_log_finds_every_write(bench: Bench) -> None:
    """A copy of a block, updated with the pages of each harvest, equals the block once the guest has stopped."""
    machine = bench.running()
    blocks = machine.ram_blocks()
    _follow(bench, machine, blocks)


@check
def _a_dirty_log_can_start_again(bench: Bench) -> None:
    """stop() can be called twice, and start() begins a new log, also on a guest that was stopped in between."""
    machine = bench.running()
    blocks = machine.ram_blocks()
    for block in blocks:
        block.dirty_log.start()
        block.dirty_log.stop()
        block.dirty_log.stop()
    machine.stop(RunState.PAUSED)
    machine.start()
    _follow(bench, machine, blocks)


def _follow(bench: Bench, machine: Machine, blocks: Sequence[RamBlock]) -> None:
    """Update a copy of the RAM from the dirty log, stop the guest, and compare."""
    copies = []
    for block in blocks:
        block.dirty_log.start()
        copies.append(block.pages.copy())
    for _ in range(ROUNDS):
        bench.wait()
        _copy_dirty(blocks, copies)
    machine.stop(RunState.FINISH_MIGRATE)
    _copy_dirty(blocks, copies)
    for block, copy in zip(blocks, copies, strict=True):
        lost = np.flatnonzero((copy != block.pages).any(axis=1))
        assert len(lost) == 0, (
            f"the dirty log of '{block.idstr}' lost writes to {len(lost)} pages, the first is {lost[0]}"
        )
        again = block.dirty_log.harvest()
        assert len(again) == 0, (
            f"the dirty log of '{block.idstr}' names pages again that were not written: {again.tolist()[:3]}"
        )
        block.dirty_log.stop()


def _copy_dirty(blocks: Sequence[RamBlock], copies: Sequence[NDArray[np.uint8]]) -> None:
    for block, copy in zip(blocks, copies, strict=True):
        runs = block.dirty_log.harvest()
        _assert_runs(runs, len(block.pages), f"a harvest of '{block.idstr}'")
        for first, end in runs.tolist():
            copy[first:end] = block.pages[first:end]
