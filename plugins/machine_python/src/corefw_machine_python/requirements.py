"""Version requirements of a program on Python and distributions: `requires = {"numpy": ">=1.26"}`.

A requirement is a list of comparisons (==, !=, >=, <=, >, <) separated by commas, or the word `same`: the version must
be the same on both sides of a migration.
"""

from __future__ import annotations

import importlib.metadata
import operator
import platform
import re
from collections.abc import Callable, Mapping
from typing import Final

from corefw.errors import UsageError

Release = tuple[int, ...]

SAME: Final = "same"

_COMPARISON: Final = re.compile(r"\s*(==|!=|>=|<=|>|<)\s*([0-9]+(?:\.[0-9]+)*)\s*\Z")
_OPERATORS: Final[Mapping[str, Callable[[Release, Release], bool]]] = {
    "==": operator.eq,
    "!=": operator.ne,
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}


def installed(name: str) -> str | None:
    """The installed version of "python" or a distribution; None if it is not installed."""
    if name == "python":
        return platform.python_version()
    try:
        return importlib.metadata.version(name)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return None


def satisfied(version: str, requirement: str) -> bool:
    """Whether a version satisfies a requirement. Raises ValueError if the requirement is malformed."""
    if requirement.strip() == SAME:
        return True
    return all(_holds(version, comparison) for comparison in requirement.split(","))


def _holds(version: str, comparison: str) -> bool:
    found = _COMPARISON.match(comparison)
    if found is None:
        raise ValueError(f"'{comparison}' is not a requirement: expected one like >=1.26, or {SAME}")
    here, wanted = release(version), release(found[2])
    length = max(len(here), len(wanted))
    return _OPERATORS[found[1]](*(one + (0,) * (length - len(one)) for one in (here, wanted)))


def release(version: str) -> Release:
    """The leading numbers of a version: "1.26.4rc1" is (1, 26, 4)."""
    found = re.match(r"[0-9]+(?:\.[0-9]+)*", version)
    return tuple(int(part[:9]) for part in found[0].split(".")[:9]) if found else ()


def unmet(requires: Mapping[str, str]) -> list[str]:
    """The requirements that are not met here, as phrases. Raises ValueError if one is malformed."""
    found = []
    for name, requirement in requires.items():
        version = installed(name)
        if version is None:
            satisfied("0", requirement)
            found.append(f"{name} {requirement}, and {name} is not installed")
        elif not satisfied(version, requirement):
            found.append(f"{name} {requirement}, and {name} is {version}")
    return found


def check(program: str, requires: Mapping[str, str]) -> None:
    """Raise UsageError if the program requires a version that is not installed, or if a requirement is malformed."""
    try:
        found = unmet(requires)
    except ValueError as error:
        raise UsageError(f"program '{program}': requires: {error}") from None
    if found:
        raise UsageError(f"program '{program}' requires {found[0]}")
