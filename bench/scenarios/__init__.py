"""What is measured, in the order of the report: one module for each question, each with `measure(bench) -> Outcome`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from bench.results import Outcome
from bench.scenarios import bandwidth, harvest, live, memory, postcopy, scaling, startup, switch, throughput
from bench.setting import Bench

SCENARIOS: Final[Mapping[str, Callable[[Bench], Outcome]]] = {
    throughput.NAME: throughput.measure,
    live.NAME: live.measure,
    postcopy.NAME: postcopy.measure,
    switch.NAME: switch.measure,
    harvest.NAME: harvest.measure,
    memory.NAME: memory.measure,
    scaling.NAME: scaling.measure,
    startup.NAME: startup.measure,
    bandwidth.NAME: bandwidth.measure,
}

FULL_ONLY: Final = frozenset({scaling.NAME})
"""Scenarios that take too long for a run of ten minutes."""
