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


def _references(buffers: list[U8], index: int) -> int:
    """To a buffer of the list. No variable holds it, as whether one counts differs between Pythons (3.14 borrows)."""
    return sys.getrefcount(buffers[index])


def _idle_references() -> int:
    """To a buffer of a list that nobody looks at; 0 where the count does not tell, and no buffer is idle."""
    without_lock = not getattr(sys, "_is_gil_enabled", lambda: True)()
    if without_lock or not hasattr(sys, "getrefcount"):
        return 0
    buffers = [np.empty(2, np.uint8)]
    idle = _references(buffers, 0)
    view = buffers[0][:1]
    return idle if _references(buffers, 0) == idle + 1 and len(view) else 0


_IDLE_REFERENCES = _idle_references()


class BufferPool:
    """Arrays to decode into, each again once no view on it is left.

    The kernel takes 1.5 us to hand out 4 KiB of new memory: as long as decoding them. A view holds a reference to
    the buffer it looks at, so the reference count says whether one is free; where a Python's count does not say so,
    every array is new.
    """

    def __init__(self) -> None:
        self._buffers: list[U8] = []
        self._lock = threading.Lock()

    def take(self, num_bytes: int) -> U8:
        """An array of ``num_bytes`` of any content."""
        if not 0 < num_bytes <= _MAX_BYTES or not _IDLE_REFERENCES:
            return np.empty(num_bytes, np.uint8)
        buffers = self._buffers
        with self._lock:
            for index in range(len(buffers)):
                if len(buffers[index]) >= num_bytes and _references(buffers, index) == _IDLE_REFERENCES:
                    return buffers[index][:num_bytes]
            buffers.append(np.empty(num_bytes, np.uint8))
            del buffers[:-_KEPT]
            return buffers[-1][:]


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
