"""The JSON document."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Final

from bench.results import Outcome

FORMAT: Final = 1
DIGITS: Final = 6
"""Significant digits; the measurements have no more."""


def render(outcomes: Sequence[Outcome], facts: Mapping[str, str], date: str) -> str:
    """Facts and outcomes, with all samples."""
    document = {
        "format": FORMAT,
        "date": date,
        "machine": dict(facts),
        "scenarios": [_rounded(outcome.document()) for outcome in outcomes],
    }
    return json.dumps(document, indent=1) + "\n"


def _rounded(value: object) -> object:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, Mapping):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(inner) for inner in value]
    return value
