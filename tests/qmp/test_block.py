"""Disks and dirty bitmaps through QMP, compared with a real QEMU with a disk of the same size and the same writes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

from corefw.block import BlockNode, ByteRuns, no_byte_runs
from corefw.engine import Engine
from corefw.machine import BlockMachine, RunState
from corefw.plugins import Plugins
from corefw.qmp.client import QmpClient
from corefw.qmp.client import QmpError as ClientError
from corefw.qmp.server import QmpServer
from tests.helpers import qemu
from tests.helpers.peers import find_peer, peer_parameters
from tests.helpers.qemu import Qemu
from tests.qmp.support import TinyMachine

LENGTH: Final = 10 << 20
OTHER: Final = 1 << 20

Execute = Callable[..., Any]
"""Executes a command: its result, or the text of the error."""


class Disk(BlockNode):
    """A node that the test writes to."""

    def __init__(self, name: str, length: int) -> None:
        super().__init__(name, length, device=name)
        self._written: list[tuple[int, int]] = []

    def collect(self) -> ByteRuns:
        written, self._written = self._written, []
        return np.array(written, dtype=np.int64) if written else no_byte_runs()

    def write(self, offset: int, length: int) -> None:
        self._written.append((offset, offset + length))


class MachineWithDisks(TinyMachine, BlockMachine):
    def __init__(self) -> None:
        super().__init__()
        self.disks = Disk("disk", LENGTH), Disk("other", OTHER)

    def block_nodes(self) -> Sequence[BlockNode]:
        return self.disks


@pytest.fixture
def machine() -> MachineWithDisks:
    return MachineWithDisks()


@pytest.fixture
def ours(machine: MachineWithDisks, folder: Path) -> Iterator[Execute]:
    plugins = Plugins()
    with (
        contextlib.closing(Engine(machine, plugins, plugins.settings())) as engine,
        QmpServer(engine, f"unix:{folder}/ours") as server,
        QmpClient(server.address) as client,
    ):

        def execute(command: str, /, **arguments: object) -> Any:
            try:
                return client.execute(command, arguments)
            except ClientError as error:
                return error.desc

        yield execute


@pytest.fixture
def theirs(request: pytest.FixtureRequest, folder: Path) -> Iterator[Execute]:
    """A QEMU with the same disks; `write(offset, length)` writes to them."""
    drives: list[str] = []
    for name, length in (("disk", LENGTH), ("other", OTHER)):
        with (folder / name).open("wb") as file:
            file.truncate(length)
        drives += ["-drive", f"file={folder / name},format=raw,if=none,id={name}"]
    with contextlib.closing(Qemu(*drives, paused=True, peer=find_peer(request.param))) as peer:

        def execute(command: str, /, **arguments: Any) -> Any:
            try:
                if command == "write":
                    line = 'qemu-io disk "write {offset} {length}"'.format(**arguments)
                    return peer.command("human-monitor-command", command_line=line)
                return peer.command(command, **arguments)
            except qemu.QmpError as error:
                return str(error)

        yield execute


ADD: Final = "block-dirty-bitmap-add"
MERGE: Final = "block-dirty-bitmap-merge"
STEPS: Final[Sequence[tuple[str, Mapping[str, object]]]] = (
    (ADD, {"node": "disk", "name": "default"}),
    (ADD, {"node": "disk", "name": "fine", "granularity": 512}),
    (ADD, {"node": "disk", "name": "off", "granularity": 4096, "disabled": True}),
    (ADD, {"node": "disk", "name": "huge", "granularity": 1 << 31}),
    (ADD, {"node": "other", "name": "small"}),
    ("write", {"offset": 0, "length": 512}),
    ("write", {"offset": 70000 // 512 * 512, "length": 3 << 19}),
    ("write", {"offset": LENGTH - 512, "length": 512}),
    ("block-dirty-bitmap-disable", {"node": "disk", "name": "fine"}),
    ("block-dirty-bitmap-enable", {"node": "disk", "name": "off"}),
    (ADD, {"node": "disk", "name": "late", "granularity": 1024}),
    ("write", {"offset": 5 << 20, "length": 1536}),
    (MERGE, {"node": "disk", "target": "late", "bitmaps": ["fine", {"node": "disk", "name": "off"}]}),
    ("block-dirty-bitmap-clear", {"node": "disk", "name": "off"}),
    (MERGE, {"node": "disk", "target": "off", "bitmaps": ["default"]}),
    ("block-dirty-bitmap-remove", {"node": "disk", "name": "huge"}),
)
WRONG: Final[Sequence[tuple[str, Mapping[str, object]]]] = (
    (ADD, {"node": "nowhere", "name": "x"}),
    (ADD, {"node": "nowhere", "name": ""}),
    (ADD, {"node": "disk", "name": ""}),
    (ADD, {"node": "disk", "name": "x" * 1024}),
    (ADD, {"node": "disk", "name": "default"}),
    *((ADD, {"node": "disk", "name": "x", "granularity": wrong}) for wrong in (0, 256, 513, -1, 1 << 32)),
    (ADD, {"node": "disk", "name": "x", "persistent": True}),
    (ADD, {"node": "disk"}),
    *((f"block-dirty-bitmap-{verb}", {"node": "nowhere", "name": "x"}) for verb in ("remove", "clear", "enable")),
    *((f"block-dirty-bitmap-{verb}", {"node": "disk", "name": "x"}) for verb in ("remove", "clear", "disable")),
    (MERGE, {"node": "nowhere", "target": "late", "bitmaps": ["fine"]}),
    (MERGE, {"node": "disk", "target": "x", "bitmaps": ["fine"]}),
    (MERGE, {"node": "disk", "target": "late", "bitmaps": ["fine", "x"]}),
    (MERGE, {"node": "disk", "target": "late", "bitmaps": [{"node": "nowhere", "name": "x"}]}),
    (MERGE, {"node": "disk", "target": "late", "bitmaps": ["fine", {"node": "other", "name": "small"}]}),
    ("x-debug-block-dirty-bitmap-sha256", {"node": "nowhere", "name": "x"}),
    ("x-debug-block-dirty-bitmap-sha256", {"node": "disk", "name": "x"}),
)


def bitmaps(execute: Execute) -> dict[str, list[dict[str, Any]]]:
    """The bitmaps in query-block, by device, with their digests."""
    found = {one["device"]: one["inserted"].get("dirty-bitmaps", []) for one in execute("query-block")}
    for device, listed in found.items():
        for one in listed:
            answer = execute("x-debug-block-dirty-bitmap-sha256", node=device, name=one["name"])
            one |= answer
    return found


@pytest.mark.qemu
@pytest.mark.parametrize("theirs", peer_parameters("7.2", "10.0", "newest"), indirect=True)
def test_the_same_commands_have_the_same_results_as_in_qemu(
    machine: MachineWithDisks, ours: Execute, theirs: Execute
) -> None:
    for command, arguments in STEPS:
        if command == "write":
            machine.disks[0].write(**arguments)  # type: ignore[arg-type]  # they are integers
            theirs(command, **arguments)
        else:
            assert (ours(command, **arguments), theirs(command, **arguments)) == ({}, {}), f"{command} {arguments}"
    for command, arguments in WRONG:
        text = theirs(command, **arguments)
        assert isinstance(text, str)
        assert ours(command, **arguments) == text, f"{command} {arguments}"
    assert bitmaps(ours) == bitmaps(theirs)


def act(kind: str, **data: object) -> dict[str, object]:
    return {"type": kind, "data": data}


def verb(name: str, bitmap: str, node: str = "disk") -> dict[str, object]:
    return act(f"block-dirty-bitmap-{name}", node=node, name=bitmap)


TRANSACTIONS: Final[Sequence[Sequence[dict[str, object]]]] = (
    (),
    (act(ADD, node="disk", name="next"), act(ADD, node="other", name="next"), verb("disable", "last")),
    (act(MERGE, node="disk", target="last", bitmaps=["next"]), verb("clear", "next"), verb("enable", "last")),
    (act(ADD, node="disk", name="temporary"), act(MERGE, node="disk", target="temporary", bitmaps=["last"])),
    (verb("remove", "temporary"),),
)
FAILING: Final[Sequence[Sequence[dict[str, object]]]] = (
    (verb("clear", "last"), act("abort")),
    (verb("clear", "last"), verb("disable", "last"), act(ADD, node="disk", name="more"), verb("clear", "nosuch")),
    (act(MERGE, node="disk", target="next", bitmaps=["last"]), act(ADD, node="disk", name="last")),
    (verb("clear", "next", "other"), verb("clear", "last"), act("abort"), verb("clear", "nosuch")),
)


@pytest.mark.qemu
@pytest.mark.parametrize("theirs", peer_parameters("7.2", "10.0", "newest"), indirect=True)
def test_transactions_have_the_same_results_as_in_qemu(
    machine: MachineWithDisks, ours: Execute, theirs: Execute
) -> None:
    for execute in (ours, theirs):
        assert execute(ADD, node="disk", name="last") == {}
    for number, actions in enumerate(TRANSACTIONS):
        machine.disks[0].write(number << 20, 512)
        theirs("write", offset=number << 20, length=512)
        assert (ours("transaction", actions=actions), theirs("transaction", actions=actions)) == ({}, {}), actions
        assert bitmaps(ours) == bitmaps(theirs)
    for actions in FAILING:
        text = theirs("transaction", actions=actions)
        assert isinstance(text, str)
        assert ours("transaction", actions=actions) == text, actions
        assert bitmaps(ours) == bitmaps(theirs)
    grouped = {"actions": [verb("clear", "last")], "properties": {"completion-mode": "grouped"}}
    assert ours("transaction", **grouped).lower() == theirs("transaction", **grouped).lower()  # a letter has changed


def test_a_transaction_that_fails_loses_no_write(machine: MachineWithDisks, ours: Execute) -> None:
    disk = machine.disks[0]
    last = disk.add_bitmap("last", 65536)
    disk.write(0, 512)
    # All of these QEMUs crash when the removal is undone.
    changes = [verb("clear", "last"), verb("disable", "last"), verb("remove", "last")]
    text = ours("transaction", actions=[*changes, act("abort")])
    assert text == "Transaction aborted using Abort action"
    disk.write(1 << 20, 512)
    assert disk.find_bitmap("last") is last
    assert last.enabled and last.count() == 2 * 65536


def test_the_members_of_a_disk(ours: Execute) -> None:
    (disk, other) = ours("query-block", flat=True)
    assert (disk["device"], other["device"]) == ("disk", "other")
    inserted = disk["inserted"]
    assert (inserted["node-name"], inserted["drv"], inserted["image"]["virtual-size"]) == ("disk", "raw", LENGTH)
    assert inserted["active"] is True
    assert "dirty-bitmaps" not in inserted
    assert ours("query-named-block-nodes") == [disk["inserted"], other["inserted"]]


@pytest.mark.parametrize("state", [RunState.INMIGRATE, RunState.POSTMIGRATE])
def test_a_disk_is_not_active_where_the_guest_is_not(machine: MachineWithDisks, ours: Execute, state: RunState) -> None:
    machine.set_run_state(state)
    assert ours("query-named-block-nodes")[0]["active"] is False


def test_bitmaps_that_are_in_use_or_inconsistent(machine: MachineWithDisks, ours: Execute) -> None:
    disk = machine.disks[0]
    busy, bad = disk.add_bitmap("busy", 65536, busy=True), disk.add_bitmap("bad", 65536)
    good = disk.add_bitmap("good", 65536)
    bad.mark_inconsistent()
    in_use = "Bitmap 'busy' is currently in use by another operation and cannot be used"
    inconsistent = "Bitmap 'bad' is inconsistent and cannot be used (block-dirty-bitmap-remove deletes it)"
    for verb in ("clear", "enable", "disable", "remove"):
        assert ours(f"block-dirty-bitmap-{verb}", node="disk", name="busy") == in_use
        if verb != "remove":
            assert ours(f"block-dirty-bitmap-{verb}", node="disk", name="bad") == inconsistent
    for source, text in ((busy, in_use), (bad, inconsistent)):
        assert ours(MERGE, node="disk", target="good", bitmaps=[source.name]) == text
        assert ours(MERGE, node="disk", target=source.name, bitmaps=["good"]) == text
    shown = bitmaps_of(ours)["bad"]
    assert (shown["inconsistent"], shown["recording"], shown["busy"]) == (True, False, False)
    assert "inconsistent" not in bitmaps_of(ours)["good"]
    assert ours("block-dirty-bitmap-remove", node="disk", name="bad") == {}
    assert disk.bitmaps == (good, busy)


def bitmaps_of(execute: Execute) -> dict[str, dict[str, Any]]:
    return {one["name"]: one for one in execute("query-block")[0]["inserted"]["dirty-bitmaps"]}


def test_the_types_of_the_bitmaps_to_merge(ours: Execute) -> None:
    ours(ADD, node="disk", name="one")
    assert (
        ours(MERGE, node="disk", target="one", bitmaps=[3])
        == "Invalid parameter type for 'bitmaps[0]', expected: BlockDirtyBitmapOrStr"
    )
    assert (
        ours(MERGE, node="disk", target="one", bitmaps=[{"node": "disk"}]) == "Parameter 'bitmaps[0].name' is missing"
    )
    assert ours(MERGE, node="disk", target="one", bitmaps=[]) == {}
    infos = {info["name"]: info for info in ours("query-qmp-schema")}
    members = {one["name"]: one["type"] for one in infos[infos[MERGE]["arg-type"]]["members"]}
    item = infos[infos[members["bitmaps"]]["element-type"]]
    assert (item["meta-type"], [one["type"] for one in item["members"]]) == ("alternate", ["str", "BlockDirtyBitmap"])


def test_dirty_ranges(machine: MachineWithDisks, ours: Execute) -> None:
    disk = machine.disks[0]
    bitmap = disk.add_bitmap("one", 512)
    assert ours("x-migfw-dirty-ranges", node="disk", name="one") == {"ranges": []}
    disk.write(1000, 600)
    disk.write(1 << 20, 1)
    first, second = {"offset": 512, "length": 1536}, {"offset": 1 << 20, "length": 512}
    assert ours("x-migfw-dirty-ranges", node="disk", name="one") == {"ranges": [first, second]}
    cut = {"offset": 1024, "length": 1024}
    assert ours("x-migfw-dirty-ranges", node="disk", name="one", start=1024) == {"ranges": [cut, second]}
    for sector in range(0, LENGTH // 512, 2):
        disk.write(sector * 512, 1)
    found: list[dict[str, int]] = []
    start: int | None = 0
    while start is not None:
        answer = ours("x-migfw-dirty-ranges", node="disk", name="one", start=start)
        found += answer["ranges"]
        start = answer.get("next")
    assert len(found) > 10_000
    assert [(one["offset"], one["offset"] + one["length"]) for one in found] == list(map(tuple, bitmap.runs().tolist()))
    bitmap.mark_inconsistent()
    assert "inconsistent" in ours("x-migfw-dirty-ranges", node="disk", name="one")


def test_a_guest_without_disks(client_of_tiny: QmpClient) -> None:
    assert client_of_tiny.execute("query-block") == client_of_tiny.execute("query-named-block-nodes") == []
    with pytest.raises(ClientError, match="Cannot find device='disk' nor node-name='disk'"):
        client_of_tiny.execute(ADD, {"node": "disk", "name": "one"})


@pytest.fixture
def client_of_tiny(server: QmpServer) -> Iterator[QmpClient]:
    with QmpClient(server.address) as client:
        yield client
