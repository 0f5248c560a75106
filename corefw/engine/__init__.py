"""The engine: one guest, its settings, and at most one migration each way.

Read engine.py for what the outside calls, outgoing.py and incoming.py for the two threads, custody.py for which side
may run the guest. precopy.py has the source's phases; passes.py decides when the guest is stopped, and convergence.py
and forecast.py are the arithmetic of that. link.py is the connection of the source, meter.py counts and paces its
bytes, framing.py and unframing.py frame the sections, returnpath.py is the way back, guestlock.py says who may touch
the guest, launch.py how the engine was started.
"""

from __future__ import annotations

from corefw.engine.engine import Engine
from corefw.engine.launch import Launch

__all__ = ["Engine", "Launch"]
