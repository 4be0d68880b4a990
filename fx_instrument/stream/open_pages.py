"""Pages that are being filled: one for each dtype, handed on when it is full or old."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from .blocks import MAX_ROWS
from .frames import ALIGNMENT
from .pages import U8, Countdown, Pack, PackLayout, Page
from .records import RecordMeta, record_bytes

Done = Callable[[], None]


class OpenPages:
    """Collects records on one thread.

    Args:
        page_bytes: the most that a page holds.
        hand_on: takes a page that nothing more comes into.
    """

    def __init__(self, page_bytes: int, hand_on: Callable[[Page], None]) -> None:
        self._page_bytes = page_bytes
        self._hand_on = hand_on
        self._open: dict[str, Page] = {}
        self._sizes: dict[tuple[str, tuple[int, ...]], int] = {}

    def put(self, meta: RecordMeta, data: U8, done: Done | None) -> None:
        """Add a record; ValueError if ``data`` has not the bytes of its dtype and shape."""
        size = len(data)
        expected = self._sizes.get((meta.dtype, meta.shape))
        if expected is None:
            expected = self._sizes[meta.dtype, meta.shape] = record_bytes(meta.dtype, meta.shape)
        if size != expected:
            raise ValueError(
                f"a record of {meta.dtype} {meta.shape} has {expected} bytes, got {size} (site {meta.site_id})"
            )
        page = self._page(meta.dtype, size, 1)
        if size > self._page_bytes:
            self._put_parts(meta, data, done)
            return
        page.add((meta, data, done, 0), 1, size)
        if page.num_rows >= MAX_ROWS:
            self._seal(page)

    def put_packed(self, layout: PackLayout, step: int, data: U8 | Sequence[U8], done: Done | None) -> None:
        """Add records that come together; ValueError if ``data`` has not the layout's bytes or fits into no page."""
        num_rows = len(layout.rows)
        if isinstance(data, np.ndarray):
            size = len(data)
            fits = size == layout.num_bytes
        else:
            sizes = [len(piece) for piece in data]
            size, fits = sum(sizes), sizes == layout.sizes.tolist()
        if not fits or size > self._page_bytes or num_rows > MAX_ROWS:
            raise ValueError(
                f"a pack of {num_rows} records has {layout.num_bytes} bytes, got {size}; a page takes "
                f"{self._page_bytes} bytes and {MAX_ROWS} records"
            )
        self._page(layout.dtype, size, num_rows).add(Pack(layout, step, data, done), num_rows, size)

    def seal(self, older_than_s: float) -> None:
        """Hand on what is at least so many seconds old."""
        if self._open:
            latest = time.monotonic() - older_than_s
            for page in [page for page in self._open.values() if page.opened_s <= latest]:
                self._seal(page)

    def _page(self, dtype: str, size: int, num_rows: int) -> Page:
        """The page that takes so much: the open one, or a new one where that is too full."""
        page = self._open.get(dtype)
        if page is not None and page.num_rows:
            if page.raw_bytes + size <= self._page_bytes and page.num_rows + num_rows <= MAX_ROWS:
                return page
            self._seal(page)
        page = self._open[dtype] = Page(dtype, time.monotonic())
        return page

    def _put_parts(self, meta: RecordMeta, data: U8, done: Done | None) -> None:
        """Cut a record that is larger than a page into nearly equal parts, each a page of its own."""
        count = -(-len(data) // (self._page_bytes - self._page_bytes % ALIGNMENT))
        part_bytes = -(-len(data) // count)
        part_bytes += -part_bytes % ALIGNMENT
        starts = range(0, len(data), part_bytes)
        part_done = None if done is None else Countdown(len(starts), done)
        for start in starts:
            page = self._open[meta.dtype] = Page(meta.dtype, time.monotonic())
            part = data[start : start + part_bytes]
            page.add((meta, part, part_done, start), 1, len(part))
            self._seal(page)

    def _seal(self, page: Page) -> None:
        del self._open[page.dtype]
        self._hand_on(page)
