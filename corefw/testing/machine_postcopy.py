"""The contract kit for machines: a guest that runs while its RAM is still arriving."""

from __future__ import annotations

import errno
import select
import time
from typing import Final

import numpy as np
from numpy.typing import NDArray

from corefw.machine import FaultSource, Machine, PostcopyMachine, RamBlock, RunState, VerifiableMachine
from corefw.memory import userfault
from corefw.memory.runs import distinct, runs_of_pages
from corefw.testing.machine_bench import Bench, assert_state, check, load_devices, save_devices
from corefw.testing.tasks import Task

PATIENCE: Final = 60.0
"""Seconds that a guest has until it waits for a page."""


@check
def _page_faults_are_served(bench: Bench) -> None:
    """A PostcopyMachine's guest waits for pages, goes on when they are installed, and sees everything after release().

    Other machines pass, and so do all on a host that cannot serve page faults.
    """
    destination = bench.machine(incoming=True)
    if not isinstance(destination, PostcopyMachine) or destination.postcopy_unsupported() is not None:
        return
    source = bench.running()
    source.stop(RunState.FINISH_MIGRATE)
    faults = destination.watch_faults()
    load_devices(destination, save_devices(source))
    for here, there in zip(source.ram_blocks(), destination.ram_blocks(), strict=True):
        there.store(np.arange(len(here.pages)), here.pages.copy())
    starting = Task("start()", destination.start)
    waited = _serve(destination, faults)
    faults.release()
    starting.result(PATIENCE)
    assert waited, "the guest saw pages that were not installed: watch_faults() has to hold it at every one of them"
    bench.wait()
    assert_state(destination, RunState.RUNNING, "start() with page faults")
    destination.stop(RunState.PAUSED)
    if isinstance(destination, VerifiableMachine):
        destination.verify()


def _serve(machine: Machine, faults: FaultSource) -> int:
    """Install pages that the guest waits for, until it stops waiting for a moment; return the number of pages."""
    blocks = {block.idstr: block for block in machine.ram_blocks()}
    served, deadline = 0, time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        ready, _, _ = select.select([faults], [], [], 0.1)
        if not ready and machine.run_state is RunState.RUNNING:
            break
        for idstr, waiting in faults.poll().items():
            pages = distinct(waiting[:, 0])
            served += len(pages)
            if served % 2:
                _map(faults, blocks[idstr], pages)
            faults.install(blocks[idstr], runs_of_pages(pages))
    return served


def _map(faults: FaultSource, block: RamBlock, pages: NDArray[np.int64]) -> None:
    """Let the guest see these pages as compiled code does, if the machine allows that."""
    mapping = faults.mapping(block)
    if mapping is None or mapping.userfaultfd < 0:
        return
    for page in pages.tolist():
        try:
            userfault.map_existing(mapping.userfaultfd, mapping.address + page * block.page_size, block.page_size)
        except OSError as error:
            assert error.errno == errno.EEXIST, f"mapping() of block '{block.idstr}' is wrong: {error.strerror}"
