"""postcopy-blocktime: a python guest's figures have the members, types and units of the newest QEMU's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from corefw.engine.blocktime import BUCKETS
from corefw.plugins import Plugins
from tests.helpers.cli import migfw
from tests.helpers.engines import Pair, query_migrate
from tests.helpers.moving import Move
from tests.helpers.peers import find_peer, needs_peers
from tests.helpers.qemu import Guest, Qemu, needs_qemu, wait_until

pytestmark = [pytest.mark.qemu, needs_qemu]


@needs_peers("newest")
def test_the_members_are_qemus(guest: Guest, folder: Path) -> None:
    theirs, shown = measured_by_qemu(guest, folder)
    ours = measured_here()
    members = {name for name in theirs if name.startswith("postcopy-")}
    assert members == {name for name in ours if name.startswith("postcopy-")}
    assert {name: type(theirs[name]) for name in members} == {name: type(ours[name]) for name in members}
    for answer in (theirs, ours):
        assert len(answer["postcopy-latency-dist"]) == BUCKETS
        faults = sum(answer["postcopy-latency-dist"])
        assert faults > 0
        # In milliseconds. What looks at the guest's RAM before it runs may wait for a page as well.
        guests, all_of_them = sum(answer["postcopy-vcpu-blocktime"]), faults * answer["postcopy-latency"] / 1e6
        others = faults * answer["postcopy-non-vcpu-latency"] / 1e6
        assert guests - 2 <= all_of_them <= guests + others + 2, answer
    assert "page faults:" in shown and "blocked:" in shown, "migfw status reads those of a QEMU as well"


def measured_by_qemu(guest: Guest, folder: Path) -> tuple[dict[str, Any], str]:
    """A QEMU destination's figures for a guest that arrived in postcopy, and what `migfw status` shows of them."""
    peer, uri, control = find_peer("newest"), f"unix:{folder}/in", f"unix:{folder}/qmp"
    with (
        Qemu(boot=guest.image, peer=peer) as source,
        Qemu("-qmp", f"{control},server=on,wait=off", boot=guest.image, peer=peer, incoming="defer") as destination,
    ):
        source.wait_printed("B")
        source.capabilities("postcopy-ram")
        destination.capabilities("postcopy-ram", "postcopy-blocktime")
        destination.command("migrate-incoming", uri=uri)
        source.command("migrate-set-parameters", max_postcopy_bandwidth=1 << 20)
        source.migrate(uri, bandwidth=1 << 20)  # so slowly that the guest is faster than the background stream
        source.command("migrate-start-postcopy")
        wait_until(lambda: source.status() in ("postcopy-active", "completed"), "the switch to postcopy")
        destination.wait_running()
        wait_until(lambda: source.command("query-migrate")["ram"]["postcopy-requests"] > 0, "a page request")
        source.command("migrate-set-parameters", max_postcopy_bandwidth=0)
        source.wait_migrated()
        destination.wait_running()
        answer: dict[str, Any] = destination.command("query-migrate")
        return answer, migfw("status", "--qmp", control).stdout


def measured_here() -> dict[str, Any]:
    """The same figures for a python guest."""
    with Pair(Plugins.load()) as pair:
        move = Move(pair)
        move.destination.set_capabilities({"postcopy-blocktime": True})
        move.switch()
        wait_until(lambda: query_migrate(move.destination)["x-migfw"]["page-faults"]["count"] > 0, "a page fault")
        move.hurry()
        move.completes()
        return query_migrate(move.destination)
