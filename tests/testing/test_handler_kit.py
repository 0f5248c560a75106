"""The contract kit for section handlers catches every way to break the contract, and lets good handlers pass.

Each broken handler is a good one with one thing changed; the kit has to name that thing, in the check made for it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import pytest

from corefw.errors import StreamError
from corefw.section import (
    Coverage,
    IncomingContext,
    LiveHandler,
    OutgoingContext,
    Pending,
    Priority,
    SectionKey,
    StateHandler,
)
from corefw.testing.handler import CHECKS, HandlerCase, check_handler
from corefw.wire.stream import StreamReader, StreamWriter

LINES = ["first line", "second", "third one"]


class Notes(StateHandler):
    """A list of texts, and nothing of VMState: u32 count, strings."""

    idstr = "notes"
    version_id = 2
    minimum_version = 1
    priority = Priority.DEVICES

    def __init__(self, lines: Iterable[str] = ()) -> None:
        self.lines = list(lines)
        self.size = 0

    def required(self) -> bool:
        return True

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

    def load_setup(self, context: IncomingContext) -> None:
        self.lines = []

    def load(self, reader: StreamReader, version_id: int) -> None:
        if version_id > self.version_id:
            raise reader.error(f"version up to {self.version_id}", str(version_id))
        count = reader.be32("the number of lines")
        if count > 1000:
            raise reader.error("at most 1000 lines", str(count))
        self.lines = [reader.string("a line") for _ in range(count)]

    def load_cleanup(self) -> None:
        pass


class Cells(LiveHandler):
    """Bytes that the guest changes one by one. A body is (u16 index, u8 value) pairs up to an index of 0xffff."""

    idstr = "cells"
    version_id = 1
    minimum_version = 1
    priority = Priority.RAM
    END = 0xFFFF

    def __init__(self, cells: bytes = bytes(300)) -> None:
        self.cells = bytearray(cells)
        self.dirty: set[int] | None = None

    def required(self) -> bool:
        return True

    def active(self) -> bool:
        return True

    def write(self, index: int) -> None:
        self.cells[index] = (self.cells[index] + 1) % 256
        if self.dirty is not None:
            self.dirty.add(index)

    def setup(self, writer: StreamWriter, context: OutgoingContext) -> None:
        self.dirty = set(range(len(self.cells)))
        writer.be16(self.END)

    def pending(self, threshold: int) -> Pending:
        assert self.dirty is not None
        return Pending(3 * len(self.dirty), 0)

    def iterate(self, writer: StreamWriter, budget: int) -> bool:
        assert self.dirty is not None
        for _ in range(min(len(self.dirty), budget // 3)):
            self.send(writer, self.dirty.pop())
        writer.be16(self.END)
        return not self.dirty

    def send(self, writer: StreamWriter, index: int) -> None:
        writer.be16(index)
        writer.u8(self.cells[index])

    def complete_precopy(self, writer: StreamWriter) -> None:
        self.iterate(writer, 1 << 30)

    def cleanup(self) -> None:
        self.dirty = None

    def load_setup(self, context: IncomingContext) -> None:
        pass

    def load(self, reader: StreamReader, version_id: int) -> None:
        if version_id != 1:
            raise reader.error("version 1", str(version_id))
        while (index := reader.be16("a cell's index")) != self.END:
            if index >= len(self.cells):
                raise reader.error(f"an index below {len(self.cells)}", str(index))
            self.cells[index] = reader.u8("a cell")

    def load_cleanup(self) -> None:
        pass


def state_case(kind: type[Notes], **more: Any) -> HandlerCase:
    return HandlerCase(source=lambda: kind(LINES), destination=kind, **more)


def live_case(kind: type[Cells], **more: Any) -> HandlerCase:
    def guest_writes(handler: Cells) -> None:
        for index in (0, 7, 299):
            handler.write(index)

    return HandlerCase(
        source=lambda: kind(bytes(i % 251 for i in range(300))),
        destination=kind,
        state=lambda handler: bytes(handler.cells),
        change=guest_writes,
        budget=256,
        samples=60,
        **more,
    )


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("case", [state_case(Notes), live_case(Cells)], ids=["notes", "cells"])
def test_good_handler_passes(case: HandlerCase, check: str) -> None:
    assert check_handler(case, only=[check]) == [check]


def test_unknown_check_is_an_error() -> None:
    with pytest.raises(AssertionError, match="no check is called roundtrip"):
        check_handler(state_case(Notes), only=["roundtrip"])


def test_live_handler_needs_a_state_to_compare() -> None:
    with pytest.raises(AssertionError, match="give the case of a LiveHandler a `state`"):
        check_handler(HandlerCase(source=Cells, destination=Cells), only=["round-trip"])


# -- broken StateHandlers ------------------------------------------------------------------------------------------


class ReadsTooMuch(Notes):
    def load(self, reader: StreamReader, version_id: int) -> None:
        super().load(reader, version_id)
        reader.u8("a byte of the footer")


class ReadsTooLittle(Notes):
    def load(self, reader: StreamReader, version_id: int) -> None:
        count = reader.be32("the number of lines")
        self.lines = [reader.string("a line") for _ in range(count - 1)]


class ForgetsALine(Notes):
    def load(self, reader: StreamReader, version_id: int) -> None:
        super().load(reader, version_id)
        self.lines.pop()


class TakesShortReadsForZeros(Notes):
    def load(self, reader: StreamReader, version_id: int) -> None:
        if len(reader.peek(40)) < 31:
            self.lines = []
            return
        super().load(reader, version_id)


class TrustsText(Notes):
    def load(self, reader: StreamReader, version_id: int) -> None:
        count = min(reader.be32("the number of lines"), 1000)
        self.lines = [reader.read(reader.u8("a length"), "a line").decode() for _ in range(count)]


class TrustsLengths(Notes):
    def load(self, reader: StreamReader, version_id: int) -> None:
        count = reader.be32("the number of lines")
        buffer = bytearray(min(count << 8, 100 << 20))
        self.lines = [reader.string("a line") for _ in range(min(count, 1000))]
        del buffer


class WaitsForBytesThatNeverCome(Notes):
    def load(self, reader: StreamReader, version_id: int) -> None:
        while len(reader.peek(31)) < 31:
            pass
        super().load(reader, version_id)


class TakesAnyVersion(Notes):
    def load(self, reader: StreamReader, version_id: int) -> None:
        super().load(reader, min(version_id, self.version_id))


class DescribesTooFewBytes(Notes):
    def describe(self) -> dict[str, Any]:
        return {"vmsd_name": "notes", "version": 2, "fields": [{"name": "data", "type": "buffer", "size": 4}]}


class DescribesWithoutTypes(Notes):
    def describe(self) -> dict[str, Any]:
        return {"vmsd_name": "notes", "version": 2, "fields": [{"name": "data", "size": self.size}]}


class DescribesWrongStructs(Notes):
    def describe(self) -> dict[str, Any]:
        inner = super().describe()
        entry = {"name": "data", "type": "struct", "struct": inner, "size": self.size - 1}
        return {"vmsd_name": "notes", "version": 2, "fields": [entry]}


class CannotCleanUpTwice(Notes):
    def load_setup(self, context: IncomingContext) -> None:
        self.scratch: bytearray | None = bytearray(10)

    def load_cleanup(self) -> None:
        del self.scratch


class LeavesDescriptorsBehind(Notes):
    def load_setup(self, context: IncomingContext) -> None:
        LEAKED.append(os.open("/dev/null", os.O_RDONLY))


class IsBlocked(Notes):
    def blocked(self) -> str | None:
        return "'notes' is attached to a printer"


class HasNoName(Notes):
    idstr = ""


class ReadsOnlyTheFuture(Notes):
    minimum_version = 3


class CoversByName(Notes):
    """A list of names where sets of keys have to be."""

    def covers(self) -> Coverage:
        return Coverage(devices=frozenset({"notes"}))  # type: ignore[arg-type]


class CoversOnlyWhereItSends(Notes):
    def covers(self) -> Coverage:
        return Coverage(devices=frozenset({SectionKey("notes", 0)}) if self.lines else frozenset())


class RaisesStreamError(Notes):
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
        (CannotCleanUpTwice, "abandoned", "AttributeError"),
    ],
)
def test_broken_state_handler_is_caught(kind: type[Notes], check: str, says: str) -> None:
    with pytest.raises(AssertionError, match=f"{check}: .*{says}"):
        check_handler(state_case(kind), only=[check])


def test_descriptor_left_behind_is_caught() -> None:
    try:
        with pytest.raises(AssertionError, match=r"left behind: descriptor .*/dev/null"):
            check_handler(state_case(LeavesDescriptorsBehind), only=["round-trip"])
    finally:
        while LEAKED:
            os.close(LEAKED.pop())


# -- broken LiveHandlers -------------------------------------------------------------------------------------------


class NeverReady(Cells):
    def pending(self, threshold: int) -> Pending:
        return Pending(1, 0)


class CompletesNothing(Cells):
    def complete_precopy(self, writer: StreamWriter) -> None:
        writer.be16(self.END)


class LosesAWrite(Cells):
    def write(self, index: int) -> None:
        super().write(index)
        if self.dirty is not None:
            self.dirty.discard(299)


class SendsPastBudgetOfOwn(Cells):
    """Sends cells without the mark at the end of the body."""

    def complete_precopy(self, writer: StreamWriter) -> None:
        assert self.dirty is not None
        while self.dirty:
            self.send(writer, self.dirty.pop())


class NeedsSetup(Cells):
    def cleanup(self) -> None:
        assert self.dirty is not None, "cleanup() without setup()"
        self.dirty = None


class TrustsIndexes(Cells):
    def load(self, reader: StreamReader, version_id: int) -> None:
        while (index := reader.be16("a cell's index")) != self.END:
            self.cells[index] = reader.u8("a cell")


class OwesBytes(Cells):
    def pending(self, threshold: int) -> Pending:
        return Pending(super().pending(threshold).must_precopy, -1)


@pytest.mark.parametrize(
    ("kind", "check", "says"),
    [
        (NeverReady, "round-trip", "after 10000 calls of iterate"),
        (OwesBytes, "round-trip", "bytes are never negative"),
        (CompletesNothing, "round-trip", r"after complete_precopy\(\), which has to send everything"),
        (LosesAWrite, "round-trip", "another state than the source"),
        (SendsPastBudgetOfOwn, "round-trip", r"of the END body of \d+ bytes"),
        (TrustsIndexes, "damaged", "expected a StreamError or a load, got IndexError"),
        (TrustsIndexes, "newer-version", "got no error"),
        (NeedsSetup, "abandoned", r"cleanup\(\) without setup\(\)"),
    ],
)
def test_broken_live_handler_is_caught(kind: type[Cells], check: str, says: str) -> None:
    with pytest.raises(AssertionError, match=f"{check}: .*{says}"):
        check_handler(live_case(kind), only=[check])
