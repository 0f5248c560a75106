"""One client's conversation: takes an item of its stream, gives the line to answer with. No sockets, no threads.

Invariant: every item gets exactly one answer, and no exception in a command ends the conversation. Before
`qmp_capabilities` every other command is refused.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Final

from corefw.errors import ANYTHING, MigfwError, did_you_mean
from corefw.qmp import protocol
from corefw.qmp.commands import Command
from corefw.qmp.commands.context import Context
from corefw.qmp.json_stream import Malformed
from corefw.qmp.protocol import ErrorClass, QmpError, Request

if TYPE_CHECKING:
    from corefw.engine import Engine

log = logging.getLogger(__name__)

NEGOTIATION: Final = "qmp_capabilities"


class Handed:
    """A file descriptor that came with a request. The command takes it, or it is closed."""

    def __init__(self, fd: int | None = None) -> None:
        self._fd = fd

    def take(self) -> int | None:
        fd, self._fd = self._fd, None
        return fd

    def close(self) -> None:
        if (fd := self.take()) is not None:
            os.close(fd)


class Session:
    """State of one conversation. `answer` is called for one item at a time, except that out-of-band requests may run
    beside it.

    negotiated    the client has sent qmp_capabilities, so it gets events
    out_of_band   it enabled that capability
    """

    def __init__(self, engine: Engine, commands: Mapping[str, Command], quit_: Callable[[], None]) -> None:
        self.negotiated = False
        self.out_of_band = False
        self._engine = engine
        self._commands = commands
        self._quit = quit_

    def overtakes(self, item: object) -> bool:
        """Whether this item is answered at once instead of after those before it."""
        return self.out_of_band and protocol.wants_out_of_band(item)

    def answer(self, item: object, handed: Handed) -> bytes:
        """The reply to an item of the stream, as a line. Never raises."""
        id_ = protocol.request_id(item)
        try:
            return protocol.encode(protocol.success(self._result(item, handed), id_))
        except MigfwError as error:
            return protocol.encode(protocol.failure(error, id_))
        except ANYTHING as error:
            log.exception("a QMP command failed with an internal error")
            bug = QmpError(f"internal error, please report it: {type(error).__name__}: {error}")
            return protocol.encode(protocol.failure(bug, id_))
        finally:
            handed.close()

    def _result(self, item: object, handed: Handed) -> object:
        if isinstance(item, Malformed):
            raise QmpError(item.reason)
        request = protocol.read_request(item, out_of_band=self.out_of_band)
        command = self._command(request)
        keywords = command.signature.bind(request.arguments)
        log.debug("QMP: %s %s", request.command, request.arguments)
        context = Context(self._engine, self._commands, self._negotiate, self._quit, handed.take)
        return command.run(context, keywords)

    def _command(self, request: Request) -> Command:
        if not self.negotiated and request.command != NEGOTIATION:
            raise QmpError(f"Expecting capabilities negotiation with '{NEGOTIATION}'", ErrorClass.COMMAND_NOT_FOUND)
        command = self._commands.get(request.command)
        if command is None:
            hint = did_you_mean(request.command, self._commands)
            raise QmpError(f"The command {request.command} has not been found{hint}", ErrorClass.COMMAND_NOT_FOUND)
        if request.out_of_band and not command.out_of_band:
            raise QmpError(f"The command {request.command} does not support OOB")
        return command

    def _negotiate(self, enable: Collection[str]) -> None:
        if self.negotiated:
            raise QmpError(
                "Capabilities negotiation is already complete, command ignored", ErrorClass.COMMAND_NOT_FOUND
            )
        self.negotiated = True
        self.out_of_band = protocol.OUT_OF_BAND in enable
