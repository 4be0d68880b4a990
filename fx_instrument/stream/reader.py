"""Records from stream files, by site and step or front to back; the files are mapped and never changed."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar, overload

import numpy as np
import numpy.typing as npt

from ..errors import CorruptStreamError, StreamError
from .buffers import BufferPool
from .codec import decode_page, page_in_place
from .mapped import AnyPath, map_files, place_segments
from .records import Damage, SiteEntry, StreamPart, record_bytes
from .segments import Block, load_block

U8 = npt.NDArray[np.uint8]
_V = TypeVar("_V")

_CACHED_BLOCKS = 64
_CACHED_PAGES = 4
_FORGET_BYTES = 16 << 20
"""Mapped pages count as the process's memory: a scan gives them back so often, else it grows to the file's size."""


@dataclass(frozen=True, slots=True)
class RecordRef:
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
    _parts: tuple[tuple[int, int], ...]
    """(block of the segment, row of its directory), in the order of the bytes."""

    @property
    def num_bytes(self) -> int:
        return record_bytes(self.dtype, self.shape)


class _Cache(OrderedDict[tuple[int, int], _V]):
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


class SiteRecords(Sequence[RecordRef]):
    """The records of one site, ascending by step, rank and call; refs are made when looked at.

    Holds 44 bytes a part of a record.
    """

    def __init__(self, reader: StreamReader, site_id: int, parts: npt.NDArray[np.void]) -> None:
        self._reader = reader
        self._site_id = site_id
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
        return self._reader._ref(segment, self._site_id, places)


def _new_array(num_bytes: int) -> U8:
    return np.empty(num_bytes, np.uint8)


_PART = np.dtype(
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


class StreamReader:
    """Stream files, mapped and read as one; also a context manager. Safe to use from several threads.

    Args:
        path: a file, or several: their segments are read as ``place_segments`` orders and numbers them. Records say
            their rank, and steps go on from one file of a rank to its next.
        recover: walk all of it and verify every checksum at once (about 0.3 s a GB); ``damage`` says what was
            skipped, and what is left reads without errors. Otherwise ``read`` and ``scan`` verify what they touch
            and raise CorruptStreamError, and ``damage`` holds what was lost before a file was resumed.

    Raises:
        FileNotFoundError: there is no such file.
        NotAStreamError: a file does not begin as a stream does.
        TruncatedStreamError: a file ends before its index; ``recover=True`` reads what is whole.
        CorruptStreamError: prolog or index contradict their checksums; ``recover=True`` reads what is whole.
        UnsupportedStreamError: a file is of a later format.
    """

    def __init__(self, path: AnyPath | Sequence[AnyPath], *, recover: bool = False) -> None:
        paths = [path] if isinstance(path, (str, os.PathLike)) else list(path)
        self.path = os.fspath(paths[0]) + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
        self.recovered = recover
        self._files, unreadable = map_files(paths, recover=recover)
        try:
            self._placed = place_segments(self._files)
        except StreamError:
            self.close()
            raise
        self.damage: list[Damage] = [lost for file in self._files for lost in file.damage] + unreadable
        self.segments = [placed.segment for placed in self._placed]
        self._blocks: _Cache[Block] = _Cache(_CACHED_BLOCKS)
        self._pages: _Cache[U8] = _Cache(_CACHED_PAGES)
        self._pool = BufferPool()
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
        """One site table for all segments: the same name and role is the same site."""
        ids: dict[tuple[str, str], int] = {}
        self._global_ids: list[dict[int, int]] = []
        self._local_ids: list[dict[int, int]] = []
        for segment in self.segments:
            to_global = {site.id: ids.setdefault((site.name, site.role), len(ids)) for site in segment.sites}
            self._global_ids.append(to_global)
            self._local_ids.append({site: local for local, site in to_global.items()})
        self.sites = [SiteEntry(site_id, name, role) for (name, role), site_id in ids.items()]

    def __enter__(self) -> StreamReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Unmap the files, or let go of them where arrays from ``read`` still look into them."""
        for file in self._files:
            file.close()

    # -- where records are ---------------------------------------------------------------------------------

    def _block(self, segment: int, number: int) -> Block:
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

    def _ref(self, segment: int, site_id: int, places: tuple[tuple[int, int], ...]) -> RecordRef:
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
                parts = np.zeros(len(places), _PART)
                for name in ("step", "part_offset", "call"):
                    parts[name] = rows[name][places]
                parts["step"] += np.uint64(placed.first_step)
                parts["rank"], parts["segment"] = placed.rank, number
                parts["block"], parts["row"] = block, places
                found.append(parts)
        if not found:
            return np.empty(0, _PART)
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
        return SiteRecords(self, site_id, self._parts(site_id))

    def find(self, site_id: int, step: int, call: int = 0, rank: int | None = None) -> RecordRef | None:
        """The record of a site, step and call (of the lowest rank that has it, if none is given), or None."""
        records = self.find_all(site_id, step, call, rank)
        return records[0] if len(records) else None

    def find_all(self, site_id: int, step: int, call: int = 0, rank: int | None = None) -> SiteRecords:
        """The records of a site, step and call: one a rank that has it."""
        if step < 0 or call < 0:
            return SiteRecords(self, site_id, np.empty(0, _PART))
        return SiteRecords(self, site_id, self._parts(site_id, step, call, rank))

    # -- what is in them -----------------------------------------------------------------------------------

    def read(self, ref: RecordRef) -> U8:
        """The bytes of a record, 1-D uint8, little-endian as every supported machine holds them.

        A view on the map, read-only, where the record lies uncompressed in one piece; else memory of its own.

        Raises:
            CorruptStreamError: a checksum does not hold, or parts of the record are missing.
        """
        if len(ref._parts) > 1:
            return self._read_parts(ref, _new_array)
        number, row = ref._parts[0]
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

    def _read_parts(self, ref: RecordRef, new: Callable[[int], U8]) -> U8:
        """The joined parts of a record, decoded where they belong."""
        places = []
        position = 0
        for number, row in ref._parts:
            directory = self._block(ref.segment, number).directory
            offset, size = int(directory.rows["part_offset"][row]), int(directory.sizes[row])
            if offset != position:
                raise CorruptStreamError(f"{self.path}: bytes {position} to {offset} of {ref} are missing")
            places.append((number, int(directory.rows["offset"][row]), offset, size))
            position += size
        if position != ref.num_bytes:
            raise CorruptStreamError(f"{self.path}: {position} of {ref.num_bytes} bytes of {ref} were found")
        record = new(position)
        for number, start, offset, size in places:
            part = record[offset : offset + size]
            if size == self._block(ref.segment, number).header.raw_bytes:
                self._decode(ref.segment, number, in_place=False, new=lambda _, part=part: part)  # type: ignore[misc]
            else:
                part[:] = self._page(ref.segment, number)[start : start + size]
        return record

    def scan(self) -> Iterator[tuple[RecordRef, U8]]:
        """Every record with its bytes, front to back as they lie in each file, inputs among them.

        One page is in memory at a time, and the arrays are views on it: copy what is to be kept. Records that lie in
        several blocks come when their last part does.
        """
        for number, placed in enumerate(self._placed):
            segment, file = placed.segment, placed.file
            passed = segment.offset
            pending: dict[tuple[int, int, int], list[tuple[int, int, tuple[int, int]]]] = {}
            for position in range(len(segment.block_offsets)):
                block = self._block(number, position)
                if block.offset - passed >= _FORGET_BYTES:
                    file.forget(passed, block.offset)
                    passed = block.offset
                directory = block.directory
                dues = [record_bytes(block.header.dtype_name, shape) for shape, _ in directory.shapes]
                rows, sizes = directory.rows.tolist(), directory.sizes.tolist()
                for row, (step, part_offset, local, call, shape, offset) in enumerate(rows):
                    site_id = self._global_ids[number].get(local)
                    if site_id is None:
                        raise CorruptStreamError(
                            f"{file.path}: a record is of site {local}, which no table names"
                        )
                    key = (local, step, call)
                    if segment.incomplete and key in segment.incomplete:
                        continue
                    size = sizes[row]
                    if size == dues[shape] and not part_offset:
                        ref = self._ref(number, site_id, ((position, row),))
                        yield ref, self._page(number, position)[offset : offset + size]
                        continue
                    parts = pending.setdefault(key, [])
                    parts.append((part_offset, size, (position, row)))
                    if sum(size for _, size, _ in parts) < dues[shape]:
                        continue
                    del pending[key]
                    whole = self._ref(number, site_id, tuple(place for _, _, place in sorted(parts)))
                    yield whole, self._read_parts(whole, self._pool.take)
            if pending:
                raise CorruptStreamError(f"{file.path}: {len(pending)} records lack a part")
            file.forget(passed, segment.offset + segment.length)

    def verify(self) -> list[Damage]:
        """Verify every checksum of the files, and each index against its blocks; empty if all is well."""
        return [lost for file in self._files for lost in file.verify()]
