"""Compiles the library when a wheel is built, also for an editable installation. Needs a C compiler and the C library's
headers, but not Python's: the library is loaded with ctypes, so that one wheel serves every version of Python.

$CC names the compiler (default cc), $CFLAGS adds options.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

OPTIONS = ("-std=gnu11", "-O2", "-fPIC", "-shared", "-Wall", "-Wextra")


class CompileKernel(BuildHookInterface[Any]):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        package = Path(self.root) / "src" / "corefw_ram_kernel"
        compiler = shlex.split(os.environ.get("CC") or "cc")
        options = (*OPTIONS, *shlex.split(os.environ.get("CFLAGS", "")))
        try:
            sources = sorted(map(str, package.glob("*.c")))
            subprocess.run([*compiler, *options, "-o", str(package / "kernel.so"), *sources], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise RuntimeError(
                f"cannot compile the kernel: {error} (install a C compiler, Debian: gcc and libc6-dev; or leave"
                f" migfw-ram-kernel out: migfw works without it)"
            ) from error
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
