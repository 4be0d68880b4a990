"""What is readable of a file that is not whole: a walk from the front that verifies every checksum."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import CorruptStreamError, StreamError, UnsupportedStreamError
from .frames import (
    BLOCK,
    CODEC_NAMES,
    INDEX,
    PROLOG,
    SEGMENT_ID_BYTES,
    SITES,
    TAGS,
    VOID,
    Frame,
    Prolog,
    read_frame,
    read_frame_head,
    read_sites,
    segment_id_of,
)
from .index import PartialKey, read_index
from .payload import EMPTY_LZ4_FRAME, EMPTY_ZSTD_FRAME
from .read_ahead import ReadAhead
from .records import Damage, SiteEntry
from .segments import Block, Segment, empty_frame_at, parse_block, read_prolog

# Frames with bad bodies are searched for frames inside them. Where those claim each other's bytes too, the search ends
# after so many bytes (a second or so), or so many times the file: no damage brings that about.
_MIN_SUMMED_BYTES = 1 << 30
_MAX_SUMMED_TIMES = 8

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
    told_summaries: list[dict[str, Any]] = field(default_factory=list)
    """Earlier ones that stand in sites frames."""
    num_steps: int = 0
    first_block_ns: int = 0
    whole: bool = False
    next_sequence: int = 0
    last_sites: tuple[bytes, int] = b"", 0
    """The sites frame behind the last block, and where it ends."""
    num_told: int = 0
    """Gaps of the file that were known when the next block was due: a later one tells where that is."""

    def add_block(self, block: Block) -> None:
        header, directory = block.header, block.directory
        number = len(self.blocks)
        self.last_sites = b"", 0
        self.codec = header.codec
        self.first_block_ns = self.first_block_ns or header.time_ns
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
        dues = directory.record_sizes(header.dtype_name)
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
        # Of a lost prolog the blocks say the codec, and about when it was.
        prolog = self.prolog or Prolog(
            CODEC_NAMES.get(self.codec, "none"),
            self.segment_id.ljust(16, b"\0"),
            {},
            created_ns=self.first_block_ns,
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
            earlier_summaries=self.earlier_summaries or list(self.told_summaries),
            whole=self.whole,
            has_prolog=self.prolog is not None,
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
    blocks: list[Block]
    """Of the last segment, if asked for."""
    told_summaries: list[dict[str, Any]]
    """Summaries of captures into the last segment that stand before ``end``."""
    has_index: bool
    """Whether the last segment was ended."""


def recover_segments(data: memoryview, read_ahead: ReadAhead, *, keep_blocks: bool = False) -> Recovery:
    """Everything that is readable of a file, whole or not; every checksum of it was verified.

    Walks from the front. A block counts if its header, directory and payload hold. A bad payload costs its block;
    after a bad header the walk goes on at the next good one, unless that was made to take for ever: then the rest of
    the file is told as damage.

    Raises:
        NotAStreamError, TruncatedStreamError, CorruptStreamError: there is no segment in the file at all.
    """
    return _Recoverer(data, read_ahead, keep_blocks).run()


class _Recoverer:
    def __init__(self, data: memoryview, read_ahead: ReadAhead, keep_blocks: bool) -> None:
        self.data = data
        self.read_ahead = read_ahead
        self.keep_blocks = keep_blocks
        self.blocks: list[Block] = []
        self.told_summaries: list[dict[str, Any]] = []
        self.segments: list[Segment] = []
        self.damage: list[Damage] = []
        self.walk: _Walk | None = None
        self.has_index = False
        self.good_end = 0
        self.summed_bytes = 0
        """Of all frames and payloads that were compared with their checksums, some several times."""

    def run(self) -> Recovery:
        position = 0
        while position < len(self.data):
            self.read_ahead(position)
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
        return Recovery(
            self.segments, self.damage, self.good_end, self.blocks, self.told_summaries, self.has_index
        )

    def _finish(self, end: int) -> None:
        if self.walk is not None:
            self.segments.append(self.walk.finish(end))
            self.told_summaries = self.walk.told_summaries
            self.walk = None

    def _walk_of(self, frame: Frame) -> _Walk:
        segment_id = segment_id_of(frame) or b""
        if self.walk is None or self.walk.segment_id != segment_id:
            self._finish(frame.offset)
            self.walk = _Walk(frame.offset, segment_id, None, num_told=-1)
        return self.walk

    def _step(self, position: int) -> int:
        """Take in the frame at ``position`` and say where the next one begins."""
        data = self.data
        empty_bytes = empty_frame_at(data, position)
        _, _, end, _ = read_frame_head(data, position + empty_bytes)
        self.summed_bytes += end - position
        frame = read_frame(data, position + empty_bytes)
        if frame.kind == PROLOG:
            prolog = Prolog.read(frame.body)
            self._finish(position)
            self.walk = _Walk(position, prolog.uuid[:SEGMENT_ID_BYTES], prolog, num_told=len(self.damage))
            self.blocks.clear()
            self.has_index = False
            self.good_end = frame.end
            return frame.end
        if empty_bytes:
            raise CorruptStreamError(f"byte {frame.offset} should hold a prolog")
        if frame.kind == SITES:
            sites, earlier = read_sites(frame.body)
            if self.walk is None and self.segments and self.segments[-1].segment_id == segment_id_of(frame):
                # A writer that was to go on with this file was killed before it touched the index.
                self.segments[-1].whole = False
                return frame.end
            walk, body = self._walk_of(frame), bytes(frame.body)
            if body == walk.last_sites[0] and walk.last_sites[1] < position:
                # A writer that was to go on was killed before it cut off what is left of the index, and the copy.
                self.damage = [lost for lost in self.damage if lost.offset < walk.last_sites[1]]
                return frame.end
            walk.last_sites = body, frame.end
            walk.sites.update((site.id, site) for site in sites)
            walk.told_summaries += earlier.summaries
            walk.num_steps = max(walk.num_steps, earlier.num_steps)
        elif frame.kind == BLOCK:
            return self._block(frame)
        elif frame.kind == INDEX:
            index = read_index(frame.body)
            self.has_index = True
            walk = self._walk_of(frame)
            walk.sites.update((site.id, site) for site in index.sites)
            walk.summary, walk.earlier_summaries = index.summary, index.earlier_summaries
            walk.num_steps = max(walk.num_steps, index.num_steps)
            walk.whole = len(index.rows) == len(walk.blocks)
            if not self.damage or self.damage[-1].offset < walk.offset:
                self._miss(walk, walk.next_sequence + len(index.rows) - len(walk.blocks), position)
            self._keep_gaps(walk, index.damage)
            self._finish(frame.end)
            return frame.end
        elif frame.kind == VOID:
            self.damage.append(Damage(position, frame.end - position, "lost before the file was resumed"))
        self.good_end = frame.end
        return frame.end

    def _block(self, frame: Frame) -> int:
        block = parse_block(self.data, frame)
        self.summed_bytes += block.end - frame.end
        block.header.dtype_name  # noqa: B018  (an unknown dtype is an error of its own)
        try:
            block.payload(self.data)
        except CorruptStreamError as error:
            if block.end == len(self.data) or self._frame_begins(block.end):
                self.damage.append(Damage(block.offset, block.end - block.offset, str(error)))
                return block.end
            # Cut off before its end, and another file joined on: that one is not this block's payload.
            raise
        walk = self._walk_of(frame)
        self._miss(walk, block.header.sequence, block.offset)
        walk.next_sequence, walk.num_told = block.header.sequence + 1, len(self.damage)
        walk.add_block(block)
        if self.keep_blocks:
            self.blocks.append(block)
        self.good_end = block.end
        return block.end

    def _miss(self, walk: _Walk, sequence: int, offset: int) -> None:
        """Note the blocks that are gone before ``sequence``, without a byte in their place."""
        if walk.num_told == len(self.damage) and sequence > walk.next_sequence:
            count = sequence - walk.next_sequence
            what = "a block is" if count == 1 else f"{count} blocks are"
            self.damage.append(Damage(offset, 0, f"{what} missing before byte {offset}"))

    def _keep_gaps(self, walk: _Walk, told: Sequence[Damage]) -> None:
        """What was lost before the file was resumed, and has no void frame in its place: the index alone tells."""
        found = {lost.offset for lost in self.damage if not lost.num_bytes}
        self.damage += [
            Damage(walk.offset + lost.offset, 0, lost.reason)
            for lost in told
            if not lost.num_bytes and walk.offset + lost.offset not in found
        ]

    def _frame_begins(self, offset: int) -> bool:
        try:
            read_frame_head(self.data, offset + empty_frame_at(self.data, offset))
        except StreamError:
            return False
        return True

    def _skip(self, position: int, reason: str) -> int:
        after = None
        if self.summed_bytes > max(_MIN_SUMMED_BYTES, _MAX_SUMMED_TIMES * len(self.data)):
            reason += "; the rest was not searched, for its frames claim each other's bytes again and again"
        else:
            after = _next_frame(self.data, position + 1, len(self.data))
        if after is None:
            after = len(self.data)
        self.damage.append(Damage(position, after - position, reason))
        return after
