"""Block headers and directories, both ways: what lies in a page, where, and how it is stored."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from ..errors import CorruptStreamError, UnsupportedStreamError
from .frames import ALIGNMENT, BLOCK, FRAME_HEAD, Bytes, write_frame
from .records import DTYPE_NAMES, record_bytes

MAX_PAGE_BYTES = 4 << 20
"""Most raw bytes of one block: the largest block of an LZ4 frame, so that a stored page is contiguous."""
MAX_PAYLOAD_BYTES = MAX_PAGE_BYTES + (1 << 20)
MAX_ROWS = 16384
"""Most directory rows of one block."""
MAX_DIRECTORY_BYTES = 32 << 20
MAX_DIMS = 64
MAX_PLANES = 4

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
    4 planes 4 u32 · encodings of 4 planes 4 u8 · 4 zero bytes · directory · zeros``.
    """

    plane_bytes: tuple[int, ...]
    plane_encodings: tuple[int, ...]
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

    def write(self, directory: bytes, offset: int, lead_bytes: int) -> bytes:
        """The header frame for a block that begins ``offset`` bytes into its segment.

        Padded so that the payload's values, ``lead_bytes`` into it, are aligned.
        """
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
        padding = -(offset + BLOCK_FIXED_BYTES + len(directory) + lead_bytes) % ALIGNMENT
        return write_frame(BLOCK, fixed + directory + bytes(padding))

    @classmethod
    def read(cls, body: memoryview) -> tuple[BlockHeader, memoryview]:
        """The header and its stored directory; every length within the format's limits."""
        if len(body) < _BLOCK.size:
            raise CorruptStreamError(f"the block header has {len(body)} bytes, fewer than {_BLOCK.size}")
        values = _BLOCK.unpack_from(body)
        header = cls(values[16:20], values[20:24], *values[:16])
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
    transposed: bytes = delta.view(np.uint8).reshape(len(rows), ROW_BYTES).T.tobytes()
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

    def record_sizes(self, dtype: str) -> npt.NDArray[np.int64]:
        """Bytes of a whole record of each shape; 2**62 where it is more."""
        return np.array([min(record_bytes(dtype, shape), 1 << 62) for shape, _ in self.shapes], np.int64)


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
