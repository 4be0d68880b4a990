"""Records to pages, pages through compressor threads, blocks into one file in order."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ..errors import CaptureFailedError
from .blocks import MAX_PAGE_BYTES, MAX_ROWS, BlockHeader
from .codec import PageEncoder, empty_frame, encode_directory
from .files import open_file, sync, write_all
from .frames import ALIGNMENT, CODEC_CODES, SEGMENT_ID_BYTES, Prolog, write_sites
from .index import IndexRow, write_index
from .pages import U8, Countdown, Page, Row
from .payload import LEAD_BYTES, EncodedPage
from .records import DTYPES, RecordMeta, SiteEntry, record_bytes
from .resume import Resumed, resume_file
from .tiers import TIERS_OF_CODEC, Choices, TierControl

DEFAULT_MEMORY_BYTES = 64 << 20
MIN_PAGE_BYTES = 16 << 10
_WORKER_FIXED_BYTES = 2 << 20
"""Of a worker: its two zstd contexts (1 MiB), the pieces that stay in L2 (512 KiB), a directory."""
_WORKER_PAGES = 4
"""What a worker holds at most in pages: gathered, planes, compressed planes and the room zstd asks for."""
MIN_MEMORY_BYTES = _WORKER_PAGES * MIN_PAGE_BYTES + _WORKER_FIXED_BYTES
"""The least that a writer works with: one worker, the smallest pages."""


class StreamWriter:
    """Writes one stream file from the calls of one drain thread; compresses in threads of its own.

    ``put`` takes over a record's memory without a copy and calls ``done`` once its bytes are in the file (or
    thrown away after a failure). Records of a dtype collect in a page; a full or old page goes to a worker, which
    lays it out by site, compresses it and appends it when its turn comes. A failure of any thread is kept in
    ``failure`` and raised by ``close``. ``memory_bytes`` bounds what workers hold beside the records; the attribute
    of that name says what they hold at most (never less than 2.1 MiB). ``target_bytes_per_s`` is the raw rate to
    hold: pages are compressed less where the best would not keep it; ``tiers`` says what was done. ``rank`` of
    ``world`` processes writes this file; ``created_ns`` (since 1970; None: now) orders the files of one rank.

    Raises on construction: ValueError for a codec or mode that does not exist; TypeError for metadata that is no
    JSON; OSError as ``open`` does; as ``resume_file`` does in mode "a".
    """

    def __init__(
        self,
        path: os.PathLike[str] | str | None,
        *,
        metadata: Mapping[str, Any],
        codec: str,
        mode: str = "w",
        num_workers: int | None = None,
        memory_bytes: int = DEFAULT_MEMORY_BYTES,
        page_bytes: int | None = None,
        target_bytes_per_s: float | None = None,
        max_relative_error: float | None = None,
        rank: int = 0,
        world: int = 1,
        created_ns: int | None = None,
    ) -> None:
        if codec not in CODEC_CODES:
            raise ValueError(f"codec must be one of {', '.join(CODEC_CODES)}, got {codec!r}")
        if mode not in ("w", "x", "a"):
            raise ValueError(f"mode must be 'w', 'x' or 'a', got {mode!r}")
        num_workers, page_bytes = _fit_memory(memory_bytes, num_workers, page_bytes)
        self.codec = codec
        self.page_bytes = page_bytes
        self.num_workers = num_workers
        self.memory_bytes = num_workers * (_WORKER_PAGES * page_bytes + _WORKER_FIXED_BYTES)
        self.tiers = TierControl(
            TIERS_OF_CODEC[codec], target_bytes_per_s=target_bytes_per_s, num_workers=num_workers
        )
        self.max_relative_error = max_relative_error
        self.first_step = 0
        self.failure: BaseException | None = None
        self.stored_bytes = 0
        self.raw_bytes = 0
        self.num_records = 0
        created_ns = time.time_ns() if created_ns is None else created_ns
        self._prolog = Prolog(codec, uuid.uuid4().bytes, dict(metadata), rank, world, created_ns)
        beginning = [empty_frame(codec), self._prolog.write()]
        self._segment_id = self._prolog.uuid[:SEGMENT_ID_BYTES]
        self._sites: list[SiteEntry] = []
        self._site_ids: dict[tuple[str, str], int] = {}
        self._inputs: set[int] = set()
        self._sites_written = 0
        self._blocks: list[IndexRow] = []
        self._max_step = -1
        self._sizes: dict[tuple[str, tuple[int, ...]], int] = {}
        self._open: dict[str, Page] = {}
        self._queue: queue.SimpleQueue[Page | None] = queue.SimpleQueue()
        self._choices = Choices()
        self._sequence = 0
        self._turn = 0
        self._turn_changed = threading.Condition()
        self._abandoned = False
        self._stopping = False
        self._closed = False
        self._segment_offset = 0
        self._resumed: Resumed | None = None
        self._fd: int | None = None
        if mode == "a" and path is not None:
            self._resume(path)
        if self._resumed is None:
            self._fd = open_file(path, mode)
            try:
                self._write(beginning)
            except BaseException:
                self._close_file()
                raise
        self._workers = [
            threading.Thread(target=self._work, name=f"fx-stream-{number}", daemon=True)
            for number in range(num_workers)
        ]
        for worker in self._workers:
            worker.start()

    def _resume(self, path: os.PathLike[str] | str) -> None:
        """Go on where the last segment of an existing file has its last good block; nothing if there is no file."""
        resumed = resume_file(path, self.codec)
        if resumed is None:
            return
        self._resumed, self._fd, segment = resumed, resumed.fd, resumed.segment
        self._prolog, self._segment_id = segment.prolog, segment.segment_id
        self._segment_offset = segment.offset
        self.stored_bytes = resumed.end
        self.first_step = segment.num_steps
        self._max_step = segment.num_steps - 1
        self.num_records, self.raw_bytes = segment.num_records, segment.raw_bytes
        self._sites = list(resumed.sites)
        self._site_ids = {(site.name, site.role): site.id for site in self._sites}
        self._inputs = set(segment.inputs)
        self._sites_written = resumed.sites_written
        self._blocks = list(resumed.blocks)
        self._sequence = self._turn = resumed.next_sequence

    # -- the drain thread's side ---------------------------------------------------------------------------

    def add_site(self, name: str, role: str) -> int:
        """The id of a site, new or known; a site is known by name and role."""
        site_id = self._site_ids.get((name, role))
        if site_id is None:
            site_id = len(self._sites)
            self._sites.append(SiteEntry(site_id, name, role))
            if role == "input":
                self._inputs.add(site_id)
            self._site_ids[name, role] = site_id
        return site_id

    def put(self, meta: RecordMeta, data: U8, done: Callable[[], None] | None = None) -> None:
        """Take over a record whose bytes are ``data`` (1-D uint8, contiguous), without a copy.

        ``done`` is called exactly once, from any thread, when the bytes are needed no more.

        Raises:
            ValueError: the bytes are not those of the dtype and shape, or the site is unknown.
        """
        size = len(data)
        expected = self._sizes.get((meta.dtype, meta.shape))
        if expected is None:
            expected = self._sizes[meta.dtype, meta.shape] = record_bytes(meta.dtype, meta.shape)
        if size != expected:
            raise ValueError(
                f"a record of {meta.dtype} {meta.shape} has {expected} bytes, got {size} (site {meta.site_id})"
            )
        if not 0 <= meta.site_id < len(self._sites):
            raise ValueError(f"site {meta.site_id} was not added; there are {len(self._sites)}")
        page = self._open.get(meta.dtype)
        if page is not None and page.raw_bytes + size > self.page_bytes:
            self._seal(page)
            page = None
        if size > self.page_bytes:
            self._put_parts(meta, data, done)
            return
        if page is None:
            page = self._open[meta.dtype] = Page(meta.dtype, time.monotonic())
        page.rows.append((meta, data, done, 0))
        page.raw_bytes += size
        if len(page.rows) >= MAX_ROWS:
            self._seal(page)

    def _put_parts(self, meta: RecordMeta, data: U8, done: Callable[[], None] | None) -> None:
        """Cut a record that is larger than a page into nearly equal parts, each a page of its own."""
        count = -(-len(data) // self.page_bytes)
        part_bytes = -(-len(data) // count)
        part_bytes += -part_bytes % min(ALIGNMENT, self.page_bytes)
        starts = range(0, len(data), part_bytes)
        part_done = None if done is None else Countdown(len(starts), done)
        for start in starts:
            page = self._open[meta.dtype] = Page(meta.dtype, time.monotonic())
            part = data[start : start + part_bytes]
            page.rows.append((meta, part, part_done, start))
            page.raw_bytes = len(part)
            self._seal(page)

    def seal(self, *, older_than_s: float = 0.0) -> None:
        """Hand incomplete pages to the workers, those at least ``older_than_s`` seconds old."""
        if self._open:
            latest = time.monotonic() - older_than_s
            for page in [page for page in self._open.values() if page.opened_s <= latest]:
                self._seal(page)

    def _seal(self, page: Page) -> None:
        del self._open[page.dtype]
        page.sequence = self._sequence
        page.num_sites = len(self._sites)
        self._sequence += 1
        self.tiers.arrived(page.raw_bytes)
        self._queue.put(page)

    def close(self, summary: Mapping[str, Any]) -> None:
        """Write what is left, then the index with ``summary``, and close the file; later calls do nothing.

        Raises:
            CaptureFailedError: a thread, or this call, could not write; ``__cause__`` says why. The file holds
                what was written before.
        """
        if self._closed:
            return
        self._stop()
        try:
            if self.failure is None:
                try:
                    self._write_end(summary)
                except Exception as error:
                    self.failure = error
        finally:
            self._close_file()
        if self.failure is not None:
            raise CaptureFailedError(
                f"the stream could not be written: {self.failure}; what was written before is readable with "
                f"recover=True"
            ) from self.failure

    def abandon(self) -> None:
        """Stop at once and write no index, as if the process had been killed; every ``done`` is called."""
        if self._closed:
            return
        self._abandoned = True
        self._stop()
        self._close_file()

    def _stop(self) -> None:
        """Let the workers finish; after an interrupt it can be called again."""
        self.seal()
        if not self._stopping:
            self._stopping = True
            for _ in self._workers:
                self._queue.put(None)
        for worker in self._workers:
            worker.join()
        self._closed = True

    def _close_file(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    # -- the workers' side ---------------------------------------------------------------------------------

    def _work(self) -> None:
        encoder: PageEncoder | None = None
        while (page := self._queue.get()) is not None:
            try:
                if self.failure is None and not self._abandoned:
                    if encoder is None:
                        encoder = PageEncoder(self.codec, self.page_bytes, self._choices)
                    self._store(page, encoder)
            except BaseException as error:
                self._fail(error)
            finally:
                with self._turn_of(page):
                    pass
                self.tiers.left(page.raw_bytes)
                self._release(page)

    def _release(self, page: Page) -> None:
        done = [row[2] for row in page.rows if row[2] is not None]
        # The memory goes before anyone is told that it went.
        page.rows.clear()
        for tell in done:
            try:
                tell()
            except BaseException as error:
                self._fail(error)

    def _fail(self, error: BaseException) -> None:
        if self.failure is None:
            self.failure = error

    @contextlib.contextmanager
    def _turn_of(self, page: Page) -> Iterator[None]:
        """Wait until all earlier pages are done with; the next page's turn comes when the block is left."""
        with self._turn_changed:
            self._turn_changed.wait_for(lambda: self._turn >= page.sequence)
        try:
            yield
        finally:
            with self._turn_changed:
                self._turn = max(self._turn, page.sequence + 1)
                self._turn_changed.notify_all()

    def _store(self, page: Page, encoder: PageEncoder) -> None:
        started_s = time.perf_counter()
        page.group_by_site()
        tier = self.tiers.choose(page.dtype)
        buffers = [row[1] for row in page.rows]
        if self.max_relative_error is None:
            encoded = encoder.encode(buffers, page.dtype, site=page.only_site(), tier=tier)
        else:
            encoded = encoder.encode_within(
                buffers, page.layouts(), page.dtype, self.max_relative_error, site=page.only_site()
            )
        rows, raw_directory, num_shapes = page.directory()
        directory_encoding, directory = encode_directory(self.codec, raw_directory)
        steps = rows["step"]
        header = BlockHeader(
            codec=CODEC_CODES[self.codec],
            dtype=DTYPES[page.dtype][0],
            filter=encoded.filter,
            directory_encoding=directory_encoding,
            num_rows=len(rows),
            segment_id=self._segment_id,
            sequence=page.sequence,
            time_ns=time.time_ns(),
            min_step=int(steps.min()),
            max_step=int(steps.max()),
            num_shapes=num_shapes,
            directory_bytes=len(directory),
            directory_raw_bytes=len(raw_directory),
            raw_bytes=page.raw_bytes,
            payload_bytes=encoded.payload_bytes,
            payload_crc=encoded.payload_crc,
            plane_bytes=encoded.plane_bytes,
            plane_encodings=encoded.plane_encodings,
        )
        seconds = time.perf_counter() - started_s
        with self._turn_of(page):
            if self.failure is None and not self._abandoned:
                seconds += self._append(page, header, directory, encoded)
        # All that a page keeps its worker busy with; waiting for its turn is not.
        self.tiers.encoded(
            page.dtype, tier, page.raw_bytes, encoded.payload_bytes, seconds if encoder.typical else None
        )

    def _append(self, page: Page, header: BlockHeader, directory: bytes, encoded: EncodedPage) -> float:
        """Write a block; the seconds that it took."""
        if page.num_sites > self._sites_written:
            self._write([write_sites(self._sites[self._sites_written : page.num_sites], self._segment_id)])
            self._sites_written = page.num_sites
        offset = self.stored_bytes - self._segment_offset
        head = header.write(directory, offset, LEAD_BYTES)
        started_s = time.perf_counter()
        self._write([head, *encoded.pieces])
        seconds = time.perf_counter() - started_s
        self.tiers.written(len(head) + encoded.payload_bytes, seconds)
        sites = {row[0].site_id for row in page.rows}
        self._blocks.append(
            IndexRow(
                offset,
                header.min_step,
                header.max_step,
                len(head) + header.payload_bytes,
                header.num_rows,
                header.raw_bytes,
                frozenset(sites),
            )
        )
        self._max_step = max(self._max_step, header.max_step)
        if self._inputs.isdisjoint(sites):
            captured: Sequence[Row] = page.rows
        else:
            captured = [row for row in page.rows if row[0].site_id not in self._inputs]
        self.raw_bytes += sum(len(row[1]) for row in captured)
        self.num_records += sum(row[3] == 0 for row in captured)
        return seconds

    def _write_end(self, summary: Mapping[str, Any]) -> None:
        num_steps = summary.get("num_steps", 0)
        resumed = self._resumed
        index = write_index(
            self.stored_bytes - self._segment_offset,
            self._blocks,
            self._sites,
            segment_id=self._segment_id,
            num_steps=max(int(num_steps), self._max_step + 1, self.first_step),
            num_records=self.num_records,
            raw_bytes=self.raw_bytes,
            summary=summary,
            earlier_summaries=resumed.earlier_summaries if resumed else (),
            damage=resumed.damage if resumed else (),
            incomplete=resumed.segment.incomplete if resumed else (),
        )
        self._write([index])
        if self._fd is not None:
            sync(self._fd)

    def _write(self, pieces: Sequence[Any]) -> None:
        views = [memoryview(piece).cast("B") for piece in pieces if len(piece)]
        if self._fd is not None:
            write_all(self._fd, views)
        self.stored_bytes += sum(map(len, views))


def _fit_memory(memory_bytes: int, num_workers: int | None, page_bytes: int | None) -> tuple[int, int]:
    """Workers and page size that fit: fewer workers before smaller pages than 1 MiB.

    A worker with the smallest page is the least there can be, also where that is more than ``memory_bytes``.
    """
    if page_bytes is not None and not 1024 <= page_bytes <= MAX_PAGE_BYTES:
        raise ValueError(f"page_bytes must be from 1024 to {MAX_PAGE_BYTES}, got {page_bytes!r}")
    if num_workers is not None and num_workers < 1:
        raise ValueError(f"num_workers must be at least 1, got {num_workers!r}")
    if num_workers is None:
        num_workers = max(1, min(4, len(os.sched_getaffinity(0)) // 2))
        while num_workers > 1 and num_workers * (_WORKER_FIXED_BYTES + (_WORKER_PAGES << 20)) > memory_bytes:
            num_workers -= 1
    if page_bytes is None:
        room = (memory_bytes // num_workers - _WORKER_FIXED_BYTES) // _WORKER_PAGES
        page_bytes = max(MIN_PAGE_BYTES, min(MAX_PAGE_BYTES, room // 4096 * 4096))
    return num_workers, page_bytes
