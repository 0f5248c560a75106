"""`migfw demo`: move a guest that keeps writing between two engines on this host, and prove that no write was lost.

It does what a user would do, with the same commands over the same QMP. Invariant: whatever happens, both engines have
ended and nothing is left behind when the command ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import click

from corefw.cli import Interrupts
from corefw.cli.console import ExitStatus, print_facts
from corefw.cli.display import open_display
from corefw.client.changes import Changes
from corefw.client.follow import Follower
from corefw.client.progress import summary
from corefw.errors import MigfwError, UsageError
from corefw.qmp.engines import POLL, EngineClient, connect
from corefw.quantities import format_size, parse_size
from corefw.settings import UNLIMITED
from corefw.states import MigrationStatus

PATIENCE: Final = 120.0
"""Seconds that an engine may take for a step: far more than any needs."""

_END_SECONDS: Final = 10.0

_SET_PARENT_DEATH_SIGNAL: Final = 1  # PR_SET_PDEATHSIG of prctl(2)
_libc: Final = ctypes.CDLL(None)


@click.command()
@click.option(
    "--ram",
    metavar="SIZE",
    default="512M",
    show_default=True,
    help="RAM of the guest, filled with incompressible bytes.",
)
@click.option(
    "--dirty-rate",
    metavar="RATE",
    default="100M",
    show_default=True,
    help="Bytes of pages that the guest dirties per second.",
)
@click.option(
    "--working-set", metavar="SIZE", default="64M", show_default=True, help="How much of its RAM the guest writes to."
)
def demo(ram: str, dirty_rate: str, working_set: str) -> None:
    """Move a running guest from one process to another on this host, and verify that no write was lost.

    The guest 'stress' fills its RAM, keeps writing to it and counts its writes. After the move it keeps running in the
    other process, and the writes that it counted are compared with those found in its RAM. The last line is "demo: ok".

    \b
    Examples:
      migfw demo
      migfw demo --ram 2G --dirty-rate 400M
    """
    sizes = {"ram": ram, "dirty-rate": dirty_rate, "working-set": working_set}
    for name, text in sizes.items():
        if parse_size(text) == 0:
            raise UsageError(f"--{name} {text}: expected more than zero")
    # An exception would be lost in a callback of the interpreter, such as those around fork(), and with it the Ctrl-C.
    with Interrupts() as interrupts, _folder() as folder:
        _play(folder, [f"--opt={name}={text}" for name, text in sizes.items()], interrupts.received)
    click.echo("demo: ok")


def _play(folder: Path, options: list[str], interrupted: Callable[[], bool]) -> None:
    wait_for = partial(_wait_for, interrupted)
    with (
        _engine(folder, "destination", wait_for, *options, "--incoming=tcp:127.0.0.1:0") as (destination, _),
        _engine(folder, "source", wait_for, *options) as (source, ended),
    ):
        uri = wait_for("the destination to listen", lambda: destination.call("x-migfw-status")["incoming-uri"])
        click.echo(f"a guest fills {_ram(source)} of RAM with incompressible bytes")
        wait_for("the guest to fill its RAM and write", lambda: _verified_beyond(source, 0))
        click.echo(f"it is running and keeps writing; now it moves to another process at {uri}")
        answer = _migrate(source, uri, interrupted)
        print_facts(summary(answer))
        before = _writes(source)
        source.client.close()  # the source stays for as long as we are connected
        wait_for("the source to end", lambda: ended() is not None)
        facts = wait_for("the guest to continue writing", lambda: _verified_beyond(destination, before))
        click.echo(
            f"proof: {facts['writes']:,} writes counted, {facts['found']:,} found in RAM;"
            f" {facts['writes'] - before:,} of them after the move"
        )
        if facts["writes"] != facts["found"]:
            raise MigfwError(f"demo: {facts['writes'] - facts['found']} writes were lost")


def _migrate(source: EngineClient, uri: str, interrupted: Callable[[], bool]) -> Mapping[str, Any]:
    Changes({"return-path": True}, {"max-bandwidth": UNLIMITED}).apply(source)
    with open_display(f"migrating to {uri}", as_json=False) as display:
        source.call("migrate", uri=uri)
        answer = Follower(source, display, interrupted=interrupted).wait()
    if interrupted():
        raise KeyboardInterrupt
    if answer["status"] != MigrationStatus.COMPLETED:
        raise MigfwError(f"demo: the migration did not complete: {answer.get('error-desc', answer['status'])}")
    return answer


def _verified_beyond(destination: EngineClient, before: int) -> Mapping[str, Any] | None:
    """The result of the guest's own check, or None if it has not written more than `before` yet."""
    facts: Mapping[str, Any] = destination.call("x-migfw-verify")
    return facts if facts["writes"] > before else None


def _writes(source: EngineClient) -> int:
    """The number of writes that the guest had counted when it left."""
    writes: int = source.call("x-migfw-status")["machine"]["information"]["fields"]["writes"]
    return writes


def _ram(engine: EngineClient) -> str:
    return format_size(sum(engine.call("x-migfw-status")["machine"]["information"]["ram"].values()))


# -- the two engines ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="migfw-demo-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _engine(
    folder: Path, name: str, wait_for: Callable[[str, Callable[[], Any]], Any], *arguments: str
) -> Iterator[tuple[EngineClient, Callable[[], int | None]]]:
    """Start `migfw run stress`. Yields a connection to it, and a function that returns its exit status or None."""
    address = f"unix:{folder}/{name}"
    errors = folder / f"{name}.err"
    with errors.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "corefw.cli", "run", "stress", f"--name={name}", f"--qmp={address}", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            start_new_session=True,  # so that only this process gets the terminal's Ctrl-C
            preexec_fn=partial(_end_with_parent, os.getpid()),
        )
    try:
        wait_for(f"the {name} to start", lambda: _started(process, Path(f"{folder}/{name}"), errors))
        with connect(None, address) as client:
            yield client, process.poll
    finally:
        _end(process)


def _end_with_parent(parent: int) -> None:
    """Have the kernel end this new process when the demo's only thread ends."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the demo's handler would swallow it until exec()
    _libc.prctl(ctypes.c_int(_SET_PARENT_DEATH_SIGNAL), ctypes.c_ulong(signal.SIGTERM))
    if os.getppid() != parent:
        os._exit(ExitStatus.FAILED)  # the demo ended before prctl()


def _started(process: subprocess.Popen[bytes], socket: Path, errors: Path) -> bool:
    if process.poll() is not None:
        lines = errors.read_text(errors="replace").strip().splitlines() or ["an engine ended without a message"]
        problem = lines[-1].removeprefix("migfw: ")
        raise (UsageError if process.returncode == ExitStatus.USAGE else MigfwError)(problem)
    return socket.exists()


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _wait_for(interrupted: Callable[[], bool], what: str, look: Callable[[], Any]) -> Any:
    """Poll `look` until its result is true, and return that.

    Raises MigfwError naming `what` after PATIENCE, and KeyboardInterrupt once `interrupted` returns True.
    """
    end = time.monotonic() + PATIENCE
    while not (found := look()):
        if interrupted():
            raise KeyboardInterrupt
        if time.monotonic() > end:
            raise MigfwError(f"demo: gave up waiting for {what} after {PATIENCE:.0f} s")
        time.sleep(POLL)
    return found
