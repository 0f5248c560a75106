"""Where an engine's QMP server listens, and how a command finds it.

An address is `unix:PATH` or `tcp:HOST:PORT`, for our engines and for a real QEMU alike. The socket of a named engine is
`NAME.qmp` in the user's own runtime directory. No other user can enter that, so what answers there is an engine of the
same user. Socket files without a listener are removed when they are found.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from corefw.errors import UriError, UsageError
from corefw.net.socketfile import Occupant, check_path, occupant
from corefw.uri import TcpAddress, UnixAddress, split_host_port

_SUFFIX: Final = ".qmp"
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")


QmpAddress = UnixAddress | TcpAddress


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """A live engine that has a name."""

    name: str
    address: UnixAddress


def parse_address(text: str) -> QmpAddress:
    """ "unix:/run/x.qmp", "tcp:[::1]:4444" -> an address. Raises UriError."""
    scheme, _, rest = text.partition(":")
    if scheme == "unix" and rest:
        return _unix(rest, text)
    if scheme == "tcp" and rest:
        return TcpAddress(*split_host_port(rest, text))
    raise UriError(f"'{text}' is not a QMP address: expected unix:PATH or tcp:HOST:PORT")


def _unix(path: str, text: str) -> UnixAddress:
    if "\0" in path or path.startswith("@"):
        raise UriError(f"{text!r}: a QMP socket has to be a file, because its mode keeps other users out")
    check_path(path, text)
    return UnixAddress(path)


def runtime_directory(environment: Mapping[str, str] = os.environ) -> Path:
    """The user's own directory for the sockets of engines; it is made (mode 0700) if it is missing.

    $XDG_RUNTIME_DIR/migfw, or /tmp/migfw-UID if that variable does not name a directory of this user. Raises UsageError
    if what is there cannot be trusted: a symbolic link, not a directory, or another user's.
    """
    base = environment.get("XDG_RUNTIME_DIR", "")
    directory = Path(base, "migfw") if base and _owned_directory(base) else Path(f"/tmp/migfw-{os.geteuid()}")  # noqa: S108 - checked below
    try:
        with contextlib.suppress(FileExistsError):
            directory.mkdir(mode=0o700)
        found = directory.lstat()
        if not stat.S_ISDIR(found.st_mode):
            raise UsageError(
                f"'{directory}' has to be a directory, but is something else: remove it, or set XDG_RUNTIME_DIR"
            )
        if found.st_uid != os.geteuid():
            raise UsageError(
                f"'{directory}' belongs to user {found.st_uid}, expected {os.geteuid()}: set XDG_RUNTIME_DIR to a "
                "directory of your own, or give --qmp unix:PATH"
            )
        if found.st_mode & 0o077:
            directory.chmod(0o700)
    except OSError as error:
        raise UsageError(f"cannot use '{directory}' for engines' sockets: {error.strerror}") from None
    return directory


def log_directory(environment: Mapping[str, str] = os.environ) -> Path:
    """Where engines that were started with --detach keep their logs: $XDG_STATE_HOME/migfw, or the directory of the
    sockets if that variable is not set. It may not exist yet."""
    state = Path(environment.get("XDG_STATE_HOME", ""))
    return state / "migfw" if state.is_absolute() else runtime_directory(environment)


def _owned_directory(path: str) -> bool:
    try:
        found = Path(path).stat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()


def named_address(name: str) -> UnixAddress:
    """The address of the engine called `name`, whether it runs or not. Raises UsageError if no engine can have it."""
    if not _NAME.match(name):
        raise UsageError(
            f"'{name}' is not a valid engine name: expected up to 64 letters, digits, '.', '_' and '-', "
            "the first one a letter or digit"
        )
    path = str(runtime_directory() / f"{name}{_SUFFIX}")
    return _unix(path, f"unix:{path}")


def find_engines() -> list[EngineInfo]:
    """The named engines of this user that are running, by name. Removes sockets without a listener."""
    found = []
    for path in runtime_directory().glob(f"*{_SUFFIX}"):
        name = path.name.removesuffix(_SUFFIX)
        if _NAME.match(name) and occupant(path) is Occupant.LISTENER:
            found.append(EngineInfo(name, UnixAddress(str(path))))
    return sorted(found, key=lambda engine: engine.name)


def resolve(name: str | None = None, qmp: str | None = None) -> QmpAddress:
    """The engine that the user means: at this address, with this name, or the only one that is running.

    Raises UsageError; its message names the engines that are running.
    """
    if qmp is not None:
        return parse_address(qmp)
    wanted = named_address(name) if name is not None else None
    running = find_engines()
    names = ", ".join(one.name for one in running) or "none"
    if wanted is not None:
        if any(one.address == wanted for one in running):
            return wanted
        log = log_directory() / f"{name}.log"
        ended = f"; the log of the last one is {log}" if log.is_file() else ""
        raise UsageError(f"no engine named '{name}' is running (running: {names}){ended}")
    if not running:
        raise UsageError("no engine is running: start one with 'migfw run', or name one with --qmp ADDRESS")
    if len(running) > 1:
        raise UsageError(f"several engines are running: choose one with --name ({names})")
    return running[0].address
