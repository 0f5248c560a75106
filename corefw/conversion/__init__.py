"""Converts a stored stream of a QEMU machine for another machine type or version of QEMU.

    convert(source, sink, Target(...)) -> Conversion     rewrites, and reports what was changed and what will not load
    read_tables(text) -> DeviceTables                    the output of `-dump-vmstate`, to compare devices with

docs/convert.md describes it for users.
"""

from corefw.conversion.rewrite import Conversion, Target, convert
from corefw.conversion.tables import DeviceTables, read_tables
from corefw.conversion.versions import parse_version
from corefw.wire.versions import Version

__all__ = ["Conversion", "DeviceTables", "Target", "Version", "convert", "parse_version", "read_tables"]
