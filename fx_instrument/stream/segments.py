"""Segments of a file: found from its end where it is whole, by walking it where it is not."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from fx_instrument.errors import (
    CorruptStreamError,
    NotAStreamError,
    StreamError,
    TruncatedStreamError,
    UnsupportedStreamError,
)
from fx_instrument.stream.codec import EMPTY_LZ4_FRAME, EMPTY_ZSTD_FRAME, decode_directory
from fx_instrument.stream.records import (
    BLOCK,
    CODEC_NAMES,
    INDEX,
    PROLOG,
    SEGMENT_ID_BYTES,
    SITES,
    TAGS,
    VOID,
    BlockHeader,
    Damage,
    Directory,
    Frame,
    Prolog,
    SiteEntry,
    read_directory,
    read_frame,
    read_frame_head,
    read_index,
    read_sites,
    read_tail,
    record_bytes,
    segment_id_of,
)

PartialKey = tuple[int, int, int]
"""Site, step and call of a record that lies in several blocks."""


@dataclass(slots=True)
class Segment:
    """One writer's part of a file. Sites are the segment's own ids; ``offset`` is the file's."""

    offset: int
    length: int
    prolog: Prolog
    sites: list[SiteEntry]
    block_offsets: npt.NDArray[np.int64]
    """Of each block header in the file."""
    min_steps: npt.NDArray[np.uint64]
    max_steps: npt.NDArray[np.uint64]
    blocks_of_site: dict[int, npt.NDArray[np.int64]]
    num_steps: int
    num_records: int
    raw_bytes: int
    summary: dict[str, Any]
    earlier_summaries: list[dict[str, Any]]
    whole: bool = True
    incomplete: frozenset[PartialKey] = frozenset()
    """Records of which recovery found some parts only."""
    inputs: frozenset[int] = frozenset()

    @property
    def segment_id(self) -> bytes:
        return self.prolog.uuid[:SEGMENT_ID_BYTES]


@dataclass(frozen=True, slots=True)
class Block:
    """A block whose header and directory were checked; its payload lies at ``[payload_start, end)``."""

    offset: int
    header: BlockHeader
    directory: Directory
    payload_start: int
    end: int

    def payload(self, data: memoryview) -> memoryview:
        """The stored payload, its checksum verified."""
        payload = data[self.payload_start : self.end]
        if zlib.crc32(payload) != self.header.payload_crc:
            raise CorruptStreamError(
                f"the payload of block {self.header.sequence} (bytes {self.payload_start} to {self.end}) "
                f"contradicts its checksum"
            )
        return payload


def parse_block(data: memoryview, frame: Frame) -> Block:
    """The block whose header frame was read; the payload is not looked at, but lies within the data."""
    header, stored = BlockHeader.read(frame.body)
    end = frame.end + header.payload_bytes
    if end > len(data):
        raise TruncatedStreamError(
            f"the file ends inside block {header.sequence} "
            f"({len(data) - frame.offset} of {end - frame.offset} bytes)"
        )
    directory = read_directory(decode_directory(header, stored), header)
    return Block(frame.offset, header, directory, frame.end, end)


def load_block(data: memoryview, segment: Segment, number: int) -> Block:
    """Block ``number`` of a segment."""
    frame = read_frame(data, int(segment.block_offsets[number]))
    if frame.kind != BLOCK or segment_id_of(frame) != segment.segment_id:
        raise CorruptStreamError(f"the index points to byte {frame.offset}, where no block of its own begins")
    return parse_block(data, frame)


def _empty_frame_at(data: memoryview, offset: int) -> int:
    """Bytes of the empty frame that a segment begins with; 0 if there is none at ``offset``."""
    for empty in (EMPTY_ZSTD_FRAME, EMPTY_LZ4_FRAME):
        if data[offset : offset + len(empty)] == empty:
            return len(empty)
    return 0


