"""Room in one block of memory, handed out in contiguous spans and taken back in any order."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass

ALIGNMENT = 64
"""Spans begin at multiples of it: a cache line, and whole elements of every dtype."""


@dataclass(eq=False, slots=True)
class Span:
    """``num_bytes`` bytes from ``start``; ``end`` is where the next span may begin."""

    start: int
    num_bytes: int
    end: int
    users: int = 1
    """How many have still to release it."""


class Ring:
    """Accounts for ``capacity_bytes`` bytes as a ring of spans.

        0        oldest                        head          capacity
        | free   | span | span (free) | span   | free        |

    A span never wraps round the end: what a longer one can't use there goes with it. Room comes back once the
    oldest span is free, so a freed span behind one in use waits for it; captured records leave nearly in the order
    in which they came. Any thread may call any method.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes - capacity_bytes % ALIGNMENT
        self.peak_bytes = 0
        self._head = 0
        self._spans: deque[Span] = deque()
        self._open = True
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._num_waiting = 0

    @property
    def held_bytes(self) -> int:
        """Bytes between the oldest span and the head, what is lost at the end of the block included."""
        if not self._spans:
            return 0
        held = self._head - self._spans[0].start
        return held if held > 0 else held + self.capacity_bytes

    def take(self, num_bytes: int) -> Span | None:
        """A span of ``num_bytes``; None while there is no room for it, or after ``shut``."""
        with self._lock:
            start = self._place(num_bytes)
            if start is None or not self._open:
                return None
            span = Span(start, num_bytes, start + _aligned(num_bytes))
            self._spans.append(span)
            self._head = span.end
            self.peak_bytes = max(self.peak_bytes, self.held_bytes)
            return span

    def has_room(self, num_bytes: int) -> bool:
        """Whether ``take(num_bytes)`` would have room."""
        with self._lock:
            return self._open and self._place(num_bytes) is not None

    def wait_for(self, num_bytes: int, timeout_s: float | None = None) -> bool:
        """True once ``take(num_bytes)`` has room; False after ``shut``, or after ``timeout_s`` seconds without."""
        with self._lock:
            self._num_waiting += 1
            try:
                found = self._changed.wait_for(
                    lambda: not self._open or self._place(num_bytes) is not None, timeout_s
                )
            finally:
                self._num_waiting -= 1
            return found and self._open

    def release(self, span: Span) -> None:
        """Take a span back from one of its users; each does so exactly once."""
        with self._lock:
            assert span.users > 0, "a span was released twice"
            span.users -= 1
            while self._spans and not self._spans[0].users:
                self._spans.popleft()
            if not self._spans:
                self._head = 0
            if self._num_waiting:
                self._changed.notify_all()

    def shut(self) -> None:
        """Let every waiting and later call answer that there is no room."""
        with self._lock:
            self._open = False
            self._changed.notify_all()

    def _place(self, num_bytes: int) -> int | None:
        """Where a span of ``num_bytes`` fits now."""
        size = _aligned(num_bytes)
        if not self._spans:
            return 0 if size <= self.capacity_bytes else None
        oldest = self._spans[0].start
        if self._head > oldest:
            if self._head + size <= self.capacity_bytes:
                return self._head
            return 0 if size <= oldest else None
        # The head has gone round; equal to the oldest it means full, since the empty ring begins at 0.
        return self._head if self._head + size <= oldest else None


def _aligned(num_bytes: int) -> int:
    # An empty record takes a line too, so that a span's end always differs from its start.
    return max(1, -(-num_bytes // ALIGNMENT)) * ALIGNMENT
