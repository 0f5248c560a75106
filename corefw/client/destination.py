"""A destination that is started on another host over ssh, as `migfw migrate --to HOST` does.

It is an engine like the local one: the same machine, program and options, in the background and in the same folder. It
waits at a UNIX socket that only its user can dial, which the source reaches through the same sshd.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from corefw.channel import Interrupt, RemoteHost
from corefw.client.routes import find_transport
from corefw.closing import Closing
from corefw.errors import ChannelError, MigfwError, UsageError
from corefw.qmp.engines import EngineClient

log = logging.getLogger(__name__)

START_SECONDS: Final = 180.0
"""Seconds that a destination may take until it listens. By then it has imported its program and allocated its RAM."""

SHORT_SECONDS: Final = 60.0

_WRONG_USAGE: Final = 2
"""The exit status of migfw on the other host for a wrong command line; below, those of a shell and of _IN_FOLDER."""

_NO_COMMAND: Final = frozenset({126, 127})
_NO_FOLDER: Final = 97
_NO_FILE: Final = 98

_IN_FOLDER: Final = (
    f'cd -- "$1" 2>/dev/null || [ -z "$2" ] || exit {_NO_FOLDER}\n'
    f'[ -z "$2" ] || [ -f "$2" ] || exit {_NO_FILE}\n'
    'shift 2; exec "$@"'
)
"""A script for `sh -c`. Its arguments are the folder, the program's file ("" if it is not a file), and the command."""

_END_TIED: Final = (
    "for process in /proc/[0-9]*; do\n"
    '    grep -aqF -e "--tied=$1" "$process/cmdline" 2>/dev/null && kill "${process#/proc/}"\n'
    "done; true"
)
"""A script for `sh -c` that ends the engine which was started with --tied=TOKEN. Its argument is the token."""

_NOT_FOR_A_DESTINATION: Final = frozenset({"return-path", "pause-before-switchover", "events"})


class Destination(Closing):
    """A destination that was started. `close()` ends it unless `keep()` was called.

    uri     what the source has to dial
    facts   "name", "qmp", "log", ... as `run --detach --json` printed them
    """

    def __init__(self, address: str, host: RemoteHost, migfw: Sequence[str], facts: Mapping[str, Any]) -> None:
        """Takes over `host`."""
        self.facts: Final = {"host": address, **facts}
        self.uri: Final = f"ssh://{address}/{facts['incoming-uri']}"
        self._address = address
        self._host = host
        self._migfw = migfw
        self._kept = False

    def keep(self) -> None:
        """Do not end it on `close()`: from now on it may have the guest."""
        self._kept = True

    def give_up(self) -> None:
        """End it on `close()` after all: the guest is certainly here."""
        self._kept = False

    def close(self) -> None:
        """Idempotent; does not raise."""
        if not self._kept:
            self._kept = True
            command = [*self._migfw, "quit", "--qmp", str(self.facts["qmp"])]
            try:
                self._quit(command)
            except MigfwError as error:
                name = self.facts["name"]
                log.warning("the engine '%s' on %s may still wait for a guest: %s", name, self._address, error)
        self._host.close()

    def _quit(self, command: Sequence[str]) -> None:
        """End the engine. One that has ended by itself, as after a failed migration, does not answer: that is fine."""
        try:
            self._host.run(command, SHORT_SECONDS)
        except ChannelError:
            with _log_in(self._address) as again:
                again.run(command, SHORT_SECONDS)


def start_destination(
    engine: EngineClient, address: str, remote_migfw: str | None, caps: Mapping[str, bool], params: Sequence[str]
) -> Destination:
    """Start a destination for the guest of `engine` at [USER@]HOST[:PORT]. Raises UsageError, MigfwError.

    It gets the engine's capabilities, changed by `caps`, and `params`, the NAME=VALUE of the migration.
    """
    status = _status(engine)
    launch = status["launch"]
    host = _log_in(address)
    with contextlib.ExitStack() as undo:
        undo.callback(host.close)
        migfw = _find_migfw(host, remote_migfw, status["version"])
        switched = {one["capability"] for one in engine.call("query-migrate-capabilities") if one["state"]}
        wanted = (switched | {name for name, on in caps.items() if on}) - {name for name, on in caps.items() if not on}
        arguments = _arguments(launch, sorted(wanted - _NOT_FOR_A_DESTINATION), params)
        token = secrets.token_hex(8)
        try:
            destination = Destination(
                address, host, migfw, _start(host, [*migfw, *arguments, f"--tied={token}"], launch)
            )
        except BaseException:
            # The engine may have become ready just now, so that it no longer ends with the command that started it.
            with contextlib.suppress(MigfwError):
                host.run(["sh", "-c", _END_TIED, "sh", token], SHORT_SECONDS)
            raise
        undo.pop_all()
    return destination


