"""The layers: URI -> Transport -> Channel -> wire -> stream -> section saver or loader -> Machine.

Invariant: a part of the core imports only parts above it in the table, and of these only what its row allows. So there
are no circular imports, and no layer depends on one to its right. Plugins import the public part of the core and their
declared dependencies, and never one another. Imports under TYPE_CHECKING only concern types; they have a table of their
own.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[1]

CORE: Final[dict[str, set[str]]] = {
    "errors": set(),
    "closing": set(),
    "uri": {"errors"},
    "jsontext": set(),
    "quantities": {"errors"},
    "dispatch": {"errors"},
    "states": {"errors", "dispatch"},
    "declarations": {"errors", "jsontext", "quantities"},
    "settings": {"errors", "declarations"},
    "channel": {"closing", "errors", "uri", "settings"},
    "wire": {"errors", "channel", "jsontext"},
    "net": {"closing", "errors", "uri", "quantities", "channel", "wire"},
    "inspection": {"closing", "errors", "quantities", "channel", "jsontext", "net", "wire"},
    "conversion": {"errors", "channel", "jsontext", "wire"},
    "section": {"errors", "channel", "settings", "wire"},
    "postcopy": {"section", "wire"},
    "registry": {"errors", "section"},
    "block": {"errors"},
    "machine": {"errors"},
    "control": {"dispatch", "machine", "settings", "states"},
    "memory": {"errors", "quantities", "net", "machine"},
    "hookspecs": set(),
    "entrypoints": {"errors"},
    "hookcalls": {"errors", "declarations", "channel", "section", "hookspecs"},
    "plugins": {
        *("errors", "uri", "states", "declarations", "settings", "channel", "section", "registry", "machine"),
        *("hookspecs", "entrypoints", "hookcalls"),
    },
    "engine": {
        *("errors", "uri", "jsontext", "quantities", "dispatch", "states", "settings", "channel", "net", "wire"),
        *("section", "postcopy", "registry", "machine", "control", "memory", "plugins"),
    },
    "qmp": {
        *("closing", "errors", "uri", "jsontext", "quantities", "dispatch", "states", "settings", "channel", "net"),
        *("declarations", "block", "machine", "control", "plugins", "engine"),
    },
    "hosting": {
        *("errors", "uri", "dispatch", "states", "net", "machine", "control", "engine", "qmp"),
    },
    "client": {
        *("closing", "errors", "uri", "quantities", "states", "declarations", "settings", "channel", "net"),
        *("machine", "plugins", "qmp"),
    },
    "testing": {
        *("errors", "uri", "quantities", "dispatch", "states", "settings", "channel", "wire", "section", "machine"),
        *("declarations", "control", "memory", "plugins", "qmp"),
    },
}
"""Part of the core -> what it may import. `cli` is missing, because it may import everything."""

TYPES: Final[dict[str, set[str]]] = {
    "section": {"machine"},
    "postcopy": {"machine"},
    "machine": {"block", "section", "wire"},
    "control": {"section"},
    "hookspecs": {"uri", "states", "declarations", "settings", "channel", "section", "machine", "control"},
    "plugins": {"control"},
    "testing": {"block"},
}
"""Part of the core -> what it may import in addition for annotations."""

LIBRARIES: Final[dict[str, set[str]]] = {
    "pluggy": {"hookspecs", "hookcalls", "plugins"},
    "stevedore": {"entrypoints"},
    "click": {"cli"},
    "rich": {"cli"},
    "numpy": {"block", "channel", "net", "wire", "postcopy", "machine", "memory", "testing", "engine"},
}
"""Library -> the parts of the core that may import it."""

PUBLIC: Final = {
    *("errors", "uri", "jsontext", "quantities", "states", "declarations", "settings", "channel", "net", "wire"),
    *("section", "postcopy", "block", "machine", "control", "dispatch", "memory", "hookspecs", "testing"),
}
"""What plugins may import; docs/plugins.md says the same."""

MODULE_NAMES: Final = {"pyzmq": "zmq"}
"""Distribution -> module, where the two differ."""


@dataclass(frozen=True)
class Import:
    """`module` is dotted; `part` is "wire" for corefw.wire.stream, "" for corefw itself, None for other libraries."""

    where: str
    module: str
    types_only: bool

    @property
    def part(self) -> str | None:
        package, _, rest = self.module.partition(".")
        return rest.partition(".")[0] if package == "corefw" else None


@cache
def imports(folder: Path) -> tuple[Import, ...]:
    """Of all modules below a folder, or of one file."""
    files = [folder] if folder.suffix == ".py" else sorted(folder.rglob("*.py"))
    return tuple(found for file in files for found in _imports(file))


def _imports(file: Path) -> Iterator[Import]:
    tree = ast.parse(file.read_text(), file)
    guarded = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        where = f"{file.relative_to(ROOT)}:{node.lineno}"
        assert not getattr(node, "level", 0), f"{where}: relative imports hide where a module is"
        for module in _modules(node):
            if module.partition(".")[0] not in sys.stdlib_module_names:
                yield Import(where, module, id(node) in guarded)


def _modules(node: ast.Import | ast.ImportFrom) -> list[str]:
    """`from corefw import hookspecs` names corefw.hookspecs; `from corefw import __version__` names corefw."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if node.module != "corefw":
        return [node.module or ""]
    return [f"corefw.{alias.name}" if alias.name in parts() else "corefw" for alias in node.names]


