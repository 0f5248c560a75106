"""The HTML page: the table, the charts and the machine that they were measured on, in one file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Final

from bench.report.svg import draw
from bench.report.table import cells
from bench.results import Outcome, Row

VERDICTS: Final = {True: "yes", False: "no", None: ""}

STYLE: Final = """
:root { color-scheme: light dark; --text: #1f2328; --dim: #59636e; --line: #d1d9e0; --back: #ffffff; --panel: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6edf3; --dim: #9198a1; --line: #3d444d; --back: #0d1117; --panel: #151b23; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back); margin: 0 auto; padding: 24px;
       max-width: 880px; }
h1 { font-size: 24px; margin: 0; }
h2 { font-size: 18px; margin: 40px 0 4px; }
p, figcaption { color: var(--dim); margin: 4px 0 12px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 4px 10px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; }
th { color: var(--dim); font-weight: 500; }
.yes { color: #2da44e; font-weight: 600; }
.no { color: #d1242f; font-weight: 600; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 16px; background: var(--panel); padding: 12px 16px;
     border-radius: 6px; }
dt { color: var(--dim); } dd { margin: 0; }
figure { margin: 16px 0 0; }
svg { width: 100%; height: auto; }
svg text { fill: var(--text); font: 12px system-ui, sans-serif; }
svg .tick { fill: var(--dim); font-size: 11px; }
svg .grid { stroke: var(--line); }
svg .limit { stroke: #d1242f; stroke-dasharray: 5 4; }
"""


def render(outcomes: Sequence[Outcome], facts: Mapping[str, str], date: str) -> str:
    """The whole page."""
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>migfw: speed and memory</title><style>{STYLE}</style></head><body>",
            "<h1>migfw: speed and memory</h1>",
            f"<p>Beside QEMU, in turns, on the same machine, on {escape(date)}. A ratio is the median of the pairs'"
            " ratios, ours by QEMU's.</p>",
            "<dl>",
            *(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items()),
            "</dl>",
            *(line for outcome in outcomes for line in _section(outcome)),
            "</body></html>",
            "",
        ]
    )


def _section(outcome: Outcome) -> Iterator[str]:
    yield f"<h2>{escape(outcome.title)}</h2><p>{escape(outcome.about)}</p>"
    yield '<div class="wide"><table><thead><tr><th>what</th><th>ours</th><th>QEMU</th><th>ratio</th><th>goal</th>'
    yield "<th>met</th></tr></thead><tbody>"
    yield from (_row(row) for row in outcome.rows)
    yield "</tbody></table></div>"
    yield from (f"<p>{escape(note)}</p>" for note in outcome.notes)
    for chart in outcome.charts:
        yield f"<figure>{draw(chart)}<figcaption>{escape(chart.title)}</figcaption></figure>"


def _row(row: Row) -> str:
    verdict = VERDICTS[row.met]
    shown = "".join(f"<td>{escape(cell)}</td>" for cell in cells(row))
    return f'<tr>{shown}<td class="{verdict}">{verdict}</td></tr>'
