"""A real QEMU as the peer of a test, and a guest whose memory proves that a migration lost nothing.

QEMUs and their files are removed at the end of the test that started them. Waits are bounded, and name what they waited
for.

    with Qemu(boot=guest.image) as source:
        source.wait_printed("B")
        source.command("migrate", uri="unix:/tmp/x")
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.helpers.peers import PROGRAM, Peer, default_peer

SOURCE: Final = Path(__file__).with_name("guest.asm")
BASE: Final = 0x100000
SEED: Final = 0x12345678
PAGE: Final = 4096
PATIENCE: Final = 60.0
"""Seconds until a wait gives up: far more than needed, even on a busy machine."""

needs_qemu: Final = pytest.mark.skipif(
    default_peer() is None or not shutil.which("nasm"),
    reason=f"needs {PROGRAM} and nasm (apt-get install qemu-system-x86 nasm)",
)


class QmpError(Exception):
    """QEMU's error answer to a command."""


class Qemu:
    """A QEMU process with `-nodefaults`, a QMP socket, and the guest's serial port as a file.

    `incoming` is a URI or "defer"; `boot` a raw image of a disk; `extra` more arguments; `within` a command that
    runs it; `peer` says which QEMU; with `out_of_band`, urgent() may be called.
    """

    def __init__(
        self,
        *extra: str,
        boot: Path | None = None,
        machine: str = "pc",
        memory: str = "32M",
        incoming: str | None = None,
        paused: bool = False,
        out_of_band: bool = False,
        pass_fds: Sequence[int] = (),
        within: Sequence[str] = (),
        peer: Peer | None = None,
    ) -> None:
        peer = peer or default_peer()
        assert peer is not None, f"no {PROGRAM}"
        self.folder = Path(tempfile.mkdtemp(prefix="migfw-qemu-", dir="/tmp"))
        self.serial = self.folder / "serial"
        self.serial.touch()
        self.events: list[dict[str, Any]] = []
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(PATIENCE)
        self._log = (self.folder / "log").open("w+b")
        drive = f"file={boot},format=raw,if=none,id=boot,snapshot=on"
        disk = ["-drive", drive, "-device", "ide-hd,drive=boot,bootindex=0"] if boot else []
        waiting = ["-incoming", incoming] if incoming else []
        self.process = subprocess.Popen(
            [
                *within,
                *(*peer.command, "-accel", "tcg", "-M", machine, "-m", memory, "-display", "none", "-nodefaults"),
                *("-serial", f"file:{self.serial}", "-qmp", f"unix:{self.folder}/qmp,server=on,wait=off"),
                *(["-S"] if paused else []),
                *(*disk, *waiting, *extra),
            ],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            pass_fds=pass_fds,
            env=os.environ | peer.environment,
        )
        try:
            self._negotiate(["oob"] if out_of_band else [])
        except BaseException:
            self.close()
            raise

    def _negotiate(self, enable: Sequence[str]) -> None:
        def connected() -> bool:
            assert self.process.poll() is None, f"{PROGRAM} ended: {self.output()}"
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                self._socket.connect(f"{self.folder}/qmp")
                return True
            return False

        wait_until(connected, "QEMU's QMP socket")
        self._lines = self._socket.makefile("rb")
        self._next()  # the greeting
        self.command("qmp_capabilities", enable=list(enable))

    def _next(self) -> dict[str, Any]:
        line = b""
        with contextlib.suppress(ConnectionError):  # what a QEMU that ends has not read resets the connection
            line = self._lines.readline()
        assert line, f"{PROGRAM} ended: {self.output()}"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def command(self, execute: str, /, *, fd: int | None = None, **arguments: object) -> Any:
        """Execute a QMP command and return its result. "_" in a keyword stands for "-". Raises QmpError."""
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        return self._exchange({"execute": execute, "arguments": named}, fd)

    def urgent(self, execute: str, /, **arguments: object) -> Any:
        """Execute a command out of band, because QEMU's main loop may be waiting for a page of the guest."""
        return self._exchange({"exec-oob": execute, "id": execute, "arguments": arguments}, None)

    def _exchange(self, request: dict[str, Any], fd: int | None) -> Any:
        data = json.dumps(request).encode()
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))] if fd is not None else []
        with contextlib.suppress(ConnectionError):  # _next() says that QEMU has ended
            self._socket.sendmsg([data], ancillary)
        while True:
            answer = self._next()
            if "event" in answer:
                self.events.append(answer)
            elif "error" in answer:
                raise QmpError(answer["error"]["desc"])
            elif "return" in answer:
                return answer["return"]
            # Anything else is a greeting again: QEMU may repeat it to a client that connects while it starts.

    def capabilities(self, *names: str) -> None:
        self.command("migrate-set-capabilities", capabilities=[{"capability": name, "state": True} for name in names])

    def migrate(self, uri: str, *, bandwidth: int = 1 << 40) -> None:
        """Start a migration, without a bandwidth limit unless given."""
        self.command("migrate-set-parameters", max_bandwidth=bandwidth)
        self.command("migrate", uri=uri)

    def listen(self) -> str:
        """Make a QEMU started with `incoming="defer"` listen on a free TCP port. Returns the URI to dial."""
        self.command("migrate-incoming", uri="tcp:127.0.0.1:0")
        (listening,) = self._addresses()
        return listening

    def listen_again(self) -> str:
        """Make a QEMU whose postcopy is paused listen on another TCP port; needs `out_of_band`. Returns the URI."""
        before = self._addresses()  # QEMU 5.2 still lists it afterwards
        self.urgent("migrate-recover", uri="tcp:127.0.0.1:0")
        (listening,) = self._addresses() - before
        return listening

    def _addresses(self) -> set[str]:
        listening = self.command("query-migrate").get("socket-address", [])
        return {f"tcp:{address['host']}:{address['port']}" for address in listening}

    def status(self) -> str:
        """The status of the migration: "active", "completed", ..."""
        return str(self.command("query-migrate").get("status", "none"))

    def wait_migrated(self) -> dict[str, Any]:
        """Wait until the outgoing migration is completed, and return query-migrate. Fails if it failed."""
        wait_until(lambda: self.status() in ("completed", "failed", "cancelled"), "the end of QEMU's migration")
        answer: dict[str, Any] = self.command("query-migrate")
        assert answer["status"] == "completed", f"{answer}: {self.output()}"
        return answer

    def wait_running(self) -> None:
        """Wait until the guest runs."""

        def running() -> bool:
            assert self.process.poll() is None, f"{PROGRAM} ended: {self.output()}"
            return bool(self.command("query-status")["running"])

        wait_until(running, "QEMU to run the guest")

    def printed(self) -> str:
        """What the guest has printed on its serial port."""
        return self.serial.read_text(errors="replace")

    def wait_printed(self, text: str, times: int = 1) -> None:
        """Wait until the guest has printed `text` that many times."""

        def seen() -> bool:
            assert self.process.poll() is None, f"{PROGRAM} ended: {self.output()}"
            return self.printed().count(text) >= times

        wait_until(seen, f"the guest to print {text!r}")

    def memory(self, start: int, size: int) -> bytes:
        """Guest-physical memory; stop the guest first."""
        path = self.folder / "memory"
        self.command("pmemsave", val=start, size=size, filename=str(path))
        data = path.read_bytes()
        path.unlink()
        return data

    def output(self) -> str:
        """QEMU's own output."""
        self._log.flush()
        return (self.folder / "log").read_text(errors="replace").strip()

    def close(self) -> None:
        """End the process and remove its files. Idempotent."""
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(AttributeError):
            self._lines.close()
        self._socket.close()
        self._log.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def wait_until(condition: Callable[[], Any], what: str, seconds: float = PATIENCE) -> Any:
    """Poll `condition` until its result is true, and return that. Fails naming `what` after `seconds`."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"waited {seconds:.0f} s in vain for {what}"
        time.sleep(0.01)
    return found


# -- the guest ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Guest:
    """guest.asm, assembled: it fills memory from BASE to `end` and counts in `pages` pages."""

    image: Path
    end: int
    pages: int

    def check(self, qemu: Qemu) -> int:
        """Stop the guest and check its memory (the invariant of guest.asm). Returns the number of its pass, mod 256."""
        qemu.command("stop")
        return check_memory(qemu.memory(BASE, self.end - BASE), self.pages)


def assemble(
    folder: Path, *, end: int = 0x1000000, pages: int = 256, delay: int = 2000, suspend: bool = False
) -> Guest:
    """Build the boot sector in `folder`. With `suspend` the guest suspends to RAM once it has filled its memory."""
    image = folder / "guest.bin"
    defined = [f"-DEND={end:#x}", f"-DPAGES={pages}", f"-DDELAY={delay}", *(["-DSUSPEND"] if suspend else [])]
    subprocess.run(["nasm", "-f", "bin", *defined, SOURCE, "-o", image], check=True)
    os.truncate(image, 1 << 20)  # firmware does not boot a disk of one sector on every controller
    return Guest(image, end, pages)


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder with a path short enough for UNIX sockets."""
    folder = Path(tempfile.mkdtemp(prefix="migfw-", dir="/tmp"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_memory(data: bytes, pages: int) -> int:
    """Check the guest's memory from BASE on. Returns the count that its first page has reached, mod 256."""
    found = np.frombuffer(data, np.uint8).reshape(-1, PAGE).copy()
    expected = xorshift32(SEED, len(data) // 4).view(np.uint8).reshape(-1, PAGE)
    counts = found[:pages, 0] - expected[:pages, 0]
    steps = counts[:-1] - counts[1:]
    assert set(steps.tolist()) <= {0, 1}, f"the counters differ by other than one step: {sorted(set(counts.tolist()))}"
    assert np.count_nonzero(steps) <= 1, f"the counters step down {np.count_nonzero(steps)} times"
    found[:pages, 0] = expected[:pages, 0]
    wrong = np.flatnonzero((found != expected).any(axis=1))
    assert not len(wrong), (
        f"{len(wrong)} pages differ from what the guest wrote, the first at {BASE + int(wrong[0]) * PAGE:#x}"
    )
    return int(counts[0])


def xorshift32(seed: int, count: int) -> NDArray[np.uint32]:
    """The `count` values that follow `seed`, as little-endian words.

    A step is linear over GF(2), so n steps are a matrix, stored as the images of the 32 single bits. Applied to n known
    values it gives the next n at once; applied to itself it gives the matrix of 2n steps.
    """
    bits = np.uint32(1) << np.arange(32, dtype=np.uint32)
    matrix = _step(bits)
    values = _step(np.array([seed], np.uint32))
    while len(values) < count:
        values = np.concatenate([values, _apply(matrix, values)])
        matrix = _apply(matrix, matrix)
    return values[:count].astype("<u4")


def _step(x: NDArray[np.uint32]) -> NDArray[np.uint32]:
    x = x ^ (x << np.uint32(13))
    x = x ^ (x >> np.uint32(17))
    return x ^ (x << np.uint32(5))


def _apply(matrix: NDArray[np.uint32], values: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Multiply the matrix by each value, one byte at a time with tables of 256 images."""
    result = np.zeros_like(values)
    byte = np.arange(256, dtype=np.uint32)
    for low in range(0, 32, 8):
        table = np.zeros(256, np.uint32)
        for bit in range(8):
            table ^= np.where(byte >> np.uint32(bit) & np.uint32(1), matrix[low + bit], np.uint32(0)).astype(np.uint32)
        result ^= table[values >> np.uint32(low) & np.uint32(255)]
    return result
