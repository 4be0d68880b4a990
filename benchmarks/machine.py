"""The machine that a figure is measured on, and this process on it."""

from __future__ import annotations

import os
import platform
import resource
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fx_instrument.stream.codec import backend_versions


def processor() -> str:
    """The processor's name as the kernel says it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def short_name(device: str) -> str:
    """``cpu``, or a CUDA device's name as part of a file's: NVIDIA H100 80GB HBM3 is h100-80gb-hbm3."""
    if not device.startswith("cuda"):
        return "cpu"
    words = torch.cuda.get_device_name(device).lower().split()
    return "-".join(word for word in words if word != "nvidia")


def resident(field: str) -> int:
    """``VmRSS``, ``VmHWM`` (its peak) or ``RssAnon`` of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(f"/proc/self/status has no {field}")


def versions() -> dict[str, Any]:
    """The command that this process was started with, the machine, and what reads and writes files on it."""
    spec = sys.modules["__main__"].__spec__
    name = spec.name.removesuffix(".__main__") if spec else "?"
    return {
        "command": f"python -m {name} {' '.join(sys.argv[1:])}".rstrip(),
        "cpu": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        **backend_versions(),
    }
