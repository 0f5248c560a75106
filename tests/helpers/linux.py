"""A Linux guest that proves on its serial console that it keeps running and that its memory is correct.

The kernel is Debian's cloud kernel, the only program busybox; `make peers` unpacks both. /init fills a file in memory.
Then it keeps printing lines with a count and a checksum of the file and all earlier lines.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from tests.helpers.peers import peers_folder
from tests.helpers.qemu import Qemu, wait_until

NUMBERS: Final = 300_000
"""Lines of the file, each with a number: 2 MB."""

INIT: Final = f"""#!/bin/busybox sh
b=/bin/busybox
$b seq 1 {NUMBERS} > /data
n=0
chain=begin
while true; do
    sum=$($b sha256sum < /data)
    chain=$(echo "$chain $n $sum" | $b sha256sum)
    echo "count $n $chain"
    n=$((n + 1))
done
"""
LINE: Final = re.compile(r"^count (\d+) ([0-9a-f]{64})  -\r?$", re.MULTILINE)
needs_linux: Final = pytest.mark.skipif(
    not (peers_folder() / "linux" / ".complete").exists(), reason="needs a Linux kernel: run 'make peers'"
)

BOOT_PATIENCE: Final = 150.0
"""Seconds to boot without hardware acceleration on a busy machine."""


@dataclass(frozen=True)
class Linux:
    """What QEMU boots."""

    kernel: Path
    initramfs: Path

    @property
    def arguments(self) -> tuple[str, ...]:
        """For both sides: the destination does not boot, but needs the same fw_cfg files."""
        line = "console=ttyS0 quiet panic=-1"
        return "-kernel", str(self.kernel), "-initrd", str(self.initramfs), "-append", line


def build_linux(folder: Path) -> Linux:
    """Write the initramfs into `folder`."""
    root = peers_folder() / "linux"
    (kernel,) = sorted((root / "boot").glob("vmlinuz-*"))[-1:]
    busybox = next(path for path in (root / "bin/busybox", root / "usr/bin/busybox") if path.exists())
    archive = b"".join(
        (
            _entry("bin", 0o40755),
            _entry("dev", 0o40755),
            _entry("dev/console", 0o20600, device=(5, 1)),
            _entry("bin/busybox", 0o100755, busybox.read_bytes()),
            _entry("init", 0o100755, INIT.encode()),
            _entry("TRAILER!!!", 0),
        )
    )
    path = folder / "initramfs"
    path.write_bytes(archive)
    return Linux(kernel, path)


def _entry(name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> bytes:
    """A file in a cpio archive of the format that Linux unpacks ("newc")."""
    encoded = name.encode() + b"\0"
    numbers = (0, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(encoded), 0)
    head = b"070701" + b"".join(b"%08X" % number for number in numbers) + encoded
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)


def counts(qemu: Qemu) -> list[tuple[int, str]]:
    """The complete lines that the guest has printed on this side: (count, checksum)."""
    return [(int(count), checksum) for count, checksum in LINE.findall(qemu.printed())]


def wait_counted(qemu: Qemu, lines: int) -> None:
    def seen() -> bool:
        assert qemu.process.poll() is None, f"QEMU ended: {qemu.output()}"
        return len(counts(qemu)) >= lines

    wait_until(seen, f"{lines} lines of the guest; it printed {qemu.printed()[-500:]!r}", BOOT_PATIENCE)


def check_counts(before: list[tuple[int, str]], after: list[tuple[int, str]]) -> None:
    """Check that the guest continued where it was: the checksums are correct and the counts continue. The line during
    which it moved may be missing, because neither side has all of it."""
    lines = before + after
    data = "".join(f"{number}\n" for number in range(1, NUMBERS + 1)).encode()
    total = f"{hashlib.sha256(data).hexdigest()}  -"
    chain, expected = "begin", {}
    for number in range(lines[-1][0] + 1):
        line = f"{chain} {number} {total}\n"
        chain = f"{hashlib.sha256(line.encode()).hexdigest()}  -"
        expected[number] = chain.removesuffix("  -")
    assert lines == [(number, expected[number]) for number, _ in lines], "a checksum is wrong"
    numbers = [number for number, _ in lines]
    assert numbers[: len(before)] == list(range(len(before)))
    assert numbers[len(before) :] == list(range(after[0][0], after[0][0] + len(after)))
    assert after[0][0] - before[-1][0] in (1, 2), f"from {before[-1][0]} to {after[0][0]}"
