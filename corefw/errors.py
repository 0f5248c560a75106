"""All errors that migfw raises on purpose.

    MigfwError                       one line: what was wrong, where, and what to do
     ├── UsageError                  the request was wrong (exit status 2, nothing was started)
     │    ├── UriError               a URI, address or quantity that does not parse
     │    ├── SettingsError          a capability, parameter or property refused
     │    ├── StateError             the command does not fit the current state of the guest or the migration
     │    └── BlockedError           the guest cannot migrate now; `reasons` has all reasons
     ├── PluginError                 a plugin is missing, failed to load, or broke its contract
     ├── ChannelError                the transport failed: refused, reset, host key unknown, ...
     │    ├── ChannelClosed          the peer ended the stream where more bytes were expected
     │    └── Interrupted            `abort()` or an `Interrupt` ended the wait: the user cancelled
     ├── StreamError                 the received bytes are not a stream that can be loaded
     │    └── RemoteStreamError      the same, with `offset`, `where`, `expected` and `got`
     ├── MachineError                the guest, or the process that runs it, failed
     └── PeerError                   the destination reported failure on the return path

Foreign exceptions (OSError, paramiko's, ZeroMQ's) are translated once, where the library is called. Any other exception
that reaches the command line is a bug and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

FOREIGN: Final = (Exception, SystemExit)
"""What foreign code may raise: sys.exit() in a plugin must not end a thread that others wait for."""

ANYTHING: Final = BaseException
"""The same in migration threads, which receive no Ctrl-C: a plugin's asyncio.CancelledError is not an Exception."""


def printable(text: str) -> str:
    """Escape all characters that are not printable."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def one_line(text: str) -> str:
    """Make any text fit for one line of a terminal or a table."""
    return printable(" ".join(line.strip() for line in text.splitlines() if line.strip()))


class MigfwError(Exception):
    """Base class of all errors; `str()` is one printable line for a user, whatever it quotes."""

    def __str__(self) -> str:
        return one_line(super().__str__())


def described(error: BaseException) -> str:
    """An error in one line: ours as they are, foreign ones with their type."""
    text = one_line(str(error))
    return text if isinstance(error, MigfwError) else f"{type(error).__name__}: {text}"


class UsageError(MigfwError):
    """The request itself was wrong; nothing was started or changed."""


class UriError(UsageError):
    """A URI, address or quantity does not parse."""


class SettingsError(UsageError):
    """A capability, parameter or property was refused."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ " (did you mean tcp?)" with the closest known name; "" if none is close."""
    from difflib import get_close_matches  # noqa: PLC0415 - only an error needs it

    near = get_close_matches(name, list(known), 1)
    return f" (did you mean {near[0]}?)" if near else ""


class StateError(UsageError):
    """The command does not fit the current state."""


class BlockedError(UsageError):
    """The guest cannot migrate. `reasons` has one line for each reason."""

    def __init__(self, reasons: Sequence[str]) -> None:
        self.reasons = tuple(reasons)
        super().__init__("cannot migrate: " + "; ".join(self.reasons))


class PluginError(MigfwError):
    """A plugin is missing, failed to load, or broke its contract."""


class ChannelError(MigfwError):
    """The transport failed."""


class ChannelClosed(ChannelError):
    """The peer ended the stream where more bytes were expected."""


class Interrupted(ChannelError):
    """The wait was ended on purpose: `Interrupt.set()` or `Channel.abort()`."""


class StreamError(MigfwError):
    """The received bytes cannot be loaded."""


class RemoteStreamError(StreamError):
    """The peer sent something other than what was expected.

    `offset` counts bytes from the start of the stream (of the package, inside PACKAGED), `where` names the section or
    record, `expected` and `got` are phrases. They may quote raw bytes of the peer; the message, which goes to
    terminals, is one printable line.
    """

    def __init__(self, offset: int, where: str, expected: str, got: str) -> None:
        self.offset = offset
        self.where = where
        self.expected = expected
        self.got = got
        super().__init__(printable(f"{where}: expected {expected}, got {got} (at offset {offset} of the stream)"))


class MachineError(MigfwError):
    """The guest, or the process that runs it, failed."""


class PeerError(MigfwError):
    """The destination reported on the return path that it could not load the guest."""
