"""Commands on the remote host, over an ssh connection of their own."""

from __future__ import annotations

import contextlib
import shlex
import time
from collections.abc import Sequence
from typing import Final

import paramiko

from corefw.channel import CommandResult, RemoteHost
from corefw.errors import ChannelError
from corefw_transport_ssh.channel import FAILURES
from corefw_transport_ssh.connection import OPEN_SECONDS, Connection

OUTPUT_LIMIT: Final = 1 << 20
"""Maximum bytes kept of a command's standard output, and of its standard error."""

_CHUNK: Final = 1 << 15
_LOOK: Final = 0.02
_SIGNALLED: Final = -1
"""paramiko's exit status for a command that was ended by a signal."""


class SshHost(RemoteHost):
    """A remote host that commands can be run on. Owns the connection."""

    def __init__(self, name: str, connection: Connection) -> None:
        self.name = name
        self._connection = connection

    def run(self, command: Sequence[str], seconds: float) -> CommandResult:
        try:
            channel = self._connection.open_session(timeout=OPEN_SECONDS)
        except FAILURES as error:
            raise ChannelError(f"{self.name}: sshd refuses to run commands: {error}") from None
        try:
            channel.exec_command(shlex.join(command))
            return self._result(channel, command[0], time.monotonic() + seconds)
        except FAILURES as error:
            raise ChannelError(
                f"{self.name}: cannot run '{command[0]}': {error or 'the connection was lost'}"
            ) from None
        finally:
            with contextlib.suppress(*FAILURES):
                channel.close()

    def _result(self, channel: paramiko.Channel, what: str, deadline: float) -> CommandResult:
        output, errors = bytearray(), bytearray()
        while True:
            ended = channel.exit_status_ready() and channel.eof_received
            while channel.recv_ready():
                output += channel.recv(_CHUNK)
            while channel.recv_stderr_ready():
                errors += channel.recv_stderr(_CHUNK)
            if max(len(output), len(errors)) > OUTPUT_LIMIT:
                raise ChannelError(f"{self.name}: '{what}' printed more than {OUTPUT_LIMIT} bytes")
            if ended:
                status = channel.recv_exit_status()
                texts = (bytes(data).decode(errors="replace") for data in (output, errors))
                return CommandResult(128 if status == _SIGNALLED else status, *texts)
            if not self._connection.is_active():
                raise ChannelError(f"{self.name}: the ssh connection was lost while '{what}' ran")
            if time.monotonic() > deadline:
                raise ChannelError(f"{self.name}: '{what}' did not end in time")
            time.sleep(_LOOK)

    def close(self) -> None:
        self._connection.shut()
