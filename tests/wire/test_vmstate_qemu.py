"""Tables written after QEMU's own read what QEMU 7.2 wrote, write the same bytes, and give the same description.

vmstate_qemu72.json holds bodies and descriptions as `qemu-system-x86_64 -M pc` sent them: hexadecimal bytes between a
section's header and its footer, and the section's entry of the JSON at the stream's end.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from corefw.wire.stream import MemorySink, MemorySource, StreamReader, StreamWriter
from corefw.wire.vmstate import Array, Buffer, Kind, Scalar, Struct, StructArray, Unused, VMState

RECORDED = {one["name"]: one for one in json.loads((Path(__file__).parent / "vmstate_qemu72.json").read_text())}
FOLLOWS = b"\x7e\0\0\0\7\0"
"""A footer and the end of the stream."""


def u8(*names: str) -> tuple[Scalar, ...]:
    return tuple(Scalar(name, Kind.U8) for name in names)


TIMER = VMState(
    "timer",
    version_id=2,
    minimum_version_id=1,
    fields=(Scalar("cpu_ticks_offset", Kind.I64), Unused(8), Scalar("cpu_clock_offset", Kind.I64, since=2)),
    subsections=(VMState("timer/icount", fields=(Scalar("bias", Kind.I64),), needed=lambda _: False),),
)

FW_CFG = VMState(
    "fw_cfg",
    version_id=2,
    minimum_version_id=1,
    fields=(
        Scalar("cur_entry", Kind.U16),
        Scalar("cur_offset", Kind.U16, exists=lambda _, version: version == 1),
        Scalar("cur_offset", Kind.U32, since=2),
    ),
    subsections=(
        VMState("fw_cfg/dma", version_id=0, fields=(Scalar("dma_addr", Kind.U64),), needed=lambda _: True),
        VMState(
            "fw_cfg/acpi_mr",
            fields=tuple(Scalar(f"{name}_mr_size", Kind.U64) for name in ("table", "linker", "rsdp")),
        ),
    ),
)

PCIBUS = VMState(
    "PCIBUS", fields=(Scalar("nirq", Kind.I32, equal=True), Array("irq_count", "nirq", Kind.I32, limit=64))
)

DMA_REGS = VMState(
    "dma_regs",
    fields=(Array("now", 2, Kind.I32), Array("base", 2, Kind.U16), *u8("mode", "page", "pageh", "dack", "eop")),
)
DMA = VMState(
    "dma",
    fields=(*u8("command", "mask", "flip_flop"), Scalar("dshift", Kind.I32), StructArray("regs", 4, DMA_REGS)),
)

PIC_NAMES = (
    "last_irr irr imr isr priority_add irq_base read_reg_select poll special_mask init_state auto_eoi"
    " rotate_on_auto_eoi special_fully_nested_mode init4 single_mode elcr"
)
PIC = VMState("i8259", fields=u8(*PIC_NAMES.split()))

IOAPIC = VMState(
    "ioapic",
    version_id=3,
    minimum_version_id=1,
    fields=(
        *u8("id", "ioregsel"),
        Unused(8, since=2),
        Scalar("irr", Kind.U32, since=2),
        Array("ioredtbl", 24, Kind.U64),
    ),
)

PIT_CHANNEL = VMState(
    "pit channel",
    version_id=2,
    fields=(
        Scalar("count", Kind.I32),
        Scalar("latched_count", Kind.U16),
        *u8("count_latched", "status_latched", "status", "read_state", "write_state", "write_latch", "rw_mode"),
        *u8("mode", "bcd", "gate"),
        Scalar("count_load_time", Kind.I64),
        Scalar("next_transition_time", Kind.I64),
    ),
)
PIT = VMState(
    "i8254",
    version_id=3,
    fields=(
        Scalar("channels[0].irq_disabled", Kind.U32, since=3),
        StructArray("channels", 3, PIT_CHANNEL),
        Scalar("channels[0].next_transition_time", Kind.I64),
    ),
)

FDRIVE = VMState(
    "fdrive",
    fields=u8("head", "track", "sect"),
    subsections=(
        VMState("fdrive/media_changed", fields=u8("media_changed"), needed=lambda drive: hasattr(drive, "media")),
        VMState("fdrive/media_rate", fields=u8("media_rate")),
    ),
)
FDC = VMState(
    "fdc",
    version_id=2,
    fields=(
        *u8("sra", "srb", "dor_vmstate", "tdr", "dsr", "msr", "status0", "status1", "status2"),
        Array("fifo", 512, Kind.U8),
        Scalar("data_pos", Kind.U32),
        Scalar("data_len", Kind.U32),
        *u8("data_state", "data_dir", "eot", "timer0", "timer1", "precomp_trk", "config", "lock", "pwrd"),
        Scalar("num_floppies", Kind.U8, equal=True),
        StructArray("drives", 2, FDRIVE),
    ),
)
ISA_FDC = VMState("fdc", version_id=2, fields=(Struct("state", FDC),))

KBD = VMState(
    "pckbd",
    version_id=3,
    fields=u8("write_cmd", "status", "mode", "pending_tmp"),
    subsections=(
        VMState(
            "pckbd/extended_state",
            version_id=0,
            fields=(
                Scalar("migration_flags", Kind.U32),
                Scalar("obsrc", Kind.U32),
                *u8("obdata", "cbdata"),
            ),
        ),
    ),
)
ISA_KBD = VMState("pckbd", version_id=3, fields=(Struct("kbd", KBD, make=SimpleNamespace),))

GLOBALSTATE = VMState("globalstate", fields=(Scalar("size", Kind.U32), Buffer("runstate", 100)))


def new() -> SimpleNamespace:
    return SimpleNamespace()


EMPTY: dict[str, tuple[VMState, Any]] = {
    "timer": (TIMER, new()),
    "fw_cfg": (FW_CFG, new()),
    "PCIBUS": (PCIBUS, SimpleNamespace(nirq=4)),
    "dma": (DMA, SimpleNamespace(regs=[new() for _ in range(4)])),
    "i8259": (PIC, new()),
    "ioapic": (IOAPIC, new()),
    "i8254": (PIT, SimpleNamespace(channels=[new() for _ in range(3)])),
    "fdc": (ISA_FDC, SimpleNamespace(state=SimpleNamespace(num_floppies=2, drives=(new(), new())))),
    "pckbd": (ISA_KBD, new()),
    "globalstate": (GLOBALSTATE, new()),
}


def test_all_recorded_devices_have_a_table() -> None:
    assert EMPTY.keys() == RECORDED.keys()


@pytest.mark.parametrize("name", EMPTY)
def test_qemu_device_decodes_and_encodes_to_the_same(name: str) -> None:
    table, state = EMPTY[name]
    body = bytes.fromhex(RECORDED[name]["body"])

    reader = StreamReader(MemorySource(body + FOLLOWS))
    table.load(reader, state, RECORDED[name]["version"])
    assert reader.offset == len(body)

    sink = MemorySink()
    writer = StreamWriter(sink)
    description = table.save(writer, state)
    writer.flush()
    assert bytes(sink.data) == body
    # Compared as text: the order of the keys is QEMU's too.
    assert json.dumps(description) == json.dumps(RECORDED[name]["description"])


def test_values_are_what_qemu_had() -> None:
    """A few values are known: the PIT runs at its full count, the keyboard's self test has passed, the guest ran."""
    pit, pic, state = (EMPTY[name][1] for name in ("i8254", "i8259", "globalstate"))
    for name in ("i8254", "i8259", "globalstate"):
        table, loaded = EMPTY[name]
        reader = StreamReader(MemorySource(bytes.fromhex(RECORDED[name]["body"]) + FOLLOWS))
        table.load(reader, loaded, RECORDED[name]["version"])
    assert pit.channels[0].count == 65536
    assert pic.irq_base == 8
    assert state.runstate.rstrip(b"\0") == b"running"
    assert state.size == len(b"running") + 1
