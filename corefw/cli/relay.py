"""`migfw relay` joins two transports; `migfw migrate` uses the same relay for a real QEMU.

A QEMU migrates over a transport that it does not support by sending into a socket of this process, which relays. It is
given one end of a socket pair with `getfd`, so it needs no path in common with this process: it may run in a container,
a chroot, or a service with a private /tmp. Only if its QMP is reached over TCP, which carries no descriptors, does it
dial a UNIX socket, in a folder that only this user can enter.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

import click

from corefw.channel import Transport
from corefw.cli import Interrupts, completion
from corefw.cli.console import ExitStatus, Finished, note, print_json, unread_is_fine
from corefw.cli.options import json_option, param_option, set_parameters
from corefw.errors import ChannelError, Interrupted, one_line
from corefw.net import descriptors
from corefw.net.relay import Phase, Relay, RelayProgress
from corefw.qmp.client import QmpClient, QmpError
from corefw.qmp.engines import EngineClient
from corefw.quantities import format_milliseconds, format_size
from corefw.states import MigrationStatus
from corefw.uri import MigrationUri, UnixAddress, check_dialled_port, split_host_port

if TYPE_CHECKING:
    from rich.live import Live

    from corefw.plugins import Plugins


# -- routes ------------------------------------------------------------------------------------------------------------


QEMU_TWO_WAY: Final = {"tcp": True, "unix": True, "vsock": True, "rdma": True, "exec": False, "fd": None}
"""The URI schemes of every QEMU -> whether they have a return path; None if that depends on the descriptor."""

_QEMU_FILE_SINCE: Final = (8, 2)
"""The first version of QEMU with file: URIs."""


@dataclass(frozen=True, slots=True)
class Route:
    """How a migration reaches its destination.

    relayed       this process forwards the bytes between a QEMU and the transport
    return_path   whether the route has one; None if unknown
    """

    relayed: bool
    return_path: bool | None


def find_transport(uri: str, params: Iterable[str] = ()) -> Transport:
    """Find the transport of a URI in this process; `params` are NAME=VALUE. Raises UriError, PluginError,
    SettingsError."""
    settings = _plugins().settings()
    set_parameters(settings, params)
    return _plugins().transport(uri, settings)


@cache
def _plugins() -> Plugins:
    from corefw.plugins import Plugins

    return Plugins.load()


def find_route(engine: EngineClient, uri: str) -> Route:
    """Find out how to reach a URI, before anything is changed.

    The process that will dial decides whether a URI is valid: an engine has its own descriptors (fd:), directory
    (file:, unix:) and plugins; a relay has those of this process. Raises UriError for an unknown scheme, a wrong
    address or one that only receives, and UsageError if the engine refuses it.
    """
    parsed = MigrationUri.parse(uri)
    if engine.is_migfw:
        return Route(relayed=False, return_path=engine.call("x-migfw-transport", uri=uri)["return-path"])
    if _qemu_knows(engine, parsed):
        return Route(relayed=False, return_path=QEMU_TWO_WAY.get(parsed.scheme, False))
    transport = find_transport(uri)
    transport.check_outgoing()
    return Route(relayed=True, return_path=transport.features.return_path)


def _qemu_knows(engine: EngineClient, uri: MigrationUri) -> bool:
    """Whether a QEMU can dial this URI itself. Raises UriError for a wrong address."""
    if uri.scheme == "tcp":
        _, port = split_host_port(uri.rest, str(uri))
        check_dialled_port(port, str(uri))
    if uri.scheme == "unix":
        return not uri.rest.startswith("@")  # QEMU's URIs cannot name abstract sockets
    if uri.scheme == "file":
        version = engine.call("query-version")["qemu"]
        return (version["major"], version["minor"]) >= _QEMU_FILE_SINCE
    return uri.scheme in QEMU_TWO_WAY


# -- migfw relay -------------------------------------------------------------------------------------------------------


LOOK: Final = 0.2
"""Seconds between two polls of the relay."""

LINE_INTERVAL: Final = 5.0
"""Minimum number of seconds between two plain lines."""

_SMOOTHING: Final = 0.3
"""Weight of the latest measurement in the rate that is shown."""


@click.command()
@click.argument("source", metavar="FROM", shell_complete=completion.uris)
@click.argument("target", metavar="TO", shell_complete=completion.uris)
@click.option(
    "--allow-any-user",
    is_flag=True,
    help="Let every user of this host dial FROM if it is unix:@NAME, not only you and root.",
)
@param_option
@json_option
def relay(source: str, target: str, allow_any_user: bool, params: tuple[str, ...], as_json: bool) -> None:
    """Listen at FROM, dial TO when a source connects, and forward everything in both directions.

    Use this to connect two hosts over a transport that one of them does not support: QEMU dials FROM, and the relay
    forwards its stream and the destination's replies over ssh: or zmq:. FROM and TO are any migration URIs; for port 0,
    the relay prints the port that it got. When one side ends its stream, the relay ends the stream to the other side;
    when one connection breaks, the relay aborts the other. If the migration has a return path, the relay fails unless
    the destination has confirmed that it has the guest.

    \b
    Examples:
      migfw relay unix:/tmp/out.sock ssh://other.example.org/tcp:localhost:4444
      migfw relay zmq:tcp://0.0.0.0:4444 unix:/tmp/in.sock
      migfw relay tcp:0.0.0.0:4444 file:guest.migration
    """
    from corefw.plugins import Plugins

    plugins = Plugins.load()
    settings = plugins.settings()
    settings.set_property("allow-any-user", allow_any_user)
    set_parameters(settings, params)
    with (
        Relay(plugins.transport(source, settings), plugins.transport(target, settings)) as joined,
        Interrupts() as interrupts,
    ):
        address = joined.listen()
        if address:
            (note if as_json else click.echo)(one_line(f"listening at {address}"))
        joined.start()
        with unread_is_fine() as unread:
            with Display(one_line(f"{address or source} -> {target}"), as_json=as_json) as display:
                while not joined.wait(LOOK):
                    display.update(joined.progress())
                    if interrupts.requested:
                        joined.abort()
            _report(joined, as_json=as_json)
        if unread.error:
            note(unread.before(f"relayed {_amount(joined.progress(), two_way=joined.two_way)}"))


def _report(joined: Relay, *, as_json: bool) -> None:
    progress = joined.progress()
    amount = _amount(progress, two_way=joined.two_way)
    if as_json:
        print_json(_document(joined, progress))
    elif progress.phase is Phase.DONE:
        rate = f" ({format_size(progress.forward / progress.seconds)}/s)" if progress.seconds else ""
        click.echo(f"relayed {amount} in {format_milliseconds(progress.seconds * 1000)}{rate}")
    if isinstance(joined.failure, Interrupted):
        note(f"interrupted after {amount}; both connections were aborted")
        raise Finished(ExitStatus.INTERRUPTED)
    if joined.failure:
        raise joined.failure


def _document(joined: Relay, progress: RelayProgress) -> dict[str, object]:
    document: dict[str, object] = {
        "from": str(joined.source.uri),
        "to": str(joined.target.uri),
        "status": "completed" if progress.phase is Phase.DONE else "failed",
        "return-path": joined.two_way,
        "forward-bytes": progress.forward,
        "backward-bytes": progress.backward,
        "seconds": round(progress.seconds, 3),
    }
    return document | ({"error-desc": str(joined.failure)} if joined.failure else {})


def _amount(progress: RelayProgress, *, two_way: bool = True) -> str:
    back = f" and {format_size(progress.backward)} back" if two_way else ""
    return f"{format_size(progress.forward)}{back}"


class Display:
    """Progress of the relay: live on a terminal, otherwise plain lines, and nothing on stdout with --json."""

    def __init__(self, title: str, *, as_json: bool) -> None:
        stream = sys.stderr if as_json else sys.stdout
        self._title = title
        self._live: Live | None = None
        self._lines = not as_json and not stream.isatty()
        self._next_line = time.monotonic() + LINE_INTERVAL
        self._last = (time.monotonic(), 0)
        self._rate = 0.0
        if stream.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(file=stream, highlight=False), auto_refresh=False, transient=True)
            self._live.start()

    def update(self, progress: RelayProgress) -> None:
        now, total = time.monotonic(), progress.forward + progress.backward
        then, before = self._last
        if now > then:
            self._rate += _SMOOTHING * ((total - before) / (now - then) - self._rate)
        self._last = (now, total)
        text = f"{progress.phase}: {_amount(progress)}, {format_size(self._rate)}/s"
        if progress.phase is not Phase.RELAYING:
            text = str(progress.phase)
        if self._live:
            self._show(text, progress)
        elif self._lines and now >= self._next_line and total != before:
            self._next_line = now + LINE_INTERVAL
            click.echo(text)

    def _show(self, text: str, progress: RelayProgress) -> None:
        from rich.console import Group
        from rich.text import Text

        assert self._live
        elapsed = f"  {format_milliseconds(progress.seconds * 1000)}" if progress.seconds else ""
        self._live.update(Group(Text(self._title, style="bold"), Text(text + elapsed, style="cyan")), refresh=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()


# -- for a real QEMU ---------------------------------------------------------------------------------------------------


_SETTLE: Final = 2.0
"""Seconds for the relay to find out why it broke, if QEMU noticed first."""

_FAREWELL: Final = 10.0
"""Seconds for the relay to end by itself after the guest has moved, while QEMU closes its socket."""

_LOOK: Final = 0.1

_NAME: Final = "migfw-relay"
"""Name of the descriptor on both sides."""


class QemuRelay:
    """Relays the migration of a QEMU to `uri`. Use it as a context manager, and make the QEMU migrate to `relay.uri`.

    Send that command over `client`, because QEMU keeps descriptors by connection. If the relay breaks, its error is the
    reason, not what QEMU reports. Once the guest has moved, the far side sees the stream end. `params` are NAME=VALUE
    for the transport. Raises UriError, ChannelError, QmpError, SettingsError.
    """

    def __init__(self, uri: str, client: QmpClient, params: Iterable[str] = ()) -> None:
        target = find_transport(uri, params)
        self._far = uri
        self._given_up = False
        with contextlib.ExitStack() as undo:
            passes_fds = isinstance(client.address, UnixAddress)
            self.uri: Final = _hand_over(client, undo) if passes_fds else _private_socket(undo)
            self._relay = Relay(find_transport(self.uri), target)
            self._tidy_up = undo.pop_all()

    def has_failed(self) -> bool:
        """Whether the relay has broken, so that the migration should be cancelled."""
        self._given_up = self._relay.failure is not None
        return self._given_up

    def finish(self, answer: Mapping[str, Any], capabilities: Mapping[str, bool], interrupts: Interrupts) -> str | None:
        """Return what went wrong, or None, after QEMU's migration has ended with this `answer` of query-migrate.

        Without a return path, waits until the last byte has left this process: the stream is not complete before.
        """
        status = answer["status"]
        if status == MigrationStatus.COMPLETED:
            if not capabilities.get("return-path"):
                return self._drain(interrupts)
            self._relay.wait(_FAREWELL)
            return None
        if status == MigrationStatus.FAILED:
            self._relay.wait(_SETTLE)
            if self._relay.failure is None:
                return f"QEMU says: {answer.get('error-desc', 'nothing of the reason')}"
            return self._failure()
        return self._failure() if self._given_up else None

    def _drain(self, interrupts: Interrupts) -> str | None:
        while not self._relay.wait(_LOOK):
            if interrupts.requested:
                return "interrupted before everything from QEMU was forwarded"
        return f"QEMU had sent everything, but {self._failure()}" if self._relay.failure else None

    def _failure(self) -> str:
        """Why the relay broke, with its two sides named as they are known here."""
        sides = {
            "the FROM side of the relay": "QEMU's side",
            "the TO side of the relay": f"the side of {self._far}",
        }
        text = str(self._relay.failure)
        for side, name in sides.items():
            text = text.replace(side, name)
        return text

    def __enter__(self) -> Self:
        try:
            self._relay.start()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        self._relay.close()
        self._tidy_up.close()


def _private_socket(undo: contextlib.ExitStack) -> str:
    """The URI of a socket that can be created in a private folder."""
    folder = Path(tempfile.mkdtemp(prefix="migfw-relay-"))
    undo.callback(shutil.rmtree, folder, ignore_errors=True)
    return f"unix:{folder}/qemu"


def _hand_over(client: QmpClient, undo: contextlib.ExitStack) -> str:
    """Give QEMU one end of a socket pair. The returned URI means that end in QEMU, and our end in this process."""
    ours, theirs = socket.socketpair()
    with theirs:
        descriptors.put(_NAME, ours.detach())
        undo.callback(descriptors.discard, _NAME)
        client.execute("getfd", {"fdname": _NAME}, [theirs.fileno()])
    undo.callback(_take_back, client)
    return f"fd:{_NAME}"


def _take_back(client: QmpClient) -> None:
    """Close the descriptor that QEMU still has if it never migrated. If it did, or has ended, there is none."""
    with contextlib.suppress(QmpError, ChannelError):
        client.execute("closefd", {"fdname": _NAME})
