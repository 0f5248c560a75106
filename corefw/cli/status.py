"""The commands that only look at an engine: `migfw status`, once or continuously, and `migfw check`."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

import click

from corefw.cli.console import ExitStatus, Finished, note, print_facts, print_json
from corefw.cli.options import complete_uris, engine_options, json_option
from corefw.client.progress import Progress, summary, switched
from corefw.errors import ChannelError, UsageError
from corefw.machine import RunState
from corefw.qmp.engines import EngineClient, connect
from corefw.quantities import format_duration, format_milliseconds, format_size
from corefw.states import POSTCOPY, MigrationStatus

if TYPE_CHECKING:
    from corefw.cli.display import Screen

Fact = tuple[str, str]


def _phrase(value: object) -> str:
    """Any JSON value in one line."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_phrase(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(_phrase(inner) for inner in value)
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _devices(value: Any) -> str:
    """The names of devices, with the instance if it is not the first. Another plugin's list may look different."""
    if not (isinstance(value, list) and all(isinstance(one, dict) and "name" in one for one in value)):
        return _phrase(value)
    return ", ".join(f"{one['name']}/{one['instance-id']}" if one.get("instance-id") else one["name"] for one in value)


def _size(value: Any) -> str:
    return format_size(value) if isinstance(value, int) else _phrase(value)


def _sizes(value: Any) -> str:
    """Sizes by name."""
    if not isinstance(value, dict):
        return _phrase(value)
    return ", ".join(f"{name} {_size(size)}" for name, size in value.items())


def _bitmaps(value: Any) -> str:
    if not isinstance(value, list):
        return _phrase(value)
    return ", ".join(
        f"{one['node']}/{one['name']} {'inconsistent' if one['inconsistent'] else _size(one['dirty'])}" for one in value
    )


_SHOWN: Final[Mapping[str, tuple[str, Callable[[Any], str]]]] = {
    "pid": ("guest process", _phrase),
    "dirty-log": ("dirty log", _phrase),
    "value-sizes": ("values", _sizes),
    "before-stop": ("before_stop()", _phrase),
    "ram-arriving": ("still arriving", lambda _: "its RAM, in postcopy; it cannot be sent on before all of it is here"),
    "devices": ("devices", _devices),
    "bitmaps": ("dirty bitmaps", _bitmaps),
    "device-state": ("device state", _size),
}
"""How parts of a machine's information are shown: key -> (name, formatter)."""


@click.command()
@engine_options
@click.option("--watch", is_flag=True, help="Keep showing it until Ctrl-C or until the engine ends.")
@json_option
def status(name: str | None, qmp: str | None, watch: bool, as_json: bool) -> None:
    """Show the guest, its RAM, and the current or last migration, of an engine or a real QEMU.

    With --watch a terminal is updated live; if stdout is a file or a pipe, a line is printed whenever something
    changes, at most once per second. Ctrl-C ends only this command (status 130), not the guest or the migration.

    \b
    Examples:
      migfw status
      migfw status --watch
      migfw status --name heat --json
      migfw status --qmp unix:/run/qemu.sock
    """
    if watch and as_json:
        raise UsageError("--json prints one document, --watch never stops printing: use one of them")
    if watch:
        _watch(name, qmp)
        return
    with connect(name, qmp) as engine:
        document = ask(engine)
    if as_json:
        print_json(document)
    else:
        print_facts(facts(document))


def ask(engine: EngineClient) -> dict[str, Any]:
    """Everything that `migfw status` shows about an engine."""
    document: dict[str, Any] = engine.call("x-migfw-status") if engine.is_migfw else _of_qemu(engine)
    return document


def _of_qemu(engine: EngineClient) -> dict[str, Any]:
    """The part of the answer to x-migfw-status that a real QEMU can give."""
    version = engine.call("query-version")["qemu"]
    state = engine.call("query-status")
    return {
        "name": engine.call("query-name").get("name", ""),
        "version": "QEMU {major}.{minor}.{micro}".format(**version),
        "running": state["running"],
        "status": state["status"],
        "migration": engine.query_migrate(),
    }


def facts(document: Mapping[str, Any]) -> list[Fact]:
    """Turn the document into (name, value) lines, most important first."""
    return [*_facts(document)]


def _facts(document: Mapping[str, Any]) -> Iterator[Fact]:
    yield "name", document["name"] or "(none)"
    yield "guest", _guest(document)
    if document.get("incoming", "none") != "none" or document.get("incoming-uri"):
        yield "incoming", " at ".join(part for part in (document["incoming"], document["incoming-uri"]) if part)
    if (allocated := document.get("preallocation")) and allocated["total"]:  # a parked machine's RAM is not known yet
        yield "allocated RAM", f"{format_size(allocated['allocated'])} of {format_size(allocated['total'])}"
    yield from _migration(document["migration"])
    for reason in document["migration"].get("blocked-reasons", ()):
        yield "cannot migrate", str(reason)
    if "machine" in document:
        yield from _machine(document["machine"])
    if "pid" in document:
        yield "process", f"{document['pid']} (migfw {document['version']})"
    else:
        yield "process", document["version"]
    if log := (document.get("launch") or {}).get("log"):
        yield "log", log


