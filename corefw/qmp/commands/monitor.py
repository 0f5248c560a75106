"""human-monitor-command: the lines of QEMU's human monitor that make sense for a guest here.

The texts have QEMU's layout, for people and for tools that read them (qmp-shell -H). Each line runs the QMP command of
that name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from corefw.declarations import Kind, Value
from corefw.errors import MigfwError, SettingsError
from corefw.qmp import protocol
from corefw.qmp.commands import control, guest, migration, queries
from corefw.qmp.commands.context import Context
from corefw.quantities import parse_switch
from corefw.states import MigrationStatus

Run = Callable[[Context, Sequence[str]], str]


@dataclass(frozen=True, slots=True)
class Line:
    """A line that may be typed. `arguments` are as help shows them: "[-d]" is a flag, "[name]" is optional."""

    names: str
    arguments: str
    help: str
    run: Run

    @property
    def usage(self) -> str:
        return f"{self.names} {self.arguments} -- {self.help}\n"


def human_monitor_command(context: Context, command_line: str, cpu_index: int = 0) -> str:
    """Run a line of the human monitor, and return what it prints. `cpu-index` is ignored."""
    del cpu_index
    return _run(context, command_line).replace("\n", "\r\n")


def _run(context: Context, text: str) -> str:
    table: Sequence[Line] = LINES
    name, rest = _first_word(text)
    if not name:
        return ""
    if name == "info" and rest:
        table = INFOS
        name, rest = _first_word(rest)
    line = _find(table, name)
    if line is None:
        return f"unknown command: '{'info ' if table is INFOS else ''}{name}'\n"
    try:
        return line.run(context, _checked(line, list(_words(rest))))
    except _Unfit as unfit:
        shown = f"info {line.names}" if table is INFOS else line.names
        return f'{shown}: {unfit}\nTry "help {"info" if table is INFOS else name}" for more information\n'
    except MigfwError as error:
        return f"Error: {error}\n"


def _find(table: Sequence[Line], name: str) -> Line | None:
    return next((line for line in table if name in line.names.split("|")), None)


class _Unfit(Exception):
    """The words do not fit the line's arguments."""


def _first_word(text: str) -> tuple[str, str]:
    """The name that a line begins with, and the rest of the line."""
    name, _, rest = text.lstrip().replace("\t", " ").partition(" ")
    return name, rest.strip()


_WORD: Final = re.compile(r'\s*(?:"(?P<quoted>(?:[^"\\]|\\[nr\\\'"])*)"|(?P<plain>[^\s"]\S*))')
_ESCAPE: Final = re.compile(r"\\(.)")
_ESCAPES: Final[Mapping[str, str]] = {"n": "\n", "r": "\r"}


def _words(text: str) -> Iterator[str]:
    """The arguments: words, or strings in double quotes with the escapes \\n \\r \\\\ \\' \\" (QEMU 7.2, get_str)."""
    at = 0
    while at < len(text):
        found = _WORD.match(text, at)
        if found is None:
            raise _Unfit("string expected")
        plain, quoted = found["plain"], found["quoted"]
        yield plain if quoted is None else _ESCAPE.sub(lambda code: _ESCAPES.get(code[1], code[1]), quoted)
        at = found.end()


def _checked(line: Line, words: list[str]) -> list[str]:
    """The flags, then the values. Raises _Unfit."""
    wanted = line.arguments.split()
    flags = {one.strip("[]") for one in wanted if one.startswith("[-")}
    names = [one for one in wanted if not one.startswith("[-")]
    given = [word for word in words if word in flags]
    values = words[len(given) :] if words[: len(given)] == given else words
    if len(values) < len([one for one in names if not one.startswith("[")]):
        raise _Unfit("string expected")
    if len(values) > len(names):
        raise _Unfit("extraneous characters at the end of line")
    return [*given, *values]


# -- lines -------------------------------------------------------------------------------------------------------------


def _quietly(run: Callable[..., object]) -> Run:
    def quiet(context: Context, words: Sequence[str]) -> str:
        run(context, *words)
        return ""

    return quiet


def _migrate(context: Context, words: Sequence[str]) -> str:
    migration.migrate(context, words[-1], resume="-r" in words)
    return "" if "-d" in words else "terminal does not allow synchronous migration, continuing detached\n"


def _continue(context: Context, state: str) -> None:
    try:
        wanted = MigrationStatus(state)
    except ValueError:
        raise SettingsError(f"invalid parameter value: {state}") from None
    migration.migrate_continue(context, wanted)


def _set_capability(context: Context, name: str, state: str) -> None:
    migration.migrate_set_capabilities(context, [{"capability": name, "state": parse_switch(state)}])


def _set_parameter(context: Context, name: str, value: str) -> None:
    parameter = context.engine.settings.declared_parameter(name)
    context.engine.set_parameters({name: parameter.parse(value)})


def _help(context: Context, words: Sequence[str]) -> str:
    del context
    if words and words[0] == "info":
        return _info_help()
    if words:
        line = _find(LINES, words[0])
        return line.usage if line else f"unknown command: '{words[0]}'\n"
    return "".join(line.usage for line in LINES)


def _info_help() -> str:
    return "".join(f"info {line.usage}" for line in INFOS)


# -- info --------------------------------------------------------------------------------------------------------------


def _info_status(context: Context, _: Sequence[str]) -> str:
    status = guest.query_status(context)
    running, state = status["running"], status["status"]
    detail = "" if running or state == "paused" else f" ({state})"
    return f"VM status: {'running' if running else 'paused'}{detail}\n"


def _info_name(context: Context, _: Sequence[str]) -> str:
    return f"{context.engine.name}\n" if context.engine.name else ""


