"""`migfw relay`: join two transports, and show what goes through.

It prints its address before it waits, and the bytes of each direction when both have ended. A relay that breaks before
the destination has the guest ends with status 1, however much went through.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

import click

from corefw.cli import completion
from corefw.cli.interrupts import Interrupts
from corefw.cli.options import PARAMETER, json_option, param_option, split_pairs
from corefw.cli.outcome import ExitStatus, Finished, note
from corefw.cli.output import print_json
from corefw.cli.stdout import unread_is_fine
from corefw.errors import Interrupted, one_line
from corefw.net.relay import Phase, Relay, RelayProgress
from corefw.quantities import format_milliseconds, format_size

if TYPE_CHECKING:
    from rich.live import Live

LOOK: Final = 0.2
"""Seconds between two looks at the relay."""

LINE_INTERVAL: Final = 5.0
"""Seconds between two plain lines, at least."""

_SMOOTHING: Final = 0.3
"""Weight of the latest look in the rate that is shown."""


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
    texts = split_pairs(params, PARAMETER)
    settings.set_parameters({name: settings.declared_parameter(name).parse(text) for name, text in texts.items()})
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
    """How far the relay is: live on a terminal, a line now and then elsewhere, nothing on stdout beside --json."""

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
