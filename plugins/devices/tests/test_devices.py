"""The devices plugin: one section for each device and one for the run state; both keep the contract."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import corefw_devices
import pytest
from corefw_devices.device import DeviceLoader, DeviceSaver
from corefw_devices.globalstate import GlobalStateLoader, GlobalStateSaver

from corefw.errors import MachineError, RemoteStreamError
from corefw.machine import Device, FaultSource, Machine, ParkingMachine, RamBlock, RunState, StreamFormat, WaitReadable
from corefw.plugins import Plugins
from corefw.registry import LoaderRegistry, SaverRegistry
from corefw.section import Priority, RunStateLoader, RunStateSaver, SectionKey
from corefw.settings import Settings
from corefw.testing.section import CHECKS, SectionCase, check_section
from corefw.wire.stream import MemorySink, MemorySource, StreamReader, StreamWriter
from corefw.wire.vmstate import Array, Buffer, Kind, Scalar, VMState

CLOCK = VMState(
    "clock",
    version_id=3,
    minimum_version_id=2,
    fields=(
        Scalar("time", Kind.U64),
        Array("alarms", 4, Kind.I32),
        Scalar("length", Kind.U16),
        Buffer("text", "length", limit=1000),
    ),
    subsections=(VMState("clock/zone", fields=(Scalar("zone", Kind.I8),), needed=lambda clock: clock.zone != 0),),
)
FOOTER = b"\x7e\0\0\0\7\0"


def clock(**values: Any) -> SimpleNamespace:
    return SimpleNamespace(**({"time": 0, "alarms": [0] * 4, "length": 0, "text": b"", "zone": 0} | values))


class Panel(Machine):
    """A machine with devices only: nothing runs, and there is no RAM."""

    kind = "panel"
    name = "panel-1"
    run_state = RunState.PAUSED

    def __init__(self, *devices: Device) -> None:
        self.present = list(devices)

    def ram_blocks(self) -> Sequence[RamBlock]:
        return ()

    def devices(self) -> Sequence[Device]:
        return tuple(self.present)

    def start(self) -> None:
        raise MachineError("a panel does not run")

    def stop(self, state: RunState) -> None:
        self.run_state = state

    def set_run_state(self, state: RunState) -> None:
        self.run_state = state

    def watch(self, observer: Callable[[RunState, RunState], None]) -> None:
        """Do nothing: no test here watches the run state."""

    def information(self) -> Mapping[str, object]:
        return {"ram": {}}

    def close(self) -> None:
        self.present.clear()


class ParkedPanel(Panel, ParkingMachine):
    """A panel that keeps device sections undecoded."""

    def adopt_sections(self, name: str, stream_format: StreamFormat, reader: StreamReader, live: WaitReadable) -> None:
        raise MachineError("nothing is parked in this test")

    def adopt_package(self, name: str, stream_format: StreamFormat, sections: bytes) -> None:
        raise MachineError("nothing is parked in this test")

    def stored_format(self) -> StreamFormat | None:
        return None

    def stored_sections(self) -> Sequence[bytes]:
        return ()

    def stored_end(self) -> bytes:
        return b""

    def postcopy_unsupported(self) -> str | None:
        return "no postcopy in this test"

    def watch_faults(self) -> FaultSource:
        raise MachineError("no postcopy in this test")


def only_devices() -> Plugins:
    plugins = Plugins()
    plugins.register(corefw_devices, "devices")
    return plugins


def savers(machine: Machine, settings: Settings | None = None) -> SaverRegistry:
    return only_devices().section_savers(machine, settings or Settings())


def loaders(machine: Machine) -> LoaderRegistry:
    return only_devices().section_loaders(machine, Settings())


def device_saver(table: VMState, state: object) -> DeviceSaver:
    found = savers(Panel(Device("clock", 0, table, state))).find(SectionKey("clock", 0))
    assert isinstance(found, DeviceSaver)
    return found


def device_loader(table: VMState, state: object) -> DeviceLoader:
    found = loaders(Panel(Device("clock", 0, table, state))).find(SectionKey("clock", 0))
    assert isinstance(found, DeviceLoader)
    return found


def saved(saver: DeviceSaver) -> bytes:
    sink = MemorySink()
    writer = StreamWriter(sink)
    saver.save(writer)
    writer.flush()
    return bytes(sink.data)


# -- the hook ------------------------------------------------------------------------------------------------------


def test_a_section_for_each_device_and_the_run_state() -> None:
    machine = Panel(Device("clock", 0, CLOCK, clock()), Device("clock", 1, CLOCK, clock()))
    expected = [("globalstate", 0), ("clock", 0), ("clock", 1)]
    assert [saver.key for saver in savers(machine)] == [loader.key for loader in loaders(machine)] == expected


def test_machine_that_stores_streams_has_its_run_state_in_them() -> None:
    machine = ParkedPanel(Device("clock", 0, CLOCK, clock()))
    expected = [("clock", 0)]
    assert [saver.key for saver in savers(machine)] == [loader.key for loader in loaders(machine)] == expected


def test_installed_as_a_plugin() -> None:
    plugins = Plugins.load()
    assert "devices" not in plugins.failures
    assert SectionKey("globalstate", 0) in {one.key for one in plugins.section_savers(Panel(), plugins.settings())}


# -- devices -------------------------------------------------------------------------------------------------------

FULL = {"time": 2**63, "alarms": [1, -1, 2**31 - 1, 0], "length": 5, "text": b"hello", "zone": -3}


@pytest.mark.parametrize("check", CHECKS)
def test_device_keeps_the_contract(check: str) -> None:
    clocks: dict[object, SimpleNamespace] = {}

    def saver() -> DeviceSaver:
        state = clock(**FULL)
        clocks[made := device_saver(CLOCK, state)] = state
        return made

    def loader() -> DeviceLoader:
        state = clock()
        clocks[made := device_loader(CLOCK, state)] = state
        return made

    check_section(SectionCase(saver=saver, loader=loader, state=clocks.__getitem__), only=[check])


def test_versions_and_priority_come_from_the_table() -> None:
    saver, loader = device_saver(CLOCK, clock()), device_loader(CLOCK, clock())
    assert (saver.version_id, saver.priority, loader.version_id, loader.minimum_version) == (3, Priority.DEVICES, 3, 2)
    late = VMState("clock", priority=Priority.LATE)
    saver, loader = device_saver(late, clock()), device_loader(late, clock())
    assert (saver.version_id, saver.priority, loader.version_id, loader.minimum_version) == (1, Priority.LATE, 1, 1)


def test_table_says_whether_the_section_is_needed_and_required() -> None:
    assert device_saver(CLOCK, clock()).needed()
    assert device_loader(CLOCK, clock()).required()
    sometimes = VMState("clock", needed=lambda state: state.time > 0)
    assert [device_saver(sometimes, clock(time=time)).needed() for time in (0, 1)] == [False, True]
    assert not device_loader(sometimes, clock()).required()


def test_device_that_cannot_migrate_says_why() -> None:
    assert device_saver(CLOCK, clock()).blocked() is None
    held = device_saver(VMState("clock", unmigratable="it shows this host's time (unplug it first)"), clock())
    assert held.blocked() == "'clock': it shows this host's time (unplug it first)"


def test_state_is_asked_for_when_it_is_sent() -> None:
    """A machine may create the state objects of its devices only when it stops."""
    machine = Panel(Device("clock", 0, CLOCK, clock(time=1)))
    saver = savers(machine).find(SectionKey("clock", 0))
    assert isinstance(saver, DeviceSaver)
    machine.present[:] = [Device("clock", 0, CLOCK, clock(time=2))]
    assert saved(saver)[:8] == (2).to_bytes(8, "big")
    machine.present.clear()
    with pytest.raises(MachineError, match="device 'clock' \\(instance 0\\) was there when the migration began"):
        saved(saver)


def test_errors_name_the_section() -> None:
    loader = device_loader(CLOCK, clock())
    with pytest.raises(RemoteStreamError, match=r"^section 'clock' \(instance 0\): expected version 2 to 3"):
        loader.load(StreamReader(MemorySource(b"")), 4)


# -- the run state -------------------------------------------------------------------------------------------------


def global_state_saver(run_state: RunState, *, stored_always: bool = True) -> GlobalStateSaver:
    settings = Settings()
    settings.set_property("store-global-state", stored_always)
    saver = savers(Panel(), settings).find(SectionKey("globalstate", 0))
    assert isinstance(saver, GlobalStateSaver)
    assert isinstance(saver, RunStateSaver)
    saver.store(run_state)
    return saver


def global_state_loader() -> GlobalStateLoader:
    loader = loaders(Panel()).find(SectionKey("globalstate", 0))
    assert isinstance(loader, GlobalStateLoader)
    assert isinstance(loader, RunStateLoader)
    return loader


def load(body: bytes) -> GlobalStateLoader:
    loader = global_state_loader()
    loader.load(StreamReader(MemorySource(body + FOOTER)), 1)
    return loader


@pytest.mark.parametrize("check", CHECKS)
def test_run_state_keeps_the_contract(check: str) -> None:
    case = SectionCase(
        saver=lambda: global_state_saver(RunState.PAUSED),
        loader=global_state_loader,
        state=lambda section: section.run_state() if isinstance(section, GlobalStateLoader) else RunState.PAUSED,
    )
    check_section(case, only=[check])


@pytest.mark.parametrize("run_state", sorted(set(RunState) - {RunState.INMIGRATE}))
def test_run_state_arrives(run_state: RunState) -> None:
    body = saved(global_state_saver(run_state))
    assert body == (len(run_state) + 1).to_bytes(4, "big") + run_state.encode().ljust(100, b"\0")
    assert global_state_loader().run_state() is None
    assert load(body).run_state() is run_state


def test_description_is_qemus() -> None:
    saver = global_state_saver(RunState.RUNNING)
    saved(saver)
    assert saver.describe() == {
        "vmsd_name": "globalstate",
        "version": 1,
        "fields": [{"name": "size", "type": "uint32", "size": 4}, {"name": "runstate", "type": "buffer", "size": 100}],
    }


@pytest.mark.parametrize("run_state", RunState)
def test_without_store_global_state_only_unusual_states_are_sent(run_state: RunState) -> None:
    usual = run_state in (RunState.RUNNING, RunState.PAUSED)
    assert global_state_saver(run_state, stored_always=False).needed() is not usual
    assert not global_state_loader().required()


def test_what_stands_behind_the_nul_is_free() -> None:
    """QEMU 8.2 and later send flags there."""
    assert load(b"\0\0\0\7paused\0".ljust(60, b"\1").ljust(104, b"\0")).run_state() is RunState.PAUSED


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"\0\0\0\7parked\0".ljust(104, b"\0"), "expected one of the run states finish-migrate, "),
        (b"\0\0\0\7parked\0".ljust(104, b"\0"), "got 'parked' (at offset 104"),
        (b"\0\0\0\x0ainmigrate\0".ljust(104, b"\0"), "got 'inmigrate'"),
        (b"\0\0\0\1".ljust(104, b"\0"), "got ''"),
        (
            b"\0\0\0\x65".ljust(104, b"x"),
            "expected a run state's name of at most 99 bytes, got 100 bytes without a NUL",
        ),
        (b"\0\0\0\6paused\0".ljust(104, b"\0"), "expected size 7 for run state b'paused', got size 6"),
        (b"\0\0\0\3\xff\xfe\0".ljust(104, b"\0"), "section 'globalstate' (instance 0): expected one of the run states"),
    ],
)
def test_wrong_run_state_is_refused(body: bytes, says: str) -> None:
    with pytest.raises(RemoteStreamError, match=re.escape(says)):
        load(body)
