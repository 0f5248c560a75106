"""`migfw check` reports what it should, and changes nothing."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import SMALL, Engine, Engines, running_engines
from tests.helpers.cli import migfw, start

GOLDEN = Path(__file__).parents[1] / "golden"

PROGRAM = """
from corefw_machine_python import guest

class Sim(guest.Program):
    data = guest.array("data", shape=({length},), dtype="uint8")
    {fields}

    def tick(self):
        self.data[0] += 1
"""


def check(engine: Engine, *arguments: str) -> tuple[int, dict[str, Any]]:
    done = engine.call("check", *arguments, "--json")
    assert done.stderr == ""
    return done.returncode, json.loads(done.stdout)


def start_pair(engines: Engines) -> tuple[Engine, Engine]:
    destination = engines(*SMALL, "--name", "there", "--incoming", f"unix:{engines.runtime}/in")
    return engines(*SMALL, "--name", "here"), destination


@pytest.fixture
def pair(engines: Engines) -> tuple[Engine, Engine]:
    """A source and a waiting destination."""
    return start_pair(engines)


@pytest.fixture(scope="module")
def shared_pair() -> Iterator[tuple[Engine, Engine]]:
    """A pair for all tests that only check, since a check changes nothing."""
    with running_engines() as engines:
        yield start_pair(engines)


def test_it_changes_nothing(pair: tuple[Engine, Engine]) -> None:
    here, there = pair
    for _ in range(2):
        status, found = check(here, there.uri)
        assert (status, found["ok"], found["problems"]) == (0, True, [])
        assert found["converges"] is True
        assert found["ram"] == 1 << 20
        assert min(found["dirty-rate"], found["bandwidth"], found["destination"]["memory"]) > 0
        assert there.ask("x-migfw-status")["incoming"] == "setup"
        assert here.ask("query-migrate").get("status") is None
    assert here.call("migrate", there.uri).returncode == 0
    assert there.call("verify").returncode == 0


def test_it_tells_people(shared_pair: tuple[Engine, Engine]) -> None:
    here, there = shared_pair
    done = here.call("check", there.uri)
    assert (done.returncode, done.stderr) == (0, "")
    names = [line.partition(":")[0] for line in done.stdout.splitlines()]
    assert names[:3] == ["RAM", "dirty rate", "destination"]
    assert done.stdout.splitlines()[-1].split(maxsplit=1)[1] == "a migration should succeed"


def test_without_a_destination_it_looks_at_this_side(shared_pair: tuple[Engine, Engine]) -> None:
    status, found = check(shared_pair[0])
    assert (status, found["destination"], found["converges"]) == (0, None, None)
    assert found["dirty-rate"] > 0


@pytest.mark.parametrize(
    ("length", "fields", "complaint"),
    [
        (4096, 'step = guest.field("u64"); more = guest.field("u32")', "'more' is missing at the source"),
        (8192, 'step = guest.field("u64")', "different arrays"),
    ],
)
def test_another_program_there(engines: Engines, tmp_path: Path, length: int, fields: str, complaint: str) -> None:
    program = tmp_path / "sim.py"
    program.write_text(PROGRAM.format(length=length, fields=fields))
    there = engines(f"{program}:Sim", "--name", "there", "--incoming", f"unix:{engines.runtime}/in")
    program.write_text(PROGRAM.format(length=4096, fields='step = guest.field("u64")'))
    here = engines(f"{program}:Sim")
    status, found = check(here, there.uri)
    assert (status, found["ok"]) == (1, False)
    assert any(one.startswith("the destination: ") and complaint in one for one in found["problems"]), found
    assert there.ask("x-migfw-status")["incoming"] == "setup"


def test_another_machine_there(engines: Engines) -> None:
    there = engines("life", "--name", "there", "--incoming", f"unix:{engines.runtime}/in")
    status, found = check(engines(*SMALL), there.uri)
    assert status == 1
    assert found["problems"][0].startswith("the destination: this is a machine 'python/Life'")


def test_it_will_not_converge(engines: Engines) -> None:
    options = ("stress", "--opt=ram=16M", "--opt=working-set=16M", "--opt=dirty-rate=100M")
    there = engines(*options, "--name", "there", "--incoming", f"unix:{engines.runtime}/in")
    here = engines(*options, "--param", "max-bandwidth=1M")
    status, found = check(here, there.uri)
    assert (status, found["converges"]) == (1, False)
    [problem] = found["problems"]
    assert problem.startswith("it will not converge: ")
    assert f"set downtime-limit to {found['expected-downtime']} ms" in problem
    status, found = check(here, there.uri, "--postcopy")
    assert (status, found["problems"]) == (0, []), "in postcopy it need not"
    assert any(one.startswith("it will not converge: ") for one in found["notes"])
    status, found = check(engines(*options, "--param=downtime-limit=5s"), there.uri)
    assert (status, found["converges"]) == (0, True)


def test_nobody_there(shared_pair: tuple[Engine, Engine]) -> None:
    status, found = check(shared_pair[0], "unix:/nowhere/socket")
    assert status == 1
    assert found["problems"] == ["unix:/nowhere/socket: no such file (is the destination listening?)"]


def test_something_else_there(shared_pair: tuple[Engine, Engine]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def hang_up() -> None:
            connection, _ = server.accept()
            connection.recv(4)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(1 << 16):
                pass
            connection.close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        status, found = check(shared_pair[0], f"tcp:127.0.0.1:{server.getsockname()[1]}")
        thread.join()
    assert status == 1
    assert "does not answer a check" in found["problems"][0]


HOSTILE = {
    "cut": b"MGCK",
    "long": b"MGCK\xff\xff\xff\xff",
    "no object": b"MGCK\0\0\0\2[]",
    "long padding": b"MGCK\0\0\0\2{}\xff\xff\xff\xff",
    "no text": b"MGCK\0\0\0\4\xff\xff\xff\xff",
}


def test_a_hostile_check_harms_nobody(shared_pair: tuple[Engine, Engine]) -> None:
    here, there = shared_pair
    for sent in HOSTILE.values():
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(there.uri.removeprefix("unix:"))
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(1 << 16):
                pass
    assert check(here, there.uri)[0] == 0


@pytest.mark.parametrize("where", ["exec:false", "file:/nowhere/file"])
def test_what_has_one_connection_is_not_dialled(shared_pair: tuple[Engine, Engine], where: str) -> None:
    status, found = check(shared_pair[0], where)
    assert status == 0
    assert found["notes"][0].startswith(f"{where} was not dialled: ")


def test_a_parked_machine_does_not_dial(engines: Engines) -> None:
    """A waiting QEMU exits when a peer connects and disconnects again."""
    parked = engines("--machine", "qemu", "--stay", "--incoming", f"exec:zcat {GOLDEN}/pc-devices.gz")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{engines.runtime}/qemu")
        server.listen()
        server.setblocking(False)
        status, found = check(parked, f"unix:{engines.runtime}/qemu")
        with pytest.raises(BlockingIOError):
            server.accept()
    assert status == 0
    assert any("was not dialled: a waiting QEMU" in note for note in found["notes"])


def test_a_migration_ends_a_check(pair: tuple[Engine, Engine]) -> None:
    here, there = pair
    checking = start("check", "--name", here.name, runtime=here.runtime)
    try:
        while (moved := here.call("migrate", there.uri)).returncode == 2:
            pass
    finally:
        _, err = checking.finish()
    assert moved.returncode == 0
    # The last two: the migration had begun or ended before the check.
    ended = ("ended the check", "no engine", "migration process in progress", "the guest has moved")
    assert checking.returncode == 0 or any(reason in err for reason in ended), err
    assert there.call("verify").returncode == 0


def test_wrong_usage(engine: Engine) -> None:
    for arguments, complaint in {
        ("tcp:a:1", "--to", "b"): "use one of them",
        ("--remote-migfw", "/x"): "--remote-migfw needs --to",
        ("nonsense:x",): "nonsense",
        ("tcp:127.0.0.1:0",): "port 0",
    }.items():
        done = engine.call("check", *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert complaint in done.stderr


def test_a_destination_cannot_check(shared_pair: tuple[Engine, Engine]) -> None:
    done = migfw("check", "tcp:127.0.0.1:1", "--name", "there", runtime=shared_pair[0].runtime)
    assert (done.returncode, done.stdout) == (2, "")
    assert "waiting for an incoming migration" in done.stderr
