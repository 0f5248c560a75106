"""The stream commands of postcopy on the destination; see commands.py.

    ADVISE         before the START sections: the source may switch to postcopy
    RAM_DISCARD    the guest has stopped there: pages that came and are out of date
    LISTEN         in the package, before the device state: what comes from here on is installed page by page
    RUN            at the package's end: the guest runs here
    RECV_BITMAP    over a new connection: which pages have arrived?
    RESUME         over a new connection: go on

Source: QEMU 10.0, loadvm_postcopy_handle_* and loadvm_handle_recv_bitmap (migration/savevm.c).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from corefw.engine.blocktime import Blocktime, MeasuredFaults
from corefw.engine.destination import Destination
from corefw.engine.guestarrival import GuestArrival, obstacle_to_postcopy
from corefw.engine.identity import new_secret
from corefw.engine.pagefaults import PageFaults
from corefw.engine.returnpath import ReturnPathWriter
from corefw.engine.scheduling import answer_at_once
from corefw.engine.standby import ArrivalThreads, StandbyThread
from corefw.errors import MachineError, StreamError
from corefw.machine import FaultSource, Machine, PostcopyMachine
from corefw.memory.faults import NoFaults
from corefw.postcopy import OnDemandLoader, PostcopyLoader, PreemptLoader
from corefw.section import SectionLoader
from corefw.states import MigrationStatus
from corefw.wire.constants import RESUMED, ReturnMessage
from corefw.wire.frames import FrameReader
from corefw.wire.records import CommandRecord, parse_discard, parse_postcopy_advise
from corefw.wire.returnpath import number_body, parse_recv_bitmap

log = logging.getLogger(__name__)


def advise(destination: Destination, frames: FrameReader, record: CommandRecord) -> None:
    """Refuse postcopy before any RAM was sent, if it cannot be done here. Without page sizes only dirty bitmaps may
    follow the guest, which needs nothing of the machine."""
    advice = parse_postcopy_advise(record.payload)
    if advice is not None:
        _check_machine(destination.machine)
        _return_path(destination)
        destination.tail.check_pages(advice)
        destination.advised_pages = True
        destination.stream_capabilities |= {"postcopy-ram"}
    destination.advised = True
    destination.threads = destination.threads or ArrivalThreads()
    _give_secret(destination)


def _check_machine(machine: Machine) -> None:
    """Raise MachineError if the guest cannot run before its RAM has arrived."""
    if (obstacle := obstacle_to_postcopy(machine)) is not None:
        raise MachineError(obstacle)
    if isinstance(machine, PostcopyMachine):
        for note in machine.postcopy_notes():
            log.info("%s", note)


def _give_secret(destination: Destination) -> None:
    """Let a source that is a migfw prove later that it is the same (identity.py)."""
    connection = destination.connection
    if connection.return_path is not None and connection.from_migfw and destination.secret is None:
        destination.secret = new_secret()
        connection.return_path.send(ReturnMessage.MIGFW_SECRET, destination.secret)


def discard(destination: Destination, _: FrameReader, record: CommandRecord) -> None:
    """Also prepares what takes milliseconds: a source that is a migfw sends the first of these before it stops its
    guest."""
    _check_expected(destination, destination.advised_pages)
    one = parse_discard(record.payload)
    _watch_faults(destination)
    loader = _loader(destination, one.block)
    for start, length in one.ranges:
        loader.discard(one.block, start, length)


def listen(destination: Destination, frames: FrameReader, _: CommandRecord) -> None:
    """From here on the guest's accesses to what has not arrived wait, and PageFaults serves them. If all of its RAM has
    arrived, nothing waits."""
    machine, progress = destination.machine, destination.progress
    later = [
        loader for loader in destination.loaders if isinstance(loader, PostcopyLoader) and loader.key in progress.opened
    ]
    on_demand = [loader for loader in later if isinstance(loader, OnDemandLoader)]
    _check_expected(destination, destination.advised_pages if on_demand else destination.advised)
    if not later and (destination.advised_pages or not progress.loaded):
        raise StreamError("expected a live section that has begun and not ended")
    threads = destination.threads
    assert threads is not None, "created at ADVISE"
    source = _watch_faults(destination) if on_demand else NoFaults()
    if on_demand and destination.settings.capability("postcopy-blocktime"):
        destination.blocktime = Blocktime()
        source = MeasuredFaults(source, destination.blocktime)
    faults = PageFaults(source, on_demand, machine.ram_blocks())
    sections = {loader.key: progress.opened[loader.key] for loader in later}
    destination.guest = GuestArrival(faults, sections, threads.start, is_whole=not on_demand)
    for loader in later:
        loader.listen(source)
    faults.start(destination.connection.return_path, threads.faults)
    _read_requested(destination, later, threads.requested)


def _watch_faults(destination: Destination) -> FaultSource:
    """Have the guest, which does not run yet, wait for what is not installed."""
    if destination.watched is None:
        assert isinstance(destination.machine, PostcopyMachine), "checked at ADVISE"
        destination.watched = destination.machine.watch_faults()
        answer_at_once()  # the guest is about to wait for this thread
    return destination.watched


def run(destination: Destination, frames: FrameReader, _: CommandRecord) -> MigrationStatus:
    """The device state is complete: the guest may run."""
    if destination.guest is None:
        raise StreamError("expected POSTCOPY_LISTEN before it")
    destination.take_over()
    return MigrationStatus.POSTCOPY_ACTIVE


def receive_bitmap(destination: Destination, _: FrameReader, record: CommandRecord) -> None:
    block = parse_recv_bitmap(record.payload)
    _return_path(destination).received_pages(block, _loader(destination, block).received(block))


def resume(destination: Destination, _: FrameReader, _record: CommandRecord) -> MigrationStatus:
    if destination.guest is None:
        raise StreamError("expected a postcopy that was interrupted")
    path = _return_path(destination)
    path.send(ReturnMessage.RESUME_ACK, number_body(RESUMED))
    _read_requested(destination, destination.loaders)
    destination.guest.faults.request_over(path)
    return MigrationStatus.POSTCOPY_ACTIVE


def _read_requested(
    destination: Destination, loaders: Iterable[SectionLoader], thread: StandbyThread | None = None
) -> None:
    """Read the channel of requested pages, if they have one: in this thread, or in a new one."""
    requested = destination.connection.requested
    reader = next((loader for loader in loaders if isinstance(loader, PreemptLoader)), None)
    if requested is not None and reader is not None:
        requested.start(reader, thread or StandbyThread("requested pages"))


def _check_expected(destination: Destination, advised: bool) -> None:
    """Raise StreamError unless the migration may switch to postcopy, and has not yet."""
    if not advised:
        raise StreamError("expected POSTCOPY_ADVISE before it")
    if destination.guest is not None:
        raise StreamError("expected it before POSTCOPY_LISTEN")


def _return_path(destination: Destination) -> ReturnPathWriter:
    path = destination.connection.return_path
    if path is None:
        raise StreamError("expected OPEN_RETURN_PATH before it")
    return path


def _loader(destination: Destination, block: str) -> OnDemandLoader:
    for loader in destination.loaders:
        if isinstance(loader, OnDemandLoader) and block in loader.covers().ram_blocks:
            return loader
    raise StreamError(f"expected the name of a RAM block, got '{block}'")
