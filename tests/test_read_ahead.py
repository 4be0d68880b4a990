"""What a walk through a mapped file asks the kernel for before it gets there."""

from __future__ import annotations

import mmap

import pytest

from fx_instrument.stream.read_ahead import _SPAN_BYTES, ReadAhead


class Mapped:
    """A map that keeps what was asked for."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.asked: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return self.size

    def madvise(self, option: int, start: int, length: int) -> None:
        assert option == mmap.MADV_WILLNEED and start % mmap.PAGESIZE == 0
        self.asked.append((start, start + length))


@pytest.mark.skipif(not hasattr(mmap, "MADV_WILLNEED"), reason="needs madvise")
def test_everything_is_asked_for_once_and_ahead() -> None:
    """In steps of less than a span all of the file is asked for, without a gap, before it is looked at."""
    size = 5 * _SPAN_BYTES + 12_345
    mapped = Mapped(size)
    read_ahead = ReadAhead(mapped)  # type: ignore[arg-type]
    for position in range(0, size, 3_000_001):
        read_ahead(position)
        assert mapped.asked[-1][1] >= min(size, position + _SPAN_BYTES)
    starts, ends = zip(*mapped.asked, strict=True)
    assert (starts[0], ends[-1]) == (0, size) and starts[1:] == ends[:-1]


@pytest.mark.skipif(not hasattr(mmap, "MADV_WILLNEED"), reason="needs madvise")
@pytest.mark.parametrize("there", [7 * _SPAN_BYTES + 5, 100])
def test_a_walk_may_begin_anywhere(there: int) -> None:
    """After a jump, forward or back, it goes on at the page there, and asks for nothing between."""
    mapped = Mapped(20 * _SPAN_BYTES)
    read_ahead = ReadAhead(mapped)  # type: ignore[arg-type]
    read_ahead(4 * _SPAN_BYTES)
    read_ahead(there)
    first = there - there % mmap.PAGESIZE
    middle, end = first + _SPAN_BYTES, first + 2 * _SPAN_BYTES
    assert mapped.asked == [(4 * _SPAN_BYTES, 5 * _SPAN_BYTES), (first, middle), (middle, end)]
