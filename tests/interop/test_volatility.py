"""volatility3, a tool for memory forensics, reads the RAM of a parked machine from a file that migfw stored.

Its reader of QEMU's streams has limits of its own, which docs/qemu.md lists: it stops at the first device whose state
begins with a zero byte, and fails where another comes first, as from QEMU 11 on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.cli import migfw
from tests.helpers.parking import park, parking, send
from tests.helpers.peers import find_peer, needs_peers, peer_parameters
from tests.helpers.qemu import Guest, Qemu, assemble, needs_qemu

WANTED = "needs volatility3 (pip install -r requirements-dev.txt)"
contexts = pytest.importorskip("volatility3.framework.contexts", reason=WANTED)
exceptions = pytest.importorskip("volatility3.framework.exceptions", reason=WANTED)
physical = pytest.importorskip("volatility3.framework.layers.physical", reason=WANTED)
qemu = pytest.importorskip("volatility3.framework.layers.qemu", reason=WANTED)

pytestmark = [pytest.mark.qemu, needs_qemu]


@pytest.fixture(scope="session")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Guest:
    return assemble(tmp_path_factory.mktemp("guest"), end=0x400000)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """The machine's physical memory, as volatility3 finds it in a stream."""
    context = contexts.Context()
    context.config["file.location"] = path.as_uri()
    file = physical.FileLayer(context, "file", "file")
    context.add_layer(file)
    context.config["qemu.base_layer"] = "file"
    try:
        yield qemu.QemuSuspendLayer(context, "qemu", "qemu")
    finally:
        file.destroy()


def store(guest: Guest, machine: str, label: str, path: Path) -> bytes:
    """Park a guest that runs in a QEMU, and store it; return its RAM."""
    with Qemu(boot=guest.image, machine=machine, memory="8M", peer=find_peer(label)) as source, parking() as engine:
        source.wait_printed("B")
        park(source, engine, f"unix:{path.parent}/in")
        (ram,) = [bytes(block.view) for block in engine.machine.ram_blocks() if block.idstr == "pc.ram"]
        send(engine, f"file:{path}")
    return ram


@pytest.mark.parametrize("label", peer_parameters("7.2", "10.0"))
def test_all_pages_are_found(label: str, guest: Guest, folder: Path) -> None:
    ram = store(guest, "pc-i440fx-7.2" if label == "7.2" else "pc-q35-7.2", label, folder / "stream")
    with opened(folder / "stream") as layer:
        assert layer.maximum_address == len(ram) - 1
        assert layer.read(0, len(ram)) == ram


@needs_peers("10.0")
def test_a_stream_with_switchover_start_is_converted_first(guest: Guest, folder: Path) -> None:
    """volatility3's reader knows no commands. Once it does, remove this test and the line in docs/qemu.md."""
    ram = store(guest, "pc-i440fx-10.0", "10.0", folder / "stream")
    with pytest.raises(exceptions.LayerException, match="unknown section"), opened(folder / "stream"):
        pass
    done = migfw("convert", f"{folder}/stream", f"{folder}/converted", "--machine", "pc-i440fx-9.2")
    assert done.returncode == 0, done.stderr
    with opened(folder / "converted") as layer:
        assert layer.read(0, len(ram)) == ram
