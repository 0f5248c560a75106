"""`migfw migrate`: move the guest and watch until it is there.

Whatever can be refused is refused before the engine is asked, and an engine that refuses keeps its settings. Once the
migration runs, this process only watches: the engine continues whatever happens here, and it enforces the limits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from corefw.cli import Interrupts
from corefw.cli.console import ExitStatus, Finished, note, print_facts, print_json, unread_is_fine
from corefw.cli.display import open_display
from corefw.cli.options import (
    NO_LIMITS,
    WithInstalled,
    add_limits,
    complete_uris,
    engine_options,
    json_option,
    settings_options,
)
from corefw.client.changes import (
    CAPABILITY,
    Changes,
    installed,
    parse_switches,
    read_changes,
    set_parameters,
    split_for_relay,
)
from corefw.client.follow import SWITCHES, Follower
from corefw.client.progress import cancelled, summary
from corefw.client.routes import QemuRelay, Route, find_route, find_transport
from corefw.errors import MigfwError, UsageError, one_line
from corefw.machine import RunState
from corefw.qmp.engines import EngineClient, connect
from corefw.settings import QMP_MAX_BANDWIDTH, UNLIMITED
from corefw.states import POSTCOPY, SETUP_OR_ACTIVE, MigrationStatus

if TYPE_CHECKING:
    from corefw.client.destination import Destination


class _Migrate(WithInstalled):
    """Takes --postcopy without a value, too, also in front of the URI."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, ["--postcopy=after-first-pass" if one == "--postcopy" else one for one in args])


