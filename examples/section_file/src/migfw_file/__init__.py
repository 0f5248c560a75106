"""A file that moves with the guest, such as a log or a database: a complete live section as a plugin.

The entry point names this module. changing.py finds out what changes in the file, saver.py sends it, and loader.py
writes it at the destination.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from corefw.declarations import Declarations, Kind, Parameter
from corefw.hookspecs import hookimpl
from corefw.section import SectionLoader, SectionSaver
from corefw.settings import Settings
from migfw_file.loader import FileLoader
from migfw_file.saver import FileSaver

FILE: Final = "x-file"
LIMIT: Final = "x-file-limit"


@hookimpl
def corefw_settings() -> Declarations:
    """Let each side name its own file: with a path in the stream, a source could write anywhere."""
    return Declarations(
        parameters=(
            Parameter(FILE, Kind.STRING, "", "the file that moves with the guest: read here, or written here"),
            Parameter(LIMIT, Kind.SIZE, 1 << 30, "the largest file to accept from a source"),
        ),
        implements=frozenset({FILE, LIMIT}),
    )


@hookimpl
def corefw_section_savers(settings: Settings) -> Iterable[SectionSaver]:
    return (FileSaver(str(settings.parameter(FILE))),)


@hookimpl
def corefw_section_loaders(settings: Settings) -> Iterable[SectionLoader]:
    return (FileLoader(str(settings.parameter(FILE)), settings.integer(LIMIT)),)
