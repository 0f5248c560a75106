"""The repository is consistent: links resolve, commands exist, and all distributions are set up alike."""

from __future__ import annotations

import re
import shlex
import stat
import subprocess
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import click
import pytest

from corefw.cli.group import COMMANDS, migfw

ROOT = Path(__file__).parents[1]
TEXT = {".py", ".md", ".toml", ".txt", ".asm", ".html", ".json", ""}
HERE = Path(__file__).relative_to(ROOT)


@cache
def files() -> tuple[Path, ...]:
    """Files that git would commit, relative to the root; without git (an unpacked archive), everything visible."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    names = listed.stdout.splitlines() if listed.returncode == 0 else map(str, _visible())
    return tuple(sorted(Path(name) for name in names if (ROOT / name).is_file()))


def _visible() -> Iterator[Path]:
    for path in ROOT.rglob("*"):
        relative = path.relative_to(ROOT)
        if not any(part.startswith(".") or part in ("__pycache__", "build", "dist", "site") for part in relative.parts):
            yield relative


def texts(*suffixes: str) -> Iterator[tuple[Path, str]]:
    for path in files():
        if path.suffix in (suffixes or TEXT) and path != HERE:
            try:
                yield path, (ROOT / path).read_text()
            except UnicodeDecodeError:  # a golden stream
                continue


def pages() -> list[Path]:
    return [path for path, _ in texts(".md")]


def project(distribution: Path) -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((ROOT / distribution / "pyproject.toml").read_text())
    return found


def plugins() -> list[Path]:
    return sorted(path.parent.relative_to(ROOT) for path in ROOT.glob("plugins/*/pyproject.toml"))


# -- pages ---------------------------------------------------------------------------------------------------------


def anchors(page: str) -> set[str]:
    """Anchors that GitHub generates for the headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", pages(), ids=str)
def test_every_link_leads_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = ROOT / page.parent / name if name else ROOT / page
        assert target.exists(), f"{page}: {link}"
        assert not anchor or anchor in anchors(target.read_text()), f"{page}: {link}"


def test_the_index_has_every_page() -> None:
    index = (ROOT / "docs" / "index.md").read_text()
    missing = [page for page in pages() if page.parts[0] == "docs" and page.name != "index.md"]
    assert [page for page in missing if f"({page.relative_to('docs')})" not in index] == []


def test_the_map_has_every_room_of_the_core() -> None:
    map_ = (ROOT / "docs" / "architecture.md").read_text().partition("## The map")[2].partition("\n## ")[0]
    named = {
        name.removeprefix("corefw/").rstrip("/") for row in map_.splitlines() for name in re.findall(r"`([^`]+)`", row)
    }
    rooms = {path.parts[1] for path, _ in texts(".py") if path.parts[0] == "corefw"} - {"__init__.py"}
    assert rooms - named == set()


@pytest.mark.parametrize("page", pages(), ids=str)
def test_every_command_on_a_page_exists(page: Path) -> None:
    known = {name for part in COMMANDS.values() for name in part} | {"--help", "--version"}
    goals = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = (ROOT / page).read_text()
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    code = [body for language, body in fences if language in ("", "console", "sh", "text")]
    code += re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE))
    for snippet in code:
        for command in re.findall(r"(?:^|\$ +|`)(?:\.venv/bin/)?migfw +([a-z-]+)", snippet, re.MULTILINE):
            assert command in known, f"{page}: migfw {command}"
        for goal in re.findall(r"(?:^|\$ +)make +([a-z-]+)", snippet, re.MULTILINE):
            assert goal in goals, f"{page}: make {goal}"


RUN = re.compile(r"(?:^[\w ]*\$ +|^ +|^)migfw +run\b(.*)$|`migfw +run\b([^`]*)`", re.MULTILINE)
"""A command as typed: a line of an example or docstring, or text in backquotes, which may contain a line break."""


def runs(text: str) -> Iterator[list[str]]:
    """The arguments of each `migfw run` that has some, without comments (after # or several spaces)."""
    for line, quoted in RUN.findall(text):
        words = shlex.split(quoted or re.sub(r" {2,}.*", "", line), comments=True)
        if words and not words[0].startswith("["):  # a synopsis
            yield words


