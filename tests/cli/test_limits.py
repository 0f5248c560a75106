"""`migfw migrate --timeout`, --max-passes and --on-timeout, on engines with real guests."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.conftest import Engine, Engines
from tests.cli.test_migrate import SLOW, begin, pair, setting, status
from tests.helpers.cli import check_refused
from tests.helpers.qemu import wait_until

__all__ = ["pair"]  # a fixture

BUSY = ("stress", "--opt=ram=8M", "--opt=working-set=8M", "--opt=dirty-rate=64M")
"""At the rate below, this guest dirties all of its RAM several times while it is sent once."""
LINK = "--param=max-bandwidth=8M"


def busy_pair(engines: Engines) -> tuple[Engine, Engine]:
    return engines(*BUSY, "--name=here"), engines(*BUSY, "--name=there", "--incoming=tcp:127.0.0.1:0")


def test_a_timeout_ends_it_and_says_where_the_guest_is(pair: tuple[Engine, Engine]) -> None:
    here, there = pair
    done = here.call("migrate", there.uri, SLOW, "--timeout=500ms")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "failed: it took longer than 500 ms" in done.stderr
    assert "; the guest is running here" in done.stderr


def test_it_holds_when_nobody_watches_and_only_for_this_migration(pair: tuple[Engine, Engine]) -> None:
    here, there = pair
    assert here.call("migrate", there.uri, SLOW, "--timeout=500ms", "--detach").returncode == 0
    wait_until(lambda: status(here) == "failed", "the timeout")
    assert here.ask("query-status")["status"] == "running"
    assert setting(here, "x-migfw-timeout") == 500
    assert here.call("migrate", "exec:exit 3").returncode == 1
    assert setting(here, "x-migfw-timeout") == 0


def test_a_guest_that_writes_too_much_is_said_to_and_may_be_stopped(engines: Engines) -> None:
    here, there = busy_pair(engines)
    command = (there.uri, LINK, "--param=downtime-limit=1ms", "--json")
    process = begin(here, *command, "--timeout=10m")
    own = wait_until(
        lambda: (own := here.ask("query-migrate")["x-migfw"]).get("converges") is False and own, "the verdict"
    )
    assert "time-left" not in own
    assert own["dirty-rate"] > 4 << 20
    (warning,) = own["warnings"]
    assert warning.startswith("will not converge: the guest dirties ")
    assert "raise downtime-limit to " in warning
    shown = here.call("status").stdout
    assert "will not converge" in shown
    here.call("set", "x-migfw-on-timeout=switchover", "x-migfw-timeout=1s")
    out, err = process.finish()
    assert (process.returncode, err) == (0, "")
    document = json.loads(out)
    forced, late = document["x-migfw"]["warnings"]
    assert "so the guest was stopped with" in forced
    assert "over the downtime-limit of 1 ms" in late
    assert document["downtime"] > 1
    assert document["ram"]["dirty-sync-count"] == document["x-migfw"]["pass"]
    assert document["x-migfw"]["sections"]["ram"]["sent"] > 8 << 20
    assert there.call("verify").returncode == 0


def test_so_many_passes(engines: Engines) -> None:
    here, there = busy_pair(engines)
    done = here.call("migrate", there.uri, LINK, "--param=downtime-limit=50ms", "--max-passes=1")
    assert done.returncode == 1
    assert "1 pass was sent (x-migfw-max-passes)" in done.stderr
    assert "the guest is running here" in done.stderr


WRONG = {
    ("--timeout=30",): "'--timeout 30': give a unit, as in 30s or 30m",
    ("--timeout=soon",): "'soon' is not a time",
    ("--timeout=0s",): "expected a time longer than zero",
    ("--max-passes=0",): "0 is not in the range x>=1",
    ("--on-timeout=cancel",): "give --timeout or --max-passes as well",
    ("--on-timeout=panic", "--timeout=1s"): "is not one of",
}


def test_wrong_limits_start_nothing(engine: Engine) -> None:
    check_refused(
        {("tcp:127.0.0.1:1", *wrong, "--name", engine.name): text for wrong, text in WRONG.items()},
        ("migrate",),
        engine.runtime,
    )
    assert status(engine) == "none"


LATE = """
import time
from corefw_machine_python import guest

class Late(guest.Program):
    data = guest.array("data", shape=(4 << 20,), dtype="uint8")

    def tick(self):
        time.sleep(0.001)

    def before_stop(self):
        self.data += 1
        time.sleep(0.2)
"""


def test_a_stop_that_took_too_long_says_with_what(engines: Engines, tmp_path: Path) -> None:
    """before_stop() is slow, and dirties pages that have to be sent while the guest is stopped."""
    (tmp_path / "late.py").write_text(LATE)
    program = f"{tmp_path}/late.py:Late"
    here, there = engines(program, "--name=here"), engines(program, "--name=there", "--incoming=tcp:127.0.0.1:0")
    done = here.call("migrate", there.uri, "--param=downtime-limit=50ms")
    assert (done.returncode, done.stderr) == (0, "")
    (warning,) = [line for line in done.stdout.splitlines() if line.startswith("warning:")]
    assert "over the downtime-limit of 50 ms: stopping it took " in warning
    assert "4.0 MiB were sent while it was stopped" in warning