def read_prolog(data: memoryview, offset: int) -> tuple[Prolog, int]:
    """The prolog of the segment that begins at ``offset``, and where it ends."""
    empty_bytes = _empty_frame_at(data, offset)
    if not empty_bytes:
        rest = bytes(data[offset : offset + len(EMPTY_LZ4_FRAME)])
        if EMPTY_ZSTD_FRAME.startswith(rest) or EMPTY_LZ4_FRAME.startswith(rest):
            raise TruncatedStreamError("the file ends inside its first frame: nothing was captured")
        raise NotAStreamError(f"a stream begins with an empty zstd or LZ4 frame, this file with {rest!r}")
    try:
        frame = read_frame(data, offset + empty_bytes)
    except TruncatedStreamError as error:
        raise TruncatedStreamError(f"{error}, its prolog: nothing was captured") from None
    except CorruptStreamError as error:
        tag = data[offset + empty_bytes + 8 : offset + empty_bytes + 16]
        if tag == TAGS[PROLOG]:
            raise
        raise NotAStreamError(f"the file has no stream prolog: {error}") from None
    if frame.kind != PROLOG:
        raise CorruptStreamError(
            f"byte {frame.offset} should hold a prolog, not a frame of kind {frame.kind:#x}"
        )
    return Prolog.read(frame.body), frame.end


def open_segments(data: memoryview) -> list[Segment]:
    """The segments of a whole file, in order, found backward from its end.

    Raises:
        NotAStreamError: the file does not begin as a stream does.
        TruncatedStreamError: no index ends the file; the message says what recovery would find.
        CorruptStreamError: prolog or index contradict their checksums or the file.
    """
    read_prolog(data, 0)
    segments: list[Segment] = []
    end = len(data)
    while end:
        segment = _segment_before(data, end)
        segments.append(segment)
        end = segment.offset
    return segments[::-1]


def _segment_before(data: memoryview, end: int) -> Segment:
    frame_bytes = read_tail(data, end)
    if frame_bytes is None:
        raise _missing_index(data[:end])
    frame = read_frame(data[:end], end - frame_bytes)
    if frame.kind != INDEX or frame.end != end:
        raise CorruptStreamError(f"the index that should begin at byte {frame.offset} is none")
    index = read_index(frame.body)
    offset = end - index.segment_bytes
    if offset < 0 or index.segment_bytes < frame_bytes:
        raise CorruptStreamError(
            f"the index at byte {frame.offset} says its segment has {index.segment_bytes} bytes"
        )
    prolog, _ = read_prolog(data, offset)
    if segment_id_of(frame) != prolog.uuid[:SEGMENT_ID_BYTES]:
        raise CorruptStreamError(f"the index at byte {frame.offset} belongs to another segment")
    blocks, sites = np.nonzero(np.unpackbits(index.bitmaps, axis=1, bitorder="little"))
    order = np.argsort(sites, kind="stable")
    present, starts = np.unique(sites[order], return_index=True)
    blocks_of_site = {
        int(site): part for site, part in zip(present, np.split(blocks[order], starts[1:]), strict=False)
    }
    return Segment(
        offset=offset,
        length=index.segment_bytes,
        prolog=prolog,
        sites=index.sites,
        block_offsets=index.rows["offset"].astype(np.int64) + offset,
        min_steps=index.rows["min_step"].copy(),
        max_steps=index.rows["max_step"].copy(),
        blocks_of_site=blocks_of_site,
        num_steps=index.num_steps,
        num_records=index.num_records,
        raw_bytes=index.raw_bytes,
        summary=index.summary,
        earlier_summaries=index.earlier_summaries,
        inputs=frozenset(site.id for site in index.sites if site.role == "input"),
    )


def _missing_index(data: memoryview) -> StreamError:
    """What is wrong with a file that no index ends: one walk over its block headers."""
    _, position = read_prolog(data, 0)
    num_blocks = 0
    problem: StreamError = TruncatedStreamError("the file ends without an index")
    try:
        while position < len(data):
            if skipped := _empty_frame_at(data, position):
                position += skipped
                continue
            frame = read_frame(data, position)
            position = frame.end
            if frame.kind == BLOCK:
                position = parse_block(data, frame).end
                num_blocks += 1
    except StreamError as error:
        problem = error
    readable = {0: "no block is", 1: "block 0 is"}.get(num_blocks, f"blocks 0-{num_blocks - 1} are")
    kind = TruncatedStreamError if isinstance(problem, TruncatedStreamError) else CorruptStreamError
    return kind(f"{problem}; {readable} readable with recover=True")


# -- recovery ----------------------------------------------------------------------------------------------

_TAGGED = re.compile(b"|".join(re.escape(tag) for tag in TAGS.values()))


