"""A running QEMU moves to another over transports that QEMU lacks, through `migfw relay` and by `migfw migrate`.

Both QEMUs have the capability return-path on, so "completed" means that the destination's SHUT came all the way back.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.cli import MIGFW, Command, launch
from tests.helpers.qemu import Guest, Qemu, needs_qemu, wait_until
from tests.helpers.sshd import missing_programs, running_sshd

pytestmark = [pytest.mark.qemu, needs_qemu]

needs_sshd = pytest.mark.skipif(bool(missing_programs()), reason=f"needs OpenSSH: {', '.join(missing_programs())}")
TRANSPORTS = [pytest.param("ssh", marks=[pytest.mark.sshd, needs_sshd]), "zmq"]


class Way:
    """A path from `uri`, which a relay or `migrate` dials, to the UNIX socket at which a QEMU waits.

    `far` is the relay there, if there is one.
    """

    def __init__(self, helpers: contextlib.ExitStack, uri: str = "", **environment: str) -> None:
        self.uri = uri
        self.far: Command | None = None
        self._environment = {**os.environ, **environment, "TERM": "dumb"}
        self._helpers = helpers

    def relay(self, source: str, target: str) -> tuple[Command, str]:
        """A relay that is listening, and the URI to dial."""
        process = self.migfw("relay", "--json", source, target)
        assert process.stderr
        line = process.stderr.readline()
        assert line.startswith("migfw: listening at "), line
        return process, line.removeprefix("migfw: listening at ").strip()

    def migfw(self, *arguments: str) -> Command:
        process = launch([*MIGFW, *arguments], self._environment)
        self._helpers.callback(process.end)
        return process


def _done(process: Command) -> str:
    """Wait for the end of a migfw that has to succeed; return its stdout."""
    out, err = process.finish()
    assert process.returncode == 0, err + out
    return out


def _relayed(process: Command) -> None:
    """Wait for the end of a relay, which has to report that the migration completed."""
    report = json.loads(_done(process))
    assert report["status"] == "completed"
    assert report["return-path"]
    assert report["forward-bytes"] > 16 << 20
    assert report["backward-bytes"] >= 8


@pytest.fixture
def way(request: pytest.FixtureRequest, folder: Path) -> Iterator[Way]:
    """The way to unix:FOLDER/destination, by ssh or by zmq."""
    with contextlib.ExitStack() as helpers:
        if request.param == "ssh":
            sshd = helpers.enter_context(running_sshd(folder / "sshd"))
            home = sshd.make_home(folder / "home")
            uri = f"ssh://{sshd.address}/unix:{folder}/destination"
            yield Way(helpers, uri, HOME=str(home), SSH_AUTH_SOCK="")
        else:
            made = Way(helpers)
            made.far, made.uri = made.relay("zmq:tcp://127.0.0.1:0", f"unix:{folder}/destination")
            yield made


def _pair(guest: Guest, folder: Path, control: Path) -> tuple[Qemu, Qemu]:
    source = Qemu("-qmp", f"unix:{control},server=on,wait=off", boot=guest.image)
    try:
        destination = Qemu(boot=guest.image, incoming="defer")
    except BaseException:
        source.close()
        raise
    for side in (source, destination):
        side.capabilities("return-path")
    destination.command("migrate-incoming", uri=f"unix:{folder}/destination")
    source.wait_printed("B")
    return source, destination


def _prove(guest: Guest, source: Qemu, destination: Qemu, way: Way) -> None:
    figures = source.wait_migrated()
    assert figures["ram"]["dirty-sync-count"] >= 2, "the guest ran while it was sent"
    destination.wait_running()
    destination.wait_printed("B", 2)
    assert set(destination.printed()) == {"B"}, "it went on, it did not start anew"
    guest.check(destination)
    if way.far:
        _relayed(way.far)


@pytest.mark.parametrize("way", TRANSPORTS, indirect=True)
def test_through_a_relay(way: Way, guest: Guest, folder: Path) -> None:
    source, destination = _pair(guest, folder, folder / "qmp")
    with source, destination:
        near, uri = way.relay(f"unix:{folder}/near", way.uri)
        source.migrate(uri)
        _prove(guest, source, destination, way)
        _relayed(near)
        assert not (folder / "near").exists()


@pytest.mark.parametrize("way", TRANSPORTS, indirect=True)
def test_by_migrate(way: Way, guest: Guest, folder: Path) -> None:
    source, destination = _pair(guest, folder, folder / "qmp")
    with source, destination:
        report = json.loads(_done(way.migfw("migrate", "--json", "--qmp", f"unix:{folder}/qmp", way.uri)))
        assert report["status"] == "completed"
        _prove(guest, source, destination, way)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for a mount namespace")
def test_a_qemu_with_a_private_tmp(guest: Guest, folder: Path) -> None:
    """A service with PrivateTmp=, or a container, cannot see a socket that this side creates in /tmp."""
    private = folder / "private"
    private.mkdir()
    hide = ("unshare", "--mount", "sh", "-c", f'mount -t tmpfs none {private} && exec "$@"', "-")
    with (
        Qemu("-qmp", f"unix:{folder}/qmp,server=on,wait=off", boot=guest.image, within=hide) as source,
        Qemu(boot=guest.image, incoming="defer") as destination,
        contextlib.ExitStack() as helpers,
    ):
        for side in (source, destination):
            side.capabilities("return-path")
        destination.command("migrate-incoming", uri=f"unix:{folder}/destination")
        source.wait_printed("B")
        way = Way(helpers, TMPDIR=str(private))
        way.far, uri = way.relay("zmq:tcp://127.0.0.1:0", f"unix:{folder}/destination")
        report = json.loads(_done(way.migfw("migrate", "--json", "--qmp", f"unix:{folder}/qmp", uri)))
        assert report["status"] == "completed"
        _prove(guest, source, destination, way)
        assert list(private.iterdir()) == []


def test_by_migrate_over_what_qemu_knows(guest: Guest, folder: Path) -> None:
    source, destination = _pair(guest, folder, folder / "qmp")
    with source, destination, contextlib.ExitStack() as helpers:
        way = Way(helpers, f"unix:{folder}/destination")
        out = _done(way.migfw("migrate", "--qmp", f"unix:{folder}/qmp", way.uri))
        assert "status:     completed" in out
        _prove(guest, source, destination, way)


def test_a_destination_that_cannot_load_it(guest: Guest, folder: Path) -> None:
    """Neither the relay nor QEMU reports that as completed, and the guest continues where it was."""
    with (
        Qemu(boot=guest.image) as source,
        Qemu(boot=guest.image, memory="64M", incoming=f"unix:{folder}/destination") as destination,
        contextlib.ExitStack() as helpers,
    ):
        source.capabilities("return-path")
        source.wait_printed("B")
        way = Way(helpers)
        far, far_uri = way.relay("zmq:tcp://127.0.0.1:0", f"unix:{folder}/destination")
        near, near_uri = way.relay(f"unix:{folder}/near", far_uri)
        source.migrate(near_uri)
        wait_until(lambda: source.status() in ("completed", "failed"), "the end of QEMU's migration")
        assert source.status() == "failed"
        source.wait_running()
        assert destination.process.wait(60) != 0
        for relay in (near, far):
            out, err = relay.finish()
            assert relay.returncode == 1, out
            assert json.loads(out)["status"] == "failed"
            assert err.startswith("migfw: ")


def test_a_far_side_that_is_not_there(guest: Guest, folder: Path) -> None:
    """The relay fails, the error says which side, and the guest continues where it was."""
    with Qemu("-qmp", f"unix:{folder}/qmp,server=on,wait=off", boot=guest.image) as source:
        source.wait_printed("B")
        done = subprocess.run(
            [*MIGFW, "migrate", "--qmp", f"unix:{folder}/qmp", "zmq:ipc:///nonexistent/socket"],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 1, done.stdout + done.stderr
        assert done.stderr.count("\n") == 1 and "zmq:ipc:///nonexistent/socket" in done.stderr
        source.wait_running()
