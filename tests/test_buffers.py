"""Memory for decoded pages: never handed out while someone looks at it, on any Python."""

from __future__ import annotations

import numpy as np
import pytest

from fx_instrument.stream import buffers
from fx_instrument.stream.buffers import BufferPool


def test_memory_that_someone_looks_at_is_not_handed_out_again() -> None:
    """Whether the view itself is held or one made from it; and what nobody looks at is used again."""
    pool = BufferPool()
    first = pool.take(100)
    part = pool.take(100)[10:20].view(np.uint16)
    third = pool.take(100)
    assert not any(
        np.shares_memory(*pair) for pair in ((first, part), (first, third), (part.view(np.uint8), third))
    )
    address = first.ctypes.data
    del first
    assert (pool.take(50).ctypes.data == address) == bool(buffers._IDLE_REFERENCES)


def test_where_counts_say_nothing_every_array_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "_IDLE_REFERENCES", 0)
    pool = BufferPool()
    held = [pool.take(100) for _ in range(3)]
    pool.take(100)
    assert not any(np.shares_memory(held[index], held[index - 1]) for index in range(3))
    assert not pool._buffers
