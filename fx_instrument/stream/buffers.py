"""Memory for decoded pages: used again, and the last few kept."""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from typing import TypeVar

import numpy as np
import numpy.typing as npt

U8 = npt.NDArray[np.uint8]
_V = TypeVar("_V")

_KEPT = 8
_MAX_BYTES = 16 << 20
_UNUSED_REFERENCES = 3
"""Of a buffer nobody looks at: the list's, the loop's, and that of the call that counts."""


class BufferPool:
    """Arrays to decode into, each again once no view on it is left.

    The kernel takes 1.5 us to hand out 4 KiB of new memory: as long as decoding them. A view holds a reference to
    the buffer it looks at, so the reference count says whether one is free; where a Python has no such count, every
    array is new.
    """

    def __init__(self) -> None:
        self._buffers: list[U8] = []
        self._lock = threading.Lock()

    def take(self, num_bytes: int) -> U8:
        """An array of ``num_bytes`` of any content."""
        if not 0 < num_bytes <= _MAX_BYTES or not hasattr(sys, "getrefcount"):
            return np.empty(num_bytes, np.uint8)
        with self._lock:
            for buffer in self._buffers:
                if len(buffer) >= num_bytes and sys.getrefcount(buffer) <= _UNUSED_REFERENCES:
                    return buffer[:num_bytes]
            buffer = np.empty(num_bytes, np.uint8)
            self._buffers.append(buffer)
            del self._buffers[:-_KEPT]
            return buffer[:]


class LastUsed(OrderedDict[tuple[int, int], _V]):
    """The last few values by (segment, block)."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit
        self.lock = threading.Lock()

    def lookup(self, key: tuple[int, int]) -> _V | None:
        with self.lock:
            value = self.get(key)
            if value is not None:
                self.move_to_end(key)
            return value

    def keep(self, key: tuple[int, int], value: _V) -> None:
        with self.lock:
            self[key] = value
            self.move_to_end(key)
            while len(self) > self.limit:
                self.popitem(last=False)
