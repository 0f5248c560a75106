"""The commands that need no engine, only a stream: `migfw inspect`, `migfw convert` and `migfw relay`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from corefw.cli import Interrupts
from corefw.cli.console import ExitStatus, Finished, note, print_facts, print_json, print_table, unread_is_fine
from corefw.cli.options import complete_uris, json_option, param_option
from corefw.errors import Interrupted, MigfwError, RemoteStreamError, UsageError, one_line
from corefw.quantities import format_milliseconds, format_size

if TYPE_CHECKING:
    from corefw.channel import Buffer
    from corefw.conversion import Conversion, DeviceTables
    from corefw.inspection import Inspection, ValueBudget
    from corefw.net.relay import Relay, RelayProgress
    from corefw.net.wholefile import WholeFile

# -- migfw inspect -----------------------------------------------------------------------------------------------------


class _StreamFile(click.ParamType[tuple[str, int]]):
    """Converts a path, "-", or a file: URI to (path, offset)."""

    name = "file"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, int]:
        from corefw.net.streamfile import split_offset

        path, offset = value, 0
        if value.startswith("file:"):
            try:
                path, offset = split_offset(value.removeprefix("file:"))
            except UsageError as error:
                self.fail(str(error), param, ctx)
        click.Path(exists=True, dir_okay=False, allow_dash=True).convert(path, param, ctx)
        return path, offset


@click.command()
@click.argument("place", metavar="FILE", type=_StreamFile())
@click.option("--device", "devices", metavar="NAME", multiple=True, help="Show the fields of this device. Repeatable.")
@click.option("--fields", "all_fields", is_flag=True, help="Show the fields of all devices.")
@json_option
def inspect(place: tuple[str, int], devices: Sequence[str], all_fields: bool, as_json: bool) -> None:
    """Show the sections, RAM, devices and commands of the migration stream in FILE ("-": standard input).

    FILE may also be a libvirt save image (virsh save), or a URI like QEMU's: file:PATH,offset=N.

    Reads streams of QEMU and migfw, with any stream options. A damaged stream is shown up to the damage. The exit
    status is 1 if the stream is damaged or its RAM is missing.

    \b
    Examples:
      migfw inspect machine.stream
      migfw inspect --device cpu --device timer machine.stream
      migfw inspect --json machine.stream | jq '.ram'
      zcat machine.stream.gz | migfw inspect -
      migfw inspect file:machine.stream,offset=64K
    """
    from corefw.inspection import ValueBudget, document
    from corefw.inspection import inspect as inspect_stream
    from corefw.inspection.source import FileSource

    file, offset = place
    with FileSource.open(file, offset) as source:
        found = inspect_stream(source)
        found.origin, found.image = source.origin, source.image
        if found.damage is not None and source.size is not None:
            found.size = source.size  # it may continue after the damage
    missing = [name for name in devices if all(section.idstr != name for section in found.sections)]
    if as_json:
        print_json(document(found))
    else:
        _print(found, None if all_fields else frozenset(devices), ValueBudget())
    if found.damage is not None:
        note(f"'{file}' is damaged: {found.damage}")
        raise Finished(ExitStatus.FAILED)
    if found.missing is not None:
        note(f"'{file}' is not a complete guest: RAM is missing: {found.missing}")
        raise Finished(ExitStatus.FAILED)
    if missing:
        note(f"'{file}' has no device '{missing[0]}' (the names are in the table of sections)")
        raise Finished(ExitStatus.FAILED)


def _print(found: Inspection, devices: frozenset[str] | None, budget: ValueBudget) -> None:
    """Print the report. `devices` are those to show the fields of; None shows all."""
    from corefw.inspection.report import facts, field_lines, tables

    print_facts(facts(found))
    for headings, rows in tables(found):
        click.echo()
        print_table(headings, rows)
    for entry in found.sections:
        if devices is None or entry.idstr in devices:
            for line in field_lines(entry, budget):
                click.echo(line)
    for command in found.commands:
        if command.package is not None:
            click.echo(f"\nInside the package at {command.offset:#x} (offsets count from its first byte):")
            _print(command.package, devices, budget)


# -- migfw convert -----------------------------------------------------------------------------------------------------


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
    from corefw.cli.display import ReadingDisplay
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
        watched = ReadingDisplay(file, file.size)
        try:
            done = convert_stream(watched, sink, target)
        except RemoteStreamError as error:
            raise MigfwError(f"'{source}' is damaged, '{destination}' was not written: {error}") from None
        finally:
            watched.clear()
    if as_json:
        print_json(_conversion_document(done))
    else:
        print_facts(_conversion_facts(done, target.to_tables))
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


# -- what it prints ----------------------------------------------------------------------------------------------------


def _conversion_document(done: Conversion) -> dict[str, object]:
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


def _conversion_facts(done: Conversion, tables: DeviceTables | None) -> list[tuple[str, str]]:
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


# -- migfw relay -------------------------------------------------------------------------------------------------------


LOOK: Final = 0.2
"""Seconds between two polls of the relay."""


@click.command()
@click.argument("source", metavar="FROM", shell_complete=complete_uris)
@click.argument("target", metavar="TO", shell_complete=complete_uris)
@click.option(
    "--allow-any-user",
    is_flag=True,
    help="Let every user of this host dial FROM if it is unix:@NAME, not only you and root.",
)
@param_option
@json_option
def relay(source: str, target: str, allow_any_user: bool, params: tuple[str, ...], as_json: bool) -> None:
    """Listen at FROM, dial TO when a source connects, and forward everything in both directions.

    Use this to connect two hosts over a transport that one of them does not support: QEMU dials FROM, and the relay
    forwards its stream and the destination's replies over ssh: or zmq:. FROM and TO are any migration URIs; for port 0,
    the relay prints the port that it got. When one side ends its stream, the relay ends the stream to the other side;
    when one connection breaks, the relay aborts the other. If the migration has a return path, the relay fails unless
    the destination has confirmed that it has the guest.

    \b
    Examples:
      migfw relay unix:/tmp/out.sock ssh://other.example.org/tcp:localhost:4444
      migfw relay zmq:tcp://0.0.0.0:4444 unix:/tmp/in.sock
      migfw relay tcp:0.0.0.0:4444 file:guest.migration
    """
    from corefw.cli.display import RelayDisplay, amount
    from corefw.client.changes import set_parameters
    from corefw.net.relay import Relay
    from corefw.plugins import Plugins

    plugins = Plugins.load()
    settings = plugins.settings()
    settings.set_property("allow-any-user", allow_any_user)
    set_parameters(settings, params)
    with (
        Relay(plugins.transport(source, settings), plugins.transport(target, settings)) as joined,
        Interrupts() as interrupts,
    ):
        address = joined.listen()
        if address:
            (note if as_json else click.echo)(one_line(f"listening at {address}"))
        joined.start()
        with unread_is_fine() as unread:
            with RelayDisplay(one_line(f"{address or source} -> {target}"), as_json=as_json) as display:
                while not joined.wait(LOOK):
                    display.update(joined.progress())
                    if interrupts.received():
                        joined.abort()
            _report_relay(joined, as_json=as_json)
        if unread.error:
            note(unread.before(f"relayed {amount(joined.progress(), two_way=joined.two_way)}"))


def _report_relay(joined: Relay, *, as_json: bool) -> None:
    from corefw.cli.display import amount

    progress = joined.progress()
    size = amount(progress, two_way=joined.two_way)
    if as_json:
        print_json(_relay_document(joined, progress))
    elif joined.failure is None:
        rate = f" ({format_size(progress.forward / progress.seconds)}/s)" if progress.seconds else ""
        click.echo(f"relayed {size} in {format_milliseconds(progress.seconds * 1000)}{rate}")
    if isinstance(joined.failure, Interrupted):
        note(f"interrupted after {size}; both connections were aborted")
        raise Finished(ExitStatus.INTERRUPTED)
    if joined.failure:
        raise joined.failure


def _relay_document(joined: Relay, progress: RelayProgress) -> dict[str, object]:
    document: dict[str, object] = {
        "from": str(joined.source.uri),
        "to": str(joined.target.uri),
        "status": "completed" if joined.failure is None else "failed",
        "return-path": joined.two_way,
        "forward-bytes": progress.forward,
        "backward-bytes": progress.backward,
        "seconds": round(progress.seconds, 3),
    }
    return document | ({"error-desc": str(joined.failure)} if joined.failure else {})