def test_every_run_that_is_shown_would_start() -> None:
    command = migfw.get_command(click.Context(migfw), "run")
    assert command is not None
    shown = [(path, words) for path, text in texts(".md", ".py") for words in runs(text)]
    assert {"README.md", "docs/ssh.md", "corefw/cli/group.py", "corefw/cli/run.py"} <= {str(path) for path, _ in shown}
    for path, words in shown:
        given = command.make_context("run", list(words)).params
        assert given["program"] or given["kind"] != "python", f"{path}: migfw run {shlex.join(words)}"


def test_every_environment_variable_is_on_the_page_of_settings() -> None:
    page = (ROOT / "docs" / "settings.md").read_text()
    sources = [text for path, text in texts(".py") if path.parts[0] == "corefw" or "src" in path.parts]
    read = {name for text in sources for name in re.findall(r"\"(MIGFW_[A-Z_]+)\"", text)}
    assert read >= {"MIGFW_DIRTY_LOG"}
    assert [name for name in sorted(read) if f"`{name}`" not in page] == []


def test_the_first_commands_of_the_readme_are_the_two_that_matter() -> None:
    first = re.findall(r"```console\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    assert re.findall(r"^\$ (make \w+)", first, re.MULTILINE) == ["make demo", "make test"]


def test_make_help_explains_every_goal() -> None:
    makefile = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.findall(r"^  make ([a-z-]+) +\w", shown, re.MULTILINE) == phony.split()


# -- words ---------------------------------------------------------------------------------------------------------

UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
ELSEWHERE = re.compile(r"(?<![\w.])/(?:work|home/\w+|root|Users)/\w")


def test_nothing_is_left_to_do() -> None:
    assert [f"{path}: {match.group()}" for path, text in texts() for match in UNFINISHED.finditer(text)] == []


def test_no_path_of_somebody_s_machine() -> None:
    assert [f"{path}: {match.group()}" for path, text in texts() for match in ELSEWHERE.finditer(text)] == []


def test_qemu_is_called_by_its_name() -> None:
    """No code or page uses the internal word `seed` for QEMU. (The core has no random numbers.)"""
    wrong = [
        str(path)
        for path, text in texts(".py", ".md")
        if path.parts[0] in ("corefw", "docs") and "seed" in text.lower()
    ]
    assert wrong == []


def test_every_module_has_a_docstring() -> None:
    modules = [(path, text) for path, text in texts(".py") if path.parts[0] == "corefw" or "src" in path.parts]
    assert [str(path) for path, text in modules if text and not text.startswith('"""')] == []


def test_text_files_end_with_one_newline_and_have_no_blanks_at_line_ends() -> None:
    wrong = [
        str(path)
        for path, text in texts(".py", ".md", ".toml", ".txt")
        if text and (not text.endswith("\n") or text.endswith("\n\n") or re.search(r"[ \t]$", text, re.MULTILINE))
    ]
    assert wrong == []


# -- distributions -------------------------------------------------------------------------------------------------


def test_the_changelog_has_this_version() -> None:
    version = project(Path())["project"]["version"]
    assert re.findall(r"^## (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0] == version


@pytest.mark.parametrize("path", plugins(), ids=lambda path: path.name)
def test_a_plugin_is_set_up_like_the_others(path: Path) -> None:
    core, plugin = project(Path()), project(path)
    name = plugin["project"]["name"]
    assert name == f"migfw-{path.name.replace('_', '-')}"
    for key in ("version", "license", "requires-python"):
        assert plugin["project"][key] == core["project"][key], key
    assert plugin["build-system"] == core["build-system"]
    assert "migfw>=0.1,<0.2" in plugin["project"]["dependencies"]
    package = path / "src" / f"corefw_{path.name}"
    wheel = plugin["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["packages"] == [str(package.relative_to(path))]
    assert (ROOT / package / "py.typed").exists()
    assert name in core["project"]["optional-dependencies"]["compiled" if "hooks" in wheel else "all"]
    assert list((ROOT / path / "tests").glob("test_*.py")), "a plugin has tests"


def test_the_types_of_every_distribution_are_checked() -> None:
    sources = [
        path.parent / "src" for kind in ("plugins", "examples") for path in ROOT.glob(f"{kind}/*/pyproject.toml")
    ]
    named = project(Path())["tool"]["mypy"]["mypy_path"]
    assert {f"$MYPY_CONFIG_FILE_DIR/{path.relative_to(ROOT)}" for path in sources} <= set(named)


def test_what_is_run_is_executable() -> None:
    assert (ROOT / ".ci" / "run").stat().st_mode & stat.S_IXUSR
