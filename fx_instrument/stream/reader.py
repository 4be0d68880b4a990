"""Records from stream files, by site and step or front to back; the files are mapped and never changed."""

from __future__ import annotations

import itertools
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import CorruptStreamError, StreamError
from .ahead import Ahead, default_threads
from .buffers import BufferPool, LastUsed
from .codec import decode_page, is_in_place, page_in_place
from .mapped import AnyPath, map_files, place_segments
from .payload import LEAD_BYTES
from .records import Damage, SiteEntry, StreamPart
from .refs import PART_DTYPE, RecordRef, SiteRecords
from .scan import Scan
from .segments import Block, load_block

U8 = npt.NDArray[np.uint8]

_CACHED_BLOCKS = 64
_CACHED_PAGES = 4


def _new_array(num_bytes: int) -> U8:
    return np.empty(num_bytes, np.uint8)


class StreamReader:
    """Stream files, mapped and read as one; also a context manager. Safe to use from several threads.

    Args:
        path: a file, or several: their segments are read as ``place_segments`` orders and numbers them. Records say
            their rank, and steps go on from one file of a rank to its next.
        recover: walk all of it and verify every checksum at once (0.1 s a GB from the page cache, about 1 from a
            disk); ``damage`` says what was skipped, and what is left reads without errors. Otherwise ``read`` and
            ``scan`` verify what they touch and raise CorruptStreamError, and ``damage`` holds what was lost before
            a file was resumed.
        num_threads: how many decode pages, ahead in ``scan`` and ``read_all``; None: one a core, up to four.

    Raises:
        FileNotFoundError: there is no such file.
        NotAStreamError: a file does not begin as a stream does.
        TruncatedStreamError: a file ends before its index; ``recover=True`` reads what is whole.
        CorruptStreamError: prolog or index contradict their checksums; ``recover=True`` reads what is whole.
        UnsupportedStreamError: a file is of a later format.
    """

    def __init__(
        self, path: AnyPath | Sequence[AnyPath], *, recover: bool = False, num_threads: int | None = None
    ) -> None:
        paths = [path] if isinstance(path, (str, os.PathLike)) else list(path)
        self.path = os.fspath(paths[0]) + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
        self.recovered = recover
        self._ahead = Ahead(default_threads() if num_threads is None else num_threads)
        self._files, unreadable = map_files(paths, recover=recover)
        try:
            self._placed = place_segments(self._files)
        except StreamError:
            self.close()
            raise
        self.damage: list[Damage] = [lost for file in self._files for lost in file.damage] + unreadable
        self.segments = [placed.segment for placed in self._placed]
        self._blocks: LastUsed[Block] = LastUsed(_CACHED_BLOCKS)
        self._pages: LastUsed[U8] = LastUsed(_CACHED_PAGES)
        self._pool = BufferPool()
        self._closed = False
        self._set_sites()
        self.metadata: dict[str, Any] = {
            **self.segments[0].prolog.metadata,
            "summary": self.segments[-1].summary,
        }
        self.codec = ", ".join(dict.fromkeys(segment.prolog.codec for segment in self.segments))
        self.version = max(segment.prolog.version for segment in self.segments)
        self.ranks = tuple(sorted({placed.rank for placed in self._placed}))
        self.num_steps = max(placed.first_step + placed.segment.num_steps for placed in self._placed)
        self.num_records = sum(segment.num_records for segment in self.segments)
        self.raw_bytes = sum(segment.raw_bytes for segment in self.segments)
        self.stored_bytes = sum(len(file.data) for file in self._files)

    @property
    def parts(self) -> tuple[StreamPart, ...]:
        """What each writer wrote, in the order it is read."""
        return tuple(
            StreamPart(
                placed.file.path,
                placed.rank,
                placed.segment.prolog.world,
                placed.first_step,
                placed.segment.num_steps,
                placed.segment.num_records,
                placed.segment.prolog.created_ns,
                {**placed.segment.prolog.metadata, "summary": placed.segment.summary},
                (*placed.segment.earlier_summaries, *filter(None, [placed.segment.summary])),
            )
            for placed in self._placed
        )

    def _set_sites(self) -> None:
        """One site table for all segments: the same name is the same site, in the role that it had first; an input is
        another thing."""
        sites: dict[tuple[str, bool], SiteEntry] = {}
        self._global_ids: list[dict[int, int]] = []
        self._local_ids: list[dict[int, int]] = []
        for segment in self.segments:
            to_global = {
                site.id: sites.setdefault(site.key, SiteEntry(len(sites), site.name, site.role)).id
                for site in segment.sites
            }
            self._global_ids.append(to_global)
            self._local_ids.append({site: local for local, site in to_global.items()})
        self.sites = list(sites.values())

    def __enter__(self) -> StreamReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Unmap the files, or let go of them where arrays from ``read`` still look into them.

        Whatever is asked for afterwards and has not been read yet is a ValueError.
        """
        self._closed = True
        self._ahead.close()
        for file in self._files:
            file.close()

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError(f"{self.path} is closed: what was not read before can't be read any more")

    # -- where records are ---------------------------------------------------------------------------------

    def _block(self, segment: int, number: int) -> Block:
        self._check_open()
        block = self._blocks.lookup((segment, number))
        if block is None:
            placed = self._placed[segment]
            try:
                block = load_block(placed.file.data, placed.segment, number)
            except StreamError as error:
                raise placed.file.error(error) from None
            self._blocks.keep((segment, number), block)
        return block

    def _page(self, segment: int, number: int) -> U8:
        """The bytes of a page, read-only: a view on the map, or memory that is used again when no view is left."""
        page = self._pages.lookup((segment, number))
        if page is None:
            page = self._decode(segment, number, in_place=True, new=self._pool.take)
            page.flags.writeable = False
            self._pages.keep((segment, number), page)
        return page

    def _decode(self, segment: int, number: int, *, in_place: bool, new: Callable[[int], U8]) -> U8:
        """A page, its checksum verified: a view on the map if it may be, else in new memory."""
        block = self._block(segment, number)
        file = self._placed[segment].file
        try:
            payload = block.payload(file.data)
            page = page_in_place(block.header, payload) if in_place else None
            return decode_page(block.header, payload, new(block.header.raw_bytes)) if page is None else page
        except StreamError as error:
            raise file.error(error) from None

    def _ref(self, site_id: int, segment: int, places: tuple[tuple[int, int], ...]) -> RecordRef:
        number, position = places[0]
        block = self._block(segment, number)
        step, _, _, call, shape_id, _ = block.directory.rows[position].item()
        shape, full_shape = block.directory.shapes[shape_id]
        placed = self._placed[segment]
        return RecordRef(
            site_id,
            step + placed.first_step,
            call,
            block.header.dtype_name,
            shape,
            full_shape,
            placed.rank,
            segment,
            places,
        )

    def _parts(
        self, site_id: int, step: int | None = None, call: int | None = None, rank: int | None = None
    ) -> npt.NDArray[np.void]:
        """All parts of a site's records, sorted, ``first`` set where a record begins."""
        found = []
        for number, placed in enumerate(self._placed):
            segment = placed.segment
            local = self._local_ids[number].get(site_id)
            if local is None or (rank is not None and rank != placed.rank):
                continue
            blocks = segment.blocks_of_site.get(local, np.empty(0, np.int64))
            if step is not None:
                own_step = step - placed.first_step
                if not 0 <= own_step < segment.num_steps:
                    continue
                hit = (segment.min_steps[blocks] <= own_step) & (own_step <= segment.max_steps[blocks])
                blocks = blocks[hit]
            for block in map(int, blocks):
                rows = self._block(number, block).directory.rows
                mask = rows["site"] == local
                if step is not None:
                    mask &= rows["step"] == own_step
                if call is not None:
                    mask &= rows["call"] == call
                places = np.flatnonzero(mask)
                parts = np.zeros(len(places), PART_DTYPE)
                for name in ("step", "part_offset", "call"):
                    parts[name] = rows[name][places]
                parts["step"] += np.uint64(placed.first_step)
                parts["rank"], parts["segment"] = placed.rank, number
                parts["block"], parts["row"] = block, places
                found.append(parts)
        if not found:
            return np.empty(0, PART_DTYPE)
        joined = np.concatenate(found)
        order = ("part_offset", "segment", "call", "rank", "step")
        joined = joined[np.lexsort([joined[name] for name in order])]
        joined["first"] = 1
        same = np.ones(max(0, len(joined) - 1), bool)
        for name in ("step", "call", "segment"):
            same &= joined[name][1:] == joined[name][:-1]
        joined["first"][1:][same & (joined["part_offset"][1:] != 0)] = 0
        for number, placed in enumerate(self._placed):
            for site, lost_step, lost_call in placed.segment.incomplete:
                if self._global_ids[number].get(site) == site_id:
                    lost = (joined["step"] == lost_step + placed.first_step) & (joined["call"] == lost_call)
                    joined = joined[~(lost & (joined["segment"] == number))]
        return joined

    def refs(self, site_id: int) -> SiteRecords:
        """The records of a site, ascending by step, rank and call; empty for an unknown site."""
        return SiteRecords(self._parts(site_id), partial(self._ref, site_id))

    def steps(self, site_ids: Iterable[int]) -> list[int]:
        """The steps in which any of these sites has a record, ascending; ``num_steps`` is only what the file says."""
        found = {int(step) for site_id in site_ids for step in np.unique(self._parts(site_id)["step"])}
        return sorted(step for step in found if step < self.num_steps)

    def find(self, site_id: int, step: int, call: int = 0, rank: int | None = None) -> RecordRef | None:
        """The record of a site, step and call (of the lowest rank that has it, if none is given), or None."""
        records = self.find_all(site_id, step, call, rank)
        return records[0] if len(records) else None

    def find_all(self, site_id: int, step: int, call: int = 0, rank: int | None = None) -> SiteRecords:
        """The records of a site, step and call: one a rank that has it."""
        if step < 0 or call < 0:
            return SiteRecords(np.empty(0, PART_DTYPE), partial(self._ref, site_id))
        return SiteRecords(self._parts(site_id, step, call, rank), partial(self._ref, site_id))

    # -- what is in them -----------------------------------------------------------------------------------

    def read(self, ref: RecordRef) -> U8:
        """The bytes of a record, 1-D uint8, little-endian as every supported machine holds them.

        A view on the map, read-only, where the record lies uncompressed in one piece; else memory of its own.

        Raises:
            CorruptStreamError: a checksum does not hold, or parts of the record are missing.
        """
        return self._read(ref, self._ahead)

    def _read(self, ref: RecordRef, ahead: Ahead | None = None) -> U8:
        if len(ref.places) > 1:
            return self._read_parts(ref, _new_array, ahead)
        number, row = ref.places[0]
        block = self._block(ref.segment, number)
        if int(block.directory.sizes[row]) != ref.num_bytes or int(block.directory.rows["part_offset"][row]):
            raise CorruptStreamError(f"{self._placed[ref.segment].file.path}: parts of {ref} are missing")
        if ref.num_bytes == block.header.raw_bytes and self._pages.lookup((ref.segment, number)) is None:
            return self._decode(ref.segment, number, in_place=True, new=_new_array)
        page = self._page(ref.segment, number)
        start = int(block.directory.rows["offset"][row])
        part = page[start : start + ref.num_bytes]
        # A view on the map costs nothing; one on a decoded page would keep all of it alive.
        return part if isinstance(page.base, memoryview) else np.array(part)

    def mapped(self, ref: RecordRef) -> tuple[mmap.mmap, int] | None:
        """The map and the place in it of a record's bytes, verified; None where they are not there as they are.

        They are where the page is stored in one piece. Writing to the map changes private memory, not the file.
        """
        number, row = ref.places[0]
        block = self._block(ref.segment, number)
        file = self._placed[ref.segment].file
        if len(ref.places) > 1 or not is_in_place(block.header):
            return None
        self.read(ref)
        return file.map, block.payload_start + LEAD_BYTES + int(block.directory.rows["offset"][row])

    def _read_parts(self, ref: RecordRef, new: Callable[[int], U8], ahead: Ahead | None = None) -> U8:
        """The joined parts of a record, decoded where they belong; by several threads, if given."""
        places = []
        position = 0
        for number, row in ref.places:
            directory = self._block(ref.segment, number).directory
            offset, size = int(directory.rows["part_offset"][row]), int(directory.sizes[row])
            if offset != position:
                raise CorruptStreamError(f"{self.path}: bytes {position} to {offset} of {ref} are missing")
            places.append((number, int(directory.rows["offset"][row]), offset, size))
            position += size
        if position != ref.num_bytes:
            raise CorruptStreamError(f"{self.path}: {position} of {ref.num_bytes} bytes of {ref} were found")
        record = new(position)

        def fill(place: tuple[int, int, int, int]) -> None:
            number, start, offset, size = place
            part = record[offset : offset + size]
            if size == self._block(ref.segment, number).header.raw_bytes:
                self._decode(ref.segment, number, in_place=False, new=lambda _: part)
            else:
                part[:] = self._page(ref.segment, number)[start : start + size]

        for _ in map(fill, places) if ahead is None else ahead.done(places, fill, lambda place: 0):
            pass
        return record

    def read_all(self, refs: Iterable[RecordRef]) -> Iterator[U8]:
        """The bytes of each record, as ``read`` gives them, decoded ahead in threads."""
        jobs = (
            [*group] for _, group in itertools.groupby(refs, key=lambda ref: (ref.segment, ref.places[0][0]))
        )
        done = self._ahead.done(
            jobs,
            lambda job: [self._read(ref) for ref in job],
            lambda job: sum(ref.num_bytes for ref in job),
        )
        for _, found in done:
            yield from found

    def scan(self) -> Iterator[tuple[RecordRef, U8]]:
        """Every record with its bytes, front to back as they lie in each file, inputs among them.

        A few pages are in memory at a time, decoded ahead in threads, and the arrays are views on them: copy what is
        to be kept. Records that lie in several blocks come when their last part does.
        """
        self._check_open()
        return Scan(
            self._placed,
            self._global_ids,
            block=self._block,
            page=partial(self._decode, in_place=True, new=self._pool.take),
            ref=self._ref,
            record=partial(self._read_parts, new=self._pool.take),
            ahead=self._ahead,
        ).run()

    def verify(self) -> list[Damage]:
        """Verify every checksum of the files, and each index against its blocks; empty if all is well."""
        self._check_open()
        return [lost for file in self._files for lost in file.verify()]
