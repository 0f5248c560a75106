"""A postcopy whose engine has no file descriptor left: it pauses, says why, and goes on once there are some."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from corefw.qmp.client import QmpClient
from corefw.testing.tasks import wait_until
from tests.cli.conftest import Engine, Engines
from tests.helpers.cutting import Cut, CutProxy

BUSY = ("stress", "--opt=ram=16M", "--opt=working-set=8M", "--opt=dirty-rate=400M")
CAPABILITIES = ("--cap=postcopy-ram", "--cap=postcopy-preempt")


def migration(client: QmpClient) -> dict[str, object]:
    return dict(client.execute("query-migrate"))


def goes_on(*clients: QmpClient) -> None:
    for one in clients:
        assert wait_until(partial(is_active, one)), migration(one)


def is_active(client: QmpClient) -> bool:
    return migration(client)["status"] == "postcopy-active"


@contextmanager
def few_descriptors(engine: Engine, more: int) -> Iterator[None]:
    """The engine may open so many more than it has."""
    pid = engine.process.pid
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    highest = max(int(one.name) for one in Path(f"/proc/{pid}/fd").iterdir())
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (highest + 1 + more if more else 3, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


def test_a_recovery_without_descriptors_is_tried_again(engines: Engines) -> None:
    source = engines(*BUSY, "--name=from")
    destination = engines(*BUSY, "--name=to", "--incoming=tcp:127.0.0.1:0", *CAPABILITIES)
    clients = QmpClient(source.address), QmpClient(destination.address)
    with CutProxy(destination.uri) as proxy, clients[0] as asked, clients[1] as other:
        limits = ("--param=max-bandwidth=100K", "--param=max-postcopy-bandwidth=100K")
        how = (*CAPABILITIES, "--postcopy=now", "--reconnect=forever", "--detach")
        detached = source.call("migrate", proxy.uri, *how, *limits)
        assert detached.returncode == 0, detached.stderr
        for engine, more in ((source, 0), (source, 2), (destination, 0)):
            goes_on(asked, other)
            attempts, connections = attempts_of(asked), proxy.connections
            with few_descriptors(engine, more):
                proxy.cut_all(Cut.RESET)
                tried = partial(has_tried, asked, attempts, proxy, connections)
                assert wait_until(tried), migration(asked)
        goes_on(asked, other)
        asked.execute("migrate-set-parameters", {"max-postcopy-bandwidth": 0})
        assert wait_until(lambda: migration(asked)["status"] == "completed"), migration(asked)
    verified = destination.call("verify")
    assert verified.returncode == 0, verified.stderr


def has_tried(client: QmpClient, attempts: int, proxy: CutProxy, connections: int) -> bool:
    """Whether the source has failed to connect again, or has connected, since it had made so many attempts."""
    return 1 < attempts_of(client) != attempts or proxy.connections > connections + 1


def attempts_of(client: QmpClient) -> int:
    own = client.execute("query-migrate").get("x-migfw", {})
    return int(own.get("reconnect", {}).get("attempts", 0))
