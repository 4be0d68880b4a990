"""Every byte of the stream format that is not compressed payload, both ways (docs/format.md).

All numbers are little-endian. A file is one or more segments; a segment is

    empty standard frame · prolog · (sites | block)* · index

where prolog, sites, block header and index are skippable frames of the zstd and LZ4 frame formats with one
head of 24 bytes in common, and a block header is followed by standard frames with the payload.
Nothing here opens a file: functions take and return bytes.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fx_instrument.errors import CorruptStreamError, TruncatedStreamError, UnsupportedStreamError

VERSION = (1, 0)
MAX_PAGE_BYTES = 4 << 20
"""Most raw bytes of one block: the largest block of an LZ4 frame, so that a stored page is contiguous."""
MAX_PAYLOAD_BYTES = MAX_PAGE_BYTES + (1 << 20)
MAX_ROWS = 16384
"""Most directory rows of one block."""
MAX_DIRECTORY_BYTES = 32 << 20
MAX_DIMS = 64
ALIGNMENT = 64
"""Payloads, and segments, start at multiples of this, so that mapped values are aligned."""
MAX_PLANES = 4

Bytes: TypeAlias = "bytes | bytearray | memoryview"

FRAME_HEAD = struct.Struct("<II8sII")
SKIPPABLE_MIN, SKIPPABLE_MAX = 0x184D2A50, 0x184D2A5F
PROLOG, SITES, BLOCK, INDEX, VOID = 0x184D2A50, 0x184D2A51, 0x184D2A52, 0x184D2A53, 0x184D2A5F
TAGS = {
    PROLOG: b"FXSTREAM",
    SITES: b"FXSITES\0",
    BLOCK: b"FXBLOCK\0",
    INDEX: b"FXINDEX\0",
    VOID: b"FXVOID\0\0",
}
TAIL = struct.Struct("<II8s")
TAIL_MAGIC = b"FXSTREND"

DTYPES: dict[str, tuple[int, int]] = {
    "bool": (1, 1),
    "uint8": (2, 1),
    "int8": (3, 1),
    "int16": (4, 2),
    "int32": (5, 4),
    "int64": (6, 8),
    "uint16": (7, 2),
    "uint32": (8, 4),
    "uint64": (9, 8),
    "float16": (16, 2),
    "bfloat16": (17, 2),
    "float32": (18, 4),
    "float64": (19, 8),
    "complex32": (24, 4),
    "complex64": (25, 8),
    "complex128": (26, 16),
    "float8_e4m3fn": (32, 1),
    "float8_e5m2": (33, 1),
    "float8_e4m3fnuz": (34, 1),
    "float8_e5m2fnuz": (35, 1),
    "float8_e8m0fnu": (36, 1),
}
"""Name, as torch spells it -> (code in the file, bytes an element)."""
DTYPE_NAMES = {code: name for name, (code, _) in DTYPES.items()}

CODEC_CODES = {"none": 0, "lz4": 1, "zstd": 2}
CODEC_NAMES = {code: name for name, code in CODEC_CODES.items()}


@dataclass(frozen=True, slots=True)
class SiteEntry:
    """A row of the site table."""

    id: int
    name: str
    role: str

    def to_json(self) -> dict[str, Any]:
        return {"id": self.id, "name": self.name, "role": self.role}


@dataclass(frozen=True, slots=True)
class RecordMeta:
    """What the producer says of one captured tensor."""

    site_id: int
    step: int
    call: int
    dtype: str
    shape: tuple[int, ...]
    """Of the stored values; of a sampled record ``(k,)``."""
    full_shape: tuple[int, ...] | None = None
    """Of the tensor that the values were sampled from; None where the whole tensor is stored."""


@dataclass(frozen=True, slots=True)
class Damage:
    """Bytes of a file that recovery had to skip."""

    offset: int
    num_bytes: int
    reason: str


def element_bytes(dtype: str) -> int:
    """Bytes of one element of a dtype, by its torch name; ValueError for a dtype that the format lacks."""
    try:
        return DTYPES[dtype][1]
    except KeyError:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}") from None


def record_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a whole record; exact for any shape (Python integers don't overflow)."""
    total = element_bytes(dtype)
    for size in shape:
        total *= size
    return total


