"""Rewrites a stream item by item: the machine type, and what a version of QEMU does not understand.

Everything else is copied byte for byte. Memory does not grow with the RAM: pages pass through one by one, and only
device sections and the description are held.
"""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from corefw.conversion.tables import DeviceTables, compare, is_doubtful
from corefw.conversion.versions import board
from corefw.errors import MigfwError, RemoteStreamError
from corefw.jsontext import JsonError, parse_json
from corefw.wire import items
from corefw.wire.constants import TARGET_PAGE_SIZE, Command, RamFlag
from corefw.wire.decoder import decode
from corefw.wire.records import (
    MAPPED_RAM,
    Configuration,
    configuration_capabilities,
    configuration_page_size,
    configuration_subsections,
    pad_description,
    select_subsections,
)
from corefw.wire.stream import Sink, Source, StreamReader, StreamWriter
from corefw.wire.versions import Subject, Version, is_known, machine_version

MAX_LISTED: Final = 1000
"""Maximum problems and unjudged devices to report: a hostile stream may have any number of sections."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where the stream is to be loaded.

    machine   the machine type; None: that of the stream
    version   QEMU's version; None: that of the machine type, if it names one
    to_tables, from_tables   the devices of the QEMU that will load it, and of the one that saved it
    """

    machine: str | None = None
    version: Version | None = None
    to_tables: DeviceTables | None = None
    from_tables: DeviceTables | None = None


@dataclass(slots=True)
class Conversion:
    """The result of a conversion; texts are phrases for users.

    machine_before, machine   the machine type before and after; None if the stream does not say
    version    the version of QEMU that the stream is for, if it is known
    changes    what was changed
    problems   what will not load
    doubts     devices that are in the source's tables and not in the target's
    notes      what has to be switched on at the destination
    compared   how many devices were compared with the tables; unjudged: those that are not in the tables
    size       bytes of the new stream
    """

    machine_before: str | None = None
    machine: str | None = None
    version: Version | None = None
    changes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    compared: int = 0
    unjudged: list[str] = field(default_factory=list)
    size: int = 0


def convert(source: Source, sink: Sink, target: Target) -> Conversion:
    """Read a stream to its end and write the new one. Raises RemoteStreamError for damage, ChannelError, and MigfwError
    for a file of mapped-ram; what was written before an error is useless.
    """
    rewriting = _Rewriting(target)
    writer = StreamWriter(sink)
    items.encode(writer, rewriting.stream(decode(StreamReader(source))))
    conversion = rewriting.finish()
    conversion.size = writer.position
    return conversion


