"""The displays and the summary, for given answers of query-migrate."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from corefw.cli.display import Lines, open_display
from corefw.client.follow import Display, Follower
from corefw.client.progress import Progress, summary, throughput
from corefw.qmp.client import QmpClient
from corefw.qmp.engines import EngineClient
from corefw.testing.tasks import Task, wait_until
from tests.cli.conftest import SMALL, Engines

ACTIVE: dict[str, Any] = {
    "status": "active",
    "total-time": 1500,
    "setup-time": 20,
    "expected-downtime": 35,
    "ram": {
        "total": 1 << 30,
        "remaining": 1 << 28,
        "transferred": 3 << 28,
        "mbps": 8.0,
        "page-size": 4096,
        "dirty-pages-rate": 256,
        "dirty-sync-count": 2,
        "normal": 1000,
        "duplicate": 7,
    },
}

COMPLETED: dict[str, Any] = {
    **{name: value for name, value in ACTIVE.items() if name != "expected-downtime"},
    "status": "completed",
    "total-time": 2020,
    "downtime": 12,
}


def test_progress_counts_in_bytes() -> None:
    progress = Progress.of(ACTIVE)
    assert (progress.rate, progress.dirty_rate, progress.fraction) == (1_000_000, 1 << 20, 0.75)
    assert progress.heading() == "active, pass 2"
    assert progress.details() == [
        *("256.0 MiB of 1.0 GiB left", "976.6 KiB/s", "dirtied 1.0 MiB/s", "expected downtime 35 ms")
    ]


OWN: dict[str, Any] = {
    **ACTIVE,
    "x-migfw": {
        "total": 5 << 30,
        "remaining": 3 << 30,
        "dirty-rate": 2 << 20,
        "warnings": [],
        "sections": {"ram": {"total": 1 << 30, "sent": 10}, "job": {"total": 4 << 30, "sent": 20}},
    },
}
"""An answer of migfw: three quarters of its RAM are done, and another section has most of its data left."""


def with_own(**figures: Any) -> Progress:
    return Progress.of(
        {**OWN, "x-migfw": OWN["x-migfw"] | {name.replace("_", "-"): value for name, value in figures.items()}}
    )


def test_progress_is_that_of_all_handlers() -> None:
    assert with_own().percent == "40 %"
    assert with_own().details()[0] == "3.0 GiB of 5.0 GiB left"
    assert "dirtied 2.0 MiB/s" in with_own().details()


def test_progress_says_only_what_is_known() -> None:
    assert not any("downtime" in one or "about" in one for one in with_own().details())
    assert "this pass ends in about 2 min 30 s" in with_own(pass_time_left=150_000).details()
    known = with_own(pass_time_left=1000, time_left=150_000, expected_downtime=35, converges=True).details()
    assert known[1] == "done in about 2 min 30 s"
    assert known[-1] == "expected downtime 35 ms"
    assert "will not converge" in with_own(pass_time_left=1000, converges=False).details()


def test_a_qemu_that_has_measured_nothing_yet_expects_no_downtime() -> None:
    """QEMU reports the downtime limit until then."""
    answer = {**ACTIVE, "ram": {**ACTIVE["ram"], "dirty-pages-rate": 0}}
    assert Progress.of(answer).expected_downtime is None


def test_nothing_is_100_percent_before_nothing_is_left() -> None:
    assert Progress(total=1000, remaining=1).percent == "99 %"
    assert Progress(total=1000, remaining=0).percent == "100 %"


def test_a_warning_is_a_line_of_its_own_once() -> None:
    written: list[str] = []
    lines = Lines(written.append, lambda: 0.0)
    for warnings in ([], ["will not converge: 1"], ["will not converge: 2"]):
        lines.update(with_own(warnings=warnings))
    assert [line for line in written if "converge" in line] == ["will not converge: 1"]


def test_the_summary_has_warnings_and_the_sections_of_other_handlers() -> None:
    answer = {**OWN, "status": "completed", "x-migfw": OWN["x-migfw"] | {"warnings": ["the guest was down for long"]}}
    facts = summary(answer)
    assert ("warning", "the guest was down for long") in facts
    assert ("sections", "ram 10 B, job 20 B") in facts


def test_a_destination_whose_plugins_report_figures() -> None:
    """Their figures have no total, which only a source knows."""
    answer = {"status": "active", "x-migfw": {"sections": {"job": {"total": 3}, "note": {"got": 10}}}}
    assert summary(answer) == [("status", "active")]


def test_progress_in_postcopy_is_of_what_follows() -> None:
    """The guest runs on the destination, so nothing is dirtied here, and no pass follows."""
    progress = Progress.of({**ACTIVE, "status": "postcopy-active"})
    assert progress.line() == (
        "postcopy-active, 75 %, 256.0 MiB of 1.0 GiB left, 65,536 pages, 0 requested by the guest,"
        " done in about 4 min 28 s, 976.6 KiB/s, the guest runs on the destination"
    )


def test_the_summary_says_what_followed_in_postcopy() -> None:
    answer = {**COMPLETED, "ram": {**COMPLETED["ram"], "postcopy-bytes": 3 << 20}}
    assert ("postcopy", "3.0 MiB sent while the guest ran on the destination") in summary(answer)


@pytest.mark.parametrize("answer", [{}, {"status": "setup"}, {"status": "active", "ram": {}}])
def test_progress_of_an_answer_that_says_little(answer: dict[str, Any]) -> None:
    progress = Progress.of(answer)
    assert progress.fraction == 0.0
    assert progress.details() == []


def test_lines_come_once_a_second_and_only_on_change() -> None:
    written: list[str] = []
    now = [0.0]
    lines = Lines(written.append, lambda: now[0])
    answers = [ACTIVE, ACTIVE, {**ACTIVE, "expected-downtime": 1}, {**ACTIVE, "expected-downtime": 2}]
    for number, answer in enumerate(answers):
        now[0] = number * 0.6
        lines.update(Progress.of(answer))
    assert [line.rpartition(" downtime ")[2] for line in written] == ["35 ms", "1 ms"]
    assert written[0].startswith("active, pass 2, 75 %, 256.0 MiB of 1.0 GiB left")


def test_a_pass_that_sends_more_than_there_is_stays_in_bounds() -> None:
    assert Progress(total=10, remaining=20).fraction == 0.0


def test_without_a_terminal_there_are_lines_or_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with open_display("x", as_json=False) as display:
        assert type(display) is Lines
    with open_display("x", as_json=True) as display:
        assert type(display) is Display
        display.update(Progress.of(ACTIVE))
        display.say("hello")
    assert capsys.readouterr() == ("", "")


def test_the_summary_of_a_migration() -> None:
    assert throughput(COMPLETED) == (3 << 28) / 2
    assert summary(COMPLETED) == [
        ("status", "completed"),
        ("total time", "2.02 s"),
        ("setup time", "20 ms"),
        ("downtime", "12 ms"),
        ("throughput", "384.0 MiB/s"),
        ("passes", "2"),
        ("sent", "768.0 MiB for 1.0 GiB of RAM"),
        ("pages", "1,000 sent whole, 7 zero"),
    ]


def test_the_summary_of_one_that_failed() -> None:
    assert summary({"status": "failed", "error-desc": "no route"}) == [("status", "failed"), ("error", "no route")]
    assert summary({}) == [("status", "none")]


class Said(Display):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def test_a_destination_that_takes_nothing_is_hinted_at(engines: Engines) -> None:
    source = engines(*SMALL, "--cap=return-path")
    with socket.create_server(("127.0.0.1", 0)) as silent, QmpClient(source.address) as client:
        engine, said = EngineClient(client), Said()
        engine.call("migrate", uri=f"tcp:127.0.0.1:{silent.getsockname()[1]}")
        following = Task("following", Follower(engine, said, silence=0.2).wait)
        assert wait_until(lambda: bool(said.lines))
        assert "nothing was sent for 0.2 s (status 'setup')" in said.lines[0]
        source.call("cancel")
        assert following.result()["status"] == "cancelled"
