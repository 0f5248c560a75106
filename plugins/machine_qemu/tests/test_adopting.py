"""The end of a device state is recognized by its bytes: at once, after a moment, or not, and never too early."""

from __future__ import annotations

import pytest
from corefw_machine_qemu import adopting
from corefw_machine_qemu.adopting import cut_device_state, cut_package, take_device_state

from corefw.errors import RemoteStreamError
from corefw.wire import items
from corefw.wire.decoder import decode
from corefw.wire.stream import MemorySource, StreamReader
from tests.golden.record import load


class Source:
    """Sends `data` in chunks, and then either ends the stream or waits for an answer."""

    def __init__(self, data: bytes, *, chunk: int = 1 << 15, ends: bool = False) -> None:
        self._data = data
        self._chunk = chunk
        self._ends = ends
        self.waits: list[float] = []

    def receive_into(self, view: memoryview, /) -> int:
        assert self._data or self._ends, "a read that would block for ever"
        part = self._data[: min(self._chunk, len(view))]
        self._data = self._data[len(part) :]
        view[: len(part)] = part
        return len(part)

    def live(self, seconds: float) -> bool:
        """Channel.wait_readable: the end of the stream is readable, too."""
        if self._data or self._ends:
            return True
        self.waits.append(seconds)
        return False


def device_state(name: str) -> bytes:
    data = load(name)
    stream = decode(StreamReader(MemorySource(data)))
    first = next(
        item.offset
        for item in stream
        if isinstance(item, items.Uncut) or (isinstance(item, items.Section) and item.header.idstr != "ram")
    )
    return data[first:]


FOOTERS = {"pc": True, "pc-no-description": True, "pc-no-footers": False, "pc-bare": False, "pc-devices": True}


@pytest.mark.parametrize("chunk", [97, 1 << 15])
@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("name", FOOTERS)
def test_everything_is_taken(name: str, ends: bool, chunk: int) -> None:
    data = device_state(name)
    source = Source(data, chunk=chunk, ends=ends)
    reader = StreamReader(source)
    state = take_device_state(reader, FOOTERS[name], source.live)
    assert b"".join(state.pieces) + state.end == data
    assert reader.offset == len(data)
    if name == "pc-bare":
        assert (state.pieces, state.end) == ((data[:-1],), b"\0")
        assert not state.devices
    else:
        assert [len(piece) for piece in state.pieces] == [device.size for device in state.devices]
        assert state.devices[-1].name == "globalstate"


@pytest.mark.parametrize("name", ["pc", "pc-no-footers", "pc-devices"])
def test_a_description_ends_the_wait_at_once(name: str) -> None:
    source = Source(device_state(name))
    take_device_state(StreamReader(source), FOOTERS[name], source.live)
    assert source.waits == []


@pytest.mark.parametrize(
    ("name", "seconds"), [("pc-no-description", adopting.QUIET_WITH_FOOTERS), ("pc-bare", adopting.QUIET_WITHOUT)]
)
def test_without_a_description_silence_ends_the_wait(name: str, seconds: float) -> None:
    source = Source(device_state(name))
    take_device_state(StreamReader(source), FOOTERS[name], source.live)
    assert source.waits == [seconds]


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("name", ["pc", "pc-no-description", "pc-no-footers"])
def test_a_part_is_never_taken_for_the_whole(name: str, ends: bool) -> None:
    data = device_state(name)
    eof = data.rindex(b"\0\6") if "no-description" not in name else len(data) - 1
    for length in [*range(1, len(data) - 1, max(1, len(data) // 200)), eof, len(data) - 1]:
        # A stream that stops after EOF has lost only its description; without footers that cannot be known.
        if length == eof + 1 or (name == "pc-no-footers" and data[length - 1] == 0):
            continue
        source = Source(data[:length], ends=ends)
        reader = StreamReader(source)
        with pytest.raises(RemoteStreamError) as caught:
            take_device_state(reader, FOOTERS[name], source.live)
        assert caught.value.offset <= length
        assert source.waits in ([], [adopting.STALLED], [adopting.QUIET_WITH_FOOTERS, adopting.STALLED])


class Pausing(Source):
    """A source that pauses once."""

    def __init__(self, data: bytes, pause: int) -> None:
        super().__init__(data)
        self._later = data[pause:]
        self._data = data[:pause]

    def live(self, seconds: float) -> bool:
        if not super().live(seconds) and len(self.waits) > 1:
            self._data, self._later = self._later, b""
        return bool(self._data)


def test_a_pause_where_the_bytes_look_like_an_end_is_none() -> None:
    """0x7e, any four bytes and a zero in the middle of a section look like a footer and EOF."""
    data = b"\4\0\0\0\2\3clk\0\0\0\0\0\0\0\1" + b"abc\x7e\1\2\3\4\0def" + b"\x7e\0\0\0\2" + b"\0"
    source = Pausing(data, data.index(b"def"))
    state = take_device_state(StreamReader(source), True, source.live)
    assert b"".join(state.pieces) + state.end == data
    assert source.waits[:2] == [adopting.QUIET_WITH_FOOTERS, adopting.STALLED]


def test_a_stream_whose_description_is_lost_is_whole() -> None:
    data = device_state("pc")
    whole = data[: data.rindex(b"\0\6") + 1]
    state = cut_device_state(whole, 0, footers=True)
    assert state.devices == cut_device_state(data, 0, footers=True).devices


def test_offsets_in_errors_count_from_the_streams_beginning() -> None:
    data = bytearray(device_state("pc"))
    at = data.index(b"\x7e\0\0\0\0")
    data[at] = 0
    with pytest.raises(RemoteStreamError) as caught:
        cut_device_state(bytes(data), 1000, footers=True)
    assert 1000 < caught.value.offset <= 1000 + at


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adopting, "MAX_DEVICE_STATE", 1 << 16)
    monkeypatch.setattr(adopting, "MAX_DESCRIPTION", 1 << 16)
    source = Source(b"\4" + b"x" * (1 << 20))
    with pytest.raises(RemoteStreamError, match="at most 0 MiB of device state"):
        take_device_state(StreamReader(source), True, source.live)


def test_what_is_no_device_section_cannot_be_kept() -> None:
    """A command cannot be kept: sent again, it would have another meaning."""
    with pytest.raises(RemoteStreamError, match="device sections"):
        cut_device_state(b"\x08\0\2\0\4\0\0\0\1\0", 0, footers=True)


# -- the package of a postcopy -----------------------------------------------------------------------------------------


def packaged() -> bytes:
    """The device sections of a real QEMU's package, between LISTEN and PING 3."""
    for item in decode(StreamReader(MemorySource(load("pc-postcopy")))):
        if isinstance(item, items.Package):
            return item.data[5:-14]
    raise AssertionError("no package")


def test_the_sections_of_a_package_are_told_apart() -> None:
    data = packaged()
    state = cut_package(data, footers=True)
    assert (b"".join(state.pieces), state.end) == (data, b"")
    assert {"timer", "cpu", "globalstate"} <= {device.name for device in state.devices}
    assert cut_package(data, footers=False).pieces == (data,)


def test_a_part_of_a_package_is_refused() -> None:
    data = packaged()
    for length in range(1, len(data), 101):
        with pytest.raises(RemoteStreamError):
            cut_package(data[:length], footers=True)