def _next_frame(data: memoryview, start: int, end: int) -> int | None:
    """Where the next frame of ours with a good head begins at or after ``start`` and before ``end``."""
    for match in _TAGGED.finditer(data, max(0, start), end):
        offset = match.start() - 8
        if offset < start:
            continue
        try:
            kind, *_ = read_frame_head(data, offset)
        except StreamError:
            continue
        if kind == PROLOG:
            for empty in (EMPTY_ZSTD_FRAME, EMPTY_LZ4_FRAME):
                if offset - len(empty) >= start and data[offset - len(empty) : offset] == empty:
                    return offset - len(empty)
        return offset
    return None


@dataclass(slots=True)
class _Walk:
    """A segment as it grows under recovery."""

    offset: int
    segment_id: bytes
    prolog: Prolog | None
    sites: dict[int, SiteEntry] = field(default_factory=dict)
    blocks: list[tuple[int, int, int]] = field(default_factory=list)
    codec: int = 0
    blocks_of_site: dict[int, list[int]] = field(default_factory=dict)
    starts: dict[int, int] = field(default_factory=dict)
    """Site -> records that begin in a good block."""
    raw_bytes: dict[int, int] = field(default_factory=dict)
    partial: dict[PartialKey, tuple[int, int, bool]] = field(default_factory=dict)
    """Record in several blocks -> bytes found, bytes due, whether its beginning was found."""
    summary: dict[str, Any] = field(default_factory=dict)
    earlier_summaries: list[dict[str, Any]] = field(default_factory=list)
    num_steps: int = 0
    whole: bool = False

    def add_block(self, block: Block) -> None:
        header, directory = block.header, block.directory
        number = len(self.blocks)
        self.codec = header.codec
        rows = directory.rows
        if not len(rows):
            return
        self.blocks.append((block.offset, int(rows["step"].min()), int(rows["step"].max())))
        self.num_steps = max(self.num_steps, int(rows["step"].max()) + 1)
        begins = rows["part_offset"] == 0
        for site in map(int, np.unique(rows["site"])):
            mine = rows["site"] == site
            self.blocks_of_site.setdefault(site, []).append(number)
            self.starts[site] = self.starts.get(site, 0) + int(np.count_nonzero(begins & mine))
            self.raw_bytes[site] = self.raw_bytes.get(site, 0) + int(directory.sizes[mine].sum())
        dues = np.array(
            [min(record_bytes(header.dtype_name, shape), 1 << 62) for shape, _ in directory.shapes], np.int64
        )
        for row in map(int, np.flatnonzero(dues[rows["shape"]] != directory.sizes)):
            step, part_offset, site, call, shape, _ = map(int, rows[row].tolist())
            found, due, begun = self.partial.get((site, step, call), (0, int(dues[shape]), False))
            size = int(directory.sizes[row])
            self.partial[site, step, call] = (found + size, due, begun or part_offset == 0)

    def finish(self, end: int) -> Segment:
        incomplete = {key: part for key, part in self.partial.items() if part[0] != part[1]}
        for (site, _, _), (found, _, begun) in incomplete.items():
            self.starts[site] -= begun
            self.raw_bytes[site] -= found
        for site in self.blocks_of_site:
            # The site's frame and the index are both lost: the values still are worth reading.
            self.sites.setdefault(site, SiteEntry(site, f"unknown-{site}", "other"))
        inputs = frozenset(site.id for site in self.sites.values() if site.role == "input")
        blocks = np.array(self.blocks, np.uint64).reshape(-1, 3)
        prolog = self.prolog or Prolog(
            CODEC_NAMES.get(self.codec, "none"), self.segment_id.ljust(16, b"\0"), {}
        )
        return Segment(
            offset=self.offset,
            length=end - self.offset,
            prolog=prolog,
            sites=sorted(self.sites.values(), key=lambda site: site.id),
            block_offsets=blocks[:, 0].astype(np.int64),
            min_steps=blocks[:, 1].copy(),
            max_steps=blocks[:, 2].copy(),
            blocks_of_site={site: np.array(numbers) for site, numbers in self.blocks_of_site.items()},
            num_steps=self.num_steps,
            num_records=sum(count for site, count in self.starts.items() if site not in inputs),
            raw_bytes=sum(count for site, count in self.raw_bytes.items() if site not in inputs),
            summary=self.summary,
            earlier_summaries=self.earlier_summaries,
            whole=self.whole,
            incomplete=frozenset(incomplete),
            inputs=inputs,
        )


