"""Telling the kernel what of a mapped file will be looked at next."""

from __future__ import annotations

import mmap

_SPAN_BYTES = 16 << 20


class ReadAhead:
    """For who reads a mapped file front to back: without it the kernel fetches 128 KiB at a time, and waits for it."""

    def __init__(self, mapped: mmap.mmap) -> None:
        self._map = mapped
        self._end = 0
        """Of what was asked for."""

    def __call__(self, position: int) -> None:
        """What lies at ``position`` is looked at now, and what follows it will be."""
        if not hasattr(mmap, "MADV_WILLNEED"):
            return
        if position > self._end or position < self._end - 2 * _SPAN_BYTES:
            self._end = position - position % mmap.PAGESIZE
        size = len(self._map)
        while self._end < min(position + _SPAN_BYTES, size):
            length = min(_SPAN_BYTES, size - self._end)
            self._map.madvise(mmap.MADV_WILLNEED, self._end, length)
            self._end += length
