"""The engine: one guest, its settings, and at most one migration each way.

Read engine.py for what the outside calls, outgoing.py and incoming.py for the two threads. convergence.py and pacing.py
are the arithmetic, framing.py and unframing.py the sections, returnpath.py the way back, statistics.py what is counted.
"""

from __future__ import annotations

from corefw.engine.engine import Engine, Event

__all__ = ["Engine", "Event"]