def _guest(document: Mapping[str, Any]) -> str:
    """The run state; of a source in postcopy also where the guest is, which QEMU's name for the state does not say."""
    state = str(document["status"])
    has_left = state == RunState.FINISH_MIGRATE and document["migration"].get("status") in POSTCOPY
    return f"{state} (in postcopy it runs on the destination)" if has_left else state


def _machine(machine: Mapping[str, Any]) -> Iterator[Fact]:
    yield "machine", f"{machine['kind']}, type {machine['name']}" if machine["name"] else machine["kind"]
    information = {key: value for key, value in machine["information"].items() if value != machine["name"]}
    ram = information.pop("ram", {})
    if ram:
        blocks = ", ".join(f"{block} {format_size(length)}" for block, length in ram.items())
        yield "RAM", f"{format_size(sum(ram.values()))} ({blocks})"
    for key, value in information.items():
        if value not in ({}, [], "", None):
            name, written = _SHOWN.get(key, (key, _phrase))
            yield name, written(value)


def _migration(answer: Mapping[str, Any]) -> Iterator[Fact]:
    progress = Progress.of(answer)
    if "expected-downtime" in answer:
        yield "migration", f"{progress.line()}, running for {format_duration(progress.elapsed)}"
        if how := switched(answer):
            yield "switched", how
        for warning in progress.warnings:
            yield "warning", warning
        if "error-desc" in answer:
            yield "error", str(answer["error-desc"])
    else:
        (_, first), *rest = summary(answer)
        yield "migration", progress.line() if progress.missing is not None else first
        yield from rest
    yield from _page_faults(answer)
    if (own := answer.get("x-migfw", {}).get("reconnect")) is not None:
        after = f", the next is in {format_milliseconds(own['wait'])}" if own.get("wait") else ""
        limit = own.get("limit", "any number of")
        yield "reconnects", f"automatic; {own['attempts']} of {limit} attempts have failed{after}"
    elif progress.phase == MigrationStatus.POSTCOPY_PAUSED:
        yield (
            "to recover",
            "'migfw migrate URI --resume' on the source; for another address, after 'migfw pause' on the destination,"
            " or if that is a QEMU, first 'migfw recover URI' on the destination",
        )


def _page_faults(answer: Mapping[str, Any]) -> Iterator[Fact]:
    """How long the guest has waited for pages in postcopy; with capability postcopy-blocktime alone."""
    if found := answer.get("x-migfw", {}).get("page-faults"):
        median, p99, longest = (_fine(found[f"latency-{which}"]) for which in ("p50", "p99", "max"))
        over = f"{found['count']:,}, latency p50 {median}, p99 {p99}, max {longest}"
        yield "page faults", f"{over}; {found['waiting']} waiting" if found["waiting"] else over
    elif (average := answer.get("postcopy-latency")) is not None:  # a real QEMU
        yield "page faults", f"average latency {_fine(average)}"
    if (blocktime := answer.get("postcopy-blocktime")) is not None:
        each = ", ".join(format_milliseconds(one) for one in answer.get("postcopy-vcpu-blocktime", ()))
        yield "blocked", f"{format_milliseconds(blocktime)} as a whole; by virtual CPU or thread: {each or 'none'}"


def _fine(nanoseconds: float) -> str:
    """A short time: "0.214 ms", "12 ms"."""
    milliseconds = nanoseconds / 1e6
    return f"{milliseconds:.3f} ms" if milliseconds < 10 else format_milliseconds(milliseconds)


# -- --watch -----------------------------------------------------------------------------------------------------------


INTERVAL: Final = 1.0
"""Seconds between two polls."""


def _watch(name: str | None, qmp: str | None) -> None:
    """Show the engine's status until it has ended. KeyboardInterrupt passes through."""
    from corefw.cli.display import open_screen

    screen: Screen | None = None
    try:
        while True:
            with connect(name, qmp) as engine:
                name, qmp = None, engine.address  # from now on this one, whichever others start
                screen = screen or open_screen()
                # An engine whose guest has moved stays for its clients: leave, and see whether it is still there.
                while not _show(screen, engine):
                    time.sleep(INTERVAL)
            time.sleep(INTERVAL)
    except ChannelError:
        pass
    except UsageError:
        if screen is None:  # otherwise it has answered before
            raise
    finally:
        if screen is not None:
            screen.close()
    note("the engine has ended")


def _show(screen: Screen, engine: EngineClient) -> bool:
    """Show the present status. Returns whether the guest has moved."""
    document = ask(engine)
    screen.show(_phrases(document), facts(document))
    return bool(document["migration"].get("status") == MigrationStatus.COMPLETED)


