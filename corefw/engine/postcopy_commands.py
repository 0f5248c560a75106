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

from collections.abc import Iterable

from corefw.engine.blocktime import Blocktime, MeasuredFaults
from corefw.engine.destination import Destination
from corefw.engine.guestarrival import GuestArrival, obstacle_to_postcopy
from corefw.engine.identity import new_secret
from corefw.engine.pagefaults import PageFaults
from corefw.engine.returnpath import ReturnPathWriter
from corefw.errors import MachineError, StreamError
from corefw.machine import PostcopyMachine
from corefw.section import PostcopyLoader, PreemptLoader, SectionLoader
from corefw.states import MigrationStatus
from corefw.wire.constants import RESUMED, ReturnMessage
from corefw.wire.frames import FrameReader
from corefw.wire.records import CommandRecord, parse_discard, parse_postcopy_advise
from corefw.wire.returnpath import number_body, parse_recv_bitmap


def advise(destination: Destination, frames: FrameReader, record: CommandRecord) -> None:
    """Refuse postcopy before any RAM was sent, if it cannot be done here."""
    machine, advice = destination.machine, parse_postcopy_advise(record.payload)
    if advice is None:
        return  # the source has the capability dirty-bitmaps alone, and sends this whether it switches or not
    if (obstacle := obstacle_to_postcopy(machine)) is not None:
        raise MachineError(obstacle)
    path = _return_path(destination)
    destination.tail.check_pages(advice)
    destination.advised = True
    if destination.connection.from_migfw and destination.secret is None:
        destination.secret = new_secret()
        path.send(ReturnMessage.MIGFW_SECRET, destination.secret)


def discard(destination: Destination, _: FrameReader, record: CommandRecord) -> None:
    _machine(destination)
    one = parse_discard(record.payload)
    loader = _loader(destination, one.block)
    for start, length in one.ranges:
        loader.discard(one.block, start, length)


def listen(destination: Destination, frames: FrameReader, _: CommandRecord) -> None:
    """From here on the guest's accesses to what has not arrived wait, and PageFaults serves them."""
    machine = _machine(destination)
    progress = destination.progress
    loaders = [loader for loader in destination.loaders if isinstance(loader, PostcopyLoader)]
    later = [loader for loader in loaders if loader.key in progress.opened]
    if not later:
        raise StreamError("expected a live section that has begun and not ended")
    source = machine.watch_faults()
    if destination.settings.capability("postcopy-blocktime"):
        destination.blocktime = Blocktime()
        source = MeasuredFaults(source, destination.blocktime)
    faults = PageFaults(source, later, machine.ram_blocks())
    destination.guest = GuestArrival(faults, {loader.key: progress.opened[loader.key] for loader in later})
    for loader in later:
        loader.listen(source)
    _read_requested(destination, later)
    faults.request_over(_return_path(destination))


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


def _read_requested(destination: Destination, loaders: Iterable[SectionLoader]) -> None:
    """Read the channel of requested pages, if they have one."""
    requested = destination.connection.requested
    reader = next((loader for loader in loaders if isinstance(loader, PreemptLoader)), None)
    if requested is not None and reader is not None:
        requested.start(reader)


def _machine(destination: Destination) -> PostcopyMachine:
    """The machine of a migration that may switch to postcopy, and has not yet."""
    machine = destination.machine
    if not destination.advised or not isinstance(machine, PostcopyMachine):
        raise StreamError("expected POSTCOPY_ADVISE before it")
    if destination.guest is not None:
        raise StreamError("expected it before POSTCOPY_LISTEN")
    return machine


def _return_path(destination: Destination) -> ReturnPathWriter:
    path = destination.connection.return_path
    if path is None:
        raise StreamError("expected OPEN_RETURN_PATH before it")
    return path


def _loader(destination: Destination, block: str) -> PostcopyLoader:
    for loader in destination.loaders:
        if isinstance(loader, PostcopyLoader) and block in loader.covers().ram_blocks:
            return loader
    raise StreamError(f"expected the name of a RAM block, got '{block}'")
