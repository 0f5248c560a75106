"""Record the golden streams from a real QEMU: python tests/golden/record.py, in the repository's root.

Invariant: a stream here is what QEMU sent, byte for byte, compressed with gzip. RECORDINGS says how each was made;
a test reads its names from there. The machines have next to no RAM and rom.asm for firmware, so a stream takes a few
kilobytes.
"""

from __future__ import annotations

import gzip
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.helpers.qemu import Qemu, temporary_folder, wait_until

HERE: Final = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Recording:
    """How one stream was recorded.

    arguments       more of QEMU's arguments
    capabilities    of the migration
    both_ends       a second QEMU receives the stream, for the return path; the stream is copied on its way
    passes          the guest runs and writes until there were that many passes; 0: it is paused
    postcopy        the migration switches to postcopy while pages are missing
    bitmaps         a dirty bitmap to add: node, name, granularity, and what follows in block-dirty-bitmap-add
    writes          what the monitor's qemu-io does to a node: ("disk", "write 0 64k")
    """

    machine: str = "pc"
    memory: str = "1M"
    arguments: tuple[str, ...] = ()
    capabilities: tuple[str, ...] = ()
    both_ends: bool = False
    passes: int = 0
    postcopy: bool = False
    bitmaps: tuple[tuple[str, str, int, dict[str, bool]], ...] = ()
    writes: tuple[tuple[str, str], ...] = ()


NO_CONFIGURATION: Final = ("-global", "migration.send-configuration=off")
NO_FOOTERS: Final = ("-global", "migration.send-section-footer=off")
UUID: Final = "00112233-4455-6677-8899-aabbccddeeff"
NO_DESCRIPTION: Final = ",suppress-vmdesc=on"
DEVICES: Final = (
    # romfile= keeps the cards' firmware out of the stream
    *("-device", "VGA,vgamem_mb=1,romfile=", "-device", "e1000,romfile=", "-device", "virtio-net-pci,romfile="),
    *(
        "-device",
        "piix3-usb-uhci",
        "-device",
        "usb-tablet",
        "-device",
        "virtio-serial-pci",
        "-device",
        "virtio-rng-pci",
    ),
    *(
        "-device",
        "AC97,audiodev=a",
        "-audiodev",
        "none,id=a",
        "-device",
        "lsi53c895a",
        "-device",
        "pci-bridge,chassis_nr=1",
    ),
    *("-device", "virtio-blk-pci,drive=d", "-drive", "if=none,id=d,driver=null-co"),
)

DISKS: Final = (
    *("-blockdev", "driver=null-co,node-name=disk,size=10000000"),
    *("-drive", "if=none,id=drive,driver=null-co,size=1048576"),
)

RECORDINGS: Final[dict[str, Recording]] = {
    "pc": Recording(),
    "pc-no-configuration": Recording(arguments=NO_CONFIGURATION),
    "pc-no-footers": Recording(arguments=NO_FOOTERS),
    "pc-no-description": Recording("pc" + NO_DESCRIPTION),
    "pc-footers-only": Recording("pc" + NO_DESCRIPTION, arguments=NO_CONFIGURATION),
    "pc-bare": Recording("pc" + NO_DESCRIPTION, arguments=(*NO_CONFIGURATION, *NO_FOOTERS)),
    "pc-description-only": Recording(arguments=(*NO_CONFIGURATION, *NO_FOOTERS)),
    "pc-devices": Recording(arguments=DEVICES),
    "pc-passes": Recording(passes=4),
    "pc-compress": Recording(capabilities=("compress",), passes=1),
    "pc-xbzrle": Recording(capabilities=("xbzrle",), passes=5),
    "pc-uuid": Recording(arguments=("-uuid", UUID), capabilities=("validate-uuid",)),
    "pc-return-path": Recording(capabilities=("return-path",), both_ends=True),
    "pc-postcopy": Recording(capabilities=("postcopy-ram",), both_ends=True, passes=1, postcopy=True),
    "pc-bitmaps": Recording(
        arguments=DISKS,
        capabilities=("dirty-bitmaps",),
        bitmaps=(
            ("disk", "coarse", 65536, {}),
            ("disk", "fine", 512, {}),
            ("disk", "off", 4096, {"disabled": True}),
            ("drive", "empty", 4096, {}),
        ),
        writes=(("disk", "write 1M 128k"), ("disk", "write 9999360 512")),
    ),
    "isapc": Recording("isapc"),
    "microvm": Recording("microvm"),
    "q35": Recording("q35", "2M"),
}


