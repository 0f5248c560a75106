"""`migfw convert`: rewrite a stored stream for another machine type or version of QEMU."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from corefw.cli.console import ExitStatus, Finished, note, print_facts, print_json
from corefw.cli.options import json_option
from corefw.errors import MigfwError, RemoteStreamError, UsageError

if TYPE_CHECKING:
    from corefw.channel import Buffer
    from corefw.conversion import Conversion, DeviceTables
    from corefw.net.wholefile import WholeFile
    from corefw.wire.stream import Source

INTERVAL: Final = 0.5
"""Seconds between two updates of the progress line."""


@click.command()
@click.argument("source", metavar="IN", type=click.Path(exists=True, dir_okay=False, allow_dash=True))
@click.argument("destination", metavar="OUT", type=click.Path(dir_okay=False))
@click.option("--machine", metavar="TYPE", help="Machine type of the QEMU that will load it, such as pc-i440fx-7.2.")
@click.option(
    "--for", "version", metavar="VERSION", help="Version of that QEMU.  [default: the version in the machine type]"
)
@click.option(
    "--to-vmstate",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False),
    help="Output of -dump-vmstate from that QEMU, to compare the devices with.",
)
@click.option(
    "--from-vmstate",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False),
    help="The same from the QEMU that saved the stream, for a more complete comparison.",
)
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
@json_option
def convert(
    source: str,
    destination: str,
    machine: str | None,
    version: str | None,
    to_vmstate: str | None,
    from_vmstate: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Rewrite the stream in IN ("-": standard input) to OUT for another machine type or version of QEMU.

    Renames the machine type and leaves out what that version cannot parse. Everything else is copied byte for byte, so
    a device with a different layout in the other QEMU still will not load: compare with its -dump-vmstate to find out.
    OUT is created completely or not at all. The exit status is 1 if part of it is known not to load.

    \b
    Examples:
      migfw convert vm.stream vm72.stream --machine pc-i440fx-7.2
      migfw convert vm.stream vm92.stream --for 9.2
      qemu-system-x86_64 -M pc-i440fx-7.2 -dump-vmstate 7.2.json
      migfw convert vm.stream vm72.stream --machine pc-i440fx-7.2 --to-vmstate 7.2.json
    """
    from corefw.conversion import Target, parse_version
    from corefw.conversion import convert as convert_stream
    from corefw.inspection.source import FileSource

    if machine is None and version is None:
        raise UsageError("nothing to convert: choose the target with --machine TYPE or --for VERSION")
    if from_vmstate is not None and to_vmstate is None:
        raise UsageError("--from-vmstate needs --to-vmstate FILE, from the QEMU that will load the stream")
    if machine is not None and not (machine.isprintable() and 0 < len(machine.encode()) < 256):
        raise UsageError(f"{machine!r} is not a machine type: expected 1 to 255 printable bytes")
    target = Target(
        machine, parse_version(version) if version is not None else None, _tables(to_vmstate), _tables(from_vmstate)
    )
    _check_destination(source, destination, force)
    with FileSource.open(source) as file, _new_file(destination, force) as sink:
        watched = _Watched(file, file.size)
        try:
            done = convert_stream(watched, sink, target)
        except RemoteStreamError as error:
            raise MigfwError(f"'{source}' is damaged, '{destination}' was not written: {error}") from None
        finally:
            watched.clear()
    if as_json:
        print_json(_document(done))
    else:
        print_facts(_facts(done, target.to_tables))
    if done.problems:
        note(f"'{destination}' was written, but {_count(len(done.problems), 'thing')} in it will not load")
        raise Finished(ExitStatus.FAILED)


def _tables(path: str | None) -> DeviceTables | None:
    from corefw.conversion import read_tables

    if path is None:
        return None
    try:
        return read_tables(Path(path).read_bytes())
    except OSError as error:
        raise MigfwError(f"cannot read '{path}': {error.strerror}") from None
    except MigfwError as error:
        raise MigfwError(f"'{path}': {error}") from None


# -- the files ---------------------------------------------------------------------------------------------------------


def _check_destination(source: str, destination: str, force: bool) -> None:
    """Check OUT before anything is read. Raises UsageError."""
    if not os.path.lexists(destination):
        return
    if source != "-" and Path(destination).exists() and Path(source).samefile(destination):
        raise UsageError(f"'{destination}' is also the input: write to another file")
    if not force:
        raise UsageError(f"'{destination}' already exists (use --force to replace it)")


@contextlib.contextmanager
def _new_file(destination: str, force: bool) -> Iterator[_FileSink]:
    """A file that appears as `destination` once it is whole, or not at all."""
    from corefw.net.wholefile import WholeFile

    with contextlib.ExitStack() as undo:
        with _writing(destination):
            file = undo.enter_context(WholeFile(Path(destination)))
        yield _FileSink(file, destination)
        with _writing(destination):
            if force:
                file.replace()
            else:
                file.create()


@contextlib.contextmanager
def _writing(destination: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise MigfwError(f"cannot write '{destination}': {error.strerror}") from None


class _FileSink:
    """Writes to the file. Raises MigfwError that names the destination."""

    def __init__(self, file: WholeFile, name: str) -> None:
        self._file = file
        self._name = name

    def send(self, *parts: Buffer) -> None:
        with _writing(self._name):
            self._file.write(*parts)


class _Watched:
    """A source that shows on a terminal how much has been read."""

    def __init__(self, source: Source, size: int | None) -> None:
        self._source = source
        self._size = size
        self._read = 0
        self._next = time.monotonic() + INTERVAL
        self._shown = False
        self._terminal = sys.stderr.isatty()

    def receive_into(self, view: memoryview, /) -> int:
        count = self._source.receive_into(view)
        self._read += count
        if self._terminal and count and time.monotonic() >= self._next:
            self._show()
        return count

    def clear(self) -> None:
        """Remove the progress line."""
        if self._shown:
            click.echo("\r\x1b[K", err=True, nl=False)

    def _show(self) -> None:
        from corefw.quantities import format_size

        of = f" of {format_size(self._size)}, {100 * self._read // self._size} %" if self._size else ""
        click.echo(f"\r\x1b[Kmigfw: read {format_size(self._read)}{of}", err=True, nl=False)
        self._next, self._shown = time.monotonic() + INTERVAL, True


# -- what it prints ----------------------------------------------------------------------------------------------------


def _document(done: Conversion) -> dict[str, object]:
    return {
        "machine": {"from": done.machine_before, "to": done.machine},
        "for": None if done.version is None else str(done.version),
        "size": done.size,
        "changes": done.changes,
        "problems": done.problems,
        "doubts": done.doubts,
        "notes": done.notes,
        "devices": {"compared": done.compared, "not-judged": done.unjudged},
    }


def _facts(done: Conversion, tables: DeviceTables | None) -> list[tuple[str, str]]:
    facts = [
        ("machine", done.machine or "not in the stream"),
        ("for QEMU", str(done.version or "any version")),
        ("size", f"{done.size} bytes"),
        *(("changed", change) for change in done.changes or ["nothing"]),
        *(("needs", text) for text in done.notes),
        *(("will not load", problem) for problem in done.problems),
        *(("may not load", doubt) for doubt in done.doubts),
    ]
    if tables is None:
        return [*facts, ("devices", "not compared (give --to-vmstate FILE to find out which will not load)")]
    facts.append(("devices", f"{done.compared} compared with '{tables.machine}'"))
    if done.unjudged:
        facts.append(("not judged", f"{', '.join(done.unjudged)} (not described, or not in QEMU's tables)"))
    return facts


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
