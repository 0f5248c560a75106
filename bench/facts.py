"""What machine and which versions a result belongs to; no names of hosts, users or paths."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from bench.engines import find_qemu, lacking
from bench.network import congestion_control
from bench.warming import GIB
from corefw.net.sockets import UNPACED


def facts(host_congestion_control: str) -> Mapping[str, str]:
    """Name -> value, for people and for JSON. `host_congestion_control` is the default of the host's own network, which
    this process may have left."""
    return {
        "processor": _field("/proc/cpuinfo", "model name") or platform.machine(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{int(_field('/proc/meminfo', 'MemTotal').split()[0]) * 1024 / GIB:.1f} GiB",
        "virtual machine": "yes" if " hypervisor" in _field("/proc/cpuinfo", "flags") else "no",
        "kernel": kernel(platform.release()),
        "congestion control": f"{congestion_control()} on both sides (the host's default: {host_congestion_control})"
        if congestion_control() == UNPACED.decode()
        else f"QEMU {congestion_control()}, migfw {UNPACED.decode()}: this host has no network namespaces",
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
    """ "11.1 (TCG)", or why there is none."""
    if reason := lacking():
        return f"not measured: {reason}"
    peer = find_qemu()
    assert peer is not None
    return f"{peer.version[0]}.{peer.version[1]} (TCG)"
