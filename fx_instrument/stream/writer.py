"""Records to pages, pages through compressor threads, blocks into one file in order."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..errors import CaptureFailedError
from .blocks import BlockHeader, Shape
from .codec import PageEncoder
from .frames import CODEC_CODES, Prolog
from .memory import DEFAULT_MEMORY_BYTES, plan_memory
from .open_pages import OpenPages
from .pages import U8, PackLayout, Page
from .records import DTYPES, RecordMeta, SiteEntry
from .segment_writer import SegmentWriter
from .tiers import TIERS_OF_CODEC, Choices, TierControl


class StreamWriter:
    """Writes one stream file from the calls of one drain thread; compresses in threads of its own.

    ``put`` takes over a record's memory without a copy and calls ``done`` once its bytes are in the file (or
    thrown away after a failure). Records of a dtype collect in a page; a full or old page goes to a worker, which
    lays it out by site, compresses it and appends it when its turn comes. A failure of any thread is kept in
    ``failure`` and raised by ``close``. ``memory_bytes`` bounds what workers hold beside the records; the attribute
    of that name says what they hold at most (never less than 1.7 MiB). ``target_bytes_per_s`` is the raw rate to
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
        plan = plan_memory(memory_bytes, num_workers, page_bytes, target_bytes_per_s)
        self.codec = codec
        self.page_bytes = plan.page_bytes
        self.num_workers = plan.num_workers
        self.memory_bytes = plan.total_bytes
        self._at_once_bytes = plan.at_once_bytes
        self._last_help = plan.last_help
        self.tiers = TierControl(
            TIERS_OF_CODEC[codec], target_bytes_per_s=target_bytes_per_s, num_workers=plan.num_workers
        )
        self.max_relative_error = max_relative_error
        self.failure: BaseException | None = None
        created_ns = time.time_ns() if created_ns is None else created_ns
        prolog = Prolog(codec, uuid.uuid4().bytes, dict(metadata), rank, world, created_ns)
        self._segment = SegmentWriter(path, mode, prolog, page_bytes=plan.page_bytes)
        self._sites = list(self._segment.known_sites)
        self._site_ids = {site.key: site.id for site in self._sites}
        self._inputs = set(self._segment.known_inputs)
        self._open = OpenPages(plan.page_bytes, self._take)
        self._queue: queue.SimpleQueue[Page | None] = queue.SimpleQueue()
        self._choices = Choices()
        self._sequence = self._turn = self._segment.next_sequence
        self._turn_changed = threading.Condition()
        self._abandoned = False
        self._stopping = False
        self._closed = False
        self._workers: list[threading.Thread] = []
        for _ in range(plan.num_workers):
            self._start_worker()

    def _start_worker(self) -> None:
        worker = threading.Thread(target=self._work, name=f"fx-stream-{len(self._workers)}", daemon=True)
        self._workers.append(worker)
        worker.start()

    @property
    def first_step(self) -> int:
        """Of this writer's own: more than 0 where it goes on with a file."""
        return self._segment.first_step

    @property
    def stored_bytes(self) -> int:
        return self._segment.stored_bytes

    @property
    def raw_bytes(self) -> int:
        return self._segment.raw_bytes

    @property
    def num_records(self) -> int:
        return self._segment.num_records

    # -- the drain thread's side ---------------------------------------------------------------------------

    def add_site(self, name: str, role: str) -> int:
        """The id of a site, new or known by its name, whose role stays; an input of that name is another thing."""
        entry = SiteEntry(len(self._sites), name, role)
        site_id = self._site_ids.setdefault(entry.key, entry.id)
        if site_id == entry.id:
            self._sites.append(entry)
            if role == "input":
                self._inputs.add(site_id)
        return site_id

    def put(self, meta: RecordMeta, data: U8, done: Callable[[], None] | None = None) -> None:
        """Take over a record whose bytes are ``data`` (1-D uint8, contiguous), without a copy.

        ``done`` is called exactly once, from any thread, when the bytes are needed no more.

        Raises:
            ValueError: the bytes are not those of the dtype and shape, or the site is unknown.
        """
        if not 0 <= meta.site_id < len(self._sites):
            raise ValueError(f"site {meta.site_id} was not added; there are {len(self._sites)}")
        self._open.put(meta, data, done)

    def layout(self, dtype: str, records: Iterable[tuple[int, int, Shape]]) -> PackLayout:
        """How records of ``(site id, call, (shape, full shape))``, by site, follow each other."""
        return PackLayout.of(dtype, records)

    def put_packed(
        self,
        layout: PackLayout,
        step: int,
        data: U8 | Sequence[U8],
        done: Callable[[], None] | None = None,
    ) -> None:
        """Take over the records of a step: ``put`` of all of them at once, in the order of the layout.

        ``data`` has them one after the other in one piece of memory, or each in an array of its own.

        Raises:
            ValueError: as ``put``; they have more bytes than ``page_bytes`` or are more than a page takes.
        """
        if not layout.rows["site"][-1] < len(self._sites):
            raise ValueError(f"site {layout.rows['site'][-1]} was not added; there are {len(self._sites)}")
        self._open.put_packed(layout, step, data, done)

    def seal(self, *, older_than_s: float = 0.0) -> None:
        """Hand incomplete pages to the workers, those at least ``older_than_s`` seconds old."""
        self._open.seal(older_than_s)

    def _take(self, page: Page) -> None:
        page.sequence = self._sequence
        page.num_sites = len(self._sites)
        self._sequence += 1
        self.tiers.arrived(page.raw_bytes)
        self._queue.put(page)

    def close(
        self, summary: Mapping[str, Any], *, earlier_summaries: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        """Write what is left, then the index with ``summary``, and close the file; later calls do nothing.

        ``earlier_summaries`` are of captures whose records were put here; a file that is gone on with has its own.

        Raises:
            CaptureFailedError: a thread, or this call, could not write; ``__cause__`` says why. The file holds
                what was written before.
        """
        if self._closed:
            return
        self.finish()
        self._closed = True
        try:
            if self.failure is None:
                try:
                    self._segment.write_end(summary, self._sites, earlier_summaries)
                except Exception as error:
                    self.failure = error
        finally:
            self._segment.close()
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
        self.finish()
        self._closed = True
        self._segment.close()

    def forked(self) -> None:
        """In a forked process, where no workers are: ``close`` does nothing, and the file is the parent's."""
        self._closed = True
        self._segment.forked()
        self.tiers.forked()

    def capacity(self) -> tuple[float, str] | None:
        """``(raw bytes a second, "disk" or "cores")``: the most that this writer takes, as measured; None before
        a page was written."""
        return self.tiers.limit()

    def finish(self) -> None:
        """Store all that was put, as far as there was no failure; nothing can be put any more.

        The thread that waits here ran the model, so its core is free: another worker takes it, where memory was
        set aside for one. After an interrupt it can be called again.
        """
        self.seal()
        if not self._stopping:
            self._stopping = True
            if self._queue.qsize() > 1 and self._last_help:
                self._start_worker()
            for _ in self._workers:
                self._queue.put(None)
        for worker in self._workers:
            worker.join()

    # -- the workers' side ---------------------------------------------------------------------------------

    def _work(self) -> None:
        encoder: PageEncoder | None = None
        scratch: list[U8] = []

        def page_scratch() -> U8:
            if not scratch:
                scratch.append(np.empty(self.page_bytes, np.uint8))
            return scratch[0]

        self._segment.close_replaced()
        while (page := self._queue.get()) is not None:
            started_s, stored = time.perf_counter(), None
            try:
                if self.failure is None and not self._abandoned:
                    if encoder is None:
                        encoder = PageEncoder(self.codec, self.page_bytes, self._choices, self._at_once_bytes)
                    stored = self._store(page, encoder, page_scratch)
            except BaseException as error:
                self._fail(error)
            finally:
                with self._turn_of(page):
                    pass
                self.tiers.left(page.raw_bytes)
                self._release(page)
            if stored is not None:
                # All that a page keeps its worker busy with; waiting for its turn is not.
                seconds = time.perf_counter() - started_s - stored.waited_s
                self.tiers.encoded(
                    page.dtype,
                    stored.tier,
                    page.raw_bytes,
                    stored.num_bytes,
                    seconds if stored.typical else None,
                )

    def _release(self, page: Page) -> None:
        # The memory goes before anyone is told that it went.
        for tell in page.take_done():
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

    def _store(self, page: Page, encoder: PageEncoder, scratch: Callable[[], U8]) -> _Stored:
        records = page.arrange(scratch if self.max_relative_error is None else None)
        tier = self.tiers.choose(page.dtype)
        if self.max_relative_error is None:
            encoded = encoder.encode(records.buffers, page.dtype, site=records.only_site(), tier=tier)
        else:
            encoded = encoder.encode_within(
                records.buffers,
                records.layouts(page.dtype),
                page.dtype,
                self.max_relative_error,
                site=records.only_site(),
            )
        rows, raw_directory, num_shapes = records.rows, records.directory(), len(records.shapes)
        directory_encoding, directory = encoder.encode_directory(raw_directory)
        steps = rows["step"]
        header = BlockHeader(
            codec=CODEC_CODES[self.codec],
            dtype=DTYPES[page.dtype][0],
            filter=encoded.filter,
            directory_encoding=directory_encoding,
            num_rows=len(rows),
            segment_id=self._segment.id,
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
        encoded_s = time.perf_counter()
        with self._turn_of(page):
            waited_s = time.perf_counter() - encoded_s
            if self.failure is None and not self._abandoned:
                started_s = time.perf_counter()
                num_bytes = self._segment.write_block(
                    header,
                    directory,
                    encoded,
                    records,
                    sites=self._sites[: page.num_sites],
                    inputs=self._inputs,
                )
                self.tiers.written(num_bytes, time.perf_counter() - started_s)
        return _Stored(tier, encoded.payload_bytes, encoder.typical, waited_s)


class _Stored(NamedTuple):
    """A page that was stored: how, in how many bytes, whether in the time that pages take, and how long it waited for
    earlier ones."""

    tier: int
    num_bytes: int
    typical: bool
    waited_s: float
