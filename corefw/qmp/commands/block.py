"""Commands about disks and their dirty bitmaps. Names, members and texts are QEMU's (7.2 to 11.1)."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, NotRequired, TypedDict

from corefw.machine import BlockMachine, RunState
from corefw.qmp.commands.context import Context
from corefw.qmp.protocol import QmpError

if TYPE_CHECKING:
    from corefw.block import BlockNode, DirtyBitmap

DEFAULT_GRANULARITY: Final = 65536
"""Bytes: what QEMU chooses for an image without clusters, such as a raw file."""


class BlockDirtyInfo(TypedDict):
    name: str
    count: int
    granularity: int
    recording: bool
    busy: bool
    persistent: bool
    inconsistent: NotRequired[bool]


ImageInfo = TypedDict(
    "ImageInfo", {"filename": str, "format": str, "virtual-size": int, "actual-size": int, "dirty-flag": bool}
)
BlockdevCacheInfo = TypedDict("BlockdevCacheInfo", {"writeback": bool, "direct": bool, "no-flush": bool})
BlockdevChild = TypedDict("BlockdevChild", {"child": str, "node-name": str})
BlockDeviceInfo = TypedDict(
    "BlockDeviceInfo",
    {
        "file": str,
        "node-name": str,
        "ro": bool,
        "drv": str,
        "backing_file_depth": int,
        "children": list[BlockdevChild],
        "active": bool,
        "encrypted": bool,
        "detect_zeroes": str,
        "bps": int,
        "bps_rd": int,
        "bps_wr": int,
        "iops": int,
        "iops_rd": int,
        "iops_wr": int,
        "image": ImageInfo,
        "cache": BlockdevCacheInfo,
        "write_threshold": int,
        "dirty-bitmaps": NotRequired[list[BlockDirtyInfo]],
    },
)


class BlockInfo(TypedDict):
    device: str
    type: str
    removable: bool
    locked: bool
    inserted: BlockDeviceInfo


class BlockDirtyBitmap(TypedDict):
    """A bitmap of any node."""

    node: str
    name: str


class BlockDirtyBitmapSha256(TypedDict):
    sha256: str


class Range(TypedDict):
    offset: int
    length: int


class DirtyRanges(TypedDict):
    ranges: list[Range]
    next: NotRequired[int]


MAX_RANGES: Final = 10_000
ELSEWHERE: Final = frozenset({RunState.INMIGRATE, RunState.POSTMIGRATE})
"""The run states of a guest that is not here: it may be writing to its disks on another host."""


# -- queries -----------------------------------------------------------------------------------------------------------


def query_block(context: Context, flat: bool = False) -> list[BlockInfo]:
    """The guest's disks with their dirty bitmaps."""
    infos = zip(nodes(context), query_named_block_nodes(context, flat), strict=True)
    return [
        {"device": node.device, "type": "unknown", "removable": False, "locked": False, "inserted": info}
        for node, info in infos
    ]


def query_named_block_nodes(context: Context, flat: bool = False) -> list[BlockDeviceInfo]:
    """The guest's block nodes with their dirty bitmaps. A node here has no backing file, so `flat` changes nothing."""
    del flat
    active = context.engine.machine.run_state not in ELSEWHERE
    return [_device_info(node, active=active) for node in nodes(context)]


def _device_info(node: BlockNode, *, active: bool) -> BlockDeviceInfo:
    with node.settled():
        bitmaps = [_dirty_info(bitmap) for bitmap in node.bitmaps]
    info: BlockDeviceInfo = {
        "file": node.filename,
        "node-name": node.name,
        "ro": False,
        "drv": node.driver,
        "backing_file_depth": 0,
        "children": [],
        "active": active,
        "encrypted": False,
        "detect_zeroes": "off",
        "bps": 0,
        "bps_rd": 0,
        "bps_wr": 0,
        "iops": 0,
        "iops_rd": 0,
        "iops_wr": 0,
        "image": {
            "filename": node.filename,
            "format": node.driver,
            "virtual-size": node.length,
            "actual-size": _allocated(node.filename),
            "dirty-flag": False,
        },
        "cache": {"writeback": True, "direct": False, "no-flush": False},
        "write_threshold": 0,
    }
    if bitmaps:
        info["dirty-bitmaps"] = bitmaps
    return info


