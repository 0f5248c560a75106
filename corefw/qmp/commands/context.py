"""What a command's function gets besides its arguments."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from corefw.engine import Engine
    from corefw.qmp.commands import Command


@dataclass(frozen=True, slots=True)
class Context:
    """The context of one request.

    engine      the engine that is controlled
    commands    all commands by name
    negotiate   ends negotiation mode, with the capabilities that the client enabled; raises QmpError the second time
    quit        asks the process to end once this reply has been sent
    take_fd     gives the file descriptor that came with this request, to be closed by the caller; None if none came
    """

    engine: Engine
    commands: Mapping[str, Command]
    negotiate: Callable[[Collection[str]], None]
    quit: Callable[[], None]
    take_fd: Callable[[], int | None]
