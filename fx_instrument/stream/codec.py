"""Pages to standard compressed frames and back: the only file that knows zstandard and lz4.

A page becomes planes (filters.py). In a "zstd" file each plane is one zstd frame: compressed, or hand-built of
raw blocks where it is incompressible, which costs no pass over the bytes. In an "lz4" or "none" file the page
is one LZ4 frame whose blocks are the planes, compressed or stored. Both are what the command-line tools read.
"""

from __future__ import annotations

import struct
import threading
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import lz4.block
import numpy as np
import numpy.typing as npt
import zstandard

from fx_instrument.errors import CorruptStreamError, UnsupportedStreamError
from fx_instrument.stream import filters
from fx_instrument.stream.blocks import COMPRESSED, MAX_PLANES, STORED, BlockHeader
from fx_instrument.stream.frames import CODEC_CODES, Bytes

U8 = npt.NDArray[np.uint8]
Piece: TypeAlias = "bytes | U8"

EMPTY_ZSTD_FRAME = bytes.fromhex("28b52ffd2000010000")
LZ4_FRAME_HEAD = bytes.fromhex("04224d18607073")
"""Version 1, independent blocks of at most 4 MiB, no checksums, no content size."""
LZ4_END = bytes(4)
LEAD_BYTES = len(LZ4_FRAME_HEAD) + 4
"""What stands before the values of a page that is stored in one piece."""
EMPTY_LZ4_FRAME = LZ4_FRAME_HEAD + LZ4_END
_LZ4_STORED = 1 << 31
_ZSTD_RAW_HEAD = struct.Struct("<4sBI")
_ZSTD_BLOCK_BYTES = 128 << 10

# Entropy coding without a search for matches: level 1 finds none in exponents, at a third of the speed.
# A negative level or target_length > 0 would switch the Huffman stage off as well.
_HUFFMAN_ONLY = zstandard.ZstdCompressionParameters(
    strategy=zstandard.STRATEGY_FAST,
    window_log=17,
    hash_log=6,
    chain_log=6,
    search_log=1,
    min_match=7,
    target_length=0,
)


def empty_frame(codec: str) -> bytes:
    """What a segment begins with: the LZ4 specification discourages a file that begins with a skippable frame."""
    return EMPTY_ZSTD_FRAME if codec == "zstd" else EMPTY_LZ4_FRAME


@dataclass(slots=True)
class EncodedPage:
    """The payload of a block as pieces of memory; they point into the encoder's scratch until its next call."""

    filter: int
    pieces: list[Piece]
    payload_bytes: int
    payload_crc: int
    plane_bytes: tuple[int, ...]
    plane_encodings: tuple[int, ...]


def _raw_zstd_frame(buffers: Iterable[U8], total: int) -> list[Piece]:
    """A zstd frame of raw blocks around the buffers, none of them copied (RFC 8878, 3.1.1)."""
    pieces: list[Piece] = []
    pending: list[Piece] = []
    left = total
    room = min(left, _ZSTD_BLOCK_BYTES)
    size = room
    for buffer in buffers:
        start = 0
        while start < len(buffer):
            part = buffer[start : start + room]
            pending.append(part)
            start += len(part)
            room -= len(part)
            if not room:
                left -= size
                pieces.append((size << 3 | (not left)).to_bytes(3, "little"))
                pieces += pending
                pending = []
                room = size = min(left, _ZSTD_BLOCK_BYTES)
    if not total:
        pieces.append(b"\x01\0\0")
    return [_ZSTD_RAW_HEAD.pack(b"\x28\xb5\x2f\xfd", 0xA0, total), *pieces]


def _piece_bytes(piece: Piece) -> int:
    return piece.nbytes if isinstance(piece, np.ndarray) else len(piece)


