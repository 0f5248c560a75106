"""The engine: one guest, its settings, and at most one migration each way.

Read engine.py for what the outside calls, outgoing.py and incoming.py for the two threads, custody.py for whose the
guest is. passes.py decides when it is stopped; convergence.py and pacing.py are the arithmetic of that, framing.py and
unframing.py the sections, returnpath.py the way back, statistics.py what is counted,
guestlock.py who may touch the guest, launch.py how the engine was started.
"""

from __future__ import annotations

from corefw.engine.engine import Engine
from corefw.engine.launch import Launch

__all__ = ["Engine", "Launch"]
