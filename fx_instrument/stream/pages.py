"""Records on their way into a block: rows collected by the drain thread, laid out by a worker."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from .blocks import ROW_DTYPE, Shape, write_directory
from .quantise import Layout, layout_of
from .records import DTYPES, RecordMeta

U8: TypeAlias = npt.NDArray[np.uint8]
Row: TypeAlias = "tuple[RecordMeta, U8, Callable[[], None] | None, int]"
"""What was captured, the bytes of it in this page, who to tell once they are needed no more, and where in the
record these bytes begin."""


class Countdown:
    """Calls ``done`` when it was called ``count`` times itself: once all parts of a record are stored."""

    def __init__(self, count: int, done: Callable[[], None]) -> None:
        self._left = count
        self._done = done
        self._lock = threading.Lock()

    def __call__(self) -> None:
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last:
            self._done()


class Page:
    """Rows of one dtype that become one block."""

    __slots__ = ("dtype", "num_sites", "opened_s", "raw_bytes", "rows", "sequence")

    def __init__(self, dtype: str, opened_s: float) -> None:
        self.dtype = dtype
        self.opened_s = opened_s
        self.rows: list[Row] = []
        self.raw_bytes = 0
        self.sequence = -1
        self.num_sites = 0

    def group_by_site(self) -> None:
        """Sort the rows by site, keeping each site's order: alike values beside each other compress best."""
        self.rows.sort(key=_site_of)

    def only_site(self) -> int:
        """The site of all rows, sorted before; -1 if there are several."""
        first, last = _site_of(self.rows[0]), _site_of(self.rows[-1])
        return first if first == last else -1

    def layouts(self) -> list[Layout]:
        """How the bytes of each row of the page fall into rows of the tensors that they are of."""
        itemsize = DTYPES[self.dtype][1]
        return [
            layout_of(meta.shape, meta.full_shape is not None, part_offset // itemsize)
            for meta, _, _, part_offset in self.rows
        ]

    def directory(self) -> tuple[npt.NDArray[np.void], bytes, int]:
        """``(rows, raw directory, number of shapes)`` of the page as its rows lie now."""
        count = len(self.rows)
        rows = np.empty(count, ROW_DTYPE)
        metas = [row[0] for row in self.rows]
        rows["step"] = [meta.step for meta in metas]
        rows["site"] = [meta.site_id for meta in metas]
        rows["call"] = [meta.call for meta in metas]
        rows["part_offset"] = [row[3] for row in self.rows]
        shapes: dict[Shape, int] = {}
        rows["shape"] = [shapes.setdefault((meta.shape, meta.full_shape), len(shapes)) for meta in metas]
        ends = np.cumsum([len(row[1]) for row in self.rows], dtype=np.uint32)
        rows["offset"][:1] = 0
        rows["offset"][1:] = ends[:-1]
        return rows, write_directory(rows, list(shapes)), len(shapes)


def _site_of(row: Row) -> int:
    return row[0].site_id
