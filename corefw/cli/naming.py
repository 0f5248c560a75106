"""What an engine is called, and where its QMP server listens."""

from __future__ import annotations

import re
from pathlib import Path

from corefw.errors import UsageError
from corefw.qmp.address import QmpAddress, UnixAddress, find_engines, named_address, parse_address, remove_stale

_LONGEST = 40
"""Characters of a name that was made up; a name given by --name may be longer."""


def claim(name: str | None, qmp: str | None, program: str) -> tuple[str, QmpAddress]:
    """The name and address of a new engine. What was given must be free; a name made from `program` gets a number
    where it is taken. Raises UsageError."""
    taken = {engine.name for engine in find_engines()} if qmp is None else set()
    if name is not None and name in taken:
        raise UsageError(f"an engine named '{name}' runs already: choose another --name, or end it with 'migfw quit'")
    chosen = name if name is not None else _free(suggest(program), taken)
    if qmp is None:
        return chosen, named_address(chosen)
    address = parse_address(qmp)
    if isinstance(address, UnixAddress) and remove_stale(Path(address.path)):
        raise UsageError(f"somebody listens at '{address}' already: choose another --qmp, or end it")
    return chosen, address


def suggest(program: str) -> str:
    """ "sims/heat.py:Heat" -> "heat", "package.module:Class" -> "class", "stress" -> "stress"."""
    path, _, attribute = program.partition(":")
    word = Path(path).stem if path.endswith(".py") else (attribute or path)
    return re.sub(r"[^a-z0-9]+", "-", word.lower()).strip("-")[:_LONGEST] or "guest"


def _free(name: str, taken: set[str]) -> str:
    number = 1
    while (numbered := name if number == 1 else f"{name}-{number}") in taken:
        number += 1
    return numbered
