"""Distributions made for a test. Put their folder first on the path to install them, or to hide an installed one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from textwrap import dedent


def install(
    site: Path, distribution: str, *, plugins: Mapping[str, str] | None = None, modules: Mapping[str, str] | None = None
) -> Path:
    """Make a distribution in the folder `site`: entry points of the group corefw.plugins, and modules' sources.

    It hides a distribution of the same name later on the path; without plugins, that is as if it were uninstalled.
    """
    about = site / f"{distribution.replace('-', '_')}-99.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 99\n")
    lines = [f"{name} = {target}\n" for name, target in (plugins or {}).items()]
    (about / "entry_points.txt").write_text("[corefw.plugins]\n" + "".join(lines) if lines else "")
    for name, source in (modules or {}).items():
        (site / f"{name}.py").write_text(dedent(source))
    return site
