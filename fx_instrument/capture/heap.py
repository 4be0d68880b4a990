"""The C library's heap: freed memory that it keeps, given back to the kernel."""

from __future__ import annotations

import ctypes
from collections.abc import Callable


def _find_trim() -> Callable[[int], int] | None:
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        # Not glibc: musl and others give large blocks back by themselves.
        return None
    trim.argtypes, trim.restype = [ctypes.c_size_t], ctypes.c_int
    return trim


_trim = _find_trim()


def return_freed_memory() -> None:
    """Give whole free pages back, also those between blocks in use; other threads go on meanwhile.

    glibc serves tensors from its heap once one of their size was freed, and cannot reuse the hole that an aligned
    block leaves for another of the same size: holes between captured tensors doubled the resident memory of a full
    buffer (tests/test_overload.py: 115 MB under a bound of 64 MB).
    """
    if _trim is not None:
        _trim(0)
