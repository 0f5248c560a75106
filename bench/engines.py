"""The processes that are measured: `migfw run` and QEMU, both driven by QMP's client over a UNIX socket.

Both sides get the same work and the same settings: return-path on, so that "completed" means that the destination
confirmed it, and no bandwidth limit. However a run ends, its processes are ended and its files removed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from bench.sampling import processor_seconds
from bench.warming import MIB
from corefw.errors import ChannelError
from corefw.qmp.client import QmpClient, QmpError
from tests.helpers.peers import Peer, find_peer

ASSEMBLER: Final = "nasm"
PATIENCE: Final = 300.0
"""Seconds until a wait gives up: an emulated guest takes a minute to fill a GiB on a busy machine."""

PAGE: Final = 4096
HERTZ: Final = 200
"""Bursts a second of either guest."""
MARK: Final = 1024
"""Pages between two marks that QEMU's guest prints."""
STRIDE: Final = 10_007
"""Pages from one touch to the next, in a scattered order: a prime, so that all pages have their turn."""

BASE: Final = 0x100000
NOTES: Final = 0x10000
NOTES_END: Final = 0x90000
NOTES_HEADER: Final = struct.Struct("<IIQQII")
"""Header of the notes in which guest.asm records touches that waited."""
TIMER_PERIOD: Final = (1193182 // HERTZ) / 1193182

UNLIMITED_QEMU: Final = 1 << 40

T = TypeVar("T")


class BenchError(Exception):
    """Something that keeps a scenario from being measured; one line."""


@dataclass(frozen=True, slots=True)
class Guest:
    """What runs: `ram` bytes that do not compress, `rate` bytes of pages dirtied in a second within the first
    `working_set` bytes; a rate of 0 for a guest that is paused.

    With `touches` it touches that many pages of its working set in each burst, in a scattered order, and notes how long
    each touch waited; only the working set is filled then.
    """

    ram: int
    rate: int = 0
    working_set: int = 64 * MIB
    touches: int = 0

    @property
    def live(self) -> bool:
        return self.rate > 0 or self.touches > 0


class Process:
    """One engine and the connection to it. Use it with `with`."""

    def __init__(self, command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> None:
        """Take over `folder`: it is removed at the end, and `folder/qmp` is the socket that `command` creates.
        `environment` is added to our own."""
        self.folder: Final = folder
        self._log = (folder / "log").open("w+b")
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            env=os.environ | environment,
            start_new_session=True,  # Ctrl-C is for this program alone
        )
        try:
            self.client: Final[QmpClient] = self._connect()
        except BaseException:
            self._end()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def _connect(self) -> QmpClient:
        def connected() -> QmpClient | None:
            self.check()
            with contextlib.suppress(ChannelError):
                return QmpClient(f"unix:{self.folder}/qmp")
            return None

        return wait_for("an engine to answer", connected)

    def call(self, command: str, /, **arguments: object) -> Any:
        """Execute a command; "_" in a keyword stands for "-". Raises BenchError."""
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        try:
            return self.client.execute(command, named)
        except (QmpError, ChannelError) as error:
            raise BenchError(f"'{command}' failed: {error} {self.said()}") from None

    def check(self) -> None:
        """Raise BenchError if the process has ended."""
        if self._process.poll() is not None:
            raise BenchError(f"an engine ended: {self.said()}")

    def said(self) -> str:
        """The last line of its output."""
        self._log.flush()
        lines = (self.folder / "log").read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.client.close()
        self._end()


class Side(ABC):
    """One of the two that are compared.

    name          for people
    unlimited     the max-bandwidth that limits nothing
    environment   what its processes need besides ours
    postcopy_capabilities   what is switched on for a guest that touches pages
    """

    name: str
    unlimited: int
    postcopy_capabilities: Sequence[str]
    environment: Mapping[str, str] = {}

    @abstractmethod
    def command(self, guest: Guest, folder: Path, *, incoming: bool) -> list[str]:
        """The command line of an engine with `folder` for its files."""

    @abstractmethod
    def fill(self, source: Process, folder: Path) -> None:
        """Wait until the guest has filled its RAM."""

    @abstractmethod
    def dirtied(self, source: Process, folder: Path) -> int:
        """Bytes of pages that the guest has dirtied since it started. May stop it for a moment."""

    @contextlib.contextmanager
    def source(self, guest: Guest) -> Iterator[Process]:
        """An engine with a guest that has filled its RAM, running or paused."""
        with self._start(guest, incoming=False) as (process, folder):
            self.fill(process, folder)
            if not guest.live:
                process.call("stop")
            yield process

    @contextlib.contextmanager
    def destination(self, guest: Guest) -> Iterator[tuple[Process, str]]:
        """A listening engine, and the URI to dial."""
        with self._start(guest, incoming=True) as (process, _):
            uri = f"tcp:127.0.0.1:{free_port()}"
            process.call("migrate-incoming", uri=uri)
            self.await_allocation(process)
            yield process, uri

    @abstractmethod
    def await_allocation(self, process: Process) -> None:
        """Wait until a destination has allocated its RAM."""

    @abstractmethod
    def slow_touches(self, source: Process, destination: Process) -> NDArray[np.float64]:
        """What a guest that touches pages has noted on the destination, which is stopped: rows (when a touch began,
        how long it took), in seconds from some moment on."""

    @abstractmethod
    def processor_seconds(self, process: Process) -> float:
        """Processor time of an engine so far, without its guest."""

    def measure_rate(self, guest: Guest, seconds: float) -> float:
        """Measure how many bytes a second such a guest really dirties."""
        with self._start(guest, incoming=False) as (process, folder):
            self.fill(process, folder)
            before, began = self.dirtied(process, folder), time.monotonic()
            time.sleep(seconds)
            after, ended = self.dirtied(process, folder), time.monotonic()
            return (after - before) / (ended - began)

    @contextlib.contextmanager
    def _start(self, guest: Guest, *, incoming: bool) -> Iterator[tuple[Process, Path]]:
        folder = Path(tempfile.mkdtemp(prefix="migfw-bench-", dir="/tmp"))
        try:
            with Process(self.command(guest, folder, incoming=incoming), folder, self.environment) as process:
                self._configure(process, guest)
                yield process, folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _configure(self, process: Process, guest: Guest) -> None:
        names = ("events", "return-path", *(self.postcopy_capabilities if guest.touches else ()))
        wanted = [{"capability": name, "state": True} for name in names]
        process.call("migrate-set-capabilities", capabilities=wanted)
        process.call("migrate-set-parameters", max_bandwidth=self.unlimited)


class Ours(Side):
    """`migfw run stress`."""

    name = "migfw"
    unlimited = 0
    postcopy_capabilities = ("postcopy-ram", "postcopy-preempt", "postcopy-blocktime")

    def command(self, guest: Guest, folder: Path, *, incoming: bool) -> list[str]:
        working_set = min(guest.working_set, guest.ram)
        options: dict[str, object] = {"ram": guest.ram}
        if guest.touches:
            program = f"{Path(__file__).with_name('touching.py')}:Touching"
            options |= {"filled": working_set, "burst": guest.touches, "stride": STRIDE, "notes": folder / "notes"}
        else:
            program = "stress"
            options |= {"dirty-rate": guest.rate or PAGE, "working-set": working_set}
        return [
            *(sys.executable, "-m", "corefw.cli", "run", program, "--stay", f"--qmp=unix:{folder}/qmp"),
            *(f"--opt={name}={value}" for name, value in options.items()),
            *(["--incoming=defer"] if incoming else []),
        ]

    def await_allocation(self, process: Process) -> None:
        def allocated() -> bool:
            status = process.call("x-migfw-status")["preallocation"]
            return bool(status["allocated"] >= status["total"] or not status["running"])

        wait_for("the destination to allocate its RAM", allocated)

    def fill(self, source: Process, folder: Path) -> None:
        def stopped() -> bool:
            # The guest fills its RAM in its first tick, and can only be stopped behind it.
            with contextlib.suppress(BenchError):
                source.call("stop")
                return True
            source.check()
            return False

        wait_for("the guest to fill its RAM", stopped)
        source.call("cont")

    def slow_touches(self, source: Process, destination: Process) -> NDArray[np.float64]:
        notes = destination.folder / "notes"
        return np.fromfile(notes).reshape(-1, 2) if notes.exists() else np.empty((0, 2))

    def processor_seconds(self, process: Process) -> float:
        return processor_seconds(process.pid)

    def dirtied(self, source: Process, folder: Path) -> int:
        source.call("stop")
        writes: int = source.call("x-migfw-status")["machine"]["information"]["fields"]["writes"]
        source.call("cont")
        return writes * PAGE


class Qemu(Side):
    """A PC under TCG with the guest of guest.asm, its RAM allocated before it starts.

    QEMU's default, private memory, is faster than a memfd. `shared` asks for a memfd, as migfw uses, so that RssAnon
    shows what the engine needs for itself.
    """

    name = "QEMU"
    unlimited = UNLIMITED_QEMU
    postcopy_capabilities = ("postcopy-ram", "postcopy-preempt", "postcopy-blocktime")

    def __init__(self, images: Path, *, shared: bool = False) -> None:
        """`images` is a folder for the guests' boot sectors."""
        peer = find_qemu()
        assert peer is not None, lacking()
        self._peer = peer
        self.environment = peer.environment
        self._images = images
        self._shared = shared

    def command(self, guest: Guest, folder: Path, *, incoming: bool) -> list[str]:
        size = f"{guest.ram // MIB}M"
        backend = "memory-backend-memfd,share=on" if self._shared else "memory-backend-ram"
        (folder / "serial").touch()
        return [
            *(*self._peer.command, "-accel", "tcg", "-M", "pc,memory-backend=ram", "-m", size),
            *("-object", f"{backend},id=ram,size={size},prealloc=on"),
            *("-display", "none", "-nodefaults"),
            *("-drive", f"file={self._image(guest)},format=raw,if=ide,snapshot=on"),
            *("-serial", f"file:{folder}/serial", "-qmp", f"unix:{folder}/qmp,server=on,wait=off"),
            *(["-incoming", "defer"] if incoming else []),
        ]

    def with_shared_memory(self) -> Qemu:
        """The same with its guest's RAM in a memfd."""
        return Qemu(self._images, shared=True)

    def _image(self, guest: Guest) -> Path:
        burst = max(1, round(guest.rate / PAGE / HERTZ))
        values = {"END": guest.ram, "PAGES": guest.working_set // PAGE, "BURST": burst, "MARK": MARK}
        if guest.touches:
            end = min(guest.working_set, guest.ram)
            values |= {"END": end, "PAGES": (end - BASE) // PAGE, "BURST": guest.touches, "STRIDE": STRIDE}
        image = self._images / f"{'-'.join(str(value) for value in values.values())}.bin"
        if not image.exists():
            defined = [f"-D{name}={value:#x}" for name, value in values.items()]
            source = Path(__file__).with_name("guest.asm")
            subprocess.run([ASSEMBLER, "-f", "bin", *defined, source, "-o", image], check=True)
        return image

    def fill(self, source: Process, folder: Path) -> None:
        def filled() -> bool:
            source.check()
            return b"F" in (folder / "serial").read_bytes()

        wait_for("the guest to fill its RAM", filled)

    def await_allocation(self, process: Process) -> None:
        """Do nothing: QEMU has allocated it before it answers QMP (prealloc=on)."""

    def slow_touches(self, source: Process, destination: Process) -> NDArray[np.float64]:
        before, _ = read_notes(self._memory(source))
        notes, frequency = read_notes(self._memory(destination))
        return notes[len(before) :] / frequency

    def _memory(self, process: Process) -> bytes:
        place = process.folder / "notes"
        process.call("pmemsave", val=NOTES, size=NOTES_END - NOTES, filename=str(place))
        return place.read_bytes()

    def processor_seconds(self, process: Process) -> float:
        """Subtract the guest, which is a thread of the emulator."""
        guests = [one["thread-id"] for one in process.call("query-cpus-fast")]
        return processor_seconds(process.pid) - sum(processor_seconds(process.pid, thread) for thread in guests)

    def dirtied(self, source: Process, folder: Path) -> int:
        return (folder / "serial").read_bytes().count(b"B") * MARK * PAGE


def read_notes(memory: bytes) -> tuple[NDArray[np.float64], float]:
    """What guest.asm has noted, in cycles, and how many cycles a second has."""
    ticks, _, first, last, end, _ = NOTES_HEADER.unpack_from(memory)
    notes = np.frombuffer(memory[NOTES_HEADER.size : end - NOTES], dtype="<u8").reshape(-1, 2)
    return notes.astype(np.float64), (last - first) / (max(1, ticks - 1) * TIMER_PERIOD)


def find_qemu() -> Peer | None:
    """The newest QEMU that `make peers` has unpacked, else the one on the PATH."""
    return find_peer("newest") or find_peer("PATH")


def lacking() -> str:
    """Why the QEMU side cannot be measured on this machine; empty where it can."""
    missing = [] if find_qemu() else ["QEMU (run 'make peers')"]
    missing += [] if shutil.which(ASSEMBLER) else [ASSEMBLER]
    return f"there is no {' and no '.join(missing)} here" if missing else ""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def wait_for(what: str, look: Callable[[], T | None], seconds: float = PATIENCE) -> T:
    """What `look` finds, once that is something. Raises BenchError naming `what`."""
    end = time.monotonic() + seconds
    while not (found := look()):
        if time.monotonic() > end:
            raise BenchError(f"waited {seconds:.0f} s in vain for {what}")
        time.sleep(0.01)
    return found