class _Rewriting:
    def __init__(self, target: Target) -> None:
        self._target = target
        self._done = Conversion()
        self._configuration: Configuration | None = None
        self._page_size = TARGET_PAGE_SIZE
        self._dropped: Counter[str] = Counter()
        self._unpacked = 0
        self._begun = False
        self._kinds: Mapping[type[items.Item], Callable[[Any], Iterator[items.Item]]] = {
            items.ConfigurationItem: self._configure,
            items.CommandItem: self._command,
            items.Ram: self._ram,
            items.Body: self._body,
            items.Package: self._package,
            items.DescriptionItem: self._description,
        }

    def stream(self, source: Iterator[items.Item]) -> Iterator[items.Item]:
        for item in source:
            if not self._begun and not isinstance(item, items.Header | items.ConfigurationItem):
                yield from self._without_configuration(item.offset)
            if type(item) in self._kinds:
                yield from self._kinds[type(item)](item)
            else:
                yield item

    def finish(self) -> Conversion:
        done = self._done
        done.changes += [f"{count} {what} left out" for what, count in self._dropped.items()]
        if self._unpacked:
            done.changes.append(f"{self._unpacked} compressed pages unpacked")
        return done

    # -- configuration ---------------------------------------------------------------------------------------------

    def _configure(self, item: items.ConfigurationItem) -> Iterator[items.Item]:
        before = item.configuration
        if MAPPED_RAM in configuration_capabilities(before):
            raise MigfwError(
                "a mapped-ram file cannot be converted, because its pages are at fixed offsets: park the machine"
                " ('migfw run --machine qemu --incoming file:PATH'), store it again ('migfw migrate file:OTHER'), and"
                " convert that"
            )
        self._begin(before.name)
        kept, subsections = [], configuration_subsections(before)
        for name in subsections:
            if self._unknown(name):
                self._dropped[f"subsection '{name}'"] += 1
            else:
                kept.append(name)
        name = self._target.machine or before.name
        tail = before.tail if len(kept) == len(subsections) else select_subsections(before, kept)
        self._configuration = Configuration(name, tail)
        self._page_size = configuration_page_size(before) or self._page_size
        if "x-ignore-shared" in configuration_capabilities(before) and len(kept) < len(subsections):
            self._done.problems.append(f"QEMU {self._done.version} does not support shared RAM (x-ignore-shared)")
        for capability in sorted(configuration_capabilities(self._configuration)):
            self._done.notes.append(
                f"the destination needs the capability '{capability}' switched on, as the source had"
            )
        yield replace(item, configuration=self._configuration)

    def _without_configuration(self, offset: int) -> Iterator[items.Item]:
        self._begin(None)
        if self._target.machine is not None:
            self._done.changes.append("a configuration section added, because the stream has none")
            yield items.ConfigurationItem(offset, Configuration(self._target.machine))

    def _begin(self, machine: str | None) -> None:
        """Determine machine type and version, now that the stream's own machine type is known."""
        self._begun = True
        target, done = self._target, self._done
        done.machine_before, done.machine = machine, target.machine or machine
        wanted = machine_version(done.machine or "")
        done.version = target.version or wanted
        if machine is not None and done.machine != machine:
            done.changes.append(f"machine type '{machine}' renamed to '{done.machine}'")
            if board(machine) != board(done.machine or ""):
                done.problems.append(
                    f"'{machine}' and '{done.machine}' are different boards: their devices do not match"
                )
        if wanted is not None and done.version is not None and wanted > done.version:
            other = f"{board(done.machine or '')}-{done.version}"
            done.problems.append(f"QEMU {done.version} has no machine type '{done.machine}' (try --machine {other})")

    # -- what a version does not understand ------------------------------------------------------------------------

    def _unknown(self, subject: Subject) -> bool:
        """Whether the version that the stream is converted for does not understand this part."""
        return self._done.version is not None and not is_known(subject, self._done.version)

    def _command(self, item: items.CommandItem) -> Iterator[items.Item]:
        command = item.record.command
        if not isinstance(command, Command) or self._unknown(command):  # no QEMU knows a plugin's
            self._dropped[f"command {item.record.name}"] += 1
        else:
            yield item

    def _ram(self, item: items.Ram) -> Iterator[items.Item]:
        kind = item.record.kind
        if not self._unknown(kind):
            yield item
        elif kind is RamFlag.COMPRESS_PAGE:
            yield self._unpack(item)
        else:
            self._dropped[f"RAM record {kind.name}"] += 1

    def _unpack(self, item: items.Ram) -> items.Ram:
        unpacker = zlib.decompressobj()
        try:
            page = unpacker.decompress(item.record.body[4:], self._page_size)
        except zlib.error as error:
            raise RemoteStreamError(item.offset, "section 'ram'", "a page compressed by zlib", str(error)) from None
        if len(page) != self._page_size:
            expected, got = f"a compressed page of {self._page_size} bytes", f"{len(page)} bytes"
            raise RemoteStreamError(item.offset, "section 'ram'", expected, got)
        self._unpacked += 1
        flags = item.record.flags & ~RamFlag.COMPRESS_PAGE | RamFlag.PAGE
        return replace(item, record=replace(item.record, flags=flags, body=page))

    # -- devices ---------------------------------------------------------------------------------------------------

    def _body(self, item: items.Body) -> Iterator[items.Item]:
        self._judge(item)
        yield item

    def _package(self, item: items.Package) -> Iterator[items.Item]:
        if item.error is not None:
            raise item.error
        for inner in item.items:
            if isinstance(inner, items.Body):
                self._judge(inner)
        yield item

    def _judge(self, item: items.Body) -> None:
        target, done = self._target, self._done
        if target.to_tables is None:
            return
        problems = compare(item.header, item.device, target.from_tables, target.to_tables)
        if problems is None:
            name = item.header.idstr
            if is_doubtful(item.device, target.from_tables, target.to_tables):
                done.doubts += [f"{item.header}: the target's tables do not have it"][: MAX_LISTED - len(done.doubts)]
            elif name not in done.unjudged and len(done.unjudged) < MAX_LISTED:
                done.unjudged.append(name)
            return
        done.compared += 1
        done.problems += problems[: MAX_LISTED - len(done.problems)]

    # -- the description -------------------------------------------------------------------------------------------

    def _description(self, item: items.DescriptionItem) -> Iterator[items.Item]:
        """Newer QEMUs describe the configuration section too, with the length of the machine type."""
        yield replace(item, text=_with_configuration(item.text, self._configuration))


_KEY: Final = '"configuration": '


def _with_configuration(text: bytes, configuration: Configuration | None) -> bytes:
    """The JSON with a corrected object for the configuration section. Unchanged if that object is right already, or if
    the text is not JSON, which the decoder reports next.

    Everything else stays text: QEMU's descriptions have objects in which a name occurs twice, and parsing would lose
    one of them.
    """
    try:
        document, whole = parse_json(text), text.decode()
    except JsonError:
        return text
    described = document.get("configuration") if isinstance(document, dict) else None
    if configuration is None or not isinstance(described, dict):
        return text
    changed = _described(described, configuration)
    if changed == described:
        return text
    # QEMU writes it before the devices.
    begin = whole.index(_KEY) + len(_KEY) if _KEY in whole else len(whole)
    found, end = json.JSONDecoder().raw_decode(whole, begin) if begin < len(whole) else (None, begin)
    if found != described:
        return text
    return pad_description((whole[:begin] + json.dumps(changed) + whole[end:]).encode())


def _described(before: dict[str, Any], configuration: Configuration) -> dict[str, Any]:
    """The object with the name's new length and the remaining subsections."""
    changed = dict(before)
    fields, subsections = before.get("fields"), before.get("subsections")
    if isinstance(fields, list):
        size = len(configuration.name.encode())
        changed["fields"] = [
            {**one, "size": size} if isinstance(one, dict) and one.get("name") == "name" else one for one in fields
        ]
    if isinstance(subsections, list):
        kept = configuration_subsections(configuration)
        changed["subsections"] = [one for one in subsections if isinstance(one, dict) and one.get("vmsd_name") in kept]
        if not changed["subsections"]:
            del changed["subsections"]
    return changed
