"""A parked QEMU machine: its RAM in memory, its devices byte for byte as QEMU sent them.

Invariant: device sections leave exactly as they arrived, so the next QEMU continues the guest as if it had come
straight from the first one. The machine cannot run here.

Threads: as corefw.machine says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from corefw.block import SECTOR, BlockNode, bitmaps_of
from corefw.errors import MachineError, UsageError
from corefw.machine import (
    BlockMakingMachine,
    FaultSource,
    MachineConfig,
    ParkingMachine,
    RamBlock,
    RamMakingMachine,
    RunState,
    StreamFormat,
    WaitReadable,
)
from corefw.memory.blocks import MemfdBlock
from corefw.memory.faults import NoFaults
from corefw.wire.constants import TARGET_PAGE_SIZE
from corefw.wire.stream import StreamReader
from corefw_machine_qemu.adopting import DeviceState, cut_package, take_device_state
from corefw_machine_qemu.limits import Limits


class ParkedMachine(ParkingMachine, RamMakingMachine, BlockMakingMachine):
    """The machine "qemu". Options: see limits.OPTIONS. It begins as a destination: `migfw run --machine qemu --incoming
    URI`."""

    kind = "qemu"

    def __init__(self, config: MachineConfig) -> None:
        self._limits = Limits.from_options(config.options)
        self._room = self._limits.now()
        if config.program is not None:
            raise UsageError(f"machine 'qemu' does not run a program, got '{config.program}': leave it out")
        if config.allow_undeclared:
            raise UsageError("machine 'qemu' does not run a program: leave --allow-undeclared out")
        if not config.incoming:
            raise UsageError("machine 'qemu' only receives machines from QEMU: say where to wait with --incoming URI")
        self._name = ""
        self._state = RunState.INMIGRATE
        self._blocks: dict[str, MemfdBlock] = {}
        self._nodes: dict[str, BlockNode] = {}
        self._format: StreamFormat | None = None
        self._stored = DeviceState()
        self._faults: NoFaults | None = None
        self._observers: list[Callable[[RunState, RunState], None]] = []

    @property
    def name(self) -> str:
        """QEMU's machine type, such as "pc-i440fx-7.2"; "" before a machine arrives or if its stream has none."""
        return self._name

    # -- run state -------------------------------------------------------------------------------------------------

    @property
    def run_state(self) -> RunState:
        return self._state

    def start(self) -> None:
        raise MachineError(
            "a parked QEMU machine cannot run here: migrate it to a QEMU that waits for it (-incoming URI), or store it"
            " with 'migfw migrate file:PATH'"
        )

    def stop(self, state: RunState) -> None:
        self.set_run_state(state)

    def set_run_state(self, state: RunState) -> None:
        if state is RunState.RUNNING:
            self.start()
        old, self._state = self._state, state
        if old is not state:
            for observer in self._observers:
                observer(old, state)

    def watch(self, observer: Callable[[RunState, RunState], None]) -> None:
        self._observers.append(observer)

    # -- RAM -------------------------------------------------------------------------------------------------------

    def ram_blocks(self) -> Sequence[RamBlock]:
        return tuple(self._blocks.values())

    def make_ram_blocks(self, lengths: Mapping[str, int]) -> Sequence[RamBlock]:
        """See RamMakingMachine. Memory is used only as pages arrive."""
        for idstr, length in lengths.items():
            if not idstr.isprintable():
                raise MachineError(f"cannot make RAM block {idstr!r}: expected a printable name")
            if length <= 0 or length % TARGET_PAGE_SIZE:
                raise MachineError(
                    f"cannot make RAM block '{idstr}': expected a multiple of {TARGET_PAGE_SIZE} bytes, got {length}"
                )
        if not self._blocks:
            self._room = self._limits.now()
        held = sum(block.length for block in self._blocks.values())
        self._room.check(len(self._blocks) + len(lengths), held + sum(lengths.values()))
        try:
            for idstr, length in lengths.items():
                self._blocks[idstr] = MemfdBlock(idstr, length)
        except MachineError:
            self.discard_loaded()
            raise
        return [self._blocks[idstr] for idstr in lengths]

    def discard_loaded(self) -> None:
        """See RamMakingMachine. Discards RAM, block nodes, device state and the machine's name."""
        self._nodes.clear()
        while self._blocks:
            _, block = self._blocks.popitem()
            block.close()
        self._stored = DeviceState()
        self._format = None
        self._faults = None
        self._name = ""

    # -- block nodes -----------------------------------------------------------------------------------------------

    def block_nodes(self) -> Sequence[BlockNode]:
        """The nodes whose dirty bitmaps arrived; the disks themselves stay with QEMU."""
        return tuple(self._nodes.values())

    def make_block_node(self, name: str, length: int) -> BlockNode:
        if not name.isprintable() or length % SECTOR:
            raise MachineError(f"cannot make block node {name!r} of {length} bytes")
        self._nodes[name] = BlockNode(name, length)
        return self._nodes[name]

    # -- devices ---------------------------------------------------------------------------------------------------

    def adopt_sections(self, name: str, stream_format: StreamFormat, reader: StreamReader, live: WaitReadable) -> None:
        """See ParkingMachine. Raises RemoteStreamError if the device state is not complete."""
        self._stored = take_device_state(reader, stream_format.footers, live)
        self._format = stream_format
        self._name = name

    def adopt_package(self, name: str, stream_format: StreamFormat, sections: bytes) -> None:
        """See ParkingMachine."""
        self._stored = cut_package(sections, stream_format.footers)
        self._format = stream_format
        self._name = name

    def stored_format(self) -> StreamFormat | None:
        return self._format

    def stored_sections(self) -> Sequence[bytes]:
        return self._stored.pieces

    def stored_end(self) -> bytes:
        return self._stored.end

    # -- postcopy --------------------------------------------------------------------------------------------------

    def postcopy_unsupported(self) -> str | None:
        return None

    def watch_faults(self) -> FaultSource:
        self._faults = NoFaults()
        return self._faults

    # -- the rest --------------------------------------------------------------------------------------------------

    def information(self) -> Mapping[str, object]:
        """The machine type (null if the stream did not name it), whether all of the machine has arrived, the sizes of
        RAM blocks and devices, and the bytes that bitmaps mark as dirty. "ram-arriving" is true while RAM follows in
        postcopy, else null."""
        arriving = self._faults is not None and self._faults.is_open
        return {
            "machine": self._name or None,
            "parked": self._format is not None and not arriving,
            "ram-arriving": arriving or None,
            "ram": {block.idstr: block.length for block in self.ram_blocks()},
            "devices": [
                {"name": one.name, "instance-id": one.instance_id, "version": one.version, "size": one.size}
                for one in self._stored.devices
            ],
            "bitmaps": bitmaps_of(self.block_nodes()),
            "device-state": sum(len(piece) for piece in self._stored.pieces) + len(self._stored.end),
        }

    def close(self) -> None:
        self.discard_loaded()
