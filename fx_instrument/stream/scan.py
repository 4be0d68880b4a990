"""Everything in a stream's files, front to back, decoded ahead in threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import repeat
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import CorruptStreamError
from .ahead import Ahead
from .mapped import MappedFile, PlacedSegment
from .read_ahead import ReadAhead
from .refs import RecordRef
from .segments import Block

U8 = npt.NDArray[np.uint8]

_FORGET_BYTES = 16 << 20
"""Mapped pages count as the process's memory: a scan gives them back so often, else it grows to the file's size."""


class _Job(NamedTuple):
    """A page of whole records, or a record of several parts."""

    file: MappedFile
    offset: int
    segment: int
    block: int
    records: Iterable[tuple[RecordRef, int, int]]
    whole: RecordRef | None


class Scan:
    """One way through a reader's files; what it calls is the reader's.

    Args:
        placed: the segments, in the order in which they are read.
        global_ids: of each segment, the reader's id of each of its sites.
        block: the block of a segment and number.
        page: its bytes, verified.
        ref: the record of a site, a segment and (block, row) of its parts.
        record: the bytes of a record of several parts.
        ahead: decodes ahead.
    """

    def __init__(
        self,
        placed: Sequence[PlacedSegment],
        global_ids: Sequence[Mapping[int, int]],
        *,
        block: Callable[[int, int], Block],
        page: Callable[[int, int], U8],
        ref: Callable[[int, int, tuple[tuple[int, int], ...]], RecordRef],
        record: Callable[[RecordRef], U8],
        ahead: Ahead,
    ) -> None:
        self._placed = placed
        self._global_ids = global_ids
        self._block = block
        self._page = page
        self._ref = ref
        self._record = record
        self._ahead = ahead

    def run(self) -> Iterator[tuple[RecordRef, U8]]:
        """Every record with its bytes, as ``StreamReader.scan`` says."""
        passed = 0
        file = self._placed[0].file
        for job, data in self._ahead.done(self._jobs(), self._decode, self._num_bytes):
            if job.file is not file or job.offset < passed:
                file.forget(passed, len(file.data))
                file, passed = job.file, job.offset
            elif job.offset - passed >= _FORGET_BYTES:
                file.forget(passed, job.offset)
                passed = job.offset
            if job.whole is not None:
                yield job.whole, data
            for ref, start, size in job.records:
                yield ref, data[start : start + size]
            # The next pages may be decoded into this one's memory.
            del data
        file.forget(passed, len(file.data))

    def _jobs(self) -> Iterator[_Job]:
        """What is to decode: pages with whole records, and records whose last part was met."""
        for number, placed in enumerate(self._placed):
            read_ahead = ReadAhead(placed.file.map)
            pending: dict[tuple[int, int, int], list[tuple[int, int, tuple[int, int]]]] = {}
            found: dict[tuple[int, int, int], int] = {}
            for position, offset in enumerate(placed.segment.block_offsets.tolist()):
                read_ahead(offset)
                block = self._block(number, position)
                rows, directory = self._known_rows(number, block), block.directory
                dues = directory.record_sizes(block.header.dtype_name)[rows["shape"]]
                whole = (directory.sizes == dues) & (rows["part_offset"] == 0)
                if placed.segment.incomplete:
                    incomplete = placed.segment.incomplete
                    keys = zip(*(rows[name].tolist() for name in ("site", "step", "call")), strict=True)
                    kept = np.array([key not in incomplete for key in keys], bool)
                    whole &= kept
                else:
                    kept = np.ones(len(rows), bool)
                if whole.any():
                    records = self._refs_of(number, position, np.flatnonzero(whole))
                    yield _Job(placed.file, block.offset, number, position, records, None)
                for row in np.flatnonzero(kept & ~whole).tolist():
                    step, part_offset, local, call, _, _ = rows[row].item()
                    key, size = (local, step, call), int(directory.sizes[row])
                    pending.setdefault(key, []).append((part_offset, size, (position, row)))
                    found[key] = found.get(key, 0) + size
                    if found[key] < dues[row]:
                        continue
                    del found[key]
                    places = tuple(place for _, _, place in sorted(pending.pop(key)))
                    ref = self._ref(self._global_ids[number][local], number, places)
                    yield _Job(placed.file, block.offset, number, position, [], ref)
            if pending:
                raise CorruptStreamError(f"{placed.file.path}: {len(pending)} records lack a part")

    def _known_rows(self, segment: int, block: Block) -> npt.NDArray[np.void]:
        """The directory's rows, after a look whether the site table names their sites."""
        known = self._global_ids[segment]
        for local in np.unique(block.directory.rows["site"]).tolist():
            if local not in known:
                raise CorruptStreamError(
                    f"{self._placed[segment].file.path}: a record is of site {local}, which no table names"
                )
        return block.directory.rows

    def _refs_of(
        self, segment: int, number: int, rows: npt.NDArray[np.intp]
    ) -> Iterator[tuple[RecordRef, int, int]]:
        """Records that lie whole in a page: each with its offset and size."""
        block, placed = self._block(segment, number), self._placed[segment]
        directory, known = block.directory, self._global_ids[segment]
        steps, sites, calls, shapes, offsets = (
            directory.rows[name][rows].tolist() for name in ("step", "site", "call", "shape", "offset")
        )
        places = zip(zip(repeat(number), rows.tolist()))
        # Column by column: pages of decode steps hold hundreds of records, and threads that decode wait for the lock
        # that a loop would hold.
        columns = zip(
            map(known.__getitem__, sites),
            map(placed.first_step.__add__, steps),
            calls,
            repeat(block.header.dtype_name),
            map([shape for shape, _ in directory.shapes].__getitem__, shapes),
            map([full_shape for _, full_shape in directory.shapes].__getitem__, shapes),
            repeat(placed.rank),
            repeat(segment),
            places,
        )
        refs = map(partial(tuple.__new__, RecordRef), columns)
        return zip(refs, offsets, directory.sizes[rows].tolist(), strict=True)

    def _num_bytes(self, job: _Job) -> int:
        if job.whole is not None:
            return job.whole.num_bytes
        return self._block(job.segment, job.block).header.raw_bytes

    def _decode(self, job: _Job) -> U8:
        if job.whole is not None:
            return self._record(job.whole)
        page = self._page(job.segment, job.block)
        page.flags.writeable = False
        return page