# -- frames ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Frame:
    """A skippable frame of ours: where it lies, and its checked body."""

    kind: int
    offset: int
    end: int
    body: memoryview


def write_frame(kind: int, body: Bytes) -> bytes:
    """``skippable magic u32 · length u32 · tag 8 · crc32 of the body u32 · crc32 of these 20 bytes u32 · body``."""
    head = FRAME_HEAD.pack(kind, FRAME_HEAD.size - 8 + len(body), TAGS[kind], zlib.crc32(body), 0)[:-4]
    return head + struct.pack("<I", zlib.crc32(head)) + bytes(body)


def read_frame_head(data: memoryview, offset: int) -> tuple[int, bytes, int, int]:
    """``(kind, tag, end of the frame, crc of the body)`` of the frame at ``offset``, its head checked.

    Raises:
        TruncatedStreamError: the data ends inside the head, or the frame reaches past the end.
        CorruptStreamError: these bytes are no frame head.
    """
    if offset + FRAME_HEAD.size > len(data):
        raise TruncatedStreamError(f"the file ends inside a frame head at byte {offset}")
    kind, length, tag, body_crc, head_crc = FRAME_HEAD.unpack_from(data, offset)
    if not SKIPPABLE_MIN <= kind <= SKIPPABLE_MAX:
        raise CorruptStreamError(f"no frame of a stream begins at byte {offset} (found {kind:#010x})")
    if zlib.crc32(data[offset : offset + FRAME_HEAD.size - 4]) != head_crc:
        raise CorruptStreamError(f"the frame head at byte {offset} contradicts its checksum")
    if kind in TAGS and tag != TAGS[kind]:
        raise CorruptStreamError(f"the frame head at byte {offset} is tagged {tag!r}, not {TAGS[kind]!r}")
    if length < FRAME_HEAD.size - 8:
        raise CorruptStreamError(f"the frame at byte {offset} says it has {length} bytes")
    end = offset + 8 + length
    if end > len(data):
        raise TruncatedStreamError(
            f"the file ends inside the frame at byte {offset} ({len(data) - offset} of {end - offset} bytes)"
        )
    return kind, tag, end, body_crc


def read_frame(data: memoryview, offset: int) -> Frame:
    """The frame at ``offset`` with its body checked; errors as ``read_frame_head``."""
    kind, _, end, body_crc = read_frame_head(data, offset)
    body = data[offset + FRAME_HEAD.size : end]
    if kind != VOID and zlib.crc32(body) != body_crc:
        raise CorruptStreamError(f"the frame at byte {offset} contradicts its checksum")
    return Frame(kind, offset, end, body)


def write_void_head(num_bytes: int) -> bytes:
    """The head that turns ``num_bytes`` of damaged file into a frame that every reader skips."""
    head = FRAME_HEAD.pack(VOID, num_bytes - 8, TAGS[VOID], 0, 0)[:-4]
    return head + struct.pack("<I", zlib.crc32(head))


def _dump_json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=True).encode()


