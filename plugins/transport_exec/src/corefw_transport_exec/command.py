"""exec:COMMAND: a stream through a shell command.

Invariant: an exit status other than 0 is a failure of the channel, reported with the command's standard error. A
command never outlives its channel: abort() kills its process group, and so does close() if it does not end by itself.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import signal
import subprocess
import sys
import termios
import threading
from typing import Final

from corefw.channel import Channel, Interrupt, Listener, Transport, TransportContext, TransportFeatures
from corefw.errors import ChannelError, UriError
from corefw.uri import MigrationUri
from corefw_transport_exec.pipe import OneShotListener, PipeChannel

SHELL: Final = "/bin/sh"

ERRORS_KEPT: Final = 2048
"""Maximum bytes kept of the command's standard error; the last ones."""

PATIENCE: Final = 5.0
"""Seconds for a command to end by itself after its channel was closed; then it is killed."""


class ExecTransport(Transport):
    """exec:COMMAND"""

    features = TransportFeatures(return_path=False, multi_channel=False)

    def __init__(self, uri: MigrationUri, context: TransportContext) -> None:
        super().__init__(uri, context)
        if not uri.rest.strip():
            raise UriError(f"'{uri}' has no command: expected exec:COMMAND, as in exec:gzip > guest.gz")
        if "\0" in uri.rest:
            raise UriError(f"'{uri!s}': a command has no zero byte")

    def connect(self, interrupt: Interrupt) -> Channel:
        interrupt.check()
        return CommandChannel(self.uri, outgoing=True)

    def listen(self) -> Listener:
        """Make the listener; the command starts when its channel is accepted."""
        return OneShotListener(self.uri, lambda: CommandChannel(self.uri, outgoing=False))


class CommandChannel(PipeChannel):
    """One end of a running command."""

    def __init__(self, uri: MigrationUri, *, outgoing: bool) -> None:
        ours, theirs = reversed(os.pipe()) if outgoing else os.pipe()
        try:
            self._command = Command(uri, theirs, outgoing=outgoing)
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(theirs)
        super().__init__(ours, str(uri), outgoing=outgoing)

    def abort(self) -> None:
        super().abort()
        if not self._closed:
            self._command.kill()

    def _finish(self) -> None:
        self._let_go()
        self._command.wait(self._wake)
        self._check_status()

    def _ended(self) -> None:
        self._command.wait(self._wake)
        self._check_aborted()
        self._check_status()

    def _leave(self) -> None:
        self._let_go()
        if self._aborted or self._failure or not self._outgoing:
            self._command.kill()
        self._command.close()

    def _failed(self, error: OSError) -> ChannelError:
        if error.errno == errno.EPIPE and not self._aborted:
            self._command.wait(self._wake, PATIENCE)
            self._failure = self._command.failure() or f"{self.peer}: the command no longer reads its input"
        self._check_aborted()
        return super()._failed(error)

    def _check_status(self) -> None:
        self._failure = self._command.failure()
        if self._failure:
            raise ChannelError(self._failure)


class Command:
    """A shell command in its own process group, with `end` as its standard input (outgoing) or output."""

    def __init__(self, uri: MigrationUri, end: int, *, outgoing: bool) -> None:
        self._uri = uri
        stdin, stdout = (end, subprocess.DEVNULL) if outgoing else (subprocess.DEVNULL, end)
        try:
            self._process = subprocess.Popen(
                [SHELL, "-c", uri.rest], stdin=stdin, stdout=stdout, stderr=subprocess.PIPE, process_group=0, bufsize=0
            )
        except OSError as error:
            raise ChannelError(f"{uri}: cannot start {SHELL}: {error.strerror}") from None
        self._exit = os.pidfd_open(self._process.pid)
        self._errors = bytearray()
        self._stop = Interrupt()
        self._listening = threading.Thread(target=self._listen, name="migfw-exec-errors", daemon=True)
        self._listening.start()

    def wait(self, interrupt: Interrupt, seconds: float | None = None) -> bool:
        """Wait for the exit; False if it has not exited after `seconds`. Raises Interrupted."""
        return self._process.poll() is not None or interrupt.wait_for(self._exit, select.POLLIN, seconds)

    def kill(self) -> None:
        """Kill the process group, unless its leader was already reaped: the number may belong to another group then."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def failure(self) -> str | None:
        """The reason for a failed exit; None if it succeeded or is still running."""
        status = self._process.poll()
        if not status:
            return None
        self._hear_out()
        how = f"exited with status {status}" if status > 0 else f"was killed by {signal.Signals(-status).name}"
        said = " / ".join(self._errors.decode(errors="replace").strip().splitlines())
        return f"{self._uri}: the command {how}" + (f": {said}" if said else "")

    def close(self) -> None:
        """Wait for the exit, kill the command if that takes too long, and release everything."""
        poll = select.poll()
        poll.register(self._exit, select.POLLIN)
        if not poll.poll(PATIENCE * 1000):
            self.kill()
        self._process.wait()
        self._hear_out()
        os.close(self._exit)
        self._stop.close()
        if self._process.stderr:
            self._process.stderr.close()

    def _listen(self) -> None:
        """Collect the standard error. Processes that the command left behind may hold the pipe open: _stop ends the
        wait."""
        assert self._process.stderr
        fd = self._process.stderr.fileno()
        with contextlib.suppress(ChannelError):
            while self._stop.wait_for(fd, select.POLLIN) and (said := os.read(fd, 65536)):
                self._keep(said)

    def _keep(self, said: bytes) -> None:
        self._errors = (self._errors + said)[-ERRORS_KEPT:]

    def _hear_out(self) -> None:
        """Keep all output from before the exit, which is in the pipe by now, and read no more. Idempotent."""
        self._stop.set()
        self._listening.join()
        assert self._process.stderr
        fd = self._process.stderr.fileno()
        left = int.from_bytes(fcntl.ioctl(fd, termios.FIONREAD, bytes(4)), sys.byteorder)
        os.set_blocking(fd, False)
        with contextlib.suppress(BlockingIOError):  # another thread has read it
            while left > 0:
                said = os.read(fd, left)
                self._keep(said)
                left -= len(said)