@dataclass(slots=True)
class Recovery:
    """What recovery found: segments of good blocks, what it skipped, and where the last good frame ends."""

    segments: list[Segment]
    damage: list[Damage]
    end: int
    """End of the last good block, sites frame or prolog; an index does not count."""


def recover_segments(data: memoryview) -> Recovery:
    """Everything that is readable of a file, whole or not; every checksum of it was verified.

    Walks from the front. A block counts if its header, directory and payload hold. A bad payload costs its block;
    after a bad header the walk goes on at the next good one.

    Raises:
        NotAStreamError, TruncatedStreamError, CorruptStreamError: there is no segment in the file at all.
    """
    return _Recoverer(data).run()


class _Recoverer:
    def __init__(self, data: memoryview) -> None:
        self.data = data
        self.segments: list[Segment] = []
        self.damage: list[Damage] = []
        self.walk: _Walk | None = None
        self.good_end = 0

    def run(self) -> Recovery:
        position = 0
        while position < len(self.data):
            try:
                position = self._step(position)
            except UnsupportedStreamError:
                raise
            except StreamError as error:
                position = self._skip(position, str(error))
        self._finish(len(self.data))
        if not self.segments:
            # Says in the right class why this is no stream.
            read_prolog(self.data, 0)
            raise CorruptStreamError("the file holds no readable frame of a stream")
        return Recovery(self.segments, self.damage, self.good_end)

    def _finish(self, end: int) -> None:
        if self.walk is not None:
            self.segments.append(self.walk.finish(end))
            self.walk = None

    def _walk_of(self, frame: Frame) -> _Walk:
        segment_id = segment_id_of(frame) or b""
        if self.walk is None or self.walk.segment_id != segment_id:
            self._finish(frame.offset)
            self.walk = _Walk(frame.offset, segment_id, None)
        return self.walk

    def _step(self, position: int) -> int:
        """Take in the frame at ``position`` and say where the next one begins."""
        data = self.data
        empty_bytes = _empty_frame_at(data, position)
        frame = read_frame(data, position + empty_bytes)
        if frame.kind == PROLOG:
            prolog = Prolog.read(frame.body)
            self._finish(position)
            self.walk = _Walk(position, prolog.uuid[:SEGMENT_ID_BYTES], prolog)
            self.good_end = frame.end
            return frame.end
        if empty_bytes:
            raise CorruptStreamError(f"byte {frame.offset} should hold a prolog")
        if frame.kind == SITES:
            walk = self._walk_of(frame)
            walk.sites.update((site.id, site) for site in read_sites(frame.body))
        elif frame.kind == BLOCK:
            return self._block(frame)
        elif frame.kind == INDEX:
            index = read_index(frame.body)
            walk = self._walk_of(frame)
            walk.sites.update((site.id, site) for site in index.sites)
            walk.summary, walk.earlier_summaries = index.summary, index.earlier_summaries
            walk.num_steps = max(walk.num_steps, index.num_steps)
            walk.whole = len(index.rows) == len(walk.blocks)
            self._finish(frame.end)
            return frame.end
        elif frame.kind == VOID:
            self.damage.append(Damage(position, frame.end - position, "lost before the file was resumed"))
        self.good_end = frame.end
        return frame.end

    def _block(self, frame: Frame) -> int:
        block = parse_block(self.data, frame)
        block.header.dtype_name  # noqa: B018  (an unknown dtype is an error of its own)
        try:
            block.payload(self.data)
        except CorruptStreamError as error:
            if block.end == len(self.data) or self._frame_begins(block.end):
                self.damage.append(Damage(block.offset, block.end - block.offset, str(error)))
                return block.end
            # Cut off before its end, and another file joined on: that one is not this block's payload.
            raise
        self._walk_of(frame).add_block(block)
        self.good_end = block.end
        return block.end

    def _frame_begins(self, offset: int) -> bool:
        try:
            read_frame_head(self.data, offset + _empty_frame_at(self.data, offset))
        except StreamError:
            return False
        return True

    def _skip(self, position: int, reason: str) -> int:
        after = _next_frame(self.data, position + 1, len(self.data))
        if after is None:
            after = len(self.data)
        self.damage.append(Damage(position, after - position, reason))
        return after
