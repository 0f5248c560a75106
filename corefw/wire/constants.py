"""The numbers of the migration stream. Source: QEMU 7.2 (migration/savevm.h, qemu-file, ram.c, migration.h).

docs/stream.md describes the format, and where older and newer QEMUs differ.

All integers on the wire are big-endian. A `string` is one byte of length and that many bytes.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from struct import Struct
from typing import Final

FILE_MAGIC: Final = 0x5145564D  # "QEVM"
FILE_VERSION: Final = 3
MULTIFD_MAGIC: Final = 0x11223344
"""The first bytes of every multifd channel except the first one, which is the stream."""
FILE_VERSION_OBSOLETE: Final = 2

BE16: Final = Struct(">H")
BE32: Final = Struct(">I")
BE64: Final = Struct(">Q")

TARGET_PAGE_SIZE: Final = 4096
"""QEMU's target page on x86, and what this project's own machines use."""


class SectionType(IntEnum):
    """The byte before every section (QEMU_VM_*)."""

    EOF = 0x00
    START = 0x01
    PART = 0x02
    END = 0x03
    FULL = 0x04
    SUBSECTION = 0x05
    VMDESCRIPTION = 0x06
    CONFIGURATION = 0x07
    COMMAND = 0x08
    FOOTER = 0x7E


class Command(IntEnum):
    """The commands inside a COMMAND section (MIG_CMD_*)."""

    OPEN_RETURN_PATH = 1
    PING = 2
    POSTCOPY_ADVISE = 3
    POSTCOPY_LISTEN = 4
    POSTCOPY_RUN = 5
    POSTCOPY_RAM_DISCARD = 6
    PACKAGED = 7
    ENABLE_COLO = 8
    POSTCOPY_RESUME = 9
    RECV_BITMAP = 10
    SWITCHOVER_START = 11


COMMAND_LENGTHS: Final[dict[Command, frozenset[int] | None]] = {
    Command.OPEN_RETURN_PATH: frozenset({0}),
    Command.PING: frozenset({4}),
    Command.POSTCOPY_ADVISE: frozenset({0, 16}),
    Command.POSTCOPY_LISTEN: frozenset({0}),
    Command.POSTCOPY_RUN: frozenset({0}),
    Command.POSTCOPY_RAM_DISCARD: None,
    Command.PACKAGED: frozenset({4}),
    Command.ENABLE_COLO: frozenset({0}),
    Command.POSTCOPY_RESUME: frozenset({0}),
    Command.RECV_BITMAP: None,
    Command.SWITCHOVER_START: frozenset({0}),
}
"""Allowed payload lengths; None if the length varies (QEMU's mig_cmd_args)."""


PLUGIN_COMMANDS: Final = range(0x7000, 0x8000)
"""Numbers of commands that plugins may define. QEMU has none there, and a destination without the plugin refuses
them."""


class ReturnMessage(IntEnum):
    """Destination to source (MIG_RP_MSG_*): u16 type, u16 length, body."""

    SHUT = 1
    PONG = 2
    REQ_PAGES_ID = 3
    REQ_PAGES = 4
    RECV_BITMAP = 5
    RESUME_ACK = 6
    SWITCHOVER_ACK = 7
    MIGFW_REASON = 0x6D01
    MIGFW_SECRET = 0x6D02


PLUGIN_MESSAGES: Final = range(0x7000, 0x8000)
"""Numbers of return-path messages that plugins may define. QEMU has none there, and a source without the plugin refuses
them."""

RETURN_MESSAGE_LENGTHS: Final[dict[ReturnMessage, int | None]] = {
    ReturnMessage.SHUT: 4,
    ReturnMessage.PONG: 4,
    ReturnMessage.REQ_PAGES_ID: None,
    ReturnMessage.REQ_PAGES: 12,
    ReturnMessage.RECV_BITMAP: None,
    ReturnMessage.RESUME_ACK: 4,
    ReturnMessage.SWITCHOVER_ACK: 0,
    ReturnMessage.MIGFW_REASON: None,
    ReturnMessage.MIGFW_SECRET: 16,
}
RETURN_MESSAGE_LIMIT: Final = 512
"""The source accepts at most this many bytes of body (QEMU's source_return_path_thread)."""

MIGFW_PING: Final = 0x6D696766  # "migf"
"""The number of a PING with which a source identifies itself as a migfw; a QEMU only echoes it. A destination that saw
it may send MIGFW_REASON before SHUT: why it could not load the guest, at most REASON_LIMIT bytes of UTF-8. QEMU never
gets that message."""
SECRET_LENGTH: Final = 16
"""Bytes of MIGFW_SECRET, which a destination that saw MIGFW_PING sends when postcopy is announced. Both sides prove
that they know it when a connection is replaced."""
PACKAGE_PING: Final = 3
"""The number of the PING in a postcopy package, right before RUN, as in QEMU. Until its PONG arrives the destination
cannot have started the guest."""
RESUMED: Final = 1
"""The value of RESUME_ACK (QEMU's MIGRATION_RESUME_ACK_VALUE)."""
READY_PING: Final = 0x6D696702
"""The number of the PING after the START sections. Its PONG says that the destination has loaded all of them."""
ALIVE_PING: Final = 0x6D696703
"""The number of the PINGs with which a source shows that it is alive, and finds out whether its destination is."""
REASON_LIMIT: Final = 500


class RamFlag(IntFlag):
    """Below the page size in the u64 that begins a RAM record (RAM_SAVE_FLAG_*)."""

    FULL = 0x01
    ZERO = 0x02
    MEM_SIZE = 0x04
    PAGE = 0x08
    EOS = 0x10
    CONTINUE = 0x20
    XBZRLE = 0x40
    HOOK = 0x80
    COMPRESS_PAGE = 0x100
    MULTIFD_FLUSH = 0x200


RAM_IDSTR: Final = "ram"
RAM_VERSION: Final = 4

# Limits on what a peer may announce, checked before anything is allocated.
MAX_DESCRIPTION: Final = 4 << 20
MAX_PACKAGE: Final = 64 << 20  # QEMU: MAX_VM_CMD_PACKAGED_SIZE is 4 GiB less one; device state is never near that
MAX_DISCARDS: Final = 12  # ranges in one RAM_DISCARD (QEMU: MAX_DISCARDS_PER_COMMAND)
MAX_MACHINE_NAME: Final = 255
MAX_CONFIGURATION_CAPABILITIES: Final = 64