def _info_version(_: Context, __: Sequence[str]) -> str:
    return ".".join(map(str, protocol.QEMU_VERSION)) + protocol.PACKAGE + "\n"


def _info_capabilities(context: Context, _: Sequence[str]) -> str:
    enabled = context.engine.settings.capabilities()
    return "".join(f"{name}: {'on' if state else 'off'}\n" for name, state in enabled.items())


def _info_parameters(context: Context, _: Sequence[str]) -> str:
    settings = context.engine.settings
    return "".join(
        f"{name}: {_shown(value)}{_UNITS.get(settings.declared_parameter(name).kind, '')}\n"
        for name, value in settings.parameters().items()
    )


_UNITS: Final[Mapping[Kind, str]] = {
    Kind.MILLISECONDS: " ms",
    Kind.SECONDS: " s",
    Kind.RATE: " bytes/second",
    Kind.SIZE: " bytes",
}


def _shown(value: Value) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    if value is None:
        return "not set"
    return str(value) or "''"


def _info_migrate(context: Context, _: Sequence[str]) -> str:
    info: Mapping[str, Any] = migration.query_migrate(context)
    text = ""
    if reasons := info.get("blocked-reasons"):
        text += "Outgoing migration blocked:\n" + "".join(f"  {reason}\n" for reason in reasons)
    if "status" in info:
        reason = f" ({info['error-desc']})" if "error-desc" in info else ""
        text += f"Migration status: {info['status']}{reason}\n"
        text += "".join(f"{label}: {info[key]} ms\n" for label, key in _TIMES if key in info)
    return text + _ram(info.get("ram"))


_TIMES: Final = (
    ("total time", "total-time"),
    ("expected downtime", "expected-downtime"),
    ("downtime", "downtime"),
    ("setup", "setup-time"),
)
_RAM: Final = (
    *(("transferred ram", "transferred", "kbytes"), ("throughput", "mbps", "mbps")),
    *(("remaining ram", "remaining", "kbytes"), ("total ram", "total", "kbytes")),
    *(("duplicate", "duplicate", "pages"), ("normal", "normal", "pages"), ("normal bytes", "normal-bytes", "kbytes")),
    *(("dirty sync count", "dirty-sync-count", ""), ("page size", "page-size", "kbytes")),
    *(("multifd bytes", "multifd-bytes", "kbytes"), ("pages-per-second", "pages-per-second", "")),
)
_RAM_UNLESS_ZERO: Final = (
    *(("dirty pages rate", "dirty-pages-rate", "pages"), ("precopy ram", "precopy-bytes", "kbytes")),
    *(("downtime ram", "downtime-bytes", "kbytes"), ("postcopy ram", "postcopy-bytes", "kbytes")),
    ("postcopy request count", "postcopy-requests", ""),
)


def _ram(ram: Mapping[str, Any] | None) -> str:
    if ram is None:
        return ""
    rows = [*_RAM, *(row for row in _RAM_UNLESS_ZERO if ram[row[1]])]
    return "".join(f"{label}: {_figure(ram[key], unit)}".rstrip() + "\n" for label, key, unit in rows)


def _figure(value: float, unit: str) -> str:
    if unit == "mbps":
        return f"{value:.2f} mbps"
    return f"{int(value) >> 10 if unit == 'kbytes' else value} {unit}"


def _text(text: str) -> Run:
    return lambda _, __: text


LINES: Final[Sequence[Line]] = (
    Line("closefd", "closefd", "close a file descriptor previously passed via SCM rights", _quietly(control.closefd)),
    Line("cont|c", "", "resume emulation", _quietly(guest.cont)),
    Line("help|?", "[cmd]", "show the help", _help),
    Line("info", "[subcommand]", "show various information about the system state", lambda _, __: _info_help()),
    Line("migrate", "[-d] [-r] uri", "migrate to URI (-d: do not wait, -r: resume a paused postcopy)", _migrate),
    Line("migrate_cancel", "", "cancel the current VM migration", _quietly(migration.migrate_cancel)),
    Line("migrate_continue", "state", "continue a migration that waits in this state", _quietly(_continue)),
    Line("migrate_incoming", "uri", "wait for a migration at URI", _quietly(migration.migrate_incoming)),
    Line("migrate_pause", "", "pause a migration in postcopy", _quietly(migration.migrate_pause)),
    Line("migrate_recover", "uri", "wait for a paused postcopy at URI", _quietly(migration.migrate_recover)),
    Line("migrate_set_capability", "capability state", "switch a capability on or off", _quietly(_set_capability)),
    Line("migrate_set_parameter", "parameter value", "set a parameter", _quietly(_set_parameter)),
    Line("migrate_start_postcopy", "", "switch to postcopy", _quietly(migration.migrate_start_postcopy)),
    Line("quit|q", "", "end the engine and its guest", _quietly(control.quit_engine)),
    Line("stop|s", "", "stop emulation", _quietly(guest.stop)),
)

INFOS: Final[Sequence[Line]] = (
    Line("block", "", "show the block devices", _text("")),
    Line("chardev", "", "show the character devices", _text("")),
    Line("cpus", "", "show the virtual CPUs", _text("")),
    Line("iothreads", "", "show the iothreads", _text("")),
    Line("kvm", "", "show KVM information", _text("kvm support: disabled\n")),
    Line("migrate", "[-a]", "show migration status", _info_migrate),
    Line("migrate_capabilities", "", "show current migration capabilities", _info_capabilities),
    Line("migrate_parameters", "", "show current migration parameters", _info_parameters),
    Line("name", "", "show the current VM name", _info_name),
    Line("status", "", "show the current VM status (running|paused)", _info_status),
    Line("uuid", "", "show the current VM UUID", _text(f"{queries.NO_UUID}\n")),
    Line("version", "", "show the version of QEMU", _info_version),
)
