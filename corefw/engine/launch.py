"""How an engine was started: everything needed to start another one like it on another host."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Launch:
    """The arguments of `migfw run`.

    machine      the kind of machine
    program      the PROGRAM argument, or None
    options      --opt, as text
    properties   --property
    directory    the folder that relative paths start from
    allow_undeclared   --allow-undeclared
    log          the file with the output of an engine in the background; None if that goes to the terminal
    """

    machine: str
    program: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    properties: Mapping[str, bool] = field(default_factory=dict)
    directory: str = ""
    allow_undeclared: bool = False
    log: str | None = None
