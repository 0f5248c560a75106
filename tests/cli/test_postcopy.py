"""Postcopy from the command line: the guest moves before its RAM has, and a broken connection is recovered."""

from __future__ import annotations

import json
import os
import re
import signal

from corefw.testing.tasks import wait_until
from tests.cli.conftest import Engine, Engines
from tests.helpers.cli import TIMEOUT, Command, migfw, start
from tests.helpers.cutting import Cut, CutProxy

BUSY = ("stress", "--opt=ram=16M", "--opt=working-set=8M", "--opt=dirty-rate=400M")
"""Writes faster than SLOW, so precopy would not end."""
SLOW = ("--param=max-bandwidth=16M", "--param=downtime-limit=1ms")


NOWHERE = "tcp:127.0.0.1:1"


def status(engine: Engine) -> str:
    return str(engine.ask("query-migrate").get("status"))


def start_postcopy(engines: Engines) -> tuple[Engine, Engine]:
    source = engines(*BUSY, "--name=from")
    destination = engines(*BUSY, "--name=to", "--incoming=tcp:127.0.0.1:0")
    # What is left takes long enough for a test to interfere, also on a busy machine.
    limits = ("--param=max-bandwidth=100K", "--param=max-postcopy-bandwidth=100K")
    detached = source.call("migrate", destination.uri, "--cap=postcopy-ram", *limits, "--detach")
    assert detached.returncode == 0, detached.stderr
    switched = source.call("postcopy")
    assert switched.returncode == 0, switched.stderr
    assert wait_until(lambda: {status(source), status(destination)} == {"postcopy-active"})
    return source, destination


def test_it_switches_after_the_first_pass(engines: Engines) -> None:
    source = engines(*BUSY, "--name=from")
    destination = engines(*BUSY, "--name=to", "--incoming=tcp:127.0.0.1:0", "--cap=postcopy-blocktime")
    moved = source.call("migrate", "--postcopy", destination.uri, *SLOW, "--json")
    assert moved.returncode == 0, moved.stderr
    ram, own = (json.loads(moved.stdout)[name] for name in ("ram", "x-migfw"))
    assert own["postcopy-switch"]["reason"] == "everything has been sent once"
    assert ram["postcopy-bytes"] > 0
    assert ram["precopy-bytes"] > ram["total"]
    verified = destination.call("verify")
    assert verified.returncode == 0, verified.stderr
    shown = destination.call("status").stdout
    assert re.search(r"^page faults: +[\d,]+, latency p50 \S+ ms, p99 \S+ m?s, max", shown, re.MULTILINE), shown
    assert re.search(r"^blocked: +\S+ m?s as a whole", shown, re.MULTILINE), shown
    faults = json.loads(destination.call("status", "--json").stdout)["migration"]["x-migfw"]["page-faults"]
    assert faults["latency-p50"] <= faults["latency-p99"] <= faults["latency-max"]


def test_a_connection_that_was_paused_is_recovered(engines: Engines) -> None:
    source, destination = start_postcopy(engines)
    refused = source.call("cancel")
    assert refused.returncode == 2 and "cannot cancel" in refused.stderr
    paused = source.call("pause")
    assert paused.returncode == 0, paused.stderr
    assert wait_until(lambda: {status(source), status(destination)} == {"postcopy-paused"})
    left = source.call("status").stdout
    assert re.search(r"^guest: +finish-migrate \(in postcopy it runs on the destination\)$", left, re.MULTILINE), left
    stopped = source.call("stop")
    assert (stopped.returncode, stopped.stdout) == (1, "")
    assert stopped.stderr == "migfw: the guest has left for the destination: stop it there\n"
    for engine in (source, destination):
        shown = engine.call("status").stdout
        assert re.search("^error: ", shown, re.MULTILINE), shown
        assert "'migfw recover URI' on the destination" in shown
        assert "after 'migfw pause' on the destination" in shown
        assert "warning" not in shown
    assert re.search("^migration: +postcopy-paused, .*iB of its RAM still to come", shown, re.MULTILINE), shown
    unverified = destination.call("verify")
    assert unverified.returncode == 1 and "until the postcopy migration is recovered" in unverified.stderr
    nowhere = source.call("migrate", NOWHERE, "--resume")
    assert nowhere.returncode == 1
    assert "migfw recover URI" in nowhere.stderr and "refused" in nowhere.stderr
    assert re.search("^error: .* refused", source.call("status").stdout, re.MULTILINE)
    one_way = destination.call("recover", "exec:cat")
    assert one_way.returncode == 2 and "has no return path, which postcopy needs" in one_way.stderr
    recovering = destination.call("recover", "tcp:127.0.0.1:0")
    assert recovering.returncode == 0, recovering.stderr
    uri = recovering.stdout.split()[-1]
    assert not uri.endswith(":0")
    assert source.call("set", "max-postcopy-bandwidth=0").returncode == 0
    moved = source.call("migrate", uri, "--resume")
    assert moved.returncode == 0, moved.stderr
    verified = destination.call("verify")
    assert verified.returncode == 0, verified.stderr


def test_the_status_says_that_it_goes_on_by_itself(engines: Engines) -> None:
    source, destination = start_postcopy(engines)
    assert source.call("set", "x-migfw-reconnect=-1").returncode == 0
    assert destination.call("pause").returncode == 0
    assert wait_until(lambda: "closed by migrate-pause" in destination.call("status").stdout)
    assert wait_until(lambda: "of any number of attempts have failed" in source.call("status").stdout)
    assert destination.call("recover", destination.uri).returncode == 0
    assert source.call("set", "max-postcopy-bandwidth=0").returncode == 0
    assert wait_until(lambda: status(destination) == "completed")


