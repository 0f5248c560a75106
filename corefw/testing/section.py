"""The contract kit for sections: checks that a saver and a loader keep the contract of corefw.section.

    from corefw.testing.section import CHECKS, SectionCase, check_section

    CASE = SectionCase(
        saver=lambda: MySaver(some_state()), loader=lambda: MyLoader(empty_state()), state=lambda section: section.state
    )

    @pytest.mark.parametrize("check", CHECKS)
    def test_contract(check):
        check_section(CASE, only=[check])

Each check states one promise of the interface, sends the section for real, and fails with an AssertionError that says
in one line what was promised and what happened. No descriptor, process or thread may be left behind. The kit needs no
test framework and no machine.
"""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Collection, Mapping
from typing import Any, Final

from corefw.errors import RemoteStreamError, StreamError
from corefw.section import Coverage, LiveLoader, LiveSaver, SectionKey, StateLoader, StateSaver
from corefw.testing.kit import Kit
from corefw.testing.recording import (
    FOOTER,
    Outcome,
    Pieces,
    Recording,
    SectionCase,
    loading_error,
    opened,
    record,
    replay,
    tell,
    written,
)
from corefw.testing.tasks import described
from corefw.wire.stream import StreamReader

__all__ = ["CHECKS", "SectionCase", "check_section"]

_KIT: Final[Kit[SectionCase]] = Kit()
CHECKS: Final = _KIT.checks
"""Every check by name, in the order in which they run."""


def check_section(case: SectionCase, *, only: Collection[str] | None = None) -> list[str]:
    """Run every check (or `only` these); the names of those that were run.

    Raises AssertionError for the first promise that is broken.
    """
    return _KIT.run(case, only)


# -- what it says of itself ----------------------------------------------------------------------------------------


@_KIT.check
def _identity(case: SectionCase) -> None:
    """Both sides have the same key, which fits into a header, and versions that fit each other."""
    with opened(case, case.saver) as (saver, _), opened(case, case.loader) as (loader, _):
        live, state = isinstance(saver, LiveSaver), isinstance(saver, StateSaver)
        assert live or state, f"{saver!r} is not a LiveSaver or StateSaver"
        wanted = LiveLoader if live else StateLoader
        assert isinstance(loader, wanted), f"{loader!r} is not a {wanted.__name__}, as what it loads asks for"
        for section in (saver, loader):
            length = len(section.idstr.encode())
            assert 1 <= length <= 255, f"idstr has 1 to 255 bytes, this one has {length}"
            assert 0 <= section.instance_id < 1 << 32, f"instance_id {section.instance_id} does not fit into 32 bits"
        assert isinstance(saver.priority, int), f"priority is {saver.priority!r}, expected a number"
        low, high = loader.minimum_version, loader.version_id
        assert 0 <= low <= high < 1 << 32, f"it reads versions from {low} but is of version {high}"
        assert isinstance(loader.required(), bool), "required() has to be True or False"
        assert saver.key == loader.key, f"the source sends {saver.key}, the destination loads {loader.key}"
        sent = saver.version_id
        assert low <= sent <= high, f"the source sends version {sent}, the destination loads {low} to {high}"


@_KIT.check
def _coverage(case: SectionCase) -> None:
    """covers() names RAM blocks by idstr and devices by SectionKey, the same devices on both sides."""
    with opened(case, case.saver) as (saver, _), opened(case, case.loader) as (loader, _):
        sent, loaded = saver.covers(), loader.covers()
        for coverage in (sent, loaded):
            assert isinstance(coverage, Coverage), f"covers() gave {coverage!r}, expected a Coverage"
            for idstr in coverage.ram_blocks:
                assert isinstance(idstr, str), f"covers().ram_blocks has {idstr!r}, expected a block's idstr"
            for key in coverage.devices:
                assert isinstance(key, SectionKey), f"covers().devices has {key!r}, expected a SectionKey"
        lost = sorted(sent.devices - loaded.devices)
        assert not lost, f"the source sends device {lost[0]}, which the destination does not cover"
        if not loaded.new_ram_blocks:
            blocks = sorted(sent.ram_blocks - loaded.ram_blocks)
            assert not blocks, f"the source sends RAM block '{blocks[0]}', which the destination does not cover"


