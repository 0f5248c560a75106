"""How an engine was started: enough to start another one like it on another host."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Launch:
    """What `migfw run` was given.

    machine      the kind of machine
    program      the PROGRAM argument, or None
    options      --opt, as text
    properties   --property
    directory    the folder that relative paths are meant from
    allow_undeclared   --allow-undeclared
    log          the file that output goes to, of an engine in the background; None where the terminal has it
    """

    machine: str
    program: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    properties: Mapping[str, bool] = field(default_factory=dict)
    directory: str = ""
    allow_undeclared: bool = False
    log: str | None = None
