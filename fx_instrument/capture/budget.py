"""The bound on host memory: every captured byte is acquired before it exists and released once it is stored."""

from __future__ import annotations

import threading
import time

from .heap import return_freed_memory

_TRIM_BYTES = 4 << 20
"""So much comes or goes between two trims of the heap, while half of the bound or more is in use."""


class HostBudget:
    """A counted bound on bytes, shared by the threads of one capture.

    Args:
        limit_bytes: the most that may be held at once.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.peak_bytes = 0
        self.stalled_ns = 0
        self._held = 0
        self._moved = 0
        self._open = True
        self._changed = threading.Condition()

    @property
    def held_bytes(self) -> int:
        return self._held

    def acquire(self, num_bytes: int, *, wait: bool, timeout_s: float | None = None) -> bool:
        """True once ``num_bytes`` are counted in; False if there is no room (``wait=False``, or not within
        ``timeout_s``) or after ``shut``.

        More than the whole bound is never granted, so nothing waits for it.
        """
        wait = wait and num_bytes <= self.limit_bytes
        with self._changed:
            if self._open and self._held + num_bytes > self.limit_bytes and wait:
                started = time.perf_counter_ns()
                self._changed.wait_for(
                    lambda: not self._open or self._held + num_bytes <= self.limit_bytes, timeout_s
                )
                self.stalled_ns += time.perf_counter_ns() - started
            trim = self._moved_so(num_bytes)
            granted = self._open and self._held + num_bytes <= self.limit_bytes
            if granted:
                self._held += num_bytes
                self.peak_bytes = max(self.peak_bytes, self._held)
        if trim:
            return_freed_memory()
        return granted

    def release(self, num_bytes: int) -> None:
        with self._changed:
            trim = self._moved_so(num_bytes)
            self._held -= num_bytes
            self._changed.notify_all()
        if trim:
            return_freed_memory()

    def _moved_so(self, num_bytes: int) -> bool:
        """True where the holes that values leave on the heap could take resident memory over the bound.

        A hole is at most as large as what lies beside it, so below half of the bound nothing has to be done.
        """
        self._moved += num_bytes
        if self._moved < _TRIM_BYTES or 2 * self._held < self.limit_bytes:
            return False
        self._moved = 0
        return True

    def shut(self) -> None:
        """Let every waiting and later ``acquire`` answer False: what would release the bytes has failed."""
        with self._changed:
            self._open = False
            self._changed.notify_all()
