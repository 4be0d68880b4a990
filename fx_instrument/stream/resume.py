"""Going on with an existing file: recover it, cut it after its last good block, void what is damaged before."""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import CorruptStreamError, StreamError, TruncatedStreamError
from .files import close_file, lock_file, pwrite_all, sync
from .frames import FRAME_HEAD, Earlier, dump_json, write_sites, write_void_head
from .index import IndexRow
from .read_ahead import ReadAhead
from .records import Damage, SiteEntry
from .recovery import recover_segments
from .segments import Block, Segment

_MAX_VOID_BYTES = 1 << 31


@dataclass(frozen=True, slots=True)
class Resumed:
    """An open file that ends after its last good block, and what its index will have to say."""

    fd: int
    end: int
    segment: Segment
    sites: list[SiteEntry]
    """With ids 0, 1, 2, ...: ids that were lost are named so. The file names all of them."""
    blocks: list[IndexRow]
    next_sequence: int
    earlier_summaries: list[dict[str, Any]]
    damage: list[Damage]
    """Offsets within the segment."""


def resume_file(path: os.PathLike[str] | str, codec: str) -> Resumed | None:
    """The file at ``path`` made ready to go on with; None if there is none, or nothing was captured into it.

    Damaged bytes between good blocks become a frame that readers skip, so that the file is whole again. In the place
    of the index, which comes anew at the end, a frame keeps what only the index said.

    Raises:
        ValueError: the file has another codec.
        NotAStreamError: the file is no stream; it is left as it is.
        CorruptStreamError: a prolog is lost, or an earlier segment has no index: only recover=True reads it.
        BlockingIOError: another writer has the file open.
        OSError: the file can't be written; a full disk leaves it as it was.
    """
    try:
        fd = os.open(path, os.O_RDWR | getattr(os, "O_CLOEXEC", 0))
    except FileNotFoundError:
        return None
    try:
        lock_file(fd, path)
        resumed = _resume(fd, codec)
    except StreamError as error:
        close_file(fd)
        raise type(error)(f"{os.fspath(path)}: {error}") from None
    except BaseException:
        close_file(fd)
        raise
    if resumed is None:
        close_file(fd)
    return resumed


def _resume(fd: int, codec: str) -> Resumed | None:
    size = os.fstat(fd).st_size
    if not size:
        return None
    try:
        mapped = mmap.mmap(fd, size, access=mmap.ACCESS_READ)
        recovery = recover_segments(memoryview(mapped), ReadAhead(mapped), keep_blocks=True)
    except TruncatedStreamError:
        return None
    segment = recovery.segments[-1]
    if segment.prolog.codec != codec:
        raise ValueError(
            f"codec must be {segment.prolog.codec!r}, that of the file to go on with, got {codec!r}"
        )
    if any(not part.whole for part in recovery.segments[:-1]):
        raise CorruptStreamError("an earlier segment has no index; only recover=True reads this file")
    if any(not part.has_prolog for part in recovery.segments) or recovery.segments[0].offset:
        raise CorruptStreamError("a prolog is damaged; only recover=True reads this file")
    # Where blocks are missing without a byte in their place, there is nothing to skip.
    damage = [
        lost for lost in recovery.damage if segment.offset <= lost.offset < recovery.end and lost.num_bytes
    ]
    # What has no byte to be skipped is told by the new index alone: gaps, and blocks behind the last good one that the
    # old index knew of. Where there was none, the end is what a kill left.
    gone = [
        Damage(min(lost.offset, recovery.end), 0, lost.reason)
        for lost in recovery.damage
        if segment.offset <= lost.offset
        and (not lost.num_bytes or (lost.offset >= recovery.end and recovery.has_index))
    ]
    if any(lost.num_bytes < FRAME_HEAD.size for lost in damage):
        raise CorruptStreamError("damage is too small to be skipped; only recover=True reads this file")
    sites = _sites(segment)
    summaries = segment.earlier_summaries + ([segment.summary] if segment.summary else [])
    untold = _without(summaries, recovery.told_summaries)
    kept = write_sites(sites, segment.segment_id, Earlier(segment.num_steps, untold))
    for lost in damage:
        _void(fd, lost)
    _cut(fd, size, recovery.end, kept)
    end = os.lseek(fd, 0, os.SEEK_END)
    return Resumed(
        fd=fd,
        end=end,
        segment=segment,
        sites=sites,
        blocks=[_index_row(block, segment) for block in recovery.blocks],
        next_sequence=max((block.header.sequence for block in recovery.blocks), default=-1) + 1,
        earlier_summaries=summaries,
        damage=[
            Damage(lost.offset - segment.offset, lost.num_bytes, lost.reason) for lost in (*damage, *gone)
        ],
    )


def _cut(fd: int, size: int, end: int, kept: bytes) -> None:
    """End the file of ``size`` bytes with the frame ``kept`` at ``end``.

    Killed at any moment, the file says what ``kept`` says: by the index that is behind ``end``, by the frame in its
    place, or by a copy behind both. A full disk leaves it as it was.
    """
    try:
        # Where there is no index, there is none to lose.
        between = bytes(max(0, end + len(kept) - size)) if size > end else b""
        pwrite_all(fd, between + kept, size)
    except OSError:
        os.ftruncate(fd, size)
        raise
    if size > end:
        sync(fd)
        pwrite_all(fd, kept, end)
        sync(fd)
        os.ftruncate(fd, end + len(kept))


def _without(summaries: list[dict[str, Any]], told: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that were not told, the same one twice counting twice."""
    left = [dump_json(summary) for summary in told]
    untold = []
    for summary in summaries:
        text = dump_json(summary)
        if text in left:
            left.remove(text)
        else:
            untold.append(summary)
    return untold


def _void(fd: int, lost: Damage) -> None:
    start, end = lost.offset, lost.offset + lost.num_bytes
    while start < end:
        num_bytes = end - start
        if num_bytes > _MAX_VOID_BYTES:
            num_bytes = _MAX_VOID_BYTES // 2
        os.pwrite(fd, write_void_head(num_bytes), start)
        start += num_bytes


def _sites(segment: Segment) -> list[SiteEntry]:
    known = {site.id: site for site in segment.sites}
    count = max(known, default=-1) + 1
    if count > len(known) + (1 << 16):
        raise CorruptStreamError(f"the site ids of the file reach {count}")
    return [known.get(number) or SiteEntry(number, f"unknown-{number}", "other") for number in range(count)]


def _index_row(block: Block, segment: Segment) -> IndexRow:
    header = block.header
    return IndexRow(
        block.offset - segment.offset,
        header.min_step,
        header.max_step,
        block.end - block.offset,
        header.num_rows,
        header.raw_bytes,
        frozenset(map(int, np.unique(block.directory.rows["site"]))),
    )