class PageEncoder:
    """Compresses pages of one codec; one for each thread.

    A ZstdCompressor shared by threads corrupts its output silently (20 of 80 pages in a trial).
    """

    def __init__(self, codec: str, page_bytes: int) -> None:
        self.codec = codec
        self._gathered = np.empty(page_bytes, np.uint8)
        self._planes = np.empty(page_bytes, np.uint8)
        self._splitter = filters.PlaneSplitter()
        self._huffman = zstandard.ZstdCompressor(compression_params=_HUFFMAN_ONLY)
        self._zstd1 = zstandard.ZstdCompressor(level=1)

    def encode(self, buffers: Sequence[U8], dtype: str) -> EncodedPage:
        """The payload of the page that ``buffers`` make one after another."""
        if self.codec == "none":
            return self._frame_lz4(filters.PLAIN, [None], [list(buffers)])
        filter_code = filters.filter_for(dtype)
        if filter_code == filters.PLAIN:
            page = filters.gather(buffers, self._gathered)
            return self._finish(filter_code, [page])
        page = filters.gather(buffers, self._gathered)
        planes, start = [], 0
        for size in filters.plane_sizes(filter_code, len(page)):
            planes.append(self._planes[start : start + size])
            start += size
        self._splitter.split(filter_code, [page], planes)
        return self._finish(filter_code, planes)

    def _finish(self, filter_code: int, planes: list[U8]) -> EncodedPage:
        packed: list[bytes | None] = []
        for position, plane in enumerate(planes):
            if self.codec == "lz4":
                data = lz4.block.compress(plane, store_size=False) if len(plane) else b""
            elif position == 0 and len(planes) > 1:
                data = self._huffman.compress(plane.data)
            else:
                data = self._zstd1.compress(plane.data)
            packed.append(data if len(data) < len(plane) - (len(plane) >> 6) else None)
        frame = self._frame_lz4 if self.codec == "lz4" else self._frame_zstd
        return frame(filter_code, packed, [[plane] for plane in planes])

    def _frame_lz4(
        self, filter_code: int, packed: Sequence[bytes | None], planes: Sequence[Sequence[U8]]
    ) -> EncodedPage:
        pieces: list[Piece] = [LZ4_FRAME_HEAD]
        sizes = []
        for data, plane in zip(packed, planes, strict=True):
            # A block of no bytes would be the end mark.
            if data is not None:
                pieces += [struct.pack("<I", len(data)), data]
                sizes.append(len(data))
            elif total := sum(map(len, plane)):
                pieces += [struct.pack("<I", _LZ4_STORED | total), *plane]
                sizes.append(total)
            else:
                sizes.append(0)
        pieces.append(LZ4_END)
        return _encoded(filter_code, pieces, sizes, packed)

    def _frame_zstd(
        self, filter_code: int, packed: Sequence[bytes | None], planes: Sequence[Sequence[U8]]
    ) -> EncodedPage:
        pieces: list[Piece] = []
        sizes = []
        for data, plane in zip(packed, planes, strict=True):
            frame = [data] if data is not None else _raw_zstd_frame(plane, sum(map(len, plane)))
            sizes.append(sum(map(_piece_bytes, frame)))
            pieces += frame
        return _encoded(filter_code, pieces, sizes, packed)


def _encoded(
    filter_code: int, pieces: list[Piece], sizes: list[int], packed: Sequence[bytes | None]
) -> EncodedPage:
    crc = total = 0
    for piece in pieces:
        crc = zlib.crc32(piece if isinstance(piece, bytes) else piece.data, crc)
        total += _piece_bytes(piece)
    padding = (0,) * (MAX_PLANES - len(sizes))
    encodings = tuple(STORED if data is None else COMPRESSED for data in packed)
    return EncodedPage(filter_code, pieces, total, crc, tuple(sizes) + padding, encodings + padding)


def encode_directory(codec: str, raw: bytes) -> tuple[int, bytes]:
    """``(encoding, stored bytes)`` of a directory."""
    if codec == "zstd":
        data = zstandard.ZstdCompressor(level=1).compress(raw)
    else:
        data = lz4.block.compress(raw, store_size=False)
    return (COMPRESSED, data) if len(data) < len(raw) else (STORED, raw)


class _ThreadState(threading.local):
    def __init__(self) -> None:
        self.decompressor = zstandard.ZstdDecompressor()
        self.splitter = filters.PlaneSplitter()