def _load_json(data: Bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(bytes(data))
    except (ValueError, RecursionError) as error:
        raise CorruptStreamError(f"the {what} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise CorruptStreamError(f"the {what} is no JSON object")
    return value


# -- prolog ------------------------------------------------------------------------------------------------

_PROLOG = struct.Struct("<HHBBHI16sIIQ")


@dataclass(frozen=True, slots=True)
class Prolog:
    """What a segment says of itself before any record.

    Body: ``major u16 · minor u16 · codec u8 · 3 zero bytes · flags u32 · uuid 16 · rank u32 · world u32 ·
    created (ns since 1970) u64 · metadata JSON``.
    """

    codec: str
    uuid: bytes
    metadata: dict[str, Any]
    rank: int = 0
    world: int = 1
    created_ns: int = 0
    version: tuple[int, int] = VERSION

    def write(self) -> bytes:
        head = _PROLOG.pack(
            *self.version,
            CODEC_CODES[self.codec],
            0,
            0,
            0,
            self.uuid,
            self.rank,
            self.world,
            self.created_ns,
        )
        return write_frame(PROLOG, head + _dump_json(self.metadata))

    @classmethod
    def read(cls, body: memoryview) -> Prolog:
        if len(body) < _PROLOG.size:
            raise CorruptStreamError(f"the prolog has {len(body)} bytes, fewer than {_PROLOG.size}")
        major, minor, codec, _, _, flags, uuid, rank, world, created_ns = _PROLOG.unpack_from(body)
        if major != VERSION[0]:
            raise UnsupportedStreamError(
                f"the file is of format version {major}.{minor}; this library reads {VERSION[0]}.x"
            )
        if flags or codec not in CODEC_NAMES:
            raise UnsupportedStreamError(
                f"the file needs codec {codec} and flags {flags:#x}, which this version does not know"
            )
        metadata = _load_json(body[_PROLOG.size :], "metadata of the prolog")
        return cls(CODEC_NAMES[codec], uuid, metadata, rank, world, created_ns, (major, minor))


# -- sites -------------------------------------------------------------------------------------------------


SEGMENT_ID_BYTES = 8
"""The first bytes of the uuid stand in every frame: a frame of another file inside a payload is none of ours."""


def write_sites(sites: Sequence[SiteEntry], segment_id: bytes) -> bytes:
    """A sites frame; its body is the segment's id, then ``{"sites": [{"id", "name", "role"}, ...]}``."""
    return write_frame(SITES, segment_id + _dump_json({"sites": [site.to_json() for site in sites]}))


def _sites_of(value: Mapping[str, Any], what: str) -> list[SiteEntry]:
    rows = value.get("sites")
    if not isinstance(rows, list):
        raise CorruptStreamError(f"the {what} has no site table")
    sites = []
    for row in rows:
        if not (
            isinstance(row, dict)
            and isinstance(row.get("id"), int)
            and isinstance(row.get("name"), str)
            and isinstance(row.get("role"), str)
            and 0 <= row["id"] < 1 << 32
        ):
            raise CorruptStreamError(f"the {what} holds {row!r}, which is no site")
        sites.append(SiteEntry(row["id"], row["name"], row["role"]))
    return sites


def read_sites(body: memoryview) -> list[SiteEntry]:
    """The sites that a sites frame adds."""
    return _sites_of(_load_json(body[SEGMENT_ID_BYTES:], "site table"), "site table")


def segment_id_of(frame: Frame) -> bytes | None:
    """The segment that a sites frame, a block header or an index says it belongs to."""
    start = {SITES: 0, BLOCK: 8, INDEX: 0}.get(frame.kind)
    return None if start is None else bytes(frame.body[start : start + SEGMENT_ID_BYTES])


# -- blocks ------------------------------------------------------------------------------------------------

_BLOCK = struct.Struct("<BBBBI8sQQQQIIIIII4I4BI")
BLOCK_FIXED_BYTES = FRAME_HEAD.size + _BLOCK.size
ROW_BYTES = 32
STORED, COMPRESSED = 0, 1


@dataclass(frozen=True, slots=True)
class BlockHeader:
    """The fixed part of a block; the directory follows it, then zeros up to the payload.

    Body: ``codec u8 · dtype u8 · filter u8 · directory encoding u8 · rows u32 · first 8 bytes of the uuid ·
    sequence u64 · time ns u64 · min step u64 · max step u64 · shapes u32 · directory bytes u32 ·
    directory raw bytes u32 · raw bytes u32 · payload bytes u32 · payload crc32 u32 · stored bytes of
    4 planes 4 × u32 · encodings of 4 planes 4 × u8 · 4 zero bytes · directory · zeros``.
    """

    codec: int
    dtype: int
    filter: int
    directory_encoding: int
    num_rows: int
    segment_id: bytes
    sequence: int
    time_ns: int
    min_step: int
    max_step: int
    num_shapes: int
    directory_bytes: int
    directory_raw_bytes: int
    raw_bytes: int
    payload_bytes: int
    payload_crc: int
    plane_bytes: tuple[int, ...]
    plane_encodings: tuple[int, ...]

    def write(self, directory: bytes, offset: int) -> bytes:
        """The header frame for a block that begins ``offset`` bytes into its segment."""
        fixed = _BLOCK.pack(
            self.codec,
            self.dtype,
            self.filter,
            self.directory_encoding,
            self.num_rows,
            self.segment_id,
            self.sequence,
            self.time_ns,
            self.min_step,
            self.max_step,
            self.num_shapes,
            self.directory_bytes,
            self.directory_raw_bytes,
            self.raw_bytes,
            self.payload_bytes,
            self.payload_crc,
            *self.plane_bytes,
            *self.plane_encodings,
            0,
        )
        padding = -(offset + BLOCK_FIXED_BYTES + len(directory)) % ALIGNMENT
        return write_frame(BLOCK, fixed + directory + bytes(padding))

    @classmethod
    def read(cls, body: memoryview) -> tuple[BlockHeader, memoryview]:
        """The header and its stored directory; every length within the format's limits."""
        if len(body) < _BLOCK.size:
            raise CorruptStreamError(f"the block header has {len(body)} bytes, fewer than {_BLOCK.size}")
        values = _BLOCK.unpack_from(body)
        header = cls(*values[:16], values[16:20], values[20:24])
        limits = (
            ("rows", header.num_rows, MAX_ROWS),
            ("shapes", header.num_shapes, header.num_rows),
            ("directory bytes", header.directory_bytes, len(body) - _BLOCK.size),
            ("directory raw bytes", header.directory_raw_bytes, MAX_DIRECTORY_BYTES),
            ("raw bytes", header.raw_bytes, MAX_PAGE_BYTES),
            ("payload bytes", header.payload_bytes, MAX_PAYLOAD_BYTES),
            ("planes", sum(header.plane_bytes), header.payload_bytes),
        )
        for name, value, limit in limits:
            if value > limit:
                raise CorruptStreamError(f"the block header says {value} {name}, more than {limit}")
        if header.directory_raw_bytes < header.num_rows * ROW_BYTES:
            raise CorruptStreamError(
                f"the block header says {header.num_rows} rows in {header.directory_raw_bytes} bytes"
            )
        return header, body[_BLOCK.size : _BLOCK.size + header.directory_bytes]

    @property
    def dtype_name(self) -> str:
        try:
            return DTYPE_NAMES[self.dtype]
        except KeyError:
            raise UnsupportedStreamError(f"this version does not know dtype code {self.dtype}") from None


Shape: TypeAlias = "tuple[tuple[int, ...], tuple[int, ...] | None]"

ROW_DTYPE = np.dtype(
    [
        ("step", "<u8"),
        ("part_offset", "<u8"),
        ("site", "<u4"),
        ("call", "<u4"),
        ("shape", "<u4"),
        ("offset", "<u4"),
    ]
)


def write_directory(rows: npt.NDArray[np.void], shapes: Sequence[Shape]) -> bytes:
    """The raw directory: rows as differences to the row before, byte-transposed, then the shape table.

    Differences of page-ordered rows are nearly constant, so that a row compresses to well under a byte.
    A shape is ``dims u8 · 1 + dims of the full shape, or 0 · sizes u64``.
    """
    delta = np.empty_like(rows)
    for name in ROW_DTYPE.names or ():
        column = rows[name]
        delta[name] = column
        delta[name][1:] -= column[:-1]
    transposed = delta.view(np.uint8).reshape(len(rows), ROW_BYTES).T.tobytes()
    table = bytearray()
    for shape, full in shapes:
        sizes = shape if full is None else shape + full
        table += struct.pack(f"<BB{len(sizes)}Q", len(shape), 0 if full is None else 1 + len(full), *sizes)
    return transposed + bytes(table)


@dataclass(frozen=True, slots=True)
class Directory:
    """The rows of a block, in page order, with their sizes, and the shapes that they refer to."""

    rows: npt.NDArray[np.void]
    """Structured, ``ROW_DTYPE``."""
    sizes: npt.NDArray[np.int64]
    shapes: list[Shape] = field(default_factory=list)


def read_directory(raw: Bytes, header: BlockHeader) -> Directory:
    """The directory of a block from its raw bytes, every reference within bounds."""
    if len(raw) != header.directory_raw_bytes:
        raise CorruptStreamError(
            f"a directory has {len(raw)} bytes where its header says {header.directory_raw_bytes}"
        )
    count = header.num_rows
    table = np.frombuffer(raw, np.uint8, count * ROW_BYTES).reshape(ROW_BYTES, count)
    rows = table.T.copy(order="C").view(ROW_DTYPE).reshape(count)
    for name in ROW_DTYPE.names or ():
        rows[name] = np.cumsum(rows[name], dtype=rows[name].dtype)
    shapes: list[Shape] = []
    position = count * ROW_BYTES
    for _ in range(header.num_shapes):
        if position + 2 > len(raw):
            raise CorruptStreamError("a shape table ends early")
        dims, full_dims = raw[position], raw[position + 1]
        num_sizes = dims + max(0, full_dims - 1)
        if dims > MAX_DIMS or full_dims > MAX_DIMS + 1 or position + 2 + 8 * num_sizes > len(raw):
            raise CorruptStreamError("a shape table ends early")
        sizes = struct.unpack_from(f"<{num_sizes}Q", raw, position + 2)
        shapes.append((sizes[:dims], sizes[dims:] if full_dims else None))
        position += 2 + 8 * num_sizes
    if position != len(raw):
        raise CorruptStreamError(f"a directory has {len(raw) - position} bytes too many")
    offsets = np.empty(count + 1, np.int64)
    offsets[:-1] = rows["offset"]
    offsets[-1] = header.raw_bytes
    row_sizes = np.diff(offsets)
    if count and (offsets[0] != 0 or row_sizes.min() < 0 or int(rows["shape"].max()) >= len(shapes)):
        raise CorruptStreamError("a directory row points outside its block")
    return Directory(rows, row_sizes, shapes)


# -- index -------------------------------------------------------------------------------------------------

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

    Body: ``first 8 bytes of the uuid · segment bytes u64 · steps u64 · records u64 · raw bytes u64 (both without inputs) · blocks u32 ·
    bitmap bytes u32 · JSON bytes u32 · 4 zero bytes`` · per block ``offset u64 · min step u64 · max step u64 ·
    length u32 · rows u32 · raw bytes u32 · 4 zero bytes · site bitmap`` · JSON ``{"sites", "summary",
    "earlier_summaries"}`` · zeros · tail ``bytes of this frame u32 · crc32 of those 4 bytes u32 · FXSTREND``.
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
) -> bytes:
    """The index frame for a segment whose blocks end at ``offset``."""
    rows, bitmaps = index_tables(blocks, max((site.id for site in sites), default=-1) + 1)
    joined = np.concatenate([rows.view(np.uint8).reshape(len(rows), -1), bitmaps], axis=1).tobytes()
    text = _dump_json(
        {
            "sites": [site.to_json() for site in sites],
            "summary": dict(summary),
            "earlier_summaries": [dict(earlier) for earlier in earlier_summaries],
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
    value = _load_json(body[text_start : text_start + text_bytes], "index")
    summary, earlier = value.get("summary", {}), value.get("earlier_summaries", [])
    if not isinstance(summary, dict) or not isinstance(earlier, list):
        raise CorruptStreamError("the summary in the index is no JSON object")
    sites = _sites_of(value, "index")
    return Index(segment_bytes, num_steps, num_records, raw_bytes, rows, bitmaps, sites, summary, earlier)
