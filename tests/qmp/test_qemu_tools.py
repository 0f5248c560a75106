"""QEMU's own tools work with our server: the qemu.qmp package's client, and its shell."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from corefw.engine import Engine
from corefw.qmp.server import QmpServer
from tests.helpers.engines import PATIENCE
from tests.qmp.support import path_of

qmp = pytest.importorskip("qemu.qmp", reason="needs the package qemu.qmp")
SHELL = Path(sys.executable).with_name("qmp-shell")


@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_the_client(engine: Engine, folder: Path, transport: str) -> None:
    async def drive(address: str | tuple[str, int]) -> None:
        client = qmp.QMPClient("test")
        await client.connect(address)
        try:
            names = [entry["name"] for entry in await client.execute("query-commands")]
            assert {"migrate", "query-migrate", "x-migfw-status"} <= set(names)
            with pytest.raises(qmp.ExecuteError, match="'uri' is missing"):
                await client.execute("migrate")
            with client.listener(("RESUME", "STOP")) as events:
                await client.execute("cont")
                assert (await client.execute("query-status"))["running"]
                await client.execute("stop")
                assert [(await events.get())["event"] for _ in range(2)] == ["RESUME", "STOP"]
            # Many at once: each reply finds its request.
            status, *replies = await asyncio.gather(
                client.execute("query-status"), *(client.execute("query-name") for _ in range(20))
            )
            assert status["status"] == "paused"
            assert replies == [{"name": "tiny"}] * 20
            if transport == "unix":
                with Path(os.devnull).open("rb") as file:
                    client.send_fd_scm(file.fileno())
                assert await client.execute("getfd", {"fdname": "way"}) == {}
                assert await client.execute("closefd", {"fdname": "way"}) == {}
            await client.execute("quit")
        finally:
            await client.disconnect()

    where = f"unix:{folder}/qmp" if transport == "unix" else "tcp:127.0.0.1:0"
    with QmpServer(engine, where) as server:
        address = server.address
        asyncio.run(drive(path_of(address) if transport == "unix" else (address.host, address.port)))  # type: ignore[union-attr]
        assert server.wait_quit(PATIENCE)


def shell(server: QmpServer, folder: Path, *lines: str, options: Sequence[str] = ()) -> str:
    """Type these lines into QEMU's shell; return what it prints."""
    done = subprocess.run(
        [SHELL, *options, path_of(server.address)],
        input="\n".join([*lines, ""]) + "\n",
        env={**os.environ, "HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    (folder / ".qmp-shell_history").unlink(missing_ok=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def test_the_shell(server: QmpServer, folder: Path) -> None:
    printed = shell(
        server,
        folder,
        "query-name",
        "migrate-set-capabilities capabilities=[{'capability':'events','state':true}]",
        "migrate-set-parameters max-bandwidth=12345",
        "query-migrate-parameters",
        "cont",
        "migrate",
    )
    assert "Connected to QEMU 7.2.0" in printed
    for expected in ('{"return": {"name": "tiny"', '"max-bandwidth": 12345', "'event': 'RESUME'", "'uri' is missing"):
        assert expected in printed


def test_the_shell_of_the_human_monitor(server: QmpServer, folder: Path) -> None:
    lines = [
        "info status",
        "cont",
        "info migrate",
        "migrate -d tcp:127.0.0.1:1",
        "info name",
        "nonsense",
        "help migrate",
    ]
    printed = shell(server, folder, *lines, options=["-H"])
    for expected in (
        "VM status: paused (prelaunch)",
        "tiny",
        "unknown command: 'nonsense'",
        "migrate [-d] [-r] uri -- ",
    ):
        assert expected in printed
