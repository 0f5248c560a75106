"""`migfw check`: find out whether the guest could move, and what that would be like."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator, Mapping
from typing import Any

import click

from corefw.cli import completion
from corefw.cli.console import ExitStatus, Finished, print_facts, print_json
from corefw.cli.options import engine_options, json_option
from corefw.errors import UsageError
from corefw.qmp.engines import EngineClient, connect
from corefw.quantities import format_milliseconds, format_size


@click.command()
@click.argument("uri", required=False, shell_complete=completion.uris)
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
        print_facts(list(_facts(answer, tried=where is None or bool(answer["destination"]))))
    if not answer["ok"]:
        raise Finished(ExitStatus.FAILED)


@contextlib.contextmanager
def _dialled(engine: EngineClient, uri: str | None, to: str | None, remote_migfw: str | None) -> Iterator[str | None]:
    """The URI to dial. With --to, that of a destination that is ended afterwards."""
    if to is None:
        yield uri
        return
    from corefw.cli.destination import start_destination

    for number in (signal.SIGTERM, signal.SIGHUP):  # they have to unwind and end it, too
        signal.signal(number, signal.default_int_handler)
    with start_destination(engine, to, remote_migfw, {}, ()) as destination:
        yield destination.uri


def _facts(answer: Mapping[str, Any], *, tried: bool) -> Iterator[tuple[str, str]]:
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
    good = "a migration should succeed" if tried else "nothing here is in the way; the destination was not tried"
    yield "result", good if answer["ok"] else "a migration would fail"


_VERSIONS = (("migfw", "migfw"), ("python", "Python"), ("numpy", "NumPy"))