def _dirty_info(bitmap: DirtyBitmap) -> BlockDirtyInfo:
    info: BlockDirtyInfo = {
        "name": bitmap.name,
        "count": bitmap.count(),
        "granularity": bitmap.granularity,
        "recording": bitmap.enabled,
        "busy": bitmap.busy,
        "persistent": bitmap.persistent,
    }
    if bitmap.inconsistent:
        info["inconsistent"] = True
    return info


def _allocated(filename: str) -> int:
    try:
        return Path(filename).stat().st_blocks * 512 if filename else 0
    except OSError:  # it has gone, or is on another host
        return 0


# -- dirty bitmaps -----------------------------------------------------------------------------------------------------


def block_dirty_bitmap_add(
    context: Context,
    node: str,
    name: str,
    granularity: int = DEFAULT_GRANULARITY,
    persistent: bool = False,
    disabled: bool = False,
) -> None:
    """Create a dirty bitmap, which records what the guest writes from now on."""
    if not 0 <= granularity < 1 << 32:
        raise QmpError("Parameter 'granularity' expects uint32_t")
    if not name:
        raise QmpError("Bitmap name cannot be empty")
    found = _find(context, node)
    if found is None:
        raise QmpError(f"Cannot find device='{node}' nor node-name='{node}'")
    if persistent:
        raise QmpError(f"Can't store persistent bitmaps to {node}: {os.strerror(errno.EOPNOTSUPP)}")
    found.add_bitmap(name, granularity, enabled=not disabled)


def block_dirty_bitmap_remove(context: Context, node: str, name: str) -> None:
    """Remove a dirty bitmap; the only thing that can be done with one that is inconsistent."""
    found = _bitmap(context, node, name)
    with found.node.settled():
        found.check_idle()
        found.node.remove_bitmap(found)


def block_dirty_bitmap_clear(context: Context, node: str, name: str) -> None:
    """Reset all bits of a dirty bitmap."""
    found = _bitmap(context, node, name)
    with found.node.settled():
        found.check()
        found.clear()


def block_dirty_bitmap_enable(context: Context, node: str, name: str) -> None:
    """Let a dirty bitmap record what the guest writes from now on."""
    found = _bitmap(context, node, name)
    with found.node.settled():
        found.check()
        found.enable()


def block_dirty_bitmap_disable(context: Context, node: str, name: str) -> None:
    """Let a dirty bitmap stay as it is, whatever the guest writes."""
    found = _bitmap(context, node, name)
    with found.node.settled():
        found.check()
        found.disable()


def block_dirty_bitmap_merge(
    context: Context, node: str, target: str, bitmaps: Sequence[str | BlockDirtyBitmap]
) -> None:
    """Add the bits of other dirty bitmaps, of this node or of others, to one: of all of them or, on an error, none."""
    found = _bitmap(context, node, target)
    sources = [
        found.node.bitmap(one) if isinstance(one, str) else _bitmap(context, one["node"], one["name"])
        for one in bitmaps
    ]
    found.merge(sources)


def x_debug_block_dirty_bitmap_sha256(context: Context, node: str, name: str) -> BlockDirtyBitmapSha256:
    """The SHA-256 digest of a dirty bitmap's bits, to compare it with another."""
    return {"sha256": _bitmap(context, node, name).sha256()}


def x_migfw_dirty_ranges(context: Context, node: str, name: str, start: int = 0) -> DirtyRanges:
    """The dirty ranges of a disk from an offset on, to copy them; at most 10000."""
    bitmap = _bitmap(context, node, name)
    bitmap.check()
    runs = [(max(first, start), end) for first, end in bitmap.runs().tolist() if end > start]
    answer: DirtyRanges = {"ranges": [{"offset": first, "length": end - first} for first, end in runs[:MAX_RANGES]]}
    if len(runs) > MAX_RANGES:
        answer["next"] = runs[MAX_RANGES][0]
    return answer


def nodes(context: Context) -> Sequence[BlockNode]:
    """The block nodes of the machine; none if it has no disks."""
    machine = context.engine.machine
    return machine.block_nodes() if isinstance(machine, BlockMachine) else ()


def _find(context: Context, node: str) -> BlockNode | None:
    machine = context.engine.machine
    return machine.find_node(node) if isinstance(machine, BlockMachine) else None


def _bitmap(context: Context, node: str, name: str) -> DirtyBitmap:
    found = _find(context, node)
    if found is None:
        raise QmpError(f"Node '{node}' not found")
    return found.bitmap(name)
