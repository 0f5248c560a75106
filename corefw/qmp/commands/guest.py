"""Commands about the guest: its run state, and what only engines of this project report."""

from __future__ import annotations

import os

from corefw import __version__
from corefw.qmp.answers import launch_document, migration_info, preallocation_info, status_info
from corefw.qmp.commands.context import Context
from corefw.qmp.documents import StatusInfo
from corefw.settings import as_json


def query_status(context: Context) -> StatusInfo:
    """The guest's run state; "singlestep" is always false."""
    return status_info(context.engine.machine.run_state)


def stop(context: Context) -> None:
    """Stop the guest. Does nothing if it is not running."""
    context.engine.stop()


def cont(context: Context) -> None:
    """Let the guest run on."""
    context.engine.cont()


def x_migfw_status(context: Context) -> object:
    """Everything that `migfw status` shows, in one document."""
    engine = context.engine
    status = status_info(engine.machine.run_state)
    return {
        "name": engine.name,
        "pid": os.getpid(),
        "version": __version__,
        "running": status["running"],
        "status": status["status"],
        "machine": {
            "kind": engine.machine.kind,
            "name": engine.machine.name,
            "information": dict(engine.machine.information()),
        },
        "outgoing": engine.outgoing.status,
        "incoming": engine.incoming.status,
        "incoming-uri": engine.inbound.uri,
        "has-part-of-guest": engine.has_part_of_guest,
        "preallocation": preallocation_info(engine.inbound.preallocation()),
        "migration": migration_info(engine.report()),
        "settings": as_json(engine.settings),
        "launch": launch_document(engine.launch) if engine.launch is not None else None,
    }


def x_migfw_verify(context: Context) -> object:
    """Let the guest verify its own state, if it can; returns the facts that it found."""
    return dict(context.engine.verify())