def _status(engine: EngineClient) -> dict[str, Any]:
    if not engine.is_migfw:
        raise UsageError(
            f"--to starts a migfw like the one here, but at {engine.address} is a QEMU: give a URI instead"
        )
    status: dict[str, Any] = engine.call("x-migfw-status")
    if not status.get("launch"):
        raise UsageError(
            f"the engine at {engine.address} does not know how it was started (from Python?):"
            " start the destination yourself, and give its URI"
        )
    return status


def _log_in(address: str) -> RemoteHost:
    transport = find_transport(f"ssh://{address}/tcp:localhost:0")
    interrupt = Interrupt()
    try:
        return transport.log_in(interrupt)
    except ChannelError as error:
        raise ChannelError(str(error).replace(f"{transport.uri}: ", "", 1)) from None
    finally:
        interrupt.close()


# -- migfw on the other host -------------------------------------------------------------------------------------------


def _find_migfw(host: RemoteHost, given: str | None, version: str) -> Sequence[str]:
    """Find a migfw of this version: its command words. Raises MigfwError."""
    tried: list[str] = []
    for words in [[given]] if given else _candidates():
        found = host.run([*words, "--version"], SHORT_SECONDS)
        said = found.output.strip()
        if found.status == 0 and said.endswith(f"migfw {version}"):
            return words
        shown = " ".join(words)
        if found.status in _NO_COMMAND:
            tried.append(f"'{shown}' is not there")
        elif found.status == 0:
            tried.append(f"'{shown}' is {said.splitlines()[-1]}" if said else f"'{shown}' does not print its version")
        else:
            tried.append(f"'{shown}' fails: {_last_line(found.errors) or f'status {found.status}'}")
    raise MigfwError(
        f"no migfw {version}, the version of the engine here, on {host.name}: {'; '.join(tried)}"
        " (install it there, or say where it is with --remote-migfw PATH)"
    )


def _candidates() -> list[list[str]]:
    """`migfw`, then the path that it has on this host."""
    script = Path(sys.executable).with_name("migfw")
    here = [str(script)] if os.access(script, os.X_OK) else [sys.executable, "-m", "corefw.cli"]
    return [["migfw"], here]


def _start(host: RemoteHost, migfw: Sequence[str], launch: Mapping[str, Any]) -> Mapping[str, Any]:
    """Run this `migfw run` in the folder of the source's engine: what it printed. Raises UsageError, MigfwError."""
    file = _program_file(launch)
    command = ["sh", "-c", _IN_FOLDER, "sh", launch["directory"], file, *migfw]
    done = host.run(command, START_SECONDS)
    if done.status == _NO_FOLDER:
        raise MigfwError(
            f"{host.name} has no directory '{launch['directory']}': the program '{file}' must be at the same path there"
        )
    if done.status == _NO_FILE:
        raise MigfwError(
            f"{host.name} has no '{Path(launch['directory'], file)}': copy the program there before its guest can move"
        )
    if done.status:
        said = _last_line(done.errors) or f"status {done.status}, without a message"
        problem = f"the destination on {host.name} does not start: {said.removeprefix('migfw: ')}"
        raise (UsageError if done.status == _WRONG_USAGE else MigfwError)(problem)
    try:
        facts = json.loads(done.output[done.output.index("{") :])  # a shell's greeting may precede it
        if not all(isinstance(facts[key], str) for key in ("name", "qmp", "incoming-uri", "log")):
            raise TypeError
    except (ValueError, KeyError, TypeError):
        raise MigfwError(f"unexpected output from migfw run on {host.name}") from None
    return {**facts}


def _program_file(launch: Mapping[str, Any]) -> str:
    """The program's file as it was given, possibly relative to the folder; "" if the program is not a file."""
    file = str(launch["program"] or "").rpartition(":")[0]
    return file if file.endswith(".py") else ""


def _arguments(launch: Mapping[str, Any], caps: Sequence[str], params: Sequence[str]) -> list[str]:
    words = ["run", *([launch["program"]] if launch["program"] else []), f"--machine={launch['machine']}"]
    words += [f"--opt={name}={value}" for name, value in launch["options"].items()]
    words += [f"--property={name}={'on' if on else 'off'}" for name, on in launch["properties"].items()]
    words += [f"--cap={name}" for name in caps]
    words += [f"--param={pair}" for pair in params]
    words += ["--allow-undeclared"] if launch["allow-undeclared"] else []
    return [*words, "--incoming=private", "--detach", "--json"]


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""