def _phrases(document: Mapping[str, Any]) -> list[str]:
    """What may change: the guest, the migration, the fields of a program."""
    answer = document["migration"]
    progress = Progress.of(answer)
    phrases = [f"guest {document['status']}"]
    if document.get("incoming", "none") != "none":
        phrases.append(f"incoming {document['incoming']}")
    if progress.phase != "none":
        shown = "expected-downtime" in answer or progress.missing is not None
        phrases.append(f"migration {progress.line() if shown else progress.phase}")
        phrases += [f"{name} {value}" for name, value in _page_faults(answer)]
    phrases += progress.warnings
    phrases += [f"cannot migrate: {reason}" for reason in answer.get("blocked-reasons", ())]
    fields = document.get("machine", {}).get("information", {}).get("fields") or {}
    phrases += [f"{name} {value}" for name, value in fields.items()]
    return phrases


# -- migfw check -------------------------------------------------------------------------------------------------------


_VERSIONS: Final = (("migfw", "migfw"), ("python", "Python"), ("numpy", "NumPy"))
"""What a destination tells of itself, and how it is shown."""


@click.command()
@click.argument("uri", required=False, shell_complete=complete_uris)
@click.option(
    "--to", metavar="[USER@]HOST[:PORT]", help="Start a destination on HOST over ssh for the check, then end it."
)
@click.option("--remote-migfw", metavar="PATH", help="Path of migfw on HOST.  [default: migfw, then its path here]")
@click.option("--postcopy", is_flag=True, help="Check for a migration with --postcopy.")
@engine_options
@json_option
def check(
    uri: str | None,
    to: str | None,
    remote_migfw: str | None,
    postcopy: bool,
    name: str | None,
    qmp: str | None,
    as_json: bool,
) -> None:
    """Check whether the running guest could move to URI or HOST. Nothing moves, and the guest keeps running.

    The destination compares the programs, their fields and arrays, the versions of Python and NumPy, and checks its
    free memory. The bandwidth and the guest's dirty rate are measured for one second each. The result shows whether a
    migration would converge, how long it would take, and the expected downtime. The destination keeps waiting
    afterwards. Without URI or --to, only this side is checked.

    With --postcopy the destination also says whether the guest's page faults can be served there.

    \b
    Examples:
      migfw check tcp:other.example.org:4444
      migfw check --to me@other.example.org
      migfw check --json

    \b
    Exit status:
      0    a migration should succeed
      1    it would fail; the "problem" lines say why
      2    wrong usage
    """
    if uri is not None and to is not None:
        raise UsageError(f"'{uri}' and --to {to} both name a destination: use one of them")
    if to is None and remote_migfw is not None:
        raise UsageError("--remote-migfw needs --to HOST")
    with connect(name, qmp) as engine:
        if not engine.is_migfw:
            raise UsageError(f"at {engine.address} is a QEMU, and only migfw can check its guest")
        with _dialled(engine, uri, to, remote_migfw) as where:
            answer = engine.call("x-migfw-check", postcopy=postcopy, **({"uri": where} if where is not None else {}))
    if as_json:
        print_json({"uri": where, **answer})
    else:
        print_facts(list(_check_facts(answer, tried=where is None or bool(answer["destination"]))))
    if not answer["ok"]:
        raise Finished(ExitStatus.FAILED)


@contextlib.contextmanager
def _dialled(engine: EngineClient, uri: str | None, to: str | None, remote_migfw: str | None) -> Iterator[str | None]:
    """The URI to dial. With --to, that of a destination that is ended afterwards."""
    if to is None:
        yield uri
        return
    from corefw.client.destination import start_destination

    for number in (signal.SIGTERM, signal.SIGHUP):  # they have to unwind and end it, too
        signal.signal(number, signal.default_int_handler)
    with start_destination(engine, to, remote_migfw, {}, ()) as destination:
        yield destination.uri


def _check_facts(answer: Mapping[str, Any], *, tried: bool) -> Iterator[tuple[str, str]]:
    """The result as lines. `tried` is False if a destination was named that cannot be asked (file:, exec:)."""
    for problem in answer["problems"]:
        yield "problem", problem
    for remark in answer["notes"]:
        yield "note", remark
    yield "RAM", f"{format_size(answer['ram'])}, {format_size(answer['ram-used'])} of it in use"
    if answer["dirty-rate"] is not None:
        yield "dirty rate", f"{format_size(answer['dirty-rate'])}/s"
    if there := answer["destination"]:
        versions = ", ".join(f"{called} {there.get(key, '?')}" for key, called in _VERSIONS)
        yield "destination", f"{there.get('host', '?')}: {versions}"
        if isinstance(there.get("memory"), int):
            yield "memory there", f"{format_size(there['memory'])} to spare"
    if answer["bandwidth"]:
        yield "bandwidth", f"{format_size(answer['bandwidth'])}/s, round trip {answer['round-trip']:.1f} ms"
    if answer["converges"]:
        passes = f"{answer['passes']} pass{'es' if answer['passes'] != 1 else ''}"
        yield "would take", f"{format_milliseconds(answer['expected-time'])}, {passes}"
        yield "downtime", f"about {format_milliseconds(answer['expected-downtime'])}, plus the time to stop the guest"
    good = "a migration should succeed" if tried else "nothing here prevents a migration; the destination was not tried"
    yield "result", good if answer["ok"] else "a migration would fail"
