"""Payloads of standard frames, built by hand around compressed and stored planes, and taken apart again.

A zstd payload is a frame for each plane; an LZ4 payload is one frame with a block for each plane.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from ..errors import CorruptStreamError
from .blocks import COMPRESSED, MAX_PLANES, STORED

try:
    import isal
    from isal.isal_zlib import crc32

    CRC32_LIBRARY = f"isal {isal.__version__}"
except ImportError:
    from zlib import ZLIB_RUNTIME_VERSION, crc32

    CRC32_LIBRARY = f"zlib {ZLIB_RUNTIME_VERSION}"

U8 = npt.NDArray[np.uint8]
Piece: TypeAlias = "bytes | U8"

EMPTY_ZSTD_FRAME = bytes.fromhex("28b52ffd2000010000")
LZ4_FRAME_MAGIC = bytes.fromhex("04224d18")
LZ4_FRAME_HEAD = bytes.fromhex("04224d18607073")
"""Version 1, independent blocks of at most 4 MiB, no checksums, no content size."""
LZ4_BLOCK_HEAD_BYTES = 4
LZ4_END = bytes(4)
EMPTY_LZ4_FRAME = LZ4_FRAME_HEAD + LZ4_END
LEAD_BYTES = len(LZ4_FRAME_HEAD) + LZ4_BLOCK_HEAD_BYTES
"""What stands before the values of a page that is stored in one piece."""
_LZ4_STORED = 1 << 31
_ZSTD_RAW_HEAD = struct.Struct("<4sBI")
_RAW_BLOCK_HEAD_BYTES = 3
RAW_BLOCK_BYTES = 128 << 10
"""Most that a block of a zstd frame holds."""
_FETCH_BYTES, _LINE_BYTES = 128 << 10, 64


@dataclass(slots=True)
class EncodedPage:
    """The payload of a block as pieces of memory; they point into the encoder's scratch until its next call."""

    filter: int
    pieces: list[Piece]
    payload_bytes: int
    payload_crc: int
    plane_bytes: tuple[int, ...]
    plane_encodings: tuple[int, ...]


class RawFrame:
    """A zstd frame of raw blocks at the start of ``memory``, made before the plane that it stores: filled in through
    ``blocks``, the plane is in one piece with the frame, and is summed and written in one call.

    Args:
        memory: at least ``raw_frame_bytes(total)``.
        total: bytes of the plane.
    """

    def __init__(self, memory: U8, total: int) -> None:
        self.whole = memory[: raw_frame_bytes(total)]
        view = self.whole.data
        position = _ZSTD_RAW_HEAD.size
        view[:position] = _raw_frame_head(total)
        for start in range(0, max(1, total), RAW_BLOCK_BYTES):
            head = _raw_block_head(total - start)
            view[position : position + len(head)] = head
            position += len(head) + RAW_BLOCK_BYTES
        self.blocks = stored_zstd_blocks(view, total)
        """The plane: whole blocks as rows, (blocks, ``RAW_BLOCK_BYTES``), and the last one if it is shorter."""

    def __len__(self) -> int:
        return len(self.whole)


Plane: TypeAlias = "bytes | Sequence[U8] | RawFrame"
"""Compressed bytes, or a stored plane: its buffers, or the frame that it is in already."""


def build_payload(family: str, filter_code: int, planes: Sequence[Plane]) -> EncodedPage:
    """The payload of planes in a file of the family "zstd" or "lz4"; buffers are not copied."""
    pieces: list[Piece] = []
    sizes: list[int] = []
    if family == "lz4":
        pieces.append(LZ4_FRAME_HEAD)
    for plane in planes:
        if isinstance(plane, RawFrame):
            pieces.append(plane.whole)
            size = len(plane)
        elif family == "lz4":
            block, size = _lz4_block(plane)
            pieces += block
        elif isinstance(plane, bytes):
            pieces.append(plane)
            size = len(plane)
        else:
            frame = _raw_zstd_frame(plane, sum(map(len, plane)))
            pieces += frame
            size = sum(map(len, frame))
        sizes.append(size)
    if family == "lz4":
        pieces.append(LZ4_END)
    crc = total = 0
    for piece in pieces:
        crc = checksum(piece, crc)
        total += len(piece)
    padding = (0,) * (MAX_PLANES - len(sizes))
    encodings = tuple(COMPRESSED if isinstance(plane, bytes) else STORED for plane in planes)
    return EncodedPage(filter_code, pieces, total, crc, (*sizes, *padding), (*encodings, *padding))


