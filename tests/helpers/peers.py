"""QEMUs of several versions: those that `make peers` has unpacked, and the one on the PATH.

tests/peers.sh unpacks Debian packages below a folder and installs nothing, so a peer is started with its own dynamic
linker, libraries, modules and firmware. It sees the same file system as any other program.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Final

import pytest

PROGRAM: Final = "qemu-system-x86_64"
RELEASES: Final[Mapping[str, str]] = {"5.2": "bullseye", "7.2": "bookworm", "10.0": "trixie", "newest": "newest"}
"""The label of a version in tests -> its folder below the peers' folder."""

MISSING: Final = "needs QEMU {version}: run 'make peers'"


@dataclass(frozen=True)
class Peer:
    """How to start a QEMU. `label` is a key of RELEASES or "PATH"; `version` is what the program reports."""

    label: str
    version: tuple[int, int]
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"QEMU {self.version[0]}.{self.version[1]}"


def peers_folder() -> Path:
    """The folder of the peers, determined as tests/peers.sh does."""
    cache_folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("MIGFW_PEERS") or cache_folder / "migfw" / "peers")


@cache
def find_peer(label: str) -> Peer | None:
    """The QEMU with this label, or None. The one on the PATH is also found by the label of its version."""
    if label == "PATH":
        return _peer_on_path()
    unpacked = _unpacked_peer(label)
    if unpacked is not None:
        return unpacked
    own = _peer_on_path()
    return own if own is not None and f"{own.version[0]}.{own.version[1]}" == label else None


def the_peer(label: str) -> Peer:
    """Find the QEMU with this label, or skip the test if it is missing."""
    found = find_peer(label)
    assert found is not None, f"no QEMU {label}: the test lacks peer_parameters() or needs_peers()"
    return found


_default = "PATH"


def default_peer() -> Peer | None:
    """The QEMU for tests that name none: the one on the PATH, or else the peer 7.2. `using_peer` changes it."""
    return find_peer(_default) or find_peer("7.2")


@contextlib.contextmanager
def using_peer(label: str) -> Iterator[None]:
    """Make this QEMU the default."""
    global _default
    before, _default = _default, label
    try:
        yield
    finally:
        _default = before


def peer_parameters(*labels: str) -> list[object]:
    """Parameters for pytest, one for each label. Those without a QEMU are skipped, and name `make peers`."""
    return [
        pytest.param(
            label,
            id=label,
            marks=pytest.mark.skipif(find_peer(label) is None, reason=MISSING.format(version=label)),
        )
        for label in labels
    ]


def needs_peers(*labels: str) -> pytest.MarkDecorator:
    """Skip a test unless these versions are installed."""
    missing = [label for label in labels if find_peer(label) is None]
    return pytest.mark.skipif(bool(missing), reason=MISSING.format(version=", ".join(missing)))


def _peer_on_path() -> Peer | None:
    program = shutil.which(PROGRAM)
    return None if program is None else Peer("PATH", _version((program,), {}), (program,))


def _unpacked_peer(label: str) -> Peer | None:
    root = peers_folder() / RELEASES[label]
    if not (root / ".complete").exists():
        return None
    libraries = [root / folder / "x86_64-linux-gnu" for folder in ("lib", "usr/lib") if (root / folder).exists()]
    linker = next(path / "ld-linux-x86-64.so.2" for path in libraries if (path / "ld-linux-x86-64.so.2").exists())
    firmware = [root / "usr" / folder for folder in ("share/qemu", "share/seabios", "lib/ipxe/qemu")]
    start = (str(linker), "--library-path", ":".join(map(str, libraries)), str(root / "usr/bin" / PROGRAM))
    environment = {"QEMU_MODULE_DIR": str(root / "usr/lib/x86_64-linux-gnu/qemu")}
    search = [part for folder in firmware if folder.exists() for part in ("-L", str(folder))]
    return Peer(label, _version(start, environment), (*start, *search), environment)


def _version(command: tuple[str, ...], environment: Mapping[str, str]) -> tuple[int, int]:
    text = subprocess.run(
        [*command, "--version"], env=os.environ | environment, check=True, capture_output=True, text=True
    ).stdout
    found = re.search(r"version (\d+)\.(\d+)", text)
    assert found is not None, f"no version in {text!r}"
    return int(found[1]), int(found[2])
