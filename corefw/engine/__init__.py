"""The engine: one guest, its settings, and at most one migration each way.

Begin with engine.py, which is what the outside calls. Each side of a migration has a table of phases:

    source        outgoing.py (the table, the thread), precopy.py (the phases), source.py (what they share)
    destination   incoming.py (the table, the thread), arrival.py (the phases), destination.py (what they share)

phases.py drives both tables, custody.py decides which side may run the guest, and tails.py knows what is different for
a parked machine. passes.py decides when the guest is stopped, with the arithmetic in convergence.py and forecast.py;
meter.py counts and paces the bytes. framing.py writes sections, loader.py loads them, and commands.py runs the commands
between them. inbound.py starts and replaces incoming migrations, and blockers.py knows what is in the way of outgoing
ones. link.py is the source's connection, connection.py the destination's, and returnpath.py the way back.
guestlock.py is the lock on the guest's run state, launch.py says how the engine was started.
"""

from __future__ import annotations

from corefw.engine.engine import Engine
from corefw.engine.launch import Launch

__all__ = ["Engine", "Launch"]
