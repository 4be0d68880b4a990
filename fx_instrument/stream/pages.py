"""Records on their way into a block: rows collected by the drain thread, laid out by a worker."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from .blocks import ROW_DTYPE, Shape, write_directory
from .quantise import Layout, layout_of
from .records import DTYPES, RecordMeta, record_bytes

U8: TypeAlias = npt.NDArray[np.uint8]
Row: TypeAlias = "tuple[RecordMeta, U8, Callable[[], None] | None, int]"
"""What was captured, the bytes of it in this page, who to tell once they are needed no more, and where in the
record these bytes begin."""


_STACKED_BYTES = 32 << 10
"""Records of packs up to this size are copied by site; the encoder splits larger ones where they lie."""


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


@dataclass(frozen=True, slots=True, eq=False)
class PackLayout:
    """How the records of a graph run follow each other in a page; made once for many steps."""

    dtype: str
    rows: npt.NDArray[np.void]
    """``ROW_DTYPE``, by site, of step 0; offsets within what they have together."""
    sizes: npt.NDArray[np.int64]
    shapes: tuple[Shape, ...]
    num_bytes: int
    even_bytes: int
    """Bytes of each record, where all have the same and no site has two; else 0."""

    @classmethod
    def of(cls, dtype: str, records: Iterable[tuple[int, int, Shape]]) -> PackLayout:
        """The layout of ``(site id, call, shape)`` in this order; ValueError if the sites don't ascend."""
        records = list(records)
        rows = np.zeros(len(records), ROW_DTYPE)
        rows["site"] = [site for site, _, _ in records]
        rows["call"] = [call for _, call, _ in records]
        if not records or (np.diff(rows["site"].astype(np.int64)) < 0).any():
            raise ValueError("records are packed in ascending order of their sites, one at least")
        shapes: dict[Shape, int] = {}
        rows["shape"] = [shapes.setdefault(shape, len(shapes)) for _, _, shape in records]
        sizes = np.array([record_bytes(dtype, shape) for _, _, (shape, _) in records], np.int64)
        rows["offset"][1:] = np.cumsum(sizes)[:-1]
        even = (np.diff(rows["site"].astype(np.int64)) > 0).all() and (sizes == sizes[0]).all()
        return cls(dtype, rows, sizes, tuple(shapes), int(sizes.sum()), int(sizes[0]) if even else 0)

    def metas(self, step: int) -> list[RecordMeta]:
        """What the records of a step are, one by one."""
        return [
            RecordMeta(int(row["site"]), step, int(row["call"]), self.dtype, *self.shapes[int(row["shape"])])
            for row in self.rows
        ]


class Pack(NamedTuple):
    """Records of one graph run that came together."""

    layout: PackLayout
    step: int
    data: U8 | Sequence[U8]
    """In one piece of memory, or each record in one of its own."""
    done: Callable[[], None] | None

    def pieces(self) -> Sequence[U8]:
        """The bytes of each record."""
        if not isinstance(self.data, np.ndarray):
            return self.data
        starts, sizes = self.layout.rows["offset"].tolist(), self.layout.sizes.tolist()
        return [self.data[start : start + size] for start, size in zip(starts, sizes, strict=True)]