@_KIT.check
def _description(case: SectionCase) -> None:
    """A StateSaver's describe() is JSON, and assigns every byte that save() wrote to a field."""
    recording = record(case)
    if recording.description is None:
        return
    described, body = recording.description, recording.bodies[0]
    json.dumps(described, allow_nan=False)
    size = _measure(described, "describe()")
    assert size == len(body.data), f"describe() accounts for {size} bytes of {body}"


def _measure(described: dict[str, Any], where: str) -> int:
    """Check every entry of a table's description; return how many bytes it accounts for."""
    for key, kind in (("vmsd_name", str), ("version", int), ("fields", list)):
        assert isinstance(described.get(key), kind), f"{where} has no '{key}' that is a {kind.__name__}"
    size = sum(_measure_field(one, f"{where}['fields'][{i}]") for i, one in enumerate(described["fields"]))
    for i, sub in enumerate(described.get("subsections", ())):
        size += _measure(sub, f"{where}['subsections'][{i}]") + len(f"tn{sub['vmsd_name']}vers".encode())
    return size


def _measure_field(entry: dict[str, Any], where: str) -> int:
    for key, kind in (("name", str), ("type", str), ("size", int)):
        assert isinstance(entry.get(key), kind), f"{where} has no '{key}' that is a {kind.__name__}"
    if "struct" in entry:
        inner = _measure(entry["struct"], f"{where}['struct']")
        assert inner == entry["size"], f"{where} has size {entry['size']}, but the fields in it {inner}"
    return int(entry["size"]) * int(entry.get("array_len", 1))


# -- what is sent and what is loaded -------------------------------------------------------------------------------


@_KIT.check
def _round_trip(case: SectionCase) -> None:
    """The destination ends up with the source's state. Each load() reads exactly its body, pending_exact() reaches zero
    and agrees with pending_estimate(), and complete() leaves nothing."""
    _compare(case, record(case), piece=1 << 20)


@_KIT.check
def _pieces(case: SectionCase) -> None:
    """The round trip also works if the bytes arrive in other portions than they were sent in."""
    recording = record(case)
    for piece in (1, 3, 4095):
        if recording.size < 4096 * piece:
            _compare(case, recording, piece=piece)


def _compare(case: SectionCase, recording: Recording, piece: int) -> None:
    found = replay(case, recording, [body.data for body in recording.bodies], piece=piece)
    body = recording.bodies[found.body]
    assert found.error is None, f"load() of {body} failed: {described(found.error)}"
    assert found.taken == len(body.data), f"load() read {found.taken} bytes of {body}"
    same = found.state == recording.state
    assert isinstance(same, bool), "the case's `state` has to give something that == compares, no array"
    assert same, f"the destination has another state than the source: {_cut(found.state)}, not {_cut(recording.state)}"


# -- hostile input -------------------------------------------------------------------------------------------------


@_KIT.check
def _truncated(case: SectionCase) -> None:
    """A stream that ends at any byte of a body raises RemoteStreamError: a short read is never taken for zeros, no
    other exception escapes, nothing hangs."""
    recording = record(case)
    for number, at in _places(case, recording):
        bodies = [body.data for body in recording.bodies[: number + 1]]
        bodies[number] = bodies[number][:at]
        error = replay(case, recording, bodies).error
        what = f"{recording.bodies[number]}, cut after {at}"
        assert isinstance(error, RemoteStreamError), f"{what}: expected RemoteStreamError, got {described(error)}"


@_KIT.check
def _damaged(case: SectionCase) -> None:
    """A stream with any byte changed either loads, if the change cannot be detected, or raises StreamError; either way
    it takes a bounded amount of memory."""
    recording = record(case)
    limit = case.memory + 4 * recording.size
    started = not tracemalloc.is_tracing()
    if started:
        tracemalloc.start()
    try:
        for number, at in _places(case, recording):
            for change in (0xFF, 1 << at % 8):
                bodies = [body.data for body in recording.bodies]
                bodies[number] = _changed(bodies[number], at, change)
                tracemalloc.reset_peak()
                before, _ = tracemalloc.get_traced_memory()
                error = replay(case, recording, bodies).error
                taken = tracemalloc.get_traced_memory()[1] - before
                what = f"{recording.bodies[number]}, byte {at} xor 0x{change:02x}"
                right = error is None or isinstance(error, StreamError)
                assert right, f"{what}: expected a StreamError or a load, got {described(error)}"
                assert taken < limit, f"{what}: load() took {taken} bytes of memory, expected at most {limit}"
    finally:
        if started:
            tracemalloc.stop()


