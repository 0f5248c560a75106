"""Commands about the machine around the guest, for tools that ask a QEMU for it.

A guest here has no network cards or virtual CPUs that QMP could list; for its disks see block.py.
"""

from __future__ import annotations

import platform
from typing import Any, Final

from corefw.qmp.commands.context import Context
from corefw.qmp.documents import (
    EVENTS,
    CommandInfo,
    CurrentMachineParams,
    KvmInfo,
    MachineInfo,
    MemoryInfo,
    TargetInfo,
    UuidInfo,
)

NO_UUID: Final = "00000000-0000-0000-0000-000000000000"
_ARCHITECTURES: Final = {"arm64": "aarch64", "AMD64": "x86_64", "i686": "i386"}


def query_uuid(_: Context) -> UuidInfo:
    """The guest's UUID: all zeros, as in a QEMU without -uuid."""
    return {"UUID": NO_UUID}


def query_kvm(_: Context) -> KvmInfo:
    """Whether KVM runs the guest: never."""
    return {"enabled": False, "present": False}


def query_target(_: Context) -> TargetInfo:
    """The architecture of this host."""
    machine = platform.machine()
    return {"arch": _ARCHITECTURES.get(machine, machine)}


def query_machines(context: Context) -> list[MachineInfo]:
    """The only machine there is."""
    return [
        {
            "name": context.engine.machine.name,
            "cpu-max": 1,
            "hotpluggable-cpus": False,
            "numa-mem-supported": False,
            "deprecated": False,
            "acpi": False,
            "is-default": True,
        }
    ]


def query_current_machine(_: Context) -> CurrentMachineParams:
    """Whether the guest can be suspended and woken up: never."""
    return {"wakeup-suspend-support": False}


def query_memory_size_summary(context: Context) -> MemoryInfo:
    """Bytes of the guest's RAM."""
    return {"base-memory": sum(block.length for block in context.engine.machine.ram_blocks()), "plugged-memory": 0}


def query_events(_: Context) -> list[CommandInfo]:
    """The names of all events. QEMU removed it in 6.0."""
    return [{"name": name} for name in EVENTS]


def query_nothing(_: Context) -> list[Any]:
    """An empty list: a guest here has no such thing."""
    return []


EMPTY: Final = (
    *("query-block-jobs", "query-jobs"),
    *("query-cpus-fast", "query-iothreads", "query-chardev", "query-memory-devices", "query-pci"),
    *("query-mice", "query-rx-filter", "query-tpm", "query-fdsets"),
)
"""The queries that query_nothing answers."""