@dataclass(slots=True)
class Arranged:
    """The records of a page by site, each site's in the order in which they came."""

    buffers: list[U8]
    """Their bytes, in this order; one buffer may hold several."""
    rows: npt.NDArray[np.void]
    sizes: npt.NDArray[np.int64]
    shapes: Sequence[Shape]

    def directory(self) -> bytes:
        return write_directory(self.rows, self.shapes)

    def sites(self) -> frozenset[int]:
        sites = self.rows["site"]
        return frozenset([*sites[:1].tolist(), *sites[1:][sites[1:] != sites[:-1]].tolist()])

    def count(self, leave_out: frozenset[int]) -> tuple[int, int]:
        """``(records, bytes)`` of all but some sites; a record counts where it begins."""
        begins = self.rows["part_offset"] == 0
        if not leave_out:
            return int(begins.sum()), int(self.sizes.sum())
        counted = ~np.isin(self.rows["site"], list(leave_out))
        return int((begins & counted).sum()), int(self.sizes[counted].sum())

    def only_site(self) -> int:
        """The site of all records; -1 if there are several."""
        first, last = self.rows["site"][0], self.rows["site"][-1]
        return int(first) if first == last else -1

    def layouts(self, dtype: str) -> list[Layout]:
        """How the bytes of each record in the page fall into rows of the tensors that they are of."""
        itemsize = DTYPES[dtype][1]
        found = []
        for index, part_offset in zip(
            self.rows["shape"].tolist(), self.rows["part_offset"].tolist(), strict=True
        ):
            shape, full_shape = self.shapes[index]
            found.append(layout_of(shape, full_shape is not None, part_offset // itemsize))
        return found


class Page:
    """Records of one dtype that become one block."""

    __slots__ = ("dtype", "entries", "num_rows", "num_sites", "opened_s", "raw_bytes", "sequence")

    def __init__(self, dtype: str, opened_s: float) -> None:
        self.dtype = dtype
        self.opened_s = opened_s
        self.entries: list[Row | Pack] = []
        self.num_rows = 0
        self.raw_bytes = 0
        self.sequence = -1
        self.num_sites = 0

    def add(self, entry: Row | Pack, num_rows: int, num_bytes: int) -> None:
        self.entries.append(entry)
        self.num_rows += num_rows
        self.raw_bytes += num_bytes

    def take_done(self) -> list[Callable[[], None]]:
        """Let go of the records; who to tell."""
        entries, self.entries = self.entries, []
        return [
            done
            for entry in entries
            if (done := entry.done if isinstance(entry, Pack) else entry[2]) is not None
        ]

    def arrange(self, scratch: Callable[[], U8] | None) -> Arranged:
        """The records by site: alike values beside each other compress best.

        ``scratch`` gives memory for the page, used where that spares a look at each record; without it every
        record has a buffer of its own.
        """
        packs = [entry for entry in self.entries if isinstance(entry, Pack)]
        if packs and len(packs) == len(self.entries):
            return _arrange_packs(packs, scratch)
        rows: list[Row] = []
        for entry in self.entries:
            if isinstance(entry, Pack):
                rows += _rows_of(entry)
            else:
                rows.append(entry)
        rows.sort(key=_site_of)
        return _arrange_rows(rows)


def _rows_of(pack: Pack) -> list[Row]:
    metas = pack.layout.metas(pack.step)
    return [(meta, piece, None, 0) for meta, piece in zip(metas, pack.pieces(), strict=True)]


def _arrange_rows(records: Sequence[Row]) -> Arranged:
    count = len(records)
    rows = np.empty(count, ROW_DTYPE)
    metas = [record[0] for record in records]
    rows["step"] = [meta.step for meta in metas]
    rows["site"] = [meta.site_id for meta in metas]
    rows["call"] = [meta.call for meta in metas]
    rows["part_offset"] = [record[3] for record in records]
    shapes: dict[Shape, int] = {}
    rows["shape"] = [shapes.setdefault((meta.shape, meta.full_shape), len(shapes)) for meta in metas]
    buffers = [record[1] for record in records]
    sizes = np.array([len(buffer) for buffer in buffers], np.int64)
    _set_offsets(rows, sizes)
    return Arranged(buffers, rows, sizes, list(shapes))


def _arrange_packs(packs: Sequence[Pack], scratch: Callable[[], U8] | None) -> Arranged:
    """As of rows, without touching a record: decode steps have hundreds of them a page."""
    layout = packs[0].layout
    if scratch is not None and len(packs) == 1:
        rows = layout.rows.copy()
        rows["step"] = packs[0].step
        data = packs[0].data
        buffers = [data] if isinstance(data, np.ndarray) else list(data)
        return Arranged(buffers, rows, layout.sizes, layout.shapes)
    if scratch is not None and 0 < layout.even_bytes <= _STACKED_BYTES:
        whole = [pack.data for pack in packs if pack.layout is layout and isinstance(pack.data, np.ndarray)]
        if len(whole) == len(packs):
            return _stack(layout, [pack.step for pack in packs], whole, scratch())
    shapes: dict[Shape, int] = {}
    parts = []
    pieces: list[U8] = []
    for pack in packs:
        layout = pack.layout
        part = layout.rows.copy()
        part["step"] = pack.step
        ids = np.array([shapes.setdefault(shape, len(shapes)) for shape in layout.shapes], np.uint32)
        part["shape"] = ids[part["shape"]]
        parts.append(part)
        pieces += pack.pieces()
    rows = np.concatenate(parts)
    order = np.argsort(rows["site"], kind="stable")
    rows = rows[order]
    sizes = np.concatenate([pack.layout.sizes for pack in packs])[order]
    _set_offsets(rows, sizes)
    return Arranged([pieces[index] for index in order.tolist()], rows, sizes, list(shapes))


def _stack(layout: PackLayout, steps: Sequence[int], packs: Sequence[U8], scratch: U8) -> Arranged:
    """Packs of one layout, with records of one size and one for each site: a copy a pack."""
    count = len(packs)
    page = scratch[: count * layout.num_bytes]
    places = page.reshape(len(layout.rows), count, layout.even_bytes)
    for number, data in enumerate(packs):
        np.copyto(places[:, number], data.reshape(len(layout.rows), layout.even_bytes))
    rows, sizes = np.repeat(layout.rows, count), np.repeat(layout.sizes, count)
    rows["step"] = np.tile(np.array(steps, np.uint64), len(layout.rows))
    _set_offsets(rows, sizes)
    return Arranged([page], rows, sizes, layout.shapes)


def _set_offsets(rows: npt.NDArray[np.void], sizes: npt.NDArray[np.int64]) -> None:
    rows["offset"][:1] = 0
    rows["offset"][1:] = np.cumsum(sizes)[:-1]


def _site_of(row: Row) -> int:
    return row[0].site_id
