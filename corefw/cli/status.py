"""`migfw status`: what an engine does, once or for as long as it lives, for people or as a document."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import click

from corefw.cli.engines import EngineClient, connect
from corefw.cli.options import engine_options, json_option
from corefw.cli.output import print_facts, print_json
from corefw.cli.progress import Progress
from corefw.cli.summary import summary
from corefw.errors import UsageError
from corefw.quantities import format_duration, format_size

Fact = tuple[str, str]


def _phrase(value: object) -> str:
    """Any JSON value in a line."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_phrase(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(_phrase(inner) for inner in value)
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _devices(value: Any) -> str:
    """Names; of several with the same one, the later with their instance. Another plugin's may look otherwise."""
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


_SHOWN: Final[Mapping[str, tuple[str, Callable[[Any], str]]]] = {
    "pid": ("guest process", _phrase),
    "dirty-log": ("dirty log", _phrase),
    "value-sizes": ("values", _sizes),
    "before-stop": ("before_stop()", _phrase),
    "devices": ("devices", _devices),
    "device-state": ("device state", _size),
}
"""What of a machine's information is called or written otherwise here: key -> (name, how to write the value)."""


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
    with connect(name, qmp) as engine:
        if watch:
            from corefw.cli.watch import watch_engine

            watch_engine(lambda: ask(engine))
            return
        document = ask(engine)
    if as_json:
        print_json(document)
    else:
        print_facts(facts(document))


def ask(engine: EngineClient) -> dict[str, Any]:
    """All that `migfw status` shows, of whichever engine."""
    document: dict[str, Any] = engine.call("x-migfw-status") if engine.is_migfw else _of_qemu(engine)
    return document


def _of_qemu(engine: EngineClient) -> dict[str, Any]:
    """The part of x-migfw-status's answer that a real QEMU can give."""
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
    """As lines, what matters first."""
    return [*_facts(document)]


def _facts(document: Mapping[str, Any]) -> Iterator[Fact]:
    yield "name", document["name"] or "(none)"
    yield "guest", document["status"]
    if document.get("incoming", "none") != "none" or document.get("incoming-uri"):
        yield "incoming", " at ".join(part for part in (document["incoming"], document["incoming-uri"]) if part)
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
        for warning in progress.warnings:
            yield "warning", warning
    else:
        (_, first), *rest = summary(answer)
        yield "migration", first
        yield from rest