def checksum(data: Piece, crc: int = 0) -> int:
    """crc32 of bytes that may not be in the cache.

    By ISA-L where it is installed (``pip install 'fx_instrument[fast]'``): a fifth to a ninth of zlib's time. zlib
    does not prefetch: with lines fetched before it 3.8 GB/s instead of 2.3.
    """
    if crc32 is not zlib.crc32:
        return crc32(data if isinstance(data, bytes) else data.data, crc)
    if isinstance(data, bytes):
        return zlib.crc32(data, crc)
    if len(data) < _FETCH_BYTES:
        return zlib.crc32(data.data, crc)
    for start in range(0, len(data), _FETCH_BYTES):
        part = data[start : start + _FETCH_BYTES]
        part[::_LINE_BYTES].max()
        crc = zlib.crc32(part.data, crc)
    return crc


def _lz4_block(plane: bytes | Sequence[U8]) -> tuple[list[Piece], int]:
    if isinstance(plane, bytes):
        return [struct.pack("<I", len(plane)), plane], len(plane)
    total = sum(map(len, plane))
    # A block of no bytes would be the end mark.
    return ([struct.pack("<I", _LZ4_STORED | total), *plane], total) if total else ([], 0)


def _raw_zstd_frame(buffers: Iterable[U8], total: int) -> list[Piece]:
    """A zstd frame of raw blocks around the buffers (RFC 8878, 3.1.1)."""
    pieces: list[Piece] = [_raw_frame_head(total)]
    left, room = total, 0
    for buffer in buffers:
        start = 0
        while start < len(buffer):
            if not room:
                pieces.append(_raw_block_head(left))
                room = min(left, RAW_BLOCK_BYTES)
                left -= room
            part = buffer[start : start + room]
            pieces.append(part)
            start += len(part)
            room -= len(part)
    if not total:
        pieces.append(_raw_block_head(0))
    return pieces


def _raw_frame_head(total: int) -> bytes:
    return _ZSTD_RAW_HEAD.pack(b"\x28\xb5\x2f\xfd", 0xA0, total)


def _raw_block_head(left: int) -> bytes:
    """Of the next block, while so many bytes are left."""
    size = min(left, RAW_BLOCK_BYTES)
    return (size << 3 | (left == size)).to_bytes(_RAW_BLOCK_HEAD_BYTES, "little")


def raw_frame_bytes(total: int) -> int:
    """Of a zstd frame of raw blocks around so many bytes."""
    return _ZSTD_RAW_HEAD.size + total + _RAW_BLOCK_HEAD_BYTES * max(1, -(-total // RAW_BLOCK_BYTES))


def stored_zstd_blocks(data: memoryview, plane_bytes: int) -> tuple[U8, U8]:
    """A plane in a hand-built zstd frame as views on its raw blocks, without the decompressor's two passes.

    The whole blocks are rows, (blocks, ``RAW_BLOCK_BYTES``), the last one may be shorter.
    """
    num_whole, rest = divmod(plane_bytes, RAW_BLOCK_BYTES)
    start, stride = _ZSTD_RAW_HEAD.size + _RAW_BLOCK_HEAD_BYTES, _RAW_BLOCK_HEAD_BYTES + RAW_BLOCK_BYTES
    if start + num_whole * stride + (rest or -_RAW_BLOCK_HEAD_BYTES) > len(data):
        raise CorruptStreamError("a stored plane is shorter than its page")
    rows = np.empty((0, RAW_BLOCK_BYTES), np.uint8)
    if num_whole:
        rows = np.ndarray((num_whole, RAW_BLOCK_BYTES), np.uint8, data, start, (stride, 1))
    return rows, np.frombuffer(data, np.uint8, rest, start + num_whole * stride if rest else 0)


def stored_zstd_bytes(frame_bytes: int) -> int:
    """Raw bytes of a hand-built zstd frame of so many bytes."""
    rest = frame_bytes - _ZSTD_RAW_HEAD.size
    blocks = max(1, -(-rest // (RAW_BLOCK_BYTES + _RAW_BLOCK_HEAD_BYTES)))
    if rest < _RAW_BLOCK_HEAD_BYTES * blocks:
        raise CorruptStreamError(f"a zstd frame of raw blocks has {frame_bytes} bytes")
    return rest - _RAW_BLOCK_HEAD_BYTES * blocks