def shows(command: Command, pattern: str) -> None:
    """Wait for a line of its stdout with this pattern."""
    assert command.stdout is not None
    passed = []
    for line in iter(command.stdout.readline, ""):
        if re.search(pattern, line):
            return
        passed.append(line)
    raise AssertionError(f"no {pattern!r} in {''.join(passed)!r}")


def test_a_connection_that_breaks_is_replaced(engines: Engines) -> None:
    source = engines(*BUSY, "--name=from")
    destination = engines(*BUSY, "--name=to", "--incoming=tcp:127.0.0.1:0")
    with CutProxy(destination.uri) as proxy:
        limits = ("--param=max-bandwidth=100K", "--param=max-postcopy-bandwidth=100K")
        how = ("--postcopy=now", "--reconnect=forever", "--name=from", *limits)
        moving = start("migrate", proxy.uri, *how, runtime=engines.runtime)
        shows(moving, r"^postcopy-active, .* left, [\d,]+ pages, [\d,]+ requested by the guest")
        assert wait_until(lambda: status(destination) == "postcopy-active")  # a reset loses what is not read yet
        proxy.lead_to(NOWHERE)  # until the command has seen that the connection is broken
        proxy.cut(Cut.RESET)
        shows(moving, r"^the connection broke: .*; dialling again in .*s \(attempt \d+\)")
        proxy.lead_to(destination.uri)
        shows(moving, "^connected again")
        assert source.call("set", "max-postcopy-bandwidth=0").returncode == 0
        _, err = moving.finish()
    assert moving.returncode == 0, err
    verified = destination.call("verify")
    assert verified.returncode == 0, verified.stderr
    wrong = source.call("migrate", "--reconnect=always", proxy.uri)
    assert wrong.returncode == 2 and "a number or 'forever'" in wrong.stderr


def test_the_engine_switches_by_itself(engines: Engines) -> None:
    """Without a command that watches, and at once; the option may precede the URI."""
    source = engines(*BUSY, "--name=from", "--stay")
    destination = engines(*BUSY, "--name=to", "--incoming=tcp:127.0.0.1:0")
    detached = source.call("migrate", "--postcopy=now", destination.uri, "--detach")
    assert detached.returncode == 0, detached.stderr
    assert wait_until(lambda: status(source) == "completed")
    shown = source.call("status").stdout
    assert re.search(
        r"^switched: +after .* in pass 1, with 16.0 MiB left: it was to switch at once$", shown, re.MULTILINE
    )
    wrong = source.call("migrate", "--postcopy=sometimes", destination.uri)
    assert wrong.returncode == 2 and "after-first-pass" in wrong.stderr


def test_neither_side_ends_in_postcopy_without_being_told_twice(engines: Engines) -> None:
    source, destination = start_postcopy(engines)
    assert source.call("pause").returncode == 0
    assert wait_until(lambda: status(destination) == "postcopy-paused")
    for engine in (source, destination):
        refused = engine.call("quit")
        assert refused.returncode == 2 and "it is lost if either side ends (--force" in refused.stderr
    printed = destination.process.stderr
    assert printed is not None
    destination.process.send_signal(signal.SIGINT)
    warnings = iter(printed.readline, "")
    assert any("the guest is lost if either side ends; send the signal again" in line for line in warnings)
    assert status(destination) == "postcopy-paused"
    destination.process.send_signal(signal.SIGINT)
    assert destination.process.wait(TIMEOUT) == 130
    assert "this engine stays" not in printed.read()
    assert source.call("quit", "--force").returncode == 0
    assert source.process.wait(TIMEOUT) == 0


def test_a_second_migration_is_told_about_the_first(engines: Engines) -> None:
    source, destination = start_postcopy(engines)
    wrong = source.call("migrate", destination.uri)
    assert wrong.returncode == 2 and "'migfw status' shows it, wait for its end" in wrong.stderr
    assert source.call("pause").returncode == 0
    assert wait_until(lambda: status(source) == "postcopy-paused")
    wrong = source.call("migrate", destination.uri)
    assert wrong.returncode == 2 and "--resume continues it" in wrong.stderr
    assert source.call("set", "max-postcopy-bandwidth=0").returncode == 0
    moved = source.call("migrate", destination.uri, "--resume")
    assert moved.returncode == 0, moved.stderr


def test_postcopy_without_a_return_path_is_refused(engines: Engines) -> None:
    source = engines(*BUSY, "--name=from")
    wrong = source.call("migrate", "tcp:127.0.0.1:1", "--postcopy", "--cap=return-path=off")
    assert wrong.returncode == 2 and "postcopy needs the return path" in wrong.stderr


def kill_guest(engine: Engine) -> None:
    os.kill(int(engine.ask("x-migfw-status")["machine"]["information"]["pid"]), signal.SIGKILL)


def test_the_process_that_the_guest_has_left_is_not_needed(engines: Engines) -> None:
    """The kernel may kill it when memory runs out; the engine still has the RAM that is left to send."""
    source, destination = start_postcopy(engines)
    kill_guest(source)
    assert wait_until(lambda: "internal-error" in source.call("status").stdout)
    assert source.call("set", "max-postcopy-bandwidth=0").returncode == 0
    assert wait_until(lambda: status(destination) == "completed")
    verified = destination.call("verify")
    assert verified.returncode == 0, verified.stderr


def test_the_commands_are_in_the_help() -> None:
    shown = migfw("--help").stdout
    assert all(f"  {name} " in shown for name in ("postcopy", "pause", "recover"))
    assert all(option in migfw("migrate", "--help").stdout for option in ("--postcopy", "--resume"))
