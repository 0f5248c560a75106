"""A waiting destination survives connections that are not migrations, and can be cancelled."""

from __future__ import annotations

import contextlib
import socket

import pytest

from tests.cli.conftest import SMALL, Engine, Engines
from tests.helpers.cli import TIMEOUT

STRANGERS = {"leaves": b"", "wants a page": b"GET / HTTP/1.1\r\nHost: there\r\n\r\n", "sends noise": bytes(range(256))}


def knock(uri: str, data: bytes) -> None:
    """Connect, send this, and wait until the other side has closed the connection."""
    host, _, port = uri.removeprefix("tcp:").rpartition(":")
    with socket.create_connection((host, int(port)), timeout=TIMEOUT) as stranger:
        stranger.sendall(data)
        stranger.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            assert stranger.recv(100) == b""


@pytest.mark.parametrize("case", STRANGERS)
def test_a_destination_without_stay_waits_on_after_a_stranger(engines: Engines, case: str) -> None:
    there = engines(*SMALL, "--incoming=tcp:127.0.0.1:0")
    here = engines(*SMALL)
    knock(there.uri, STRANGERS[case])
    done = here.call("migrate", there.uri)
    assert done.returncode == 0, done
    assert there.ask("query-status")["status"] == "running"
    there.call("quit")
    status, _, err = there.finish()
    assert status == 0
    assert err.count("\n") == 1 and "ignored; the destination keeps waiting" in err, err


def test_cancel_frees_a_destination_and_migrate_incoming_lets_it_wait_again(engines: Engines) -> None:
    there = engines(*SMALL, "--incoming=tcp:127.0.0.1:0")
    done = there.call("cancel")
    assert done.returncode == 0 and "cancelled" in done.stdout, done
    assert there.process.poll() is None, "it stays, without --stay too"
    again = there.call("qmp", "migrate-incoming", f"uri={there.uri}")
    assert again.returncode == 0, again
    arrive(engines(*SMALL), there)


def test_the_source_s_error_ends_with_the_destination_s_reason(engines: Engines) -> None:
    there = engines("stress", "--opt=ram=2M", "--opt=working-set=64K", "--incoming=tcp:127.0.0.1:0")
    here = engines(*SMALL)
    done = here.call("migrate", there.uri)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done
    assert "the destination failed to load the guest: " in done.stderr and "different arrays" in done.stderr, done
    assert done.stderr.endswith("; the guest is running here\n"), done
    assert there.finish()[0] == 1


def arrive(here: Engine, there: Engine) -> None:
    assert here.call("migrate", there.uri).returncode == 0
    assert there.ask("query-status")["status"] == "running"
