"""Resident memory, as the kernel counts it."""

from __future__ import annotations

from pathlib import Path


def resident(field: str) -> int:
    """``VmRSS`` or ``VmHWM`` (its peak) of this process in bytes.

    Not ``ru_maxrss``: a process begins with its parent's there, so that a large test run would hide what is measured.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise LookupError(field)
