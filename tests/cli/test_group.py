"""`migfw` itself: it loads fast, every command has help, and wrong usage is one line with status 2."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import click
import pytest

from corefw.cli.group import COMMANDS, migfw
from tests.helpers.cli import migfw as call
from tests.helpers.cli import migfw_each

NAMES = [name for part in COMMANDS.values() for name in part]

HEAVY = ("numpy", "pluggy", "stevedore", "rich", "corefw.plugins", "corefw.qmp", "corefw.engine", "logging.config")


def test_help_lists_every_command_and_loads_none_of_them() -> None:
    program = (
        "import sys; sys.argv = ['migfw', '--help']\n"
        "from corefw.cli import main\n"
        "assert main() == 0\n"
        "print(*sorted(sys.modules), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    loaded = set(done.stderr.split())
    own = ("", ".cli", ".cli.group", ".cli.console", ".errors")
    allowed = {f"corefw{name}" for name in own}
    assert {name for name in loaded if name.split(".")[0] == "corefw"} <= allowed
    assert not loaded & set(HEAVY)
    for name in NAMES:
        assert f"  {name} " in done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_every_command_explains_itself(name: str) -> None:
    context = click.Context(migfw, info_name="migfw")
    command = migfw.get_command(context, name)
    assert command is not None
    text = command.get_help(click.Context(command, info_name=name, parent=context))
    assert "Example" in text
    assert "--verbose" in text
    for option in command.params:
        if isinstance(option, click.Option):
            assert option.help, f"{name} {option.opts} has no help"


def test_help_of_a_command_on_the_command_line() -> None:
    done = call("migrate", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Usage: migfw migrate [OPTIONS] [URI]")


def test_version() -> None:
    assert call("--version").stdout == f"migfw {version('migfw')}\n"


def test_without_a_command_it_shows_help_and_fails() -> None:
    done = call()
    assert (done.returncode, done.stdout) == (2, "")
    assert "Usage: migfw" in done.stderr


LINES = {
    ("fly",): "No such command 'fly' (see 'migfw --help')",
    ("migrat",): "No such command 'migrat': did you mean 'migrate'? (see 'migfw --help')",
    ("-v", "continu"): "No such command 'continu': did you mean 'continue' or 'cont'? (see 'migfw --help')",
    ("recover",): "Missing argument 'URI' (see 'migfw recover --help')",
    ("migrate", "a:b", "c"): "Got unexpected extra argument (c) (see 'migfw migrate --help')",
    ("cancel", "--name"): "Option '--name' requires an argument (see 'migfw cancel --help')",
    ("--fast",): "No such option '--fast' (see 'migfw --help')",
    ("set",): "Missing argument 'NAME=VALUE...' (see 'migfw set --help')",
    ("-v", "recover"): "Missing argument 'URI' (see 'migfw recover --help')",
}


def test_wrong_usage_is_one_line(tmp_path: Path) -> None:
    found = migfw_each(list(LINES), tmp_path)
    assert found == [(2, "", f"migfw: {line}\n") for line in LINES.values()]


def test_verbose_logs_to_stderr_before_and_behind_the_command(tmp_path: Path) -> None:
    quiet, before, behind, all_of_it = migfw_each(
        [("plugins",), ("-v", "plugins"), ("plugins", "-v"), ("-v", "plugins", "-v")], tmp_path
    )
    assert {found[:2] for found in (quiet, before, behind, all_of_it)} == {(0, quiet[1])}
    assert (quiet[2], before[2], behind[2]) == ("", "", "")
    assert " DEBUG stevedore" in all_of_it[2]


def test_a_reader_that_goes_away_makes_no_noise() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "corefw.cli", "plugins", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    with process.stderr as stderr:
        assert stderr.read() == b""
    assert process.wait(60) == 141