@_KIT.check
def _newer_version(case: SectionCase) -> None:
    """A version newer than the loader's raises StreamError. The engine refuses it too, but load() must not guess a
    format that it does not know."""
    recording = record(case)
    with opened(case, case.loader) as (loader, context):
        reader = StreamReader(Pieces(recording.bodies[0].data + FOOTER), where=f"section {loader.key}")
        loader.setup(context)
        version = loader.version_id + 1
        error = loading_error(loader, reader, version)
        loader.cleanup()
        assert isinstance(error, StreamError), (
            f"load() of version {version}: expected StreamError, got {described(error)}"
        )


# -- the end, however it comes -------------------------------------------------------------------------------------


@_KIT.check
def _cleanup(case: SectionCase) -> None:
    """cleanup() succeeds before setup(), in the middle of a migration, and twice."""
    with opened(case, case.loader) as (loader, context):
        loader.cleanup()
        loader.setup(context)
        loader.cleanup()
        loader.cleanup()
    with opened(case, case.saver) as (saver, context):
        if not isinstance(saver, LiveSaver):
            return
        saver.cleanup()
        thrown_away = Recording(saver.version_id)
        written(thrown_away, "START", lambda writer: saver.setup(writer, context))
        written(thrown_away, "PART", lambda writer: saver.iterate(writer, case.budget))
        saver.cleanup()
        saver.cleanup()


@_KIT.check
def _outcome(case: SectionCase) -> None:
    """committed() and abandoned() succeed after cleanup(), also if the section was not sent; abandoned() also if the
    migration failed in the middle of it."""
    recording = record(case, outcome="committed")
    record(case, outcome="abandoned")
    bodies = [body.data for body in recording.bodies]
    for came in (bodies, []):
        replay(case, recording, came, outcome="committed")
    for came in (bodies, [], [bodies[0][:-1]]):
        replay(case, recording, came, outcome="abandoned")
    _end_before_the_first_pass(case, "committed")
    _end_before_the_first_pass(case, "abandoned")


def _end_before_the_first_pass(case: SectionCase, outcome: Outcome) -> None:
    with opened(case, case.saver) as (saver, context):
        if isinstance(saver, LiveSaver):
            written(Recording(saver.version_id), "START", lambda writer: saver.setup(writer, context))
            saver.cleanup()
        tell(saver, outcome)


@_KIT.check
def _statistics(case: SectionCase) -> None:
    """statistics() returns JSON values by name, even before setup()."""
    with opened(case, case.saver) as (saver, _), opened(case, case.loader) as (loader, _):
        for section in (saver, loader):
            figures = section.statistics()
            assert isinstance(figures, Mapping), f"statistics() gave {figures!r}, expected a mapping"
            try:
                json.dumps(dict(figures), allow_nan=False)
            except (TypeError, ValueError):
                raise AssertionError(f"statistics() gave {figures!r}, which is not JSON") from None


# -- helpers -------------------------------------------------------------------------------------------------------


def _places(case: SectionCase, recording: Recording) -> list[tuple[int, int]]:
    """Places as (number of the body, offset in it): every byte of a small stream; the beginnings and ends of bodies and
    some places in between for a large one, the same each time."""
    sizes = [len(body.data) for body in recording.bodies]
    edge = case.samples // (4 * len(sizes)) + 1
    step = 1 if recording.size <= case.samples else 2 * recording.size // case.samples
    places: list[tuple[int, int]] = []
    for number, size in enumerate(sizes):
        ends = (*range(min(edge, size)), *range(max(0, size - edge), size))
        places += [(number, at) for at in sorted({*ends, *range(0, size, step)})]
    return places[:: -(-len(places) // case.samples) or 1]


def _changed(data: bytes, at: int, change: int) -> bytes:
    return data[:at] + bytes([data[at] ^ change]) + data[at + 1 :]


def _cut(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
