"""`make bench`: measure, print the table, write bench/results.

The law: a scenario that cannot be measured says why and does not keep the others from being measured; only a full run
replaces what is in bench/results; Ctrl-C ends everything that was started, and writes nothing. Exit status: 0 every
goal that was measured is met, 1 one is not or a scenario failed, 2 wrong usage, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from bench.engines import BenchError, Ours, Qemu, lacking
from bench.facts import facts
from bench.report import document, page
from bench.report.table import print_table
from bench.results import Outcome
from bench.scenarios import SCENARIOS
from bench.setting import Bench

RESULTS: Final = Path(__file__).with_name("results")
PAIRS: Final = 9
QUICK_PAIRS: Final = 2


def main() -> int:
    arguments = _parse(sys.argv[1:])
    # SIGTERM, too, has to find its way through the cleaning up.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        _say("interrupted; nothing is written")
        return 130


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench/run.py",
        description="Measure migfw beside a real QEMU on this machine. Writes latest.json and latest.html.",
        epilog="Scenarios: " + ", ".join(SCENARIOS),
    )
    parser.add_argument(
        "--quick", action="store_true", help=f"small guests and {QUICK_PAIRS} pairs: a smoke test, no result"
    )
    parser.add_argument("--pairs", type=int, metavar="N", help=f"pairs of runs that are compared (default {PAIRS})")
    parser.add_argument("--only", action="append", choices=list(SCENARIOS), metavar="SCENARIO", help="repeatable")
    parser.add_argument("--no-qemu", action="store_true", help="measure migfw alone")
    parser.add_argument(
        "--results",
        type=Path,
        metavar="FOLDER",
        help="where to write; by default only a full run does, to bench/results",
    )
    arguments = parser.parse_args(words)
    if arguments.pairs is not None and arguments.pairs < 1:
        parser.error(f"--pairs {arguments.pairs}: expected at least 1")
    return arguments


def _run(arguments: argparse.Namespace) -> int:
    without = "--no-qemu was given" if arguments.no_qemu else lacking()
    with tempfile.TemporaryDirectory(prefix="migfw-bench-") as images:
        bench = Bench(
            pairs=arguments.pairs or (QUICK_PAIRS if arguments.quick else PAIRS),
            quick=arguments.quick,
            ours=Ours(),
            qemu=None if without else Qemu(Path(images)),
            lacking=without,
            say=_say,
        )
        outcomes, failures = _measure(bench, arguments.only or list(SCENARIOS))
    print_table(outcomes)
    whole = not (arguments.quick or arguments.only or arguments.no_qemu or failures)
    if folder := arguments.results or (RESULTS if whole else None):
        _write(folder, outcomes)
    for failure in failures:
        print(failure, file=sys.stderr)
    missed = sum(row.met is False for outcome in outcomes for row in outcome.rows)
    if missed:
        print(f"{missed} goals are not met", file=sys.stderr)
    return 1 if missed or failures else 0


def _measure(bench: Bench, names: Sequence[str]) -> tuple[list[Outcome], list[str]]:
    outcomes: list[Outcome] = []
    failures: list[str] = []
    for name, scenario in SCENARIOS.items():
        if name not in names:
            continue
        _say(f"{name} ...")
        try:
            outcomes.append(scenario(bench))
        except BenchError as error:
            failures.append(f"bench: {name}: {error}")
    return outcomes, failures


def _write(folder: Path, outcomes: Sequence[Outcome]) -> None:
    machine, date = facts(), time.strftime("%Y-%m-%d")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "latest.json").write_text(document.render(outcomes, machine, date))
    (folder / "latest.html").write_text(page.render(outcomes, machine, date))
    print(f"written: {folder}/latest.json and latest.html")


def _say(text: str) -> None:
    """Progress: on stderr, so that the table can be piped."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
