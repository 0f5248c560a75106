"""exit-on-error of migrate-incoming: whether an engine outlives a failed load."""

from __future__ import annotations

import socket

import pytest

from corefw.qmp.client import QmpClient
from tests.cli.conftest import SMALL, Engines
from tests.helpers.qemu import wait_until

QEVM = b"QEVM"  # the right magic, followed by nonsense


def send_nonsense(uri: str) -> None:
    with socket.create_connection(("127.0.0.1", int(uri.rpartition(":")[2])), 20) as sock:
        sock.sendall(QEVM + b"\0\0\0\3" + b"\xff" * 64)


@pytest.mark.parametrize("stays", [False, True])
def test_an_engine_stays_where_it_was_told_to(engines: Engines, *, stays: bool) -> None:
    here = engines(*SMALL, "--incoming", "defer")
    with QmpClient(here.address) as client:
        client.execute("migrate-incoming", {"uri": "tcp:127.0.0.1:0", "exit-on-error": not stays})
        send_nonsense(client.execute("x-migfw-status")["incoming-uri"])
        if stays:
            wait_until(lambda: client.execute("query-migrate").get("status") == "failed", "the failure")
            assert "load of migration failed" in client.execute("query-migrate")["error-desc"]
            client.execute("migrate-incoming", {"uri": "tcp:127.0.0.1:0"})
            send_nonsense(client.execute("x-migfw-status")["incoming-uri"])
    status, _, err = here.finish()
    assert status == 1
    assert "the guest could not be loaded" in err
