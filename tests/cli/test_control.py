"""The commands that send one QMP command each, on a single engine."""

from __future__ import annotations

import json

from tests.cli.conftest import Engine
from tests.helpers.cli import check_refused, migfw_each


def each(engine: Engine, *commands: str) -> list[tuple[int, str, str]]:
    return migfw_each([(*command.split(), "--name", engine.name) for command in commands], engine.runtime)


def test_stop_and_cont_say_what_holds_now(engine: Engine) -> None:
    stopped, state, again, going, as_json = each(engine, "stop", "status", "stop", "cont", "stop --json")
    assert stopped == (0, "the guest is paused\n", "")
    assert "guest:         paused" in state[1]
    assert "writes" in state[1]  # the fields of a stopped guest are shown
    assert again == stopped
    assert going == (0, "the guest is running\n", "")
    assert json.loads(as_json[1]) == {"guest": "paused", "migration": "none"}
    assert each(engine, "cont")[0][0] == 0


def test_status_is_a_document_too(engine: Engine) -> None:
    for_people, for_programs = each(engine, "status", "status --json")
    assert "machine:       python, type python/Stress" in for_people[1]
    assert "RAM:           1.0 MiB (ram 1.0 MiB)" in for_people[1]
    document = json.loads(for_programs[1])
    assert document["name"] == engine.name
    assert document["pid"] == engine.process.pid
    assert document["status"] == "running"


def test_ps_is_a_document_too(engine: Engine) -> None:
    table, document = migfw_each([("ps",), ("ps", "--json")], engine.runtime)
    assert table[1].splitlines()[1].split()[:5] == ["stress", str(engine.process.pid), "python", "running", "none"]
    assert json.loads(document[1])[0]["qmp"] == engine.address


def test_verify_prints_what_the_guest_found(engine: Engine) -> None:
    for_people, for_programs = each(engine, "verify", "verify --json")
    assert for_people[1].endswith("\nverified: ok\n")
    facts = json.loads(for_programs[1])
    assert facts["writes"] == facts["found"]


def test_set_takes_both_kinds_at_once(engine: Engine) -> None:
    done, parameters, capabilities, off = each(
        engine,
        "set max-bandwidth=200M downtime-limit=0.05s events=on",
        "qmp query-migrate-parameters",
        "qmp query-migrate-capabilities",
        "set events=off --json",
    )
    assert (done[0], done[2]) == (0, "")
    assert [line.split() for line in done[1].splitlines()] == [
        ["events:", "on"],
        ["max-bandwidth:", "209715200"],
        ["downtime-limit:", "50"],
    ]
    assert json.loads(parameters[1])["downtime-limit"] == 50
    assert {"capability": "events", "state": True} in json.loads(capabilities[1])
    assert json.loads(off[1]) == {"events": False}


def test_set_is_all_or_nothing(engine: Engine) -> None:
    before = engine.ask("query-migrate-parameters")
    refused = each(engine, "set downtime-limit=7ms x-colo=on")[0]
    assert refused[0] == 2
    assert engine.ask("query-migrate-parameters") == before


def test_qmp_reads_json_values_and_strings(engine: Engine) -> None:
    set_to, limit, name = each(
        engine,
        "qmp migrate-set-parameters downtime-limit=123",
        "qmp query-migrate-parameters",
        "qmp query-name",
    )
    assert set_to == (0, "{}\n", "")
    assert json.loads(limit[1])["downtime-limit"] == 123
    assert json.loads(name[1]) == {"name": engine.name}


def test_cancel_without_a_migration_is_fine(engine: Engine) -> None:
    assert each(engine, "cancel") == [(0, "migration: none; the guest is running\n", "")]


WRONG = {
    ("continue",): "Migration not in expected state: none",
    ("postcopy",): "Enable postcopy",
    ("pause",): "postcopy-active",
    ("recover", "tcp:localhost:1"): "postcopy is paused",
    ("recover", "carrier-pigeon:x"): "no installed plugin has the scheme 'carrier-pigeon'",
    ("recover", "file:/tmp/\udcff"): "'file:/tmp/\\xff' is not a migration URI: a URI has to be UTF-8",
    ("set", "altitude=3"): "unknown parameter 'altitude'",
    ("set", "altitude"): "'altitude': expected NAME=VALUE",
    ("set", "events=perhaps"): "expected events=on or events=off",
    ("set", "downtime-limit=9h"): "expects a time in milliseconds",
    ("set", "downtime-limit=3000s"): "from 0 to 2000000",
    ("qmp", "fly"): "has no command 'fly'",
    ("qmp", "query-name", "hard=true"): "'hard' is unexpected",
    ("qmp", "query-status", "x"): "'x': expected NAME=VALUE",
}


def test_wrong_usage_is_one_line(engine: Engine) -> None:
    check_refused(WRONG, (), engine.runtime)


NOWHERE = ["stop", "cont", "verify", "quit", "status", "cancel", "continue", "postcopy", "pause", "set a=1", "qmp x"]


def test_every_command_says_when_there_is_no_engine(engine: Engine) -> None:
    wrong = {
        (*command.split(), *where): complaint
        for command in NOWHERE
        for where, complaint in {
            ("--name", "nobody"): "no engine named 'nobody' is running (running: stress)",
            ("--qmp", "unix:/nonexistent"): "no migfw or QEMU answers at unix:/nonexistent",
        }.items()
    }
    check_refused(wrong, (), engine.runtime)
