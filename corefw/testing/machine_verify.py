"""The contract kit for machines: verify(), with which a machine proves that its guest arrived intact."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from corefw.errors import MigfwError
from corefw.machine import RamBlock, RunState, VerifiableMachine
from corefw.testing.machine_bench import Bench, assert_state, check, save_devices

SAMPLES: Final = 8
"""Number of pages that are put back, one at a time."""


class UncheckedExecution(UserWarning):
    """The kit could not check that the guest continues correctly."""


@check
def _verify_leaves_the_guest_as_it_was(bench: Bench) -> None:
    """verify(), if there is one, works on a running and on a stopped guest, and changes neither."""
    machine = bench.running()
    if not isinstance(machine, VerifiableMachine):
        return
    json.dumps(dict(machine.verify()))
    assert_state(machine, RunState.RUNNING, "verify() of a guest that runs")
    machine.stop(RunState.PAUSED)
    before = save_devices(machine)
    machine.verify()
    assert_state(machine, RunState.PAUSED, "verify() of a stopped guest")
    assert save_devices(machine) == before, "verify() changed a device's state"


@check
def _verify_finds_lost_writes(bench: Bench) -> None:
    """verify() raises if a page is older than the rest of the guest, as after a migration that lost a write.

    Warns (UncheckedExecution) about a machine without verify(), and about one that does not notice.
    """
    machine = bench.running()
    if not isinstance(machine, VerifiableMachine):
        _warn(
            f"machine '{machine.kind}' has no verify(), so no test shows whether its guest continues correctly after a"
            " migration: make it a VerifiableMachine"
        )
        return
    machine.stop(RunState.PAUSED)
    blocks = machine.ram_blocks()
    before = [block.pages.copy() for block in blocks]
    machine.start()
    bench.wait()
    machine.stop(RunState.PAUSED)
    machine.verify()
    for block, page, old in _changed_pages(blocks, before):
        now = block.pages[page].copy()
        block.pages[page] = old
        if not _fails(machine):
            _warn(
                f"verify() of machine '{machine.kind}' does not notice that page {page} of '{block.idstr}' is older"
                " than the rest of the guest, so it would not notice lost writes: check all of its state"
            )
        block.pages[page] = now
    machine.verify()


def _changed_pages(
    blocks: Sequence[RamBlock], before: Sequence[NDArray[np.uint8]]
) -> list[tuple[RamBlock, int, NDArray[np.uint8]]]:
    """Some pages that the guest has written, with their earlier contents."""
    found = [
        (block, int(page), copy[page])
        for block, copy in zip(blocks, before, strict=True)
        for page in np.flatnonzero((copy != block.pages).any(axis=1))
    ]
    return found[:: len(found) // SAMPLES + 1]


def _fails(machine: VerifiableMachine) -> bool:
    try:
        machine.verify()
    except MigfwError:
        return True
    return False


def _warn(message: str) -> None:
    warnings.warn(f"{message} (docs/write-a-machine.md)", UncheckedExecution, stacklevel=1)
