"""The machine that a figure is measured on, and this process on it."""

from __future__ import annotations

import platform
from pathlib import Path


def processor() -> str:
    """The processor's name as the kernel says it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def resident(field: str) -> int:
    """``VmRSS``, ``VmHWM`` (its peak) or ``RssAnon`` of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(f"/proc/self/status has no {field}")
