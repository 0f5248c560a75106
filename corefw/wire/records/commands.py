"""Commands, which the source sends between sections, and their payloads.

Source: QEMU 7.2, mig_cmd_args and loadvm_process_command (migration/savevm.c).
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct
from typing import Final

from corefw.channel import Buffer
from corefw.errors import StreamError
from corefw.wire.constants import BE32, COMMAND_LENGTHS, MAX_PACKAGE, PLUGIN_COMMANDS, Command, SectionType
from corefw.wire.stream import StreamReader, StreamWriter

COMMAND_HEADER: Final = Struct(">BHH")
"""Type of the section, number of the command, length of its payload."""


@dataclass(frozen=True, slots=True)
class CommandRecord:
    """A command and its payload. The package of PACKAGED is not the payload; it follows the record.

    command   a number of PLUGIN_COMMANDS if a plugin defined it
    """

    command: Command | int
    payload: bytes = b""

    @property
    def name(self) -> str:
        """QEMU's, as "PING"; the number of a plugin's."""
        return self.command.name if isinstance(self.command, Command) else f"{self.command:#x}"


def _lengths_in_words(lengths: frozenset[int]) -> str:
    return " or ".join(str(length) for length in sorted(lengths))


def read_command(reader: StreamReader) -> CommandRecord:
    """Read the rest of a COMMAND section. Raises RemoteStreamError for an unknown command, and for a length that the
    command cannot have."""
    number = reader.be16("a command's number")
    length = reader.be16("a command's length")
    if number in PLUGIN_COMMANDS:
        return CommandRecord(number, reader.read(length, f"the payload of command {number:#x}"))
    try:
        command = Command(number)
    except ValueError:
        raise reader.error(f"a command from {min(Command)} to {max(Command)}", f"command {number}") from None
    allowed = COMMAND_LENGTHS[command]
    if allowed is not None and length not in allowed:
        raise reader.error(f"{_lengths_in_words(allowed)} bytes of payload for command {command.name}", f"{length}")
    return CommandRecord(command, reader.read(length, f"the payload of command {command.name}"))


def write_command(writer: StreamWriter, command: Command | int, payload: bytes = b"") -> None:
    """Write the whole section, with its type byte. The payload has at most 64 KiB less one byte."""
    allowed = None if command in PLUGIN_COMMANDS else COMMAND_LENGTHS[Command(command)]
    assert allowed is None or len(payload) in allowed, f"{Command(command).name} with {len(payload)} bytes"
    writer.write(COMMAND_HEADER.pack(SectionType.COMMAND, command, len(payload)) + payload)


def parse_ping(payload: bytes) -> int:
    """The number that the destination has to echo."""
    return int(BE32.unpack(payload)[0])


def ping_payload(value: int) -> bytes:
    return BE32.pack(value)


def read_package(reader: StreamReader, record: CommandRecord) -> bytes:
    """The stream within the stream that follows a PACKAGED command."""
    (length,) = BE32.unpack(record.payload)
    return reader.read(length, "a package", MAX_PACKAGE)


def write_package(writer: StreamWriter, package: Buffer) -> None:
    """A PACKAGED command with its package. Raises StreamError for one that is too large."""
    length = len(memoryview(package).cast("B"))
    if length > MAX_PACKAGE:
        raise StreamError(f"the device state has {length} bytes, more than the {MAX_PACKAGE} that a package can have")
    write_command(writer, Command.PACKAGED, BE32.pack(length))
    writer.payload(package)
