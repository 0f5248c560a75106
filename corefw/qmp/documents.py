"""QMP's answers and events: their types, with QAPI's names, and what makes them from the engine's reports.

query-qmp-schema describes the types; tests check every answer against them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, NotRequired, TypedDict

from corefw.qmp.forms import NOTHING, Enumeration, Form, Member, Structure
from corefw.qmp.schema import Variants, shape
from corefw.states import MigrationStatus

if TYPE_CHECKING:
    pass

# They depend on the installed plugins: introspection.py fills in the forms of these names.
CapabilityName = Annotated[str, Enumeration("MigrationCapability", ())]
ParameterValues = Annotated[dict[str, Any], Structure("MigrationParameters")]
ParameterChange = Annotated[object, Structure("MigrateSetParameters")]


class NameInfo(TypedDict):
    name: NotRequired[str]


class CommandInfo(TypedDict):
    name: str


class VersionTriple(TypedDict):
    major: int
    minor: int
    micro: int


class VersionInfo(TypedDict):
    qemu: VersionTriple
    package: str


class StatusInfo(TypedDict):
    running: bool
    singlestep: bool
    status: str


class UuidInfo(TypedDict):
    UUID: str


class KvmInfo(TypedDict):
    enabled: bool
    present: bool


class TargetInfo(TypedDict):
    arch: str


MachineInfo = TypedDict(
    "MachineInfo",
    {
        "name": str,
        "cpu-max": int,
        "hotpluggable-cpus": bool,
        "numa-mem-supported": bool,
        "deprecated": bool,
        "acpi": bool,
        "is-default": bool,
    },
)
CurrentMachineParams = TypedDict("CurrentMachineParams", {"wakeup-suspend-support": bool})
MemoryInfo = TypedDict("MemoryInfo", {"base-memory": int, "plugged-memory": int})


class MigrationCapabilityStatus(TypedDict):
    capability: CapabilityName
    state: bool


MigrationStats = TypedDict(
    "MigrationStats",
    {
        "transferred": int,
        "remaining": int,
        "total": int,
        "duplicate": int,
        "skipped": int,
        "normal": int,
        "normal-bytes": int,
        "dirty-pages-rate": int,
        "mbps": float,
        "dirty-sync-count": int,
        "postcopy-requests": int,
        "page-size": int,
        "multifd-bytes": int,
        "pages-per-second": int,
        "precopy-bytes": int,
        "downtime-bytes": int,
        "postcopy-bytes": int,
        "dirty-sync-missed-zero-copy": int,
    },
)
MigrationInfo = TypedDict(
    "MigrationInfo",
    {
        "status": NotRequired[MigrationStatus],
        "ram": NotRequired[MigrationStats],
        "remaining": NotRequired[int],
        "total-time": NotRequired[int],
        "expected-downtime": NotRequired[int],
        "downtime": NotRequired[int],
        "setup-time": NotRequired[int],
        "error-desc": NotRequired[str],
        "blocked-reasons": NotRequired[list[str]],
        "postcopy-blocktime": NotRequired[int],
        "postcopy-vcpu-blocktime": NotRequired[list[int]],
        "postcopy-latency": NotRequired[int],
        "postcopy-latency-dist": NotRequired[list[int]],
        "postcopy-vcpu-latency": NotRequired[list[int]],
        "postcopy-non-vcpu-latency": NotRequired[int],
        "x-migfw": NotRequired[dict],  # type: ignore[type-arg]  # an object of any members
    },
)

# -- where to migrate to -----------------------------------------------------------------------------------------------

InetSocketAddress = TypedDict(
    "InetSocketAddress",
    {
        "host": str,
        "port": str,
        "numeric": NotRequired[bool],
        "to": NotRequired[int],
        "ipv4": NotRequired[bool],
        "ipv6": NotRequired[bool],
        "keep-alive": NotRequired[bool],
        "keep-alive-count": NotRequired[int],
        "keep-alive-idle": NotRequired[int],
        "keep-alive-interval": NotRequired[int],
        "mptcp": NotRequired[bool],
    },
)


class UnixSocketAddress(TypedDict):
    path: str
    abstract: NotRequired[bool]
    tight: NotRequired[bool]


class VsockSocketAddress(TypedDict):
    cid: str
    port: str


class FdSocketAddress(TypedDict):
    str: str


class MigrationExecCommand(TypedDict):
    args: list[str]


class FileMigrationArgs(TypedDict):
    filename: str
    offset: int


SocketAddress = Annotated[
    dict[str, Any],
    Variants(
        "SocketAddress",
        "type",
        {"inet": InetSocketAddress, "unix": UnixSocketAddress, "vsock": VsockSocketAddress, "fd": FdSocketAddress},
    ),
]
MigrationAddress = Annotated[
    dict[str, Any],
    Variants(
        "MigrationAddress",
        "transport",
        {
            "socket": SocketAddress,
            "exec": MigrationExecCommand,
            "rdma": InetSocketAddress,
            "file": FileMigrationArgs,
        },
    ),
]
MigrationChannel = TypedDict("MigrationChannel", {"channel-type": Literal["main", "cpr"], "addr": MigrationAddress})

# -- events ------------------------------------------------------------------------------------------------------------

ShutdownCause = Literal["guest-shutdown", "host-error", "host-qmp-quit"]


def _data(name: str, **members: object) -> Form:
    return Structure(name, tuple(Member(member, shape(kind).form) for member, kind in members.items()))


EVENTS: Final[Mapping[str, Form]] = {
    "MIGRATION": _data("MigrationEvent", status=MigrationStatus),
    "MIGRATION_PASS": _data("MigrationPassEvent", **{"pass": int}),
    "STOP": NOTHING,
    "RESUME": NOTHING,
    "SHUTDOWN": _data("ShutdownEvent", guest=bool, reason=ShutdownCause),
}
"""Every event and its data."""

OPTIONAL_EVENTS: Final = frozenset({"MIGRATION", "MIGRATION_PASS"})
"""The events that are sent only while the capability `events` is on."""
