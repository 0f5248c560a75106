"""Random commands from several threads while a guest moves: in the end exactly one side has it, undamaged.

The seed determines the commands, their delays and the guest, but not how the threads interleave. More than a thousand
rounds were run when this was written; a few are here.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import pytest

from corefw.engine import Engine
from corefw.errors import UsageError
from corefw.machine import RunState
from corefw.states import IDLE, MigrationStatus
from tests.helpers.engines import PATIENCE, Pair, counting, query_migrate
from tests.helpers.machines import CountingMachine

ROUNDS = 16
MIB = 1 << 20


class Watched(CountingMachine):
    """A guest that notices if it is started while the other one runs."""

    other: CountingMachine | None = None
    wrong: str | None = None

    def start(self) -> None:
        if self.other is not None and self.other.run_state is RunState.RUNNING:
            self.wrong = "it was started while it ran on the other side"
        super().start()


def commands(source: Engine, choice: random.Random) -> dict[Callable[[], object], int]:
    """The commands, and how often each is given."""

    def cont() -> None:
        # If it may be running elsewhere, only the user can decide.
        if source.settings.capability("return-path") and source.machine.run_state is not RunState.POSTMIGRATE:
            source.cont()

    return {
        source.stop: 3,
        cont: 3,
        source.report: 3,
        lambda: source.continue_migration(MigrationStatus.PRE_SWITCHOVER): 4,
        lambda: source.set_parameters({"max-bandwidth": choice.choice([0, MIB, 100 * MIB])}): 2,
        lambda: source.migrate("tcp:127.0.0.1:1"): 1,
        source.cancel: choice.choice([0, 0, 1, 2]),
    }


def ask(source: Engine, seed: int, seconds: float) -> None:
    choice = random.Random(seed)
    known = commands(source, choice)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with suppress(UsageError):  # some have to be refused
            choice.choices(list(known), list(known.values()))[0]()
        time.sleep(choice.choice([0, 0, 0.0005, 0.003]))


def end(source: Engine, *, cancel: bool) -> None:
    """End the migration, whatever it waits for."""
    source.set_parameters({"max-bandwidth": 0, "downtime-limit": 500})
    deadline = time.monotonic() + PATIENCE
    while source.outgoing.status not in IDLE:
        assert time.monotonic() < deadline, f"it hangs in {source.outgoing.status}"
        with suppress(UsageError):
            if cancel:
                source.cancel()
            else:
                source.continue_migration(MigrationStatus.PRE_SWITCHOVER)
        time.sleep(0.002)


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_one_side_has_the_guest_and_no_write_is_lost(pair: Pair, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("corefw.engine.source.LAST_WORDS", PATIENCE)  # on a busy machine the answer may take long
    choice = random.Random(seed)
    pages = choice.choice([16, 64, 512])
    here, there = Watched(pages), Watched(pages, incoming=True)
    here.other, there.other = there, here
    source, destination = pair.source(here, running=choice.random() < 0.9), pair.destination(there)
    source.set_capabilities({"pause-before-switchover": choice.random() < 0.4, "return-path": choice.random() < 0.8})
    source.set_parameters({"downtime-limit": choice.choice([0, 1, 300])})
    source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
    asking = [threading.Thread(target=ask, args=(source, 100 * seed + number, 0.15)) for number in range(3)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join(PATIENCE)
        assert not thread.is_alive(), "a command hangs"
    end(source, cancel=choice.random() < 0.3)
    if source.outgoing.status is not MigrationStatus.COMPLETED and destination.incoming.status is MigrationStatus.SETUP:
        destination.close()  # no source has connected, or one that sends nothing more
    arrived = destination.wait_incoming(PATIENCE)

    assert (here.wrong, there.wrong) == (None, None)
    assert arrived in ("completed", "failed")
    assert here.run_state is not RunState.FINISH_MIGRATE
    if arrived == "completed":
        assert here.run_state is RunState.POSTMIGRATE
        there.stop(RunState.PAUSED)
        assert counting(destination).check() >= here.check()
        if source.settings.capability("return-path"):
            assert source.outgoing.status is MigrationStatus.COMPLETED, "a cancel that came too late changes nothing"
    elif here.run_state is RunState.POSTMIGRATE:
        found = query_migrate(source)
        assert "may be running the guest" in (found.get("error-desc") or found["x-migfw"]["reason"])
    else:
        assert there.starts == 0
        here.stop(RunState.PAUSED)
        here.check()