def parts() -> set[str]:
    return {
        path.stem for path in (ROOT / "corefw").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }


def place(part: str) -> Path:
    module = ROOT / "corefw" / f"{part}.py"
    return module if module.exists() else module.with_suffix("")


def distributions() -> list[Path]:
    return sorted(
        path.parent for folder in ("plugins", "examples") for path in (ROOT / folder).glob("*/pyproject.toml")
    )


def test_the_table_has_every_part_of_the_core() -> None:
    assert parts() - {"__init__"} == CORE.keys() | {"cli"}


def test_the_table_goes_one_way() -> None:
    above: set[str] = set()
    for part, allowed in CORE.items():
        assert allowed <= above, f"'{part}' imports what stands below it"
        above.add(part)


@pytest.mark.parametrize("part", CORE)
def test_a_part_imports_only_what_its_row_allows(part: str) -> None:
    allowed = CORE[part] | {part, ""}
    named = allowed | TYPES.get(part, set())
    wrong = [
        found
        for found in imports(place(part))
        if found.part is not None and found.part not in (named if found.types_only else allowed)
    ]
    assert wrong == []


def test_a_library_is_known_to_the_parts_that_are_made_for_it() -> None:
    wrong = [
        found
        for part in parts() - {"__init__"}
        for found in imports(place(part))
        if found.part is None and part not in LIBRARIES.get(found.module.partition(".")[0], set()) | {"cli"}
    ]
    assert wrong == []


def test_the_core_declares_the_libraries_that_it_imports() -> None:
    used = {found.module.partition(".")[0] for found in imports(ROOT / "corefw") if found.part is None}
    assert used <= dependencies(ROOT), "and imports no plugin"


@pytest.mark.parametrize("distribution", distributions(), ids=lambda path: path.name)
def test_a_plugin_imports_the_public_core_and_what_it_declares(distribution: Path) -> None:
    packages = [path for path in (distribution / "src").iterdir() if path.suffix != ".egg-info"]
    own = {path.stem for path in packages}
    declared = dependencies(distribution)
    for found in imports(distribution / "src"):
        if found.part is None:
            assert found.module.partition(".")[0] in own | declared, f"{found} is not declared"
        else:
            assert found.part in PUBLIC, f"{found} is not public"
    assert all(name == "corefw" or not name.startswith("corefw_") for name in declared), "plugins stand alone"


def dependencies(distribution: Path) -> set[str]:
    """The top-level modules of the libraries that a distribution declares."""
    project = tomllib.loads((distribution / "pyproject.toml").read_text())["project"]
    names = {re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in project["dependencies"]}
    return {MODULE_NAMES.get(name, name).replace("migfw", "corefw").replace("-", "_") for name in names}


def test_the_page_on_plugins_names_what_is_public() -> None:
    page = (ROOT / "docs" / "plugins.md").read_text()
    (sentence,) = re.findall(r"What a plugin may import: (.*?)\. The rest", page, re.DOTALL)
    assert {name.removeprefix("corefw.") for name in re.findall(r"`(.+?)`", sentence)} == PUBLIC
