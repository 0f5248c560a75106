"""Every error that migfw raises on purpose.

    MigfwError                       one line that says what was wrong, where, and what to do
     ├── UsageError                  the caller asked for something that cannot be (exit status 2, nothing was started)
     │    ├── UriError               a URI, address or quantity that does not parse
     │    ├── SettingsError          a capability, parameter or property refused
     │    ├── StateError             the command does not fit the present state of the guest or the migration
     │    └── BlockedError           the guest cannot migrate now; `reasons` has every one
     ├── PluginError                 a plugin is missing, failed to load, or broke its contract
     ├── ChannelError                the transport failed: refused, reset, host key unknown, ...
     │    ├── ChannelClosed          the peer ended the stream where more bytes had to come
     │    └── Interrupted            `abort()` or an `Interrupt` ended the wait; the user cancelled
     ├── StreamError                 the bytes that arrived are not a stream that we can load
     │    └── RemoteStreamError      the same, with `offset`, `where`, `expected` and `got`
     ├── MachineError                the guest, or the process that runs it, failed
     └── PeerError                   the destination reported failure on the return path

Foreign exceptions (OSError, paramiko's, ZeroMQ's) are translated once, where the library is called. Whatever reaches
the command line and is not a MigfwError is a bug and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

FOREIGN: Final = (Exception, SystemExit)
"""What code that is not ours may raise: sys.exit() in a plugin must not end a thread that others wait for."""

ANYTHING: Final = BaseException
"""The same in a thread of a migration, where no Ctrl-C arrives: a plugin's asyncio.CancelledError is no Exception."""


def printable(text: str) -> str:
    """The text with every character escaped that would not show."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def one_line(text: str) -> str:
    """A text of whatever origin, fit for one line of a terminal or a table."""
    return printable(" ".join(line.strip() for line in text.splitlines() if line.strip()))


class MigfwError(Exception):
    """Base of all errors here; `str()` is one line fit for a user, whatever was quoted in it."""

    def __str__(self) -> str:
        return one_line(super().__str__())


class UsageError(MigfwError):
    """The request itself was wrong; nothing was started or changed."""


class UriError(UsageError):
    """A URI, address or quantity does not parse."""


class SettingsError(UsageError):
    """A capability, parameter or property was refused."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ " (did you mean tcp?)" with the known name that is closest to a wrong one; "" where none is close."""
    from difflib import get_close_matches  # noqa: PLC0415 - only an error needs it

    near = get_close_matches(name, list(known), 1)
    return f" (did you mean {near[0]}?)" if near else ""


class StateError(UsageError):
    """The command does not fit the present state."""


class BlockedError(UsageError):
    """The guest cannot migrate. `reasons` has one line for each thing in the way, all of them at once."""

    def __init__(self, reasons: Sequence[str]) -> None:
        self.reasons = tuple(reasons)
        super().__init__("cannot migrate: " + "; ".join(self.reasons))


class PluginError(MigfwError):
    """A plugin is missing, failed to load, or broke its contract."""


class ChannelError(MigfwError):
    """The transport failed."""


class ChannelClosed(ChannelError):
    """The peer ended the stream where more bytes had to come."""


class Interrupted(ChannelError):
    """Somebody ended the wait on purpose: `Interrupt.set()` or `Channel.abort()`."""


class StreamError(MigfwError):
    """The bytes that arrived cannot be loaded."""


class RemoteStreamError(StreamError):
    """What arrived from the peer is not what had to come.

    `offset` counts bytes from the start of the stream (of the package, inside PACKAGED), `where` names the section or
    record, `expected` and `got` are phrases. What the peer sent may be in them as it came; in the message it is made
    printable, for that goes to terminals and has one line.
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
