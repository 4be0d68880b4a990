"""Where records lie: references that are cheap to hold, and a site's worth of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, overload

import numpy as np
import numpy.typing as npt

from .records import record_bytes


class RecordRef(NamedTuple):
    """A record of a file: what it is, and where it lies."""

    site_id: int
    step: int
    call: int
    dtype: str
    shape: tuple[int, ...]
    full_shape: tuple[int, ...] | None
    rank: int
    """Which process captured it."""
    segment: int
    """Which of the reader's segments it is of, from 0."""
    places: tuple[tuple[int, int], ...]
    """(block of the segment, row of its directory), in the order of the bytes."""

    @property
    def num_bytes(self) -> int:
        return record_bytes(self.dtype, self.shape)


PART_DTYPE = np.dtype(
    [
        ("step", "<u8"),
        ("part_offset", "<u8"),
        ("call", "<u4"),
        ("rank", "<u4"),
        ("segment", "<u4"),
        ("block", "<u4"),
        ("row", "<u4"),
        ("first", "<u4"),
    ]
)
"""A part of a record; ``first`` is set where a record begins."""


class SiteRecords(Sequence[RecordRef]):
    """The records of one site, ascending by step, rank and call; refs are made when looked at.

    Holds 44 bytes a part of a record.
    """

    def __init__(
        self, parts: npt.NDArray[np.void], make_ref: Callable[[int, tuple[tuple[int, int], ...]], RecordRef]
    ) -> None:
        """``parts`` is of ``PART_DTYPE``; ``make_ref`` takes a segment and (block, row) of each part."""
        self._make_ref = make_ref
        self._parts = parts
        starts = np.flatnonzero(parts["first"])
        self._starts = np.append(starts, len(parts))

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, position: int) -> RecordRef: ...
    @overload
    def __getitem__(self, position: slice) -> list[RecordRef]: ...
    def __getitem__(self, position: int | slice) -> RecordRef | list[RecordRef]:
        if isinstance(position, slice):
            return [self[number] for number in range(*position.indices(len(self)))]
        number = range(len(self))[position]
        parts = self._parts[self._starts[number] : self._starts[number + 1]]
        segment = int(parts["segment"][0])
        places = tuple(zip(parts["block"].tolist(), parts["row"].tolist(), strict=True))
        return self._make_ref(segment, places)
