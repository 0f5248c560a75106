"""A file that moves with the guest: a log, a database. A complete live section as a plugin.

This module is what the entry point names. changing.py finds out what changes in the file, saver.py sends it,
loader.py writes it at the destination.
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
    """Each side names its own file: a path in the stream would let a source write anywhere."""
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
