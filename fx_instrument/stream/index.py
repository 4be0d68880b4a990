"""The index that ends a whole segment, both ways."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import CorruptStreamError
from .frames import (
    ALIGNMENT,
    FRAME_HEAD,
    INDEX,
    TAIL,
    TAIL_MAGIC,
    dump_json,
    load_json,
    site_to_json,
    sites_of,
    write_frame,
)
from .records import Damage, SiteEntry

PartialKey = tuple[int, int, int]
"""Site, step and call of a record that lies in several blocks."""

_INDEX = struct.Struct("<8sQQQQIIII")


@dataclass(frozen=True, slots=True)
class IndexRow:
    """Where a block lies in its segment, and what can be in it."""

    offset: int
    min_step: int
    max_step: int
    length: int
    num_rows: int
    raw_bytes: int
    sites: frozenset[int]


@dataclass(frozen=True, slots=True)
class Index:
    """The end of a whole segment.

    Body: ``first 8 bytes of the uuid · segment bytes u64 · steps u64 · records u64 · raw bytes u64 (both without
    inputs) · blocks u32 · bitmap bytes u32 · JSON bytes u32 · 4 zero bytes`` · block table · JSON · zeros · tail.
    A row of the table is ``offset u64 · min step u64 · max step u64 · length u32 · rows u32 · raw bytes u32 ·
    4 zero bytes · site bitmap``; the JSON is ``{"sites", "summary", "earlier_summaries", "damage": [[offset, bytes,
    reason]], "incomplete": [[site, step, call]]}``; the tail ``bytes of this frame u32 · crc32 of those 4 bytes
    u32 · FXSTREND``.
    """

    segment_bytes: int
    num_steps: int
    num_records: int
    raw_bytes: int
    rows: npt.NDArray[np.void]
    bitmaps: npt.NDArray[np.uint8]
    sites: list[SiteEntry]
    summary: dict[str, Any]
    earlier_summaries: list[dict[str, Any]]
    damage: list[Damage]
    """Bytes that were lost before the file was resumed; offsets within the segment."""
    incomplete: frozenset[PartialKey]
    """Records of which some parts were lost then."""


INDEX_DTYPE = np.dtype(
    [
        ("offset", "<u8"),
        ("min_step", "<u8"),
        ("max_step", "<u8"),
        ("length", "<u4"),
        ("num_rows", "<u4"),
        ("raw_bytes", "<u4"),
        ("zero", "<u4"),
    ]
)


def index_tables(
    blocks: Sequence[IndexRow], num_sites: int
) -> tuple[npt.NDArray[np.void], npt.NDArray[np.uint8]]:
    """``(rows, site bitmaps)`` of a block table; bit ``s % 8`` of byte ``s // 8`` stands for site ``s``."""
    rows = np.zeros(len(blocks), INDEX_DTYPE)
    bitmaps = np.zeros((len(blocks), -(-num_sites // 64) * 8), np.uint8)
    for position, block in enumerate(blocks):
        rows[position] = (
            block.offset,
            block.min_step,
            block.max_step,
            block.length,
            block.num_rows,
            block.raw_bytes,
            0,
        )
        for site in block.sites:
            bitmaps[position, site // 8] |= 1 << (site % 8)
    return rows, bitmaps


def write_index(
    offset: int,
    blocks: Sequence[IndexRow],
    sites: Sequence[SiteEntry],
    *,
    segment_id: bytes,
    num_steps: int,
    num_records: int,
    raw_bytes: int,
    summary: Mapping[str, Any],
    earlier_summaries: Sequence[Mapping[str, Any]] = (),
    damage: Sequence[Damage] = (),
    incomplete: Iterable[PartialKey] = (),
) -> bytes:
    """The index frame for a segment whose blocks end at ``offset``."""
    rows, bitmaps = index_tables(blocks, max((site.id for site in sites), default=-1) + 1)
    joined = np.concatenate(
        [rows.view(np.uint8).reshape(len(rows), INDEX_DTYPE.itemsize), bitmaps], axis=1
    ).tobytes()
    text = dump_json(
        {
            "sites": [site_to_json(site) for site in sites],
            "summary": dict(summary),
            "earlier_summaries": [dict(earlier) for earlier in earlier_summaries],
            "damage": [[lost.offset, lost.num_bytes, lost.reason] for lost in damage],
            "incomplete": sorted(incomplete),
        }
    )
    frame_bytes = FRAME_HEAD.size + _INDEX.size + len(joined) + len(text) + TAIL.size
    padding = -(offset + frame_bytes) % ALIGNMENT
    frame_bytes += padding
    head = _INDEX.pack(
        segment_id,
        offset + frame_bytes,
        num_steps,
        num_records,
        raw_bytes,
        len(blocks),
        bitmaps.shape[1],
        len(text),
        0,
    )
    tail = TAIL.pack(frame_bytes, zlib.crc32(struct.pack("<I", frame_bytes)), TAIL_MAGIC)
    return write_frame(INDEX, head + joined + text + bytes(padding) + tail)


def read_tail(data: memoryview, end: int) -> int | None:
    """Bytes of the index frame that ends at ``end``; None if no index ends there."""
    if end < TAIL.size:
        return None
    frame_bytes, crc, magic = TAIL.unpack_from(data, end - TAIL.size)
    if magic != TAIL_MAGIC or zlib.crc32(struct.pack("<I", frame_bytes)) != crc or frame_bytes > end:
        return None
    return int(frame_bytes)


def read_index(body: memoryview) -> Index:
    """The index, every row within the segment; arrays are copies."""
    if len(body) < _INDEX.size + TAIL.size:
        raise CorruptStreamError(f"the index has {len(body)} bytes")
    _, segment_bytes, num_steps, num_records, raw_bytes, num_blocks, bitmap_bytes, text_bytes, _ = (
        _INDEX.unpack_from(body)
    )
    row_bytes = INDEX_DTYPE.itemsize + bitmap_bytes
    text_start = _INDEX.size + num_blocks * row_bytes
    if text_start + text_bytes + TAIL.size > len(body):
        raise CorruptStreamError(f"the index says {num_blocks} blocks, more than its {len(body)} bytes hold")
    table = np.frombuffer(body, np.uint8, num_blocks * row_bytes, _INDEX.size).reshape(num_blocks, row_bytes)
    rows = np.ascontiguousarray(table[:, : INDEX_DTYPE.itemsize]).view(INDEX_DTYPE).reshape(num_blocks)
    bitmaps = table[:, INDEX_DTYPE.itemsize :].copy()
    if num_blocks and int(rows["offset"].max()) > segment_bytes:
        raise CorruptStreamError("the index points outside its segment")
    value = load_json(body[text_start : text_start + text_bytes], "index")
    summary, earlier = value.get("summary", {}), value.get("earlier_summaries", [])
    if not isinstance(summary, dict) or not isinstance(earlier, list):
        raise CorruptStreamError("the summary in the index is no JSON object")
    return Index(
        segment_bytes,
        num_steps,
        num_records,
        raw_bytes,
        rows,
        bitmaps,
        sites_of(value, "index"),
        summary,
        earlier,
        [Damage(row[0], row[1], row[2]) for row in _rows_of(value, "damage", (int, int, str))],
        frozenset((row[0], row[1], row[2]) for row in _rows_of(value, "incomplete", (int, int, int))),
    )


def _rows_of(value: Mapping[str, Any], key: str, kinds: tuple[type, ...]) -> list[list[Any]]:
    rows = value.get(key, [])
    if not isinstance(rows, list):
        raise CorruptStreamError(f"{key} in the index is no list")
    for row in rows:
        if not isinstance(row, list) or [type(item) for item in row] != list(kinds):
            raise CorruptStreamError(f"{key} in the index holds {row!r}")
    return rows
