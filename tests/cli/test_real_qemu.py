"""`migfw migrate --qmp` with a real QEMU: over transports that QEMU supports, and over others through a relay."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.cli import migfw, start
from tests.helpers.qemu import Guest, Qemu, assemble, needs_qemu, temporary_folder

pytestmark = [needs_qemu, pytest.mark.qemu]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with temporary_folder() as path:
        yield path


@pytest.fixture(scope="module")
def guest(folder: Path) -> Guest:
    return assemble(folder, end=0x800000)


@pytest.fixture
def source(guest: Guest, folder: Path) -> Iterator[str]:
    """The address of a QEMU that runs the guest: a second QMP socket, because each serves only one client."""
    path = folder / "source.qmp"
    with Qemu("-qmp", f"unix:{path},server=on,wait=off", boot=guest.image) as qemu:
        qemu.wait_printed("B")
        yield f"unix:{path}"
    path.unlink(missing_ok=True)


def test_a_uri_that_qemu_knows_is_passed_on(source: str, guest: Guest, folder: Path) -> None:
    uri = f"unix:{folder}/known"
    with Qemu(boot=guest.image, incoming=uri) as destination:
        done = migfw("migrate", uri, "--json", "--qmp", source)
        assert (done.returncode, done.stderr) == (0, "")
        assert json.loads(done.stdout)["status"] == "completed"
        capabilities = migfw("qmp", "query-migrate-capabilities", "--qmp", source)
        assert {"capability": "return-path", "state": True} in json.loads(capabilities.stdout)
        destination.wait_running()
        guest.check(destination)


def test_a_qemu_is_told_to_switch_to_postcopy(source: str, guest: Guest, folder: Path) -> None:
    uri = f"unix:{folder}/late"
    with Qemu(boot=guest.image, incoming="defer") as destination:
        destination.capabilities("postcopy-ram")
        destination.command("migrate-incoming", uri=uri)
        slowly = "--param=max-bandwidth=1M"  # so that it does not complete before it is told
        done = migfw("migrate", uri, "--postcopy=now", slowly, "--qmp", source)
        assert (done.returncode, done.stderr) == (0, "")
        assert "asked QEMU to switch to postcopy" in done.stdout
        destination.wait_running()
        guest.check(destination)


def test_what_a_qemu_does_not_decide_is_refused(source: str) -> None:
    for options, words in [(("--detach", "--postcopy"), "'migfw postcopy'"), (("--postcopy=when-stuck",), "or after-")]:
        refused = migfw("migrate", "tcp:localhost:1", *options, "--qmp", source)
        assert refused.returncode == 2
        assert words in refused.stderr, refused.stderr


def test_any_other_is_relayed_with_the_return_path(source: str, guest: Guest, folder: Path) -> None:
    # QEMU cannot use abstract sockets, so the destination needs a relay as well.
    far, near = f"unix:@{folder.name}", f"unix:{folder}/near"
    with Qemu(boot=guest.image, incoming=near) as destination:
        relay = start("relay", far, near)
        assert relay.stdout is not None
        relay.stdout.readline()
        done = migfw("migrate", far, "--qmp", source)
        assert (done.returncode, done.stderr) == (0, "")
        assert "completed" in done.stdout
        out, err = relay.finish()
        assert relay.returncode == 0, err
        assert " back in " in out
        destination.wait_running()
        guest.check(destination)


def test_a_file_is_relayed_without_one_and_loads(source: str, guest: Guest, folder: Path) -> None:
    stream = folder / "stream"
    done = migfw("migrate", f"file:{stream}", "--qmp", source)
    assert (done.returncode, done.stderr) == (0, "")
    with Qemu(boot=guest.image, incoming=f"exec:cat {stream}") as destination:
        destination.wait_running()
        guest.check(destination)
    stopped = migfw("status", "--qmp", source)
    assert "QEMU" in stopped.stdout
    assert "guest:" in stopped.stdout
    assert "postmigrate" in stopped.stdout


def test_what_fails_is_named_and_the_guest_goes_on(source: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = folder / "t"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    for uri, complaint in {
        f"unix:{folder}/nobody": "Failed to connect",
        "unix:@nobody-here": "unix:@nobody-here: connection refused",
        "file:/nonexistent/stream": "/nonexistent/stream",
    }.items():
        done = migfw("migrate", uri, "--qmp", source)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
        assert complaint in done.stderr
        # QEMU sends to the relay before the relay finds that nothing listens. The display may show that, but no end.
        assert all(line.startswith(("setup", "active")) for line in done.stdout.splitlines()), done.stdout
        assert done.stderr.endswith("; the guest is running here\n")
    assert list(temporary.iterdir()) == []


PLUGIN = """
from corefw.channel import Transport, TransportFeatures
from corefw.errors import ChannelError
from corefw.hookspecs import hookimpl
from corefw.declarations import Declarations, Kind, Parameter

class Spy(Transport):
    features = TransportFeatures(return_path=False, multi_channel=False)

    def connect(self, interrupt):
        raise ChannelError(f"{self.uri}: the word is {self.context.settings.parameter('x-spy-word')}")

    def listen(self):
        raise NotImplementedError

@hookimpl
def corefw_settings():
    word = Parameter("x-spy-word", Kind.STRING, "", "a word")
    return Declarations(parameters=(word,), implements=frozenset({word.name}))
"""


def test_parameters_of_a_relayed_transport_stay_here(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU would refuse them."""
    (tmp_path / "spy.py").write_text(PLUGIN)
    information = tmp_path / "spy-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: spy\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[corefw.transport]\nspy = spy:Spy\n\n[corefw.plugins]\nspy = spy\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = migfw("migrate", "spy:x", "--param=x-spy-word=ahoy", "--param=downtime-limit=90ms", "--qmp", source)
    assert "spy:x: the word is ahoy" in done.stderr
    assert done.returncode == 1


def test_wrong_usage_starts_nothing(source: str) -> None:
    for arguments in (
        ("carrier-pigeon:x",),
        ("tcp:localhost:99999",),
        ("unix:@x", "--detach"),
        ("tcp:localhost:1", "--cap=levitate"),
        ("tcp:localhost:1", "--param=altitude=3"),
    ):
        done = migfw("migrate", *arguments, "--qmp", source)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert json.loads(migfw("qmp", "query-migrate", "--qmp", source).stdout) == {}
