"""A host that commands can be run on: what a transport offers so that a destination can be started over there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from corefw.closing import Closing


@dataclass(frozen=True, slots=True)
class CommandResult:
    """How a command ended. `status` is what a shell would say: 127 where there is no such command."""

    status: int
    output: str
    errors: str


class RemoteHost(Closing, ABC):
    """A log-in on another host. `name` is how the user called the host, for messages."""

    name: str

    @abstractmethod
    def run(self, command: Sequence[str], seconds: float) -> CommandResult:
        """Run a command there, and wait for its end, `seconds` at most.

        Its words arrive as they are, whatever the user's shell is. Its standard input ends when the connection does,
        and when this method returns or raises; so a command can watch for that. Raises ChannelError.
        """

    @abstractmethod
    def close(self) -> None:
        """Log out. Idempotent; does not raise."""
