"""The bound on host memory: every captured byte is acquired before it exists and released once it is stored."""

from __future__ import annotations

import threading
import time

from .heap import return_freed_memory

_TRIM_BYTES = 4 << 20
"""So much is freed between two trims of the heap, while half of the bound or more is in use."""


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
        self._num_waiting = 0
        self._freed = 0
        self._still_held = 0
        self._postponed = 0
        self._open = True
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)

    @property
    def held_bytes(self) -> int:
        return self._held

    @property
    def num_waiting(self) -> int:
        """Threads that wait for room."""
        return self._num_waiting

    def acquire(
        self, num_bytes: int, *, wait: bool, timeout_s: float | None = None, leave_bytes: int = 0
    ) -> bool:
        """True once ``num_bytes`` are counted in; False if there is no room (``wait=False``, or not within
        ``timeout_s``) or after ``shut``. ``leave_bytes`` must still be free then.

        More than the whole bound is never granted, so nothing waits for it.
        """
        needed = num_bytes + leave_bytes
        # Not the condition, whose own way in and out is in Python: this is done twice a step.
        with self._lock:
            if wait and self._open and needed <= self.limit_bytes < self._held + needed:
                self._wait_for(needed, timeout_s)
            granted = self._open and self._held + needed <= self.limit_bytes
            if granted:
                self._held += num_bytes
                if self._held > self.peak_bytes:
                    self.peak_bytes = self._held
        return granted

    def _wait_for(self, needed: int, timeout_s: float | None) -> None:
        started = time.perf_counter_ns()
        self._num_waiting += 1
        try:
            self._changed.wait_for(
                lambda: not self._open or self._held + needed <= self.limit_bytes, timeout_s
            )
        finally:
            self._num_waiting -= 1
            self.stalled_ns += time.perf_counter_ns() - started

    def release(self, num_bytes: int) -> None:
        """Count out bytes whose memory was freed."""
        with self._lock:
            trim = self._freed_so(num_bytes)
            postponed = min(num_bytes, self._still_held - self._postponed)
            self._postponed += postponed
            self._held -= num_bytes - postponed
            if self._num_waiting:
                self._changed.notify_all()
        if trim:
            return_freed_memory()

    def hold(self, num_bytes: int) -> None:
        """Until ``let_go``, so many bytes stay counted whatever is released: a graph that runs has them still."""
        with self._lock:
            self._still_held += num_bytes

    def let_go(self, num_bytes: int) -> None:
        """The graph has returned; what was released meanwhile is counted out."""
        with self._lock:
            self._still_held -= num_bytes
            over = max(0, self._postponed - self._still_held)
            self._postponed -= over
            self._held -= over
            self._changed.notify_all()

    def _freed_so(self, num_bytes: int) -> bool:
        """True where the holes that values leave on the heap could take resident memory over the bound.

        A hole is at most as large as what lies beside it, so below half of the bound nothing has to be done.
        """
        self._freed += num_bytes
        if self._freed < _TRIM_BYTES or 2 * self._held < self.limit_bytes:
            return False
        self._freed = 0
        return True

    def forked(self) -> None:
        """In a forked process: who held the lock is not there, nor who would release anything."""
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._open = False

    def shut(self) -> None:
        """Let every waiting and later ``acquire`` answer False: what would release the bytes has failed."""
        with self._lock:
            self._open = False
            self._changed.notify_all()
