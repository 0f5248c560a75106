"""What machine and which versions a result belongs to; no names of hosts, users or paths."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from bench.engines import QEMU, lacking
from bench.warming import GIB


def facts() -> Mapping[str, str]:
    """Name -> value, for people and for JSON."""
    return {
        "processor": _field("/proc/cpuinfo", "model name") or platform.machine(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{int(_field('/proc/meminfo', 'MemTotal').split()[0]) * 1024 / GIB:.1f} GiB",
        "virtual machine": "yes" if " hypervisor" in _field("/proc/cpuinfo", "flags") else "no",
        "kernel": kernel(platform.release()),
        "congestion control": Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip(),
        "Python": platform.python_version(),
        "NumPy": version("numpy"),
        "migfw": version("migfw"),
        "QEMU": _qemu(),
    }


def kernel(release: str) -> str:
    """The version alone; the rest of a release names one machine's build."""
    found = re.match(r"\d+(\.\d+)*", release)
    return found[0] if found else "unknown"


def _field(path: str, name: str) -> str:
    for line in Path(path).read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def _qemu() -> str:
    """ "7.2.22", with "(TCG)", or why there is none."""
    if reason := lacking():
        return f"not measured: {reason}"
    said = subprocess.run([QEMU, "--version"], capture_output=True, text=True, check=True).stdout.split()
    return f"{said[3]} (TCG)"
