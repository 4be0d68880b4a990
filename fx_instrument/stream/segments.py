"""Segments of a whole file, found from its end, and their blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import CorruptStreamError, NotAStreamError, StreamError, TruncatedStreamError
from .blocks import BlockHeader, Directory, read_directory
from .codec import decode_directory
from .frames import (
    BLOCK,
    INDEX,
    PROLOG,
    SEGMENT_ID_BYTES,
    TAGS,
    Frame,
    Prolog,
    read_frame,
    segment_id_of,
)
from .index import PartialKey, read_index, read_tail
from .payload import EMPTY_LZ4_FRAME, EMPTY_ZSTD_FRAME, checksum
from .records import Damage, SiteEntry


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
    """An index ends it that lists all of its good blocks."""
    has_prolog: bool = True
    incomplete: frozenset[PartialKey] = frozenset()
    """Records of which recovery found some parts only."""
    inputs: frozenset[int] = frozenset()
    damage: tuple[Damage, ...] = ()
    """Bytes that were lost before the file was resumed; offsets within the file."""

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
        if checksum(np.frombuffer(payload, np.uint8)) != self.header.payload_crc:
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


def empty_frame_at(data: memoryview, offset: int) -> int:
    """Bytes of the empty frame that a segment begins with; 0 if there is none at ``offset``."""
    for empty in (EMPTY_ZSTD_FRAME, EMPTY_LZ4_FRAME):
        if data[offset : offset + len(empty)] == empty:
            return len(empty)
    return 0


def read_prolog(data: memoryview, offset: int) -> tuple[Prolog, int]:
    """The prolog of the segment that begins at ``offset``, and where it ends."""
    empty_bytes = empty_frame_at(data, offset)
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
    try:
        prolog, _ = read_prolog(data, offset)
    except NotAStreamError:
        raise CorruptStreamError(
            f"the index at byte {frame.offset} says that its segment begins at byte {offset}, where none does"
        ) from None
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
        incomplete=index.incomplete,
        inputs=frozenset(site.id for site in index.sites if site.role == "input"),
        damage=tuple(Damage(lost.offset + offset, lost.num_bytes, lost.reason) for lost in index.damage),
    )


def _missing_index(data: memoryview) -> StreamError:
    """What is wrong with a file that no index ends: one walk over its block headers."""
    _, position = read_prolog(data, 0)
    num_blocks = 0
    problem: StreamError = TruncatedStreamError("the file ends without an index")
    try:
        while position < len(data):
            if skipped := empty_frame_at(data, position):
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
