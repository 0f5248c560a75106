"""Write docs/matrix.md: the cases of the matrix, and how they ended in the last run.

`python -m tests.matrix.page` writes it.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from tests.matrix.cases import CASES, FAULTS, SUBSET, WAYS, Case
from tests.matrix.points import Stage

PAGE: Final = Path(__file__).parents[2] / "docs" / "matrix.md"
RESULTS: Final = Path(__file__).parents[2] / "build" / "matrix.jsonl"
"""One line for each run of a case; the last one counts."""
FAILED: Final = "failed"
"""The outcome of a failed case."""

HEAD: Final = """\
# The matrix of faults

*Written by `make matrix`; do not edit.* A guest moves between two real `migfw run` processes, and one fault comes at
one point of its way. Afterwards a test does what [the protocol](decisions/switchover.md) asks of a user, and checks:

- the guest never ran on both sides: it numbers its steps in a file that both can write, and each step is there once;
- if both engines live, it runs on one of them, and `migfw verify` finds every write;
- after a fault that the source notices before it hands the guest over, it resumes the guest by itself;
- no process, and no file in `/tmp` or the runtime directory, is left.

"""
NAMES: Final = tuple(way.name for way in WAYS)
RESULTS_HEADING: Final = "## Where the guest ended"


def note_result(case: Case, outcome: str) -> None:
    """Record where the guest ended, or FAILED, for the page."""
    RESULTS.parent.mkdir(exist_ok=True)
    result = {"case": case.name, "outcome": outcome, "day": datetime.now(UTC).date().isoformat()}
    line = json.dumps(result) + "\n"
    descriptor = os.open(RESULTS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def cases_part() -> str:
    """The part of the page that follows from the code."""
    return HEAD + "\n".join(_case_lines()) + "\n"


def _case_lines() -> Iterator[str]:
    yield "## The cases"
    yield ""
    yield f"{len(CASES)} cases; `make test` runs {len(SUBSET)} of them, `make matrix` all."
    yield ""
    yield "The faults: " + "; ".join(FAULTS) + "."
    yield (
        "With *preempt*, requested pages have a channel of their own; at *MGRP* and *status postcopy-active* it alone"
        " breaks."
    )
    for stage in Stage:
        yield ""
        yield f"| {stage}: right before | goes to the | " + " | ".join(NAMES) + " |"
        yield "|---|---|" + "---|" * len(NAMES)
        counts = Counter(
            (case.point.name, case.point.forward, case.way.name) for case in CASES if case.point.stage is stage
        )
        for name, forward in dict.fromkeys((name, forward) for name, forward, _ in counts):
            cells = " | ".join(str(counts[name, forward, way] or "-") for way in NAMES)
            yield f"| {name} | {'destination' if forward else 'source'} | {cells} |"


def results_part(results: Iterable[Mapping[str, str]]) -> str:
    last = {one["case"]: one for one in results}
    ended = [(case, last[case.name]["outcome"]) for case in CASES if case.name in last]
    if not ended:
        return ""
    return "\n".join(_result_lines(ended, sorted({one["day"] for one in last.values()}))) + "\n"


def _result_lines(ended: Sequence[tuple[Case, str]], days: Sequence[str]) -> Iterator[str]:
    failed = [case.name for case, outcome in ended if outcome == FAILED]
    passed = Counter((case.way.name, case.fault) for case, outcome in ended if outcome != FAILED)
    yield ""
    yield RESULTS_HEADING
    yield ""
    yield (
        f"Run on {' and '.join(days)}: {len(ended) - len(failed)} of {len(CASES)} cases passed, {len(failed)} failed,"
        f" {len(CASES) - len(ended)} not run. *nowhere*: an engine was killed, and the guest with it."
    )
    yield from (f"- failed: {name}" for name in failed)
    yield from _outcome_table(ended)
    yield ""
    yield "| passed of all | " + " | ".join(NAMES) + " |"
    yield "|---|" + "---|" * len(NAMES)
    cases = Counter((case.way.name, case.fault) for case in CASES)
    for fault in FAULTS:
        cells = [f"{passed[name, fault]} of {cases[name, fault]}" if cases[name, fault] else "-" for name in NAMES]
        yield f"| {fault} | " + " | ".join(cells) + " |"


def _outcome_table(ended: Sequence[tuple[Case, str]]) -> Iterator[str]:
    counts = Counter((case.point.stage, case.fault, outcome) for case, outcome in ended if outcome != FAILED)
    outcomes = sorted({outcome for _, _, outcome in counts})
    yield ""
    yield "| stage | fault | " + " | ".join(outcomes) + " |"
    yield "|---|---|" + "---|" * len(outcomes)
    for stage in Stage:
        for fault in FAULTS:
            cells = " | ".join(str(counts[stage, fault, outcome] or "-") for outcome in outcomes)
            yield f"| {stage} | {fault} | {cells} |"


def main() -> int:
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    PAGE.write_text(cases_part() + results_part([json.loads(line) for line in lines]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
