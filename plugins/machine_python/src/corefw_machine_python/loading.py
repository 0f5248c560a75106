"""Loads a program class by its name: "heat.py:Heat", "package.module:Heat", or a bundled name.

A wrong name or a broken module raises UsageError with what was expected. Runs in the guest's process only: the engine
never imports a user's code.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Final

from corefw.errors import UsageError
from corefw_machine_python.guest import Program

BUNDLED: Final = {
    "life": "corefw_machine_python.programs.life:Life",
    "stress": "corefw_machine_python.programs.stress:Stress",
}

EXPECTED: Final = f"expected FILE.py:CLASS, PACKAGE.MODULE:CLASS, or one of {', '.join(BUNDLED)}"


def load_program(name: str) -> type[Program]:
    """The class. Raises UsageError."""
    place, colon, class_name = BUNDLED.get(name, name).rpartition(":")
    if not colon or not class_name:
        raise UsageError(_which_class(name.rstrip(":")))
    module = _load(place, name)
    found = getattr(module, class_name, None)
    if isinstance(found, type) and issubclass(found, Program):
        if found.tick is Program.tick:
            raise UsageError(f"program '{class_name}' in '{place}' has no tick(): expected a method that does one step")
        return found
    has = f"its programs: {', '.join(_programs(module)) or 'none'}"
    if found is None:
        raise UsageError(f"'{place}' has no class '{class_name}' ({has})")
    raise UsageError(f"'{name}' is not a program: expected a subclass of guest.Program ({has})")


def _which_class(place: str) -> str:
    """The error message for a name without a class."""
    if place.endswith(".py") and Path(place).is_file():
        programs = _programs(_load(place, place))
        if programs:
            return f"'{place}' does not name a class: expected {' or '.join(f'{place}:{one}' for one in programs)}"
        return f"'{place}' contains no program: expected a subclass of guest.Program"
    return f"'{place}' is not a program: {EXPECTED}"


def _programs(module: ModuleType) -> list[str]:
    return [
        name
        for name, one in vars(module).items()
        if isinstance(one, type) and issubclass(one, Program) and one is not Program and not name.startswith("_")
    ]


def _load(place: str, name: str) -> ModuleType:
    try:
        return _load_file(Path(place)) if place.endswith(".py") else _load_module(place, name)
    except UsageError:
        raise
    except Exception as error:  # the user's own module: it may raise anything
        raise UsageError(f"cannot load '{place}': {_describe(error)}") from error


def _describe(error: Exception) -> str:
    """Describe an error with its place in the user's files, leaving out ours and the import system."""
    if isinstance(error, SyntaxError):
        where = f" ({error.filename}, line {error.lineno})" if error.lineno is not None else ""  # none for zero bytes
        return f"{type(error).__name__}: {error.msg}{where}"
    ours = str(Path(__file__).parent)
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((ours, "<frozen importlib"))
    ]
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise UsageError(f"no file '{path}'")
    # As for a script: modules beside the file can be imported.
    sys.path.insert(0, str(path.resolve().parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _load_module(place: str, name: str) -> ModuleType:
    if not all(part.isidentifier() for part in place.split(".")):
        raise UsageError(f"'{name}' is not a program: {EXPECTED}")
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is None or not (place + ".").startswith(error.name + "."):
            raise  # a module that the user's module imports is missing
        raise UsageError(f"no module '{place}' can be imported here ({EXPECTED})") from None
