# SPDX-License-Identifier: Apache-2.0
"""What a machine is, and what a generator runs with on it: :func:`this_machine`."""

from __future__ import annotations

import os
import platform
import ssl
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def this_machine() -> dict[str, str]:
    """Return what this process runs on, and with."""
    cpu, memory = "", "0"
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("model name", "Model")):
                cpu = line.partition(":")[2].strip()
                break
        memory = Path("/proc/meminfo").read_text(encoding="utf-8").split()[1]
    except OSError:
        pass
    return {
        "cpu": cpu or platform.machine(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{int(memory) // 1024} MiB",
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "openssl": ssl.OPENSSL_VERSION,
        **{name: _version(name) for name in ("locust", "gevent", "paho-mqtt", "bednet")},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "of the run"
