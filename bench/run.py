"""`make bench` and `make bench-full`: measure, print the table, write results.

A scenario that cannot be measured says why, and the others still run. Only a full run replaces what is in
bench/results. Ctrl-C ends everything that was started, and writes nothing. Exit status: 0 if every measured goal was
met, 1 if one was missed or a scenario failed, 2 wrong usage, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from bench.engines import BenchError, Ours, Qemu, lacking
from bench.facts import facts
from bench.network import congestion_control, enter_own_network
from bench.report import document, page
from bench.report.table import print_table
from bench.results import Outcome
from bench.scenarios import FULL_ONLY, SCENARIOS
from bench.setting import Bench, Effort

RESULTS: Final = Path(__file__).with_name("results")
PAIRS: Final = {Effort.QUICK: 2, Effort.USUAL: 5, Effort.FULL: 15}


def main() -> int:
    arguments = _parse(sys.argv[1:])
    # SIGTERM has to clean up too.
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
    effort = parser.add_mutually_exclusive_group()
    effort.add_argument(
        "--quick", dest="effort", action="store_const", const=Effort.QUICK, help="small guests: a smoke test, no result"
    )
    effort.add_argument(
        "--full",
        dest="effort",
        action="store_const",
        const=Effort.FULL,
        help="more runs, large guests and all scenarios, about half an hour",
    )
    parser.set_defaults(effort=Effort.USUAL)
    defaults = ", ".join(f"{effort.value} {pairs}" for effort, pairs in PAIRS.items())
    parser.add_argument("--pairs", type=int, metavar="N", help=f"pairs of runs that are compared (default: {defaults})")
    parser.add_argument("--only", action="append", choices=list(SCENARIOS), metavar="SCENARIO", help="repeatable")
    parser.add_argument("--no-qemu", action="store_true", help="measure migfw alone")
    parser.add_argument(
        "--results",
        type=Path,
        metavar="FOLDER",
        help="where to write; without this only a run of --full writes, to bench/results",
    )
    arguments = parser.parse_args(words)
    if arguments.pairs is not None and arguments.pairs < 1:
        parser.error(f"--pairs {arguments.pairs}: expected at least 1")
    return arguments


def _run(arguments: argparse.Namespace) -> int:
    without = "--no-qemu was given" if arguments.no_qemu else lacking()
    host_control = congestion_control()
    try:
        enter_own_network()
    except OSError as error:
        _say(f"no network of our own, so QEMU runs under {host_control}: {error.strerror}")
    with tempfile.TemporaryDirectory(prefix="migfw-bench-") as images:
        bench = Bench(
            pairs=arguments.pairs or PAIRS[arguments.effort],
            effort=arguments.effort,
            ours=Ours(),
            qemu=None if without else Qemu(Path(images)),
            lacking=without,
            say=_say,
        )
        usual = [name for name in SCENARIOS if arguments.effort is Effort.FULL or name not in FULL_ONLY]
        outcomes, failures = _measure(bench, arguments.only or usual)
    print_table(outcomes)
    whole = arguments.effort is Effort.FULL and not (arguments.only or arguments.pairs or without or failures)
    if folder := arguments.results or (RESULTS if whole else None):
        _write(folder, outcomes, facts(host_control))
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


def _write(folder: Path, outcomes: Sequence[Outcome], machine: Mapping[str, str]) -> None:
    date = time.strftime("%Y-%m-%d")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "latest.json").write_text(document.render(outcomes, machine, date))
    (folder / "latest.html").write_text(page.render(outcomes, machine, date))
    print(f"written: {folder}/latest.json and latest.html")


def _say(text: str) -> None:
    """Print progress to stderr, so that the table can be piped."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