def record(recording: Recording, rom: Path) -> bytes:
    """Run QEMU and return the stream that it sends."""
    common = ("-bios", str(rom), *recording.arguments)
    machine, memory = recording.machine, recording.memory
    paused = not recording.passes
    with temporary_folder() as folder, Qemu(*common, machine=machine, memory=memory, paused=paused) as source:
        source.capabilities(*recording.capabilities)
        for node, name, granularity, more in recording.bitmaps:
            source.command("block-dirty-bitmap-add", node=node, name=name, granularity=granularity, **more)
        for node, write in recording.writes:
            source.command("human-monitor-command", command_line=f'qemu-io {node} "{write}"')
        if recording.passes:
            source.wait_printed("A")
        if recording.both_ends:
            inlet, outlet = folder / "in", folder / "out"
            with Qemu(*common, machine=machine, memory=memory, incoming="defer") as destination:
                destination.capabilities(*recording.capabilities)
                destination.command("migrate-incoming", uri=f"unix:{outlet}")
                with Copy(inlet, outlet) as copy:
                    _migrate(source, f"unix:{inlet}", recording)
                return bytes(copy.data)
        path = folder / "stream"
        _migrate(source, f"exec:cat > {path}", recording)
        return path.read_bytes()


def _migrate(source: Qemu, uri: str, recording: Recording) -> None:
    if recording.bitmaps:
        source.migrate(uri, bandwidth=256 << 10)  # with bitmaps QEMU sends passes until it has measured the bandwidth
    elif not recording.passes:
        source.migrate(uri)
    else:
        # At this rate the guest dirties its 16 pages faster than they go, and they do not fit into a downtime of 1 ms.
        source.command("migrate-set-parameters", downtime_limit=1)
        source.migrate(uri, bandwidth=128 << 10)
        wait_until(lambda: _passed(source, recording.passes), f"{recording.passes} passes")
        if recording.postcopy:
            source.command("migrate-start-postcopy")
        else:
            source.command("migrate-set-parameters", downtime_limit=2000)
    source.wait_migrated()


def _passed(source: Qemu, passes: int) -> bool:
    answer = source.command("query-migrate")
    done = answer.get("ram", {}).get("dirty-sync-count", 0) >= passes
    assert done or answer["status"] in ("setup", "active"), f"it ended without its passes, try again: {answer}"
    return bool(done)


class Copy:
    """Forwards both directions between two QEMUs, and keeps a copy of the stream."""

    def __init__(self, inlet: Path, outlet: Path) -> None:
        self.data = bytearray()
        self._outlet = outlet
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(inlet))
        self._listener.listen()
        self._threads = [threading.Thread(target=self._run)]

    def __enter__(self) -> Copy:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def _run(self) -> None:
        source, _ = self._listener.accept()
        with source, socket.socket(socket.AF_UNIX) as destination:
            destination.connect(str(self._outlet))
            back = threading.Thread(target=_pump, args=(destination, source, lambda _: None))
            back.start()
            _pump(source, destination, self.data.extend)
            back.join()


def _pump(source: socket.socket, sink: socket.socket, keep: Callable[[bytes], None]) -> None:
    try:
        while data := source.recv(1 << 16):
            keep(data)
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # one of the QEMUs has ended its side: what was to be kept is kept


def main(names: list[str]) -> None:
    if not shutil.which("nasm"):
        sys.exit("record.py needs nasm (apt-get install nasm)")
    with temporary_folder() as folder:
        rom = folder / "rom.bin"
        subprocess.run(["nasm", "-f", "bin", HERE / "rom.asm", "-o", rom], check=True)
        for name in names or RECORDINGS:
            data = record(RECORDINGS[name], rom)
            packed = gzip.compress(data, 9, mtime=0)
            (HERE / f"{name}.gz").write_bytes(packed)
            sys.stdout.write(f"{name}: {len(data)} bytes, compressed {len(packed)}\n")


def load(name: str) -> bytes:
    """A recorded stream."""
    return gzip.decompress((HERE / f"{name}.gz").read_bytes())


if __name__ == "__main__":
    main(sys.argv[1:])
