"""The records of a stream: those of its frame, of RAM, and of the few other bodies that the core understands.

Invariant: `write_x` writes back byte for byte what `read_x` has read. Reading gives a record or raises
RemoteStreamError with offset, expected and got; lengths from the peer are checked against a limit before anything is
allocated. The type byte of a section decides which `read_x` to call, so `read_x` begins behind it, and `write_x`
writes it.

docs/stream.md describes the format. Threads: those of the reader and the writer.
"""

from __future__ import annotations

from corefw.wire.records.commands import (
    CommandRecord,
    parse_ping,
    ping_payload,
    read_command,
    read_package,
    write_command,
    write_package,
)
from corefw.wire.records.configuration import (
    CONFIGURATION_SUBSECTIONS,
    UUID_SIZE,
    Configuration,
    configuration_capabilities,
    configuration_page_size,
    configuration_subsections,
    read_configuration_body,
    select_subsections,
    without_capabilities,
    write_configuration,
)
from corefw.wire.records.frame import (
    WITH_NAME,
    WITHOUT_NAME,
    SectionHeader,
    pad_description,
    peek_section_header,
    read_description_body,
    read_footer,
    read_header,
    read_part_header,
    read_section_header,
    write_description,
    write_footer,
    write_header,
    write_part_header,
    write_section_header,
)
from corefw.wire.records.layout import LAYOUT_IDSTR, MAX_LAYOUT, read_layout, write_layout
from corefw.wire.records.mapped import (
    MAPPED_RAM,
    MappedHeader,
    read_bitmap,
    read_mapped_header,
    write_mapped_header,
)
from corefw.wire.records.postcopy import (
    Discard,
    PostcopyAdvice,
    discard_payload,
    discards,
    parse_discard,
    parse_postcopy_advise,
    postcopy_advise_payload,
    read_received_bitmap,
    write_received_bitmap,
)
from corefw.wire.records.ram import (
    MAX_BLOCKS,
    PAGE_BODIES,
    BlockEntry,
    RamLayout,
    RamRecord,
    read_block_list,
    read_ram_record,
    write_block_list,
    write_ram_record,
)

__all__ = [
    "CONFIGURATION_SUBSECTIONS",
    "LAYOUT_IDSTR",
    "MAPPED_RAM",
    "MAX_BLOCKS",
    "MAX_LAYOUT",
    "PAGE_BODIES",
    "UUID_SIZE",
    "WITHOUT_NAME",
    "WITH_NAME",
    "BlockEntry",
    "CommandRecord",
    "Configuration",
    "Discard",
    "MappedHeader",
    "PostcopyAdvice",
    "RamLayout",
    "RamRecord",
    "SectionHeader",
    "configuration_capabilities",
    "configuration_page_size",
    "configuration_subsections",
    "discard_payload",
    "discards",
    "pad_description",
    "parse_discard",
    "parse_ping",
    "parse_postcopy_advise",
    "peek_section_header",
    "ping_payload",
    "postcopy_advise_payload",
    "read_bitmap",
    "read_block_list",
    "read_command",
    "read_configuration_body",
    "read_description_body",
    "read_footer",
    "read_header",
    "read_layout",
    "read_mapped_header",
    "read_package",
    "read_part_header",
    "read_ram_record",
    "read_received_bitmap",
    "read_section_header",
    "select_subsections",
    "without_capabilities",
    "write_block_list",
    "write_command",
    "write_configuration",
    "write_description",
    "write_footer",
    "write_header",
    "write_layout",
    "write_mapped_header",
    "write_package",
    "write_part_header",
    "write_ram_record",
    "write_received_bitmap",
    "write_section_header",
]
