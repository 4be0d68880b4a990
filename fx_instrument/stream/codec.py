"""Pages to standard compressed frames and back: the only file that knows zstandard and lz4.

A page becomes planes (filters.py), each compressed or stored (payload.py), so that the command-line tools read it.
How a plane is best compressed differs by site: it is tried on the site's first page, and again now and then.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import lz4
import lz4.block
import lz4.frame
import numpy as np
import numpy.typing as npt
import zstandard

from ..errors import CorruptStreamError, UnsupportedStreamError
from . import filters
from .blocks import COMPRESSED, STORED, BlockHeader
from .frames import CODEC_CODES, Bytes
from .payload import (
    CRC32_LIBRARY,
    EMPTY_LZ4_FRAME,
    EMPTY_ZSTD_FRAME,
    LEAD_BYTES,
    LZ4_BLOCK_HEAD_BYTES,
    LZ4_FRAME_HEAD,
    LZ4_FRAME_MAGIC,
    EncodedPage,
    Plane,
    RawFrame,
    build_payload,
    stored_zstd_blocks,
    stored_zstd_bytes,
)
from .quantise import DTYPES as QUANTISABLE
from .quantise import Layout, quantise, split_codes
from .tiers import BEST, FAST, RAW, Choice, Choices

U8 = npt.NDArray[np.uint8]

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
_WORTH = 0.99
"""Compressing must make a plane at least so much smaller."""
_LZ4_WORTH = 0.97
_MATCHES_WORTH = 0.98
"""zstd-1 takes 2.7 times as long as Huffman-only."""
_PROBE_BYTES = 128 << 10
"""Of a plane: enough for zstd-1 to meet tokens again."""
_SAMPLE_SLICES, _SAMPLE_SLICE_BYTES = 4, 4096
_DIRECT_BYTES = 32 << 10
"""From this mean size of buffers on they are split where they lie; smaller ones are gathered first."""


def empty_frame(codec: str) -> bytes:
    """What a segment begins with: the LZ4 specification discourages a file that begins with a skippable frame."""
    return EMPTY_ZSTD_FRAME if codec == "zstd" else EMPTY_LZ4_FRAME


class PageEncoder:
    """Compresses pages of one codec; one for each thread.

    A ZstdCompressor shared by threads corrupts its output silently (20 of 80 pages in a trial). ``choices`` may be
    shared. ``at_once_bytes`` is as for ``Planes``.
    """

    def __init__(
        self,
        codec: str,
        page_bytes: int,
        choices: Choices | None = None,
        at_once_bytes: int = filters.AT_ONCE_BYTES,
    ) -> None:
        self.codec = codec
        self._family = "zstd" if codec == "zstd" else "lz4"
        self._choices = Choices() if choices is None else choices
        self._gathered = np.empty(page_bytes if codec != "none" else 0, np.uint8)
        self._scratch = np.empty(filters.split_bytes(page_bytes) if codec != "none" else 0, np.uint8)
        self._planes = filters.Planes(min(page_bytes, at_once_bytes))
        self._huffman = zstandard.ZstdCompressor(compression_params=_HUFFMAN_ONLY)
        self._zstd1 = zstandard.ZstdCompressor(level=1)
        self.typical = False
        """Whether the last page took no longer than pages do: it was not the first, and nothing was tried on it."""
        self._first = True

    def encode(self, buffers: Sequence[U8], dtype: str, *, site: int = -1, tier: int = BEST) -> EncodedPage:
        """The payload of the page that ``buffers`` make one after another.

        ``site`` is that of all records of the page, or -1; it keys what was learnt of compressing it.
        """
        self.typical, self._first = not self._first, False
        packed = filters.packed_filter(dtype)
        if self.codec == "none" or tier == RAW or (tier == FAST and packed is None):
            return build_payload(self._family, filters.PLAIN, [buffers])
        if len(buffers) > 1 and sum(map(len, buffers)) < _DIRECT_BYTES * len(buffers):
            buffers = [filters.gather(buffers, self._gathered)]
        if tier == FAST and packed is not None:
            return self._packed(packed, buffers)
        choice = self._choices.of(dtype, site)
        self.typical &= not choice.probe
        encoded = (self._zstd if self.codec == "zstd" else self._lz4)(buffers, dtype, choice)
        choice.stored(sum(map(len, buffers)), encoded.payload_bytes)
        return encoded

    def encode_within(
        self,
        buffers: Sequence[U8],
        layouts: Sequence[Layout],
        dtype: str,
        max_relative_error: float,
        *,
        site: int,
    ) -> EncodedPage:
        """As ``encode``, with values that may be off by so much; exact where that takes no more room."""
        if dtype in QUANTISABLE:
            found = quantise(buffers, layouts, dtype, max_relative_error)
            high, low = split_codes(found.codes)
            compress = self._huffman.compress if self.codec == "zstd" else _lz4_compress
            planes: list[Plane] = [_if_smaller(compress(plane.data), plane) for plane in (high, low)]
            if self.codec == "none":
                planes = [[high], [low]]
            rest = np.frombuffer(found.table + found.kept, np.uint8)
            encoded = build_payload(self._family, filters.QUANTISED[dtype], [*planes, [rest]])
            self.typical = True
            # Half the page's rows kept as they are outweigh what the others save.
            if 2 * len(found.kept) < sum(map(len, buffers)):
                return encoded
        return self.encode(buffers, dtype, site=site)

    def encode_directory(self, raw: bytes) -> tuple[int, bytes]:
        """``(encoding, stored bytes)`` of a directory."""
        data = self._zstd1.compress(raw) if self.codec == "zstd" else _lz4_compress(raw)
        return (COMPRESSED, data) if len(data) < len(raw) else (STORED, raw)

    def _packed(self, filter_code: int, buffers: Sequence[U8]) -> EncodedPage:
        return build_payload(self._family, filter_code, [*map(_stored, self._split(filter_code, buffers))])

    def _split(self, filter_code: int, buffers: Sequence[U8]) -> list[U8 | RawFrame]:
        if filter_code == filters.PLAIN:
            return [filters.gather(buffers, self._gathered)]
        if self._family == "zstd":
            return self._planes.split_framed(filter_code, buffers, self._scratch)
        return [*self._planes.split(filter_code, buffers, self._scratch)]

    def _zstd(self, buffers: Sequence[U8], dtype: str, choice: Choice) -> EncodedPage:
        """Huffman-only or zstd-1 for the plane of exponents; the others where a sample says that it pays."""
        filter_code = filters.split_filter(dtype)
        first, *others = self._split(filter_code, buffers)
        assert not isinstance(first, RawFrame)
        planes: list[Plane] = []
        if choice.probe:
            sample = _middle([first], _PROBE_BYTES)
            share = len(sample) / max(1, len(first))
            rest = share * sum(map(len, others))
            huffman, zstd1 = len(self._huffman.compress(sample.data)), len(self._zstd1.compress(sample.data))
            choice.learnt("zstd1" if rest + zstd1 < _MATCHES_WORTH * (rest + huffman) else "huffman")
        compressor = self._zstd1 if choice.method == "zstd1" else self._huffman
        planes.append(_if_smaller(compressor.compress(first.data), first))
        planes += [_compressed(self._zstd1.compress, plane) for plane in others]
        return build_payload("zstd", filter_code, planes)

    def _lz4(self, buffers: Sequence[U8], dtype: str, choice: Choice) -> EncodedPage:
        """Packed exponents where they win, else LZ4 on planes or on the page: LZ4 itself has no entropy coder."""
        packed = filters.packed_filter(dtype)
        if not choice.probe and choice.method == "packed" and packed is not None:
            return self._packed(packed, buffers)
        split = filters.split_filter(dtype)
        if not choice.probe:
            return self._lz4_planes(split if choice.method == "planes" else filters.PLAIN, buffers)
        sample = [_middle(buffers, 2 * _PROBE_BYTES)]
        sizes: dict[str, float] = {"plain": self._lz4_planes(filters.PLAIN, sample).payload_bytes}
        if split != filters.PLAIN:
            sizes["planes"] = self._lz4_planes(split, sample).payload_bytes
        if packed is not None:
            # Three times as fast as LZ4 on the same bytes.
            sizes["packed"] = self._packed(packed, sample).payload_bytes * _LZ4_WORTH
        choice.learnt(min(sizes, key=sizes.__getitem__))
        return self._lz4(buffers, dtype, choice)

    def _lz4_planes(self, filter_code: int, buffers: Sequence[U8]) -> EncodedPage:
        first, *others = self._split(filter_code, buffers)
        planes = [_compressed(_lz4_compress, first, sure=len(first) > 0)]
        planes += [_compressed(_lz4_compress, plane) for plane in others]
        return build_payload("lz4", filter_code, planes)


def _middle(buffers: Sequence[U8], limit: int) -> U8:
    """At most ``limit`` bytes from the middle of a page, cut at multiples of 64."""
    skip = max(0, sum(map(len, buffers)) - limit) // 2 & -64
    parts = []
    for buffer in buffers:
        part = buffer[skip : skip + limit]
        skip = max(0, skip - len(buffer))
        limit -= len(part)
        parts.append(part)
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _lz4_compress(data: Bytes) -> bytes:
    compressed: bytes = lz4.block.compress(data, store_size=False)
    return compressed


def _if_smaller(data: bytes, plane: U8) -> Plane:
    return data if len(data) < _WORTH * len(plane) else [plane]


def _stored(plane: U8 | RawFrame) -> Plane:
    return plane if isinstance(plane, RawFrame) else [plane]


def _compressed(compress: Any, plane: U8 | RawFrame, *, sure: bool = False) -> Plane:
    """A plane compressed where that is ``sure`` to be worth a try, or a sample of it says so, and made it smaller."""
    if not (sure or _pays(compress, plane)):
        return _stored(plane)
    content = filters.joined(plane.blocks) if isinstance(plane, RawFrame) else plane
    return _if_smaller(compress(content.data), content)


def _pays(compress: Any, plane: U8 | RawFrame) -> bool:
    """Whether compressing a plane is worth a try, by a sample of it: 16 KiB, 1 % of the time of a page."""
    if isinstance(plane, RawFrame):
        slices = plane.blocks[0]
        if len(slices) < _SAMPLE_SLICES:
            return _pays(compress, filters.joined(plane.blocks))
        slices = slices[:: len(slices) // _SAMPLE_SLICES]
    else:
        stride = len(plane) // _SAMPLE_SLICES
        if stride <= _SAMPLE_SLICE_BYTES:
            return len(plane) > 0
        slices = plane[: stride * _SAMPLE_SLICES].reshape(_SAMPLE_SLICES, stride)
    sample = np.ascontiguousarray(slices[:_SAMPLE_SLICES, :_SAMPLE_SLICE_BYTES])
    return len(compress(sample.reshape(-1).data)) < 0.98 * sample.size


class _ThreadState(threading.local):
    def __init__(self) -> None:
        self.decompressor = zstandard.ZstdDecompressor()
        self.planes = filters.Planes()


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


def is_in_place(header: BlockHeader) -> bool:
    """Whether the page is stored as it is, in one piece."""
    lz4_family = header.codec != CODEC_CODES["zstd"]
    stored = header.filter == filters.PLAIN and header.plane_encodings[0] == STORED
    return lz4_family and stored and header.raw_bytes > 0


def page_in_place(header: BlockHeader, payload: memoryview) -> U8 | None:
    """The page as a view on its payload, where it is stored in one piece; else None."""
    if not is_in_place(header):
        return None
    data = payload[LEAD_BYTES : LEAD_BYTES + header.raw_bytes]
    if len(data) != header.raw_bytes or header.plane_bytes[0] != header.raw_bytes:
        raise CorruptStreamError(
            f"a stored page has {header.plane_bytes[0]} bytes where {header.raw_bytes} are due"
        )
    return np.frombuffer(data, np.uint8)


def decode_page(header: BlockHeader, payload: memoryview, out: U8 | None = None) -> U8:
    """The raw bytes of a page, from a payload whose checksum was verified; in ``out``, if given."""
    page = np.empty(header.raw_bytes, np.uint8) if out is None else out
    lz4_family = header.codec != CODEC_CODES["zstd"]
    sizes = filters.plane_sizes(header.filter, header.raw_bytes)
    planes: list[filters.Plane] = []
    position = len(LZ4_FRAME_HEAD) if lz4_family else 0
    for size, stored_bytes, encoding in zip(sizes, header.plane_bytes, header.plane_encodings, strict=False):
        if lz4_family and stored_bytes:
            position += LZ4_BLOCK_HEAD_BYTES
        data = payload[position : position + stored_bytes]
        position += stored_bytes
        if len(data) != stored_bytes:
            raise CorruptStreamError("the planes of a block are longer than its payload")
        planes.append(_decode_plane(data, size, encoding, lz4_family))
    if header.filter != filters.PLAIN:
        _thread_state.planes.join(header.filter, planes, page)
    else:
        filters.joined(planes[0], page)
    return page


def _decode_plane(data: memoryview, size: int | None, encoding: int, lz4_family: bool) -> filters.Plane:
    """A plane: decompressed, or views on a stored block or the raw blocks of a stored frame."""
    if encoding == COMPRESSED and size is not None:
        return np.frombuffer((_unlz4 if lz4_family else _unzstd)(data, size), np.uint8)
    if encoding != STORED:
        raise UnsupportedStreamError(
            f"this version does not know encoding {encoding} of a plane of {size} bytes"
        )
    if not lz4_family:
        return stored_zstd_blocks(data, stored_zstd_bytes(len(data)) if size is None else size)
    if size is not None and len(data) != size:
        raise CorruptStreamError(f"a stored plane has {len(data)} bytes where {size} are due")
    return np.frombuffer(data, np.uint8)


def unpack_any(data: bytes, limit: int) -> bytes:
    """The content of one zstd or LZ4 frame, of at most ``limit`` bytes; other data as they are."""
    try:
        if data.startswith(b"\x28\xb5\x2f\xfd"):
            size = zstandard.get_frame_parameters(data).content_size
            if size > limit:
                raise CorruptStreamError(f"a zstd frame says it has {size} bytes")
            return bytes(zstandard.ZstdDecompressor().decompress(data))
        if data.startswith(LZ4_FRAME_MAGIC):
            unpacker = lz4.frame.LZ4FrameDecompressor()
            unpacked: bytes = unpacker.decompress(data, max_length=limit)
            if not unpacker.eof:
                raise CorruptStreamError(f"an LZ4 frame is cut, or has more than {limit} bytes")
            return unpacked
    except (zstandard.ZstdError, RuntimeError) as error:
        raise CorruptStreamError(f"a frame does not decode: {error}") from error
    return data


def backend_versions() -> dict[str, Any]:
    """Versions of the libraries that compress and check, for the metadata of a file."""
    return {
        "crc32": CRC32_LIBRARY,
        "zstandard": zstandard.__version__,
        "zstd": ".".join(map(str, zstandard.ZSTD_VERSION)),
        "lz4": lz4.library_version_string(),
    }
