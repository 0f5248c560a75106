"""The contract kit for sections catches every way to break the contract, and lets good sections pass.

Each broken saver or loader is a good one with one thing changed; the kit has to name that thing, in the check made for
it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import pytest

from corefw.errors import StreamError
from corefw.section import (
    Coverage,
    IncomingContext,
    LiveLoader,
    LiveSaver,
    OutgoingContext,
    Pending,
    Priority,
    RamSaver,
    RamStatistics,
    Section,
    SectionKey,
    StateLoader,
    StateSaver,
)
from corefw.testing import kit
from corefw.testing.section import CHECKS, SectionCase, check_section
from corefw.wire.stream import StreamReader, StreamWriter

LINES = ["first line", "second", "third one"]


class NotesSaver(StateSaver):
    """A list of texts, without a VMState: u32 count, strings."""

    idstr = "notes"
    version_id = 2
    priority = Priority.DEVICES

    def __init__(self, lines: Iterable[str] = LINES) -> None:
        self.lines = list(lines)
        self.size = 0

    def blocked(self) -> str | None:
        return None

    def needed(self) -> bool:
        return True

    def save(self, writer: StreamWriter) -> None:
        start = writer.position
        writer.be32(len(self.lines))
        for line in self.lines:
            writer.string(line)
        self.size = writer.position - start

    def describe(self) -> dict[str, Any]:
        data = {"name": "data", "type": "buffer", "size": self.size}
        return {"vmsd_name": "notes", "version": self.version_id, "fields": [data]}


class NotesLoader(StateLoader):
    idstr = "notes"
    version_id = 2
    minimum_version = 1

    def __init__(self) -> None:
        self.lines: list[str] = []

    def required(self) -> bool:
        return True

    def setup(self, context: IncomingContext) -> None:
        self.lines = []

    def load(self, reader: StreamReader, version_id: int) -> None:
        if version_id > self.version_id:
            raise reader.error(f"version up to {self.version_id}", str(version_id))
        count = reader.be32("the number of lines")
        if count > 1000:
            raise reader.error("at most 1000 lines", str(count))
        self.lines = [reader.string("a line") for _ in range(count)]

    def cleanup(self) -> None:
        pass


class CellsSaver(LiveSaver):
    """Bytes that the guest changes one by one. A body is (u16 index, u8 value) pairs up to an index of 0xffff."""

    idstr = "cells"
    version_id = 1
    priority = Priority.RAM
    END = 0xFFFF

    def __init__(self) -> None:
        self.cells = bytearray(i % 251 for i in range(300))
        self.written: set[int] = set()  # the dirty log
        self.dirty: set[int] = set()

    def active(self) -> bool:
        return True

    def write(self, index: int) -> None:
        self.cells[index] = (self.cells[index] + 1) % 256
        self.written.add(index)

    def setup(self, writer: StreamWriter, context: OutgoingContext) -> None:
        self.dirty = set(range(len(self.cells)))
        writer.be16(self.END)

    def pending_estimate(self) -> Pending:
        return Pending(3 * len(self.dirty), 0)

    def pending_exact(self) -> Pending:
        self.harvest()
        return self.pending_estimate()

    def harvest(self) -> None:
        self.dirty |= self.written
        self.written.clear()

    def iterate(self, writer: StreamWriter, budget: int) -> bool:
        for _ in range(min(len(self.dirty), budget // 3)):
            self.send(writer, self.dirty.pop())
        writer.be16(self.END)
        return not self.dirty

    def send(self, writer: StreamWriter, index: int) -> None:
        writer.be16(index)
        writer.u8(self.cells[index])

    def complete(self, writer: StreamWriter) -> None:
        self.harvest()
        self.iterate(writer, 1 << 30)

    def cleanup(self) -> None:
        self.dirty = set()


class CountsItsHarvests(CellsSaver, RamSaver):
    def __init__(self) -> None:
        super().__init__()
        self.statistics_of_ram = RamStatistics()

    def ram_statistics(self) -> RamStatistics:
        return self.statistics_of_ram

    def harvest(self) -> None:
        super().harvest()
        self.statistics_of_ram.dirty_sync_count += 1


class CellsLoader(LiveLoader):
    idstr = "cells"
    version_id = 1
    minimum_version = 1
    END = CellsSaver.END

    def __init__(self) -> None:
        self.cells = bytearray(300)

    def required(self) -> bool:
        return True

    def setup(self, context: IncomingContext) -> None:
        pass

    def load(self, reader: StreamReader, version_id: int) -> None:
        if version_id != 1:
            raise reader.error("version 1", str(version_id))
        while (index := reader.be16("a cell's index")) != self.END:
            if index >= len(self.cells):
                raise reader.error(f"an index below {len(self.cells)}", str(index))
            self.cells[index] = reader.u8("a cell")

    def cleanup(self) -> None:
        pass


def state_case(kind: type[Section] = Section) -> SectionCase:
    """Notes, with one side replaced by `kind`."""
    saver = kind if issubclass(kind, StateSaver) else NotesSaver
    loader = kind if issubclass(kind, NotesLoader | LiveLoader) else NotesLoader
    return SectionCase(saver=saver, loader=loader, state=lambda section: section.lines)


def live_case(kind: type[Section] = Section) -> SectionCase:
    """Cells, with one side replaced by `kind`."""

    def guest_writes(saver: CellsSaver) -> None:
        for index in (0, 7, 299):
            saver.write(index)

    return SectionCase(
        saver=kind if issubclass(kind, CellsSaver) else CellsSaver,
        loader=kind if issubclass(kind, CellsLoader) else CellsLoader,
        state=lambda section: bytes(section.cells),
        change=guest_writes,
        budget=256,
        samples=60,
    )


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(
    "case", [state_case(), live_case(), live_case(CountsItsHarvests)], ids=["notes", "cells", "counted cells"]
)
def test_good_section_passes(case: SectionCase, check: str) -> None:
    assert check_section(case, only=[check]) == [check]


def test_unknown_check_is_an_error() -> None:
    with pytest.raises(AssertionError, match="no check is called roundtrip"):
        check_section(state_case(), only=["roundtrip"])


# -- broken state sections ----------------------------------------------------------------------------------------


class ReadsTooMuch(NotesLoader):
    def load(self, reader: StreamReader, version_id: int) -> None:
        super().load(reader, version_id)
        reader.u8("a byte of the footer")


class ReadsTooLittle(NotesLoader):
    def load(self, reader: StreamReader, version_id: int) -> None:
        count = reader.be32("the number of lines")
        self.lines = [reader.string("a line") for _ in range(count - 1)]


class ForgetsALine(NotesLoader):
    def load(self, reader: StreamReader, version_id: int) -> None:
        super().load(reader, version_id)
        self.lines.pop()


class TakesShortReadsForZeros(NotesLoader):
    def load(self, reader: StreamReader, version_id: int) -> None:
        if len(reader.peek(40)) < 31:
            self.lines = []
            return
        super().load(reader, version_id)


class TrustsText(NotesLoader):
    def load(self, reader: StreamReader, version_id: int) -> None:
        count = min(reader.be32("the number of lines"), 1000)
        self.lines = [reader.read(reader.u8("a length"), "a line").decode() for _ in range(count)]


class TrustsLengths(NotesLoader):
    def load(self, reader: StreamReader, version_id: int) -> None:
        count = reader.be32("the number of lines")
        buffer = bytearray(min(count << 8, 100 << 20))
        self.lines = [reader.string("a line") for _ in range(min(count, 1000))]
        del buffer


class WaitsForBytesThatNeverCome(NotesLoader):
    def load(self, reader: StreamReader, version_id: int) -> None:
        while len(reader.peek(31)) < 31:
            pass
        super().load(reader, version_id)


class TakesAnyVersion(NotesLoader):
    def load(self, reader: StreamReader, version_id: int) -> None:
        super().load(reader, min(version_id, self.version_id))


class DescribesTooFewBytes(NotesSaver):
    def describe(self) -> dict[str, Any]:
        return {"vmsd_name": "notes", "version": 2, "fields": [{"name": "data", "type": "buffer", "size": 4}]}


class DescribesWithoutTypes(NotesSaver):
    def describe(self) -> dict[str, Any]:
        return {"vmsd_name": "notes", "version": 2, "fields": [{"name": "data", "size": self.size}]}


class DescribesWrongStructs(NotesSaver):
    def describe(self) -> dict[str, Any]:
        inner = super().describe()
        entry = {"name": "data", "type": "struct", "struct": inner, "size": self.size - 1}
        return {"vmsd_name": "notes", "version": 2, "fields": [entry]}


class CannotCleanUpTwice(NotesLoader):
    def setup(self, context: IncomingContext) -> None:
        self.scratch: bytearray | None = bytearray(10)

    def cleanup(self) -> None:
        del self.scratch


class LeavesDescriptorsBehind(NotesLoader):
    def setup(self, context: IncomingContext) -> None:
        LEAKED.append(os.open("/dev/null", os.O_RDONLY))


class TakesLiveBodies(CellsLoader):
    """Would be called for START, PART and END."""


class FailsToCommit(NotesSaver):
    def committed(self) -> None:
        self.size //= 0


class FailsToAbandon(NotesLoader):
    """Discards what exists only after a successful load."""

    def load(self, reader: StreamReader, version_id: int) -> None:
        super().load(reader, version_id)
        self.loaded = self.lines

    def abandoned(self) -> None:
        self.loaded.clear()


class HasOddFigures(NotesSaver):
    def statistics(self) -> Mapping[str, object]:
        return {"lines": object()}


class HasNoFigures(NotesLoader):
    def statistics(self) -> Mapping[str, object]:
        return None  # type: ignore[return-value]


class IsBlocked(NotesSaver):
    def blocked(self) -> str | None:
        return "'notes' is attached to a printer"


class HasNoName(NotesSaver):
    idstr = ""


class ReadsOnlyTheFuture(NotesLoader):
    minimum_version = 3


class CoversByName(NotesSaver):
    """Returns a list of names instead of sets of keys."""

    def covers(self) -> Coverage:
        return Coverage(devices=frozenset({"notes"}))  # type: ignore[arg-type]


class CoversOnlyWhereItSends(NotesSaver):
    def covers(self) -> Coverage:
        return Coverage(devices=frozenset({SectionKey("notes", 0)}) if self.lines else frozenset())


class RaisesStreamError(NotesLoader):
    """StreamError is right for content; for a stream that ends it lacks the offset."""

    def load(self, reader: StreamReader, version_id: int) -> None:
        try:
            super().load(reader, version_id)
        except StreamError as error:
            raise StreamError("something was wrong") from error


LEAKED: list[int] = []


@pytest.mark.parametrize(
    ("kind", "check", "says"),
    [
        (HasNoName, "identity", "idstr has 1 to 255 bytes, this one has 0"),
        (ReadsOnlyTheFuture, "identity", "it reads versions from 3 but is of version 2"),
        (CoversByName, "coverage", r"covers\(\).devices has 'notes', expected a SectionKey"),
        (CoversOnlyWhereItSends, "coverage", "sends device 'notes' .*, which the destination does not cover"),
        (DescribesTooFewBytes, "description", "accounts for 4 bytes of the FULL body of 32 bytes"),
        (DescribesWithoutTypes, "description", r"fields'\]\[0\] has no 'type' that is a str"),
        (DescribesWrongStructs, "description", "has size 31, but the fields in it 32"),
        (IsBlocked, "round-trip", "attached to a printer"),
        (ReadsTooMuch, "round-trip", r"load\(\) read 33 bytes of the FULL body of 32 bytes"),
        (ReadsTooLittle, "round-trip", r"load\(\) read 22 bytes of the FULL body of 32 bytes"),
        (ForgetsALine, "round-trip", "another state than the source"),
        (TakesShortReadsForZeros, "truncated", "cut after 0: expected RemoteStreamError, got no error"),
        (RaisesStreamError, "truncated", "expected RemoteStreamError, got StreamError: something was wrong"),
        (WaitsForBytesThatNeverCome, "truncated", "reads on and on after the end"),
        (TrustsText, "damaged", "expected a StreamError or a load, got UnicodeDecodeError"),
        (TrustsLengths, "damaged", r"byte 0 xor 0xff: load\(\) took \d+ bytes of memory"),
        (TakesAnyVersion, "newer-version", r"load\(\) of version 3: expected StreamError, got no error"),
        (CannotCleanUpTwice, "cleanup", "AttributeError"),
        (TakesLiveBodies, "identity", "is not a StateLoader"),
        (FailsToCommit, "outcome", r"committed\(\) raised ZeroDivisionError"),
        (FailsToAbandon, "outcome", r"abandoned\(\) raised AttributeError"),
        (HasOddFigures, "statistics", r"statistics\(\) gave .*object"),
        (HasNoFigures, "statistics", r"statistics\(\) gave None, expected a mapping"),
    ],
)
def test_broken_state_section_is_caught(kind: type[Section], check: str, says: str) -> None:
    with pytest.raises(AssertionError, match=f"{check}: .*{says}"):
        check_section(state_case(kind), only=[check])


def test_descriptor_left_behind_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kit, "LETTING_GO", 0.3)
    try:
        with pytest.raises(AssertionError, match=r"left behind: descriptor .*/dev/null"):
            check_section(state_case(LeavesDescriptorsBehind), only=["round-trip"])
    finally:
        while LEAKED:
            os.close(LEAKED.pop())


# -- broken live sections -----------------------------------------------------------------------------------------


class NeverReady(CellsSaver):
    def pending_estimate(self) -> Pending:
        return Pending(1, 0)


class CompletesNothing(CellsSaver):
    def complete(self, writer: StreamWriter) -> None:
        writer.be16(self.END)


class LosesAWrite(CellsSaver):
    def write(self, index: int) -> None:
        super().write(index)
        self.written.discard(299)


class SendsPastBudgetOfOwn(CellsSaver):
    """Sends cells without the mark at the end of the body."""

    def complete(self, writer: StreamWriter) -> None:
        self.harvest()
        while self.dirty:
            self.send(writer, self.dirty.pop())


class HarvestsToEstimate(CountsItsHarvests):
    def pending_estimate(self) -> Pending:
        self.harvest()
        return super().pending_estimate()


class NeverBeginsAPass(CountsItsHarvests):
    def pending_exact(self) -> Pending:
        return self.pending_estimate()


class CommitsWhatItSent(CellsSaver):
    """Assumes that every completed migration had a pass."""

    def iterate(self, writer: StreamWriter, budget: int) -> bool:
        self.last_pass = budget
        return super().iterate(writer, budget)

    def committed(self) -> None:
        self.last_pass += 1


class NeedsSetup(CellsSaver):
    def cleanup(self) -> None:
        assert self.dirty, "cleanup() without setup()"
        super().cleanup()


class ForgetsToHarvest(CellsSaver):
    def pending_exact(self) -> Pending:
        return Pending(3 * len(self.dirty | self.written), 0)


class TrustsIndexes(CellsLoader):
    def load(self, reader: StreamReader, version_id: int) -> None:
        while (index := reader.be16("a cell's index")) != self.END:
            self.cells[index] = reader.u8("a cell")


class OwesBytes(CellsSaver):
    def pending_estimate(self) -> Pending:
        return Pending(super().pending_estimate().must_precopy, -1)


@pytest.mark.parametrize(
    ("kind", "check", "says"),
    [
        (NeverReady, "round-trip", "after 10000 calls of iterate"),
        (OwesBytes, "round-trip", "bytes are never negative"),
        (CompletesNothing, "round-trip", r"after complete\(\), which has to send everything"),
        (LosesAWrite, "round-trip", "another state than the source"),
        (SendsPastBudgetOfOwn, "round-trip", r"of the END body of \d+ bytes"),
        (TrustsIndexes, "damaged", "expected a StreamError or a load, got IndexError"),
        (TrustsIndexes, "newer-version", "got no error"),
        (ForgetsToHarvest, "round-trip", r"pending_exact\(\) gives .*, but pending_estimate\(\) right after it"),
        (HarvestsToEstimate, "round-trip", r"pending_estimate\(\) harvests the dirty log"),
        (NeverBeginsAPass, "round-trip", r"pending_exact\(\) begins no pass"),
        (CommitsWhatItSent, "outcome", r"committed\(\) raised AttributeError"),
        (NeedsSetup, "cleanup", r"cleanup\(\) without setup\(\)"),
    ],
)
def test_broken_live_section_is_caught(kind: type[Section], check: str, says: str) -> None:
    with pytest.raises(AssertionError, match=f"{check}: .*{says}"):
        check_section(live_case(kind), only=[check])