class Attempts(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic in newer versions of click
    """A number of attempts, or "forever", which is -1."""

    name = "attempts"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if value == "forever":
            return -1
        if not str(value).isdecimal():
            self.fail(f"expected a number or 'forever', got '{value}'", param, ctx)
        return int(value)


@click.command(cls=_Migrate)
@click.argument("uri", required=False, shell_complete=complete_uris)
@click.option(
    "--to",
    metavar="[USER@]HOST[:PORT]",
    help="Start the destination on HOST over ssh, with the same program and options, and move there.",
)
@click.option("--remote-migfw", metavar="PATH", help="Path of migfw on HOST.  [default: migfw, then its path here]")
@engine_options
@settings_options
@click.option("--timeout", metavar="DURATION", help="Limit how long the migration may take, for example 30s or 10m.")
@click.option("--max-passes", metavar="N", type=click.IntRange(1), help="Limit the number of passes.")
@click.option(
    "--on-timeout",
    type=click.Choice(["cancel", "switchover"]),
    help="What to do when --timeout or --max-passes is reached: cancel, and keep the guest running here; or stop the"
    " guest and send the rest, even if that takes longer than downtime-limit.  [default: cancel]",
)
@click.option(
    "--postcopy",
    type=click.Choice(["after-first-pass", "when-stuck", "now"]),
    help="Switch to postcopy: once everything has been sent once, once precopy does not converge, or at once."
    " --postcopy alone means --postcopy=after-first-pass.",
)
@click.option(
    "--reconnect",
    metavar="N|forever",
    type=Attempts(),
    help="If the connection breaks in postcopy, redial automatically, up to N times in a row. Also applies after"
    " --resume, unless another N is given there.",
)
@click.option("--detach", is_flag=True, help="Start the migration and return; 'migfw status' shows its progress.")
@click.option("--resume", is_flag=True, help="Resume a postcopy migration whose connection broke.")
@json_option
def migrate(
    uri: str | None,
    to: str | None,
    remote_migfw: str | None,
    name: str | None,
    qmp: str | None,
    caps: tuple[str, ...],
    params: tuple[str, ...],
    timeout: str | None,
    max_passes: int | None,
    on_timeout: str | None,
    postcopy: str | None,
    reconnect: int | None,
    detach: bool,
    resume: bool,
    as_json: bool,
) -> None:
    """Move the running guest to the destination at URI, or to HOST, and show progress.

    \b
    URI is one of:
      tcp:HOST:PORT                                unix:PATH
      ssh://[USER@]HOST[:PORT]/tcp:HOST:PORT       ssh://[USER@]HOST[:PORT]/unix:PATH
      zmq:tcp://HOST:PORT                          zmq:ipc://PATH
      exec:COMMAND                                 fd:N or fd:NAME
      file:PATH                                    others that 'migfw plugins' lists

    The engine opens the URI, so paths and commands refer to its host and working directory. The return path is on if
    the transport is bidirectional, so "completed" means that the destination has confirmed it. The bandwidth is not
    limited. Use --cap and --param to change this.

    A migration that does not converge continues until the guest writes less, or until --timeout or --max-passes. The
    engine enforces these limits, even with --detach.

    With --to, the command starts the destination for you. HOST needs this version of migfw and the program's files. The
    remote engine stays in the background after a successful migration, and is ended after a failed one.

    With --postcopy the guest starts on the destination before its RAM has arrived, even if it writes faster than the
    link can send. The engine decides when, also with --detach, and the output says when and why. If the connection
    breaks then, --resume continues over a new one, to the same URI or to that of 'migfw recover'; with --reconnect it
    does so by itself.

    Ctrl-C cancels the migration and waits until the guest runs here again; a second one exits at once. In postcopy it
    is too late to cancel. With --qmp the command also moves a real QEMU; it relays over transports that QEMU does not
    support.

    \b
    Examples:
      migfw migrate tcp:other.example.org:4444
      migfw migrate --to me@other.example.org
      migfw migrate ssh://other.example.org/tcp:localhost:4444 --param downtime-limit=50ms
      migfw migrate tcp:other:4444 --param max-bandwidth=200M --json
      migfw migrate tcp:other:4444 --timeout 5m --on-timeout switchover
      migfw migrate tcp:other:4444 --postcopy=when-stuck
      migfw migrate zmq:tcp://other:4444 --qmp unix:/run/qemu.sock
    """
    fixed = {"--cap": caps, "--timeout": timeout, "--max-passes": max_passes, "--postcopy": postcopy}
    _check_where(uri, to, remote_migfw, detach=detach, resume=resume)
    _check_resume(fixed if resume else {})
    with connect(name, qmp) as engine, contextlib.ExitStack() as stack:
        _check_idle(engine, resume=resume)
        destination = stack.enter_context(_start(engine, to, remote_migfw, caps, params)) if to is not None else None
        uri = destination.uri if destination is not None else uri
        assert uri is not None
        route = find_route(engine, uri)
        of_engine, of_relay = split_for_relay(params) if route.relayed else (params, ())
        changes = read_changes(caps, of_engine, plugins=engine.is_migfw)
        if postcopy is not None:
            _check_switch(engine, postcopy, detach=detach)
            changes.capabilities.setdefault("postcopy-ram", True)
        _check_return_path(changes)
        _add_reconnect(changes, engine, reconnect)
        if not resume:
            _add_defaults(changes, engine, route)
            add_limits(changes, engine, timeout, max_passes, on_timeout, postcopy)
        if detach and route.relayed:
            raise UsageError(f"'{uri}': this process has to stay to relay for QEMU (leave out --detach)")
        relay = stack.enter_context(_relay(uri, engine, of_relay)) if route.relayed else None
        interrupted = stack.enter_context(Interrupts()).received
        with changes.applied(engine) as before:
            if interrupted():
                note("cancelled before it started")
                raise Finished(ExitStatus.INTERRUPTED)
            engine.call("migrate", uri=relay.uri if relay else uri, **({"resume": True} if resume else {}))
        if destination is not None:
            destination.keep()
        unread = stack.enter_context(unread_is_fine())
        if detach:
            _say_detached(engine, uri, as_json=as_json)
            if unread.error:
                note(unread.before(f"migrating to {uri}"))
            return
        with open_display(f"migrating to {one_line(uri)}", as_json=as_json) as display:
            switch = None if engine.is_migfw else postcopy
            follower = Follower(
                engine, display, interrupted=interrupted, switch=switch, has_failed=relay.has_failed if relay else None
            )
            answer = follower.wait()
        problem = _finish(relay, answer, changes, interrupted) if relay else None
        _revert(changes, engine, before, answer)
        if destination is not None:
            _settle(destination, engine, answer)
        if as_json:
            there = {"destination": destination.facts} if destination is not None else {}
            print_json({"uri": uri, **answer, **({"error-desc": problem} if problem else {}), **there})
        elif answer["status"] == MigrationStatus.COMPLETED and problem is None:
            print_facts([*summary(answer), *(_place(destination) if destination is not None else ())])
        _end(engine, uri, answer, problem, interrupted=interrupted())
        if unread.error:
            note(unread.before("the guest has moved"))


def _add_reconnect(changes: Changes, engine: EngineClient, attempts: int | None) -> None:
    if attempts is None:
        return
    if not engine.is_migfw:
        raise UsageError(f"--reconnect: at {engine.address} is a QEMU, and only migfw reconnects automatically")
    changes.parameters.setdefault("x-migfw-reconnect", attempts)


def _check_switch(engine: EngineClient, postcopy: str, *, detach: bool) -> None:
    """Refuse what a real QEMU cannot do."""
    if engine.is_migfw:
        return
    if detach:
        raise UsageError(
            "--postcopy: this process has to stay to switch QEMU to postcopy (leave out --detach, or use --cap"
            " postcopy-ram --detach and then 'migfw postcopy')"
        )
    if postcopy not in SWITCHES:
        raise UsageError(f"--postcopy={postcopy}: a QEMU cannot decide this (use {' or '.join(SWITCHES)})")


def _check_idle(engine: EngineClient, *, resume: bool) -> None:
    """Refuse a second migration with what to do about the first. The engine refuses it too, in QEMU's words."""
    status = engine.outgoing_status()
    if resume or status not in SETUP_OR_ACTIVE:
        return
    if status == MigrationStatus.POSTCOPY_PAUSED:
        raise UsageError(
            "a migration is paused in postcopy, because its connection broke: --resume continues it ('migfw status'"
            " shows more)"
        )
    way_out = "wait for its end" if status in POSTCOPY else "'migfw cancel' ends it"
    raise UsageError(f"a migration is in progress (status '{status}'): 'migfw status' shows it, {way_out}")


def _check_return_path(changes: Changes) -> None:
    """Refuse what would have no effect: a migration with postcopy opens the return path anyway."""
    if changes.capabilities.get("postcopy-ram") and changes.capabilities.get("return-path") is False:
        raise UsageError("--cap return-path=off: postcopy needs the return path (leave one of the two out)")


def _check_where(uri: str | None, to: str | None, remote_migfw: str | None, *, detach: bool, resume: bool) -> None:
    if uri is not None and to is not None:
        raise UsageError(f"'{uri}' and --to {to} both name a destination: use one of them")
    if uri is None and to is None:
        raise UsageError("no destination: give a URI, as in tcp:HOST:PORT, or --to HOST")
    if to is None and remote_migfw is not None:
        raise UsageError("--remote-migfw needs --to HOST")
    if to is not None and resume:
        raise UsageError(f"--to {to} starts a destination, and --resume needs the one that has the guest: give its URI")
    if to is not None and detach:
        raise UsageError(f"--to {to}: this process has to stay and watch the destination (leave out --detach)")


def _check_resume(options: Mapping[str, object]) -> None:
    """Refuse the options that only a migration which begins can have."""
    for option, value in options.items():
        if value:
            raise UsageError(f"{option}: a migration resumes with the settings that it began with (leave {option} out)")


def _start(
    engine: EngineClient, to: str, remote_migfw: str | None, caps: Sequence[str], params: Sequence[str]
) -> Destination:
    from corefw.client.destination import start_destination

    return start_destination(engine, to, remote_migfw, parse_switches(caps, CAPABILITY), params)


def _settle(destination: Destination, engine: EngineClient, answer: Mapping[str, Any]) -> None:
    """End the destination of a migration that failed, unless it may have the guest."""
    if answer["status"] == MigrationStatus.COMPLETED:
        return
    if engine.settled_run_state() in (RunState.POSTMIGRATE, RunState.FINISH_MIGRATE):
        facts = destination.facts
        note(f"the guest may have arrived: check the engine '{facts['name']}' on {facts['host']}, which still runs")
        return
    destination.give_up()


def _place(destination: Destination) -> list[tuple[str, str]]:
    facts = destination.facts
    return [("now on", f"{facts['host']}, engine '{facts['name']}', log {facts['log']}")]


def _revert(changes: Changes, engine: EngineClient, before: Changes, answer: Mapping[str, Any]) -> None:
    """Give the engine its settings back if the guest stays here: --cap and --param were meant for this migration."""
    if answer["status"] in (MigrationStatus.FAILED, MigrationStatus.CANCELLED):
        before.parameters.update((name, none) for name, none in NO_LIMITS.items() if name in before.parameters)
        changes.revert(engine, before)


def _end(engine: EngineClient, uri: str, answer: Mapping[str, Any], problem: str | None, *, interrupted: bool) -> None:
    """Return if the guest has moved; otherwise raise an error that says why not, and where the guest is."""
    status = answer["status"]
    if status == MigrationStatus.COMPLETED and problem is None:
        if interrupted:
            note("too late to cancel: the guest has moved")
        return
    here = f"the guest is {(state := engine.settled_run_state())} here"
    if interrupted and status in (MigrationStatus.CANCELLED, MigrationStatus.FAILED):
        note(f"{cancelled({**answer, 'status': MigrationStatus.CANCELLED}, state)}; {here}")
        raise Finished(ExitStatus.INTERRUPTED)
    if status == MigrationStatus.CANCELLED and problem is None:
        raise MigfwError(f"the migration to {uri} was {cancelled(answer, state)}; {here}")
    if status == MigrationStatus.POSTCOPY_PAUSED:
        cause = one_line(str(answer.get("error-desc", uri)))
        raise MigfwError(
            f"the connection broke in postcopy ({cause}), and the guest runs on the destination without a part of its"
            " RAM: run 'migfw migrate URI --resume' here (unless the destination still listens where it did, first"
            " 'migfw recover URI' there)"
        )
    reason = one_line(str(problem or answer.get("error-desc", status)))
    raise MigfwError(f"the migration{'' if one_line(uri) in reason else f' to {uri}'} failed: {reason}; {here}")


def _relay(uri: str, engine: EngineClient, params: Sequence[str]) -> QemuRelay:
    settings = installed().settings()
    set_parameters(settings, params)
    return QemuRelay(find_transport(uri, settings), engine.client)


def _finish(
    relay: QemuRelay, answer: Mapping[str, Any], changes: Changes, interrupted: Callable[[], bool]
) -> str | None:
    """What went wrong with the relay; None if nothing did."""
    return_path = bool(changes.capabilities.get("return-path"))
    return relay.finish(answer, return_path=return_path, interrupted=interrupted)


def _add_defaults(changes: Changes, engine: EngineClient, route: Route) -> None:
    """Add the command line's own defaults for what --cap, --param and 'migfw set' left open."""
    if route.return_path is not None:
        changes.capabilities.setdefault("return-path", route.return_path)
    if engine.call("query-migrate-parameters").get("max-bandwidth") == QMP_MAX_BANDWIDTH:
        changes.parameters.setdefault("max-bandwidth", UNLIMITED)


def _say_detached(engine: EngineClient, uri: str, *, as_json: bool) -> None:
    if as_json:
        print_json({"uri": uri, **engine.query_migrate()})
    else:
        click.echo(f"migrating to {one_line(uri)}; 'migfw status' shows how far it is")
