"""The choice of a block's dirty log: the best that this host supports, or the one that MIGFW_DIRTY_LOG names."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from enum import StrEnum
from typing import Final

from corefw.errors import UsageError
from corefw.machine import DirtyLog, RamBlock
from corefw.memory.hashes import HashLog
from corefw.memory.pagemap import PagemapLog, Tracker

log = logging.getLogger(__name__)

VARIABLE: Final = "MIGFW_DIRTY_LOG"


class LogKind(StrEnum):
    """The dirty logs, best first."""

    PAGEMAP = "pagemap"
    HASHES = "hashes"


AUTO: Final = "auto"


def wanted_log(environment: Mapping[str, str] = os.environ) -> LogKind | None:
    """The log that MIGFW_DIRTY_LOG names; None for the best one. Raises UsageError for an unknown name."""
    word = environment.get(VARIABLE, AUTO)
    if word in ("", AUTO):
        return None
    try:
        return LogKind(word)
    except ValueError:
        known = ", ".join([*LogKind, AUTO])
        raise UsageError(f"{VARIABLE}='{word}' is not a dirty log: expected one of {known}") from None


def best_dirty_log(block: RamBlock, tracker: Tracker | None, address: int, reason: str = "") -> DirtyLog:
    """The dirty log for `block`, which the process behind `tracker` maps at `address`.

    `tracker` is None if that process could not make one, for `reason`. Raises UsageError if MIGFW_DIRTY_LOG names a log
    that this host does not support.
    """
    wanted = wanted_log()
    if wanted is LogKind.HASHES:
        return HashLog(block)
    if tracker is not None:
        return PagemapLog(tracker, address, block.length, block.page_size)
    if wanted is LogKind.PAGEMAP:
        raise UsageError(f"{VARIABLE}={wanted}, but this host cannot: {reason}")
    log.info("block '%s': dirty pages are found by comparing hashes, which is slow (%s)", block.idstr, reason)
    return HashLog(block)