_thread_state = _ThreadState()


def _unzstd(data: Bytes, raw_bytes: int) -> bytes:
    try:
        size = zstandard.get_frame_parameters(data).content_size
        if size != raw_bytes:
            raise CorruptStreamError(f"a zstd frame says {size} bytes where {raw_bytes} are due")
        return bytes(_thread_state.decompressor.decompress(data, max_output_size=raw_bytes))
    except zstandard.ZstdError as error:
        raise CorruptStreamError(f"a zstd frame does not decode: {error}") from error


def _unlz4(data: Bytes, raw_bytes: int) -> bytes:
    try:
        plane: bytes = lz4.block.decompress(data, uncompressed_size=raw_bytes)
    except (lz4.block.LZ4BlockError, ValueError) as error:
        raise CorruptStreamError(f"an LZ4 block does not decode: {error}") from error
    if len(plane) != raw_bytes:
        raise CorruptStreamError(f"an LZ4 block has {len(plane)} bytes where {raw_bytes} are due")
    return plane


def decode_directory(header: BlockHeader, stored: Bytes) -> bytes:
    """The raw directory of a block."""
    if header.directory_encoding == STORED:
        return bytes(stored)
    if header.directory_encoding != COMPRESSED:
        raise UnsupportedStreamError(f"this version does not know encoding {header.directory_encoding}")
    unpack = _unzstd if header.codec == CODEC_CODES["zstd"] else _unlz4
    return unpack(stored, header.directory_raw_bytes)


def _unraw_zstd(data: memoryview, raw_bytes: int) -> U8:
    """The bytes of a hand-built frame of raw blocks, without the decompressor's two passes."""
    plane = np.empty(raw_bytes, np.uint8)
    position = _ZSTD_RAW_HEAD.size
    for start in range(0, raw_bytes, _ZSTD_BLOCK_BYTES):
        size = min(_ZSTD_BLOCK_BYTES, raw_bytes - start)
        position += 3
        if position + size > len(data):
            raise CorruptStreamError("a stored plane is shorter than its page")
        plane[start : start + size] = np.frombuffer(data, np.uint8, size, position)
        position += size
    return plane


def decode_page(header: BlockHeader, payload: memoryview) -> U8:
    """The raw bytes of a page, from a payload whose checksum was verified.

    A page that is stored in one piece comes back as a view on the payload.
    """
    sizes = filters.plane_sizes(header.filter, header.raw_bytes)
    lz4_family = header.codec != CODEC_CODES["zstd"]
    planes: list[U8] = []
    position = len(LZ4_FRAME_HEAD) if lz4_family else 0
    for size, stored_bytes, encoding in zip(sizes, header.plane_bytes, header.plane_encodings, strict=False):
        if lz4_family and size:
            position += 4
        data = payload[position : position + stored_bytes]
        position += stored_bytes
        if len(data) != stored_bytes:
            raise CorruptStreamError("the planes of a block are longer than its payload")
        if encoding == COMPRESSED:
            plane = np.frombuffer((_unlz4 if lz4_family else _unzstd)(data, size), np.uint8)
        elif encoding != STORED:
            raise UnsupportedStreamError(f"this version does not know encoding {encoding}")
        elif not lz4_family:
            plane = _unraw_zstd(data, size)
        elif stored_bytes != size:
            raise CorruptStreamError(f"a stored plane has {stored_bytes} bytes where {size} are due")
        else:
            plane = np.frombuffer(data, np.uint8)
        planes.append(plane)
    if header.filter == filters.PLAIN:
        return planes[0]
    page = np.empty(header.raw_bytes, np.uint8)
    _thread_state.splitter.join(header.filter, planes, page)
    return page


def backend_versions() -> dict[str, Any]:
    """Versions of the compression libraries, for the metadata of a file."""
    return {
        "zstandard": zstandard.__version__,
        "zstd": ".".join(map(str, zstandard.ZSTD_VERSION)),
        "lz4": lz4.library_version_string(),
    }
