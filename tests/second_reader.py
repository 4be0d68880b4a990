"""A reader of stream files written from docs/format.md alone: nothing of the library, no NumPy, no torch.

    python tests/second_reader.py FILE...

Slow and simple on purpose. It reads with or without an index, several segments, every filter, and refuses what the
document says to refuse. Prints rank, site, step, call, dtype, shape and crc32 of each record.
"""

from __future__ import annotations

import json
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import lz4.block
import zstandard

DTYPES = {
    1: ("bool", 1), 2: ("uint8", 1), 3: ("int8", 1), 4: ("int16", 2), 5: ("int32", 4), 6: ("int64", 8),
    7: ("uint16", 2), 8: ("uint32", 4), 9: ("uint64", 8), 16: ("float16", 2), 17: ("bfloat16", 2),
    18: ("float32", 4), 19: ("float64", 8), 24: ("complex32", 4), 25: ("complex64", 8), 26: ("complex128", 16),
    32: ("float8_e4m3fn", 1), 33: ("float8_e5m2", 1), 34: ("float8_e4m3fnuz", 1), 35: ("float8_e5m2fnuz", 1),
    36: ("float8_e8m0fnu", 1),
}  # fmt: skip
WIDTHS = {
    1: (1, 1),
    2: (1, 1),
    3: (1, 1, 2),
    4: (1, 1, 2),
    5: (1, 1, 2, 4),
    6: (1, 1),
    7: (1, 1, 2),
    11: (1, 1),
    12: (1, 1, 2),
    13: (1, 1),
    14: (1, 1, 2),
}
PACKED = (6, 7, 13, 14)
TAGS = {
    0x184D2A50: b"FXSTREAM",
    0x184D2A51: b"FXSITES\0",
    0x184D2A52: b"FXBLOCK\0",
    0x184D2A53: b"FXINDEX\0",
    0x184D2A5F: b"FXVOID\0\0",
}
PROLOG, SITES, BLOCK, INDEX, VOID = TAGS
Key = tuple[int, str, int, int]
"""Rank, site, step, call."""


class Segment:
    """What one writer wrote."""

    def __init__(self, body: bytes) -> None:
        fields = struct.unpack_from("<HHBBHI16sIIQ", body)
        self.version, self.codec, flags = fields[:2], fields[2], fields[5]
        if self.version[0] != 1 or flags:
            raise ValueError(f"version {self.version}, flags {flags}")
        self.id, self.rank, self.world, self.created = fields[6][:8], *fields[7:10]
        self.metadata = json.loads(body[struct.calcsize("<HHBBHI16sIIQ") :])
        self.names: dict[int, tuple[str, str]] = {}
        self.parts: dict[tuple[int, int, int], dict[int, bytes]] = {}
        self.about: dict[tuple[int, int, int], tuple[str, tuple[int, ...], tuple[int, ...] | None]] = {}
        self.steps = 0
        self.summary: dict[str, Any] = {}


def frame_at(data: bytes, offset: int) -> tuple[int, bytes, int]:
    """Magic, body and end of the skippable frame at ``offset``."""
    magic, length, tag, body_crc, head_crc = struct.unpack_from("<II8sII", data, offset)
    end = offset + 8 + length
    assert 0x184D2A50 <= magic <= 0x184D2A5F and head_crc == zlib.crc32(data[offset : offset + 20])
    assert magic not in TAGS or TAGS[magic] == tag
    assert end <= len(data)
    body = data[offset + 24 : end]
    assert magic == VOID or body_crc == zlib.crc32(body)
    return magic, body, end


def segments(data: bytes) -> list[Segment]:
    """All segments of a file, walked from the front; the index is used for what only it says."""
    found: list[Segment] = []
    position = 0
    while position < len(data):
        for empty in ("28b52ffd2000010000", "04224d1860707300000000"):
            if data.startswith(bytes.fromhex(empty), position):
                position += len(empty) // 2
        magic, body, end = frame_at(data, position)
        if magic == PROLOG:
            found.append(Segment(body))
        elif magic == SITES:
            add_sites(found[-1], json.loads(body[8:]))
        elif magic == BLOCK:
            end = read_block(found[-1], data, body, end)
        elif magic == INDEX:
            fields = struct.unpack_from("<8sQQQQIIII", body)
            start = struct.calcsize("<8sQQQQIIII") + fields[5] * (40 + fields[6])
            value = json.loads(body[start : start + fields[7]])
            add_sites(found[-1], value)
            found[-1].steps, found[-1].summary = max(found[-1].steps, fields[2]), value["summary"]
        position = end
    return found


def add_sites(segment: Segment, value: dict[str, Any]) -> None:
    segment.names.update({site["id"]: (site["name"], site["role"]) for site in value["sites"]})


def read_block(segment: Segment, data: bytes, body: bytes, payload_start: int) -> int:
    """Add a block's pieces to its segment; where the payload ends."""
    head = struct.Struct("<BBBBI8sQQQQIIIIII4I4BI")
    fields = head.unpack_from(body)
    codec, dtype, code, encoding, num_rows, segment_id = fields[:6]
    assert segment_id == segment.id and codec == segment.codec
    num_shapes, directory_bytes, directory_raw, raw_bytes, payload_bytes, payload_crc = fields[10:16]
    payload = data[payload_start : payload_start + payload_bytes]
    assert len(payload) == payload_bytes and zlib.crc32(payload) == payload_crc
    page = join(code, raw_bytes, planes(codec, code, raw_bytes, payload, fields[16:20], fields[20:24]))
    assert len(page) == raw_bytes
    directory = body[head.size : head.size + directory_bytes]
    if encoding:
        directory = unpack(codec, directory, directory_raw)
    columns, position = [], 0
    for width in (8, 8, 4, 4, 4, 4):
        total, column = 0, []
        for row in range(num_rows):
            raw = bytes(directory[(position + byte) * num_rows + row] for byte in range(width))
            total = (total + int.from_bytes(raw, "little")) % (1 << 8 * width)
            column.append(total)
        columns.append(column)
        position += width
    shapes = read_shapes(directory[32 * num_rows :], num_shapes)
    rows = list(zip(*columns, strict=True))
    for number, (step, part, site, call, shape, offset) in enumerate(rows):
        end = rows[number + 1][5] if number + 1 < num_rows else raw_bytes
        segment.parts.setdefault((site, step, call), {})[part] = page[offset:end]
        segment.about[site, step, call] = (DTYPES[dtype][0], *shapes[shape])
        segment.steps = max(segment.steps, step + 1)
    return payload_start + payload_bytes


def read_shapes(data: bytes, count: int) -> list[tuple[tuple[int, ...], tuple[int, ...] | None]]:
    shapes, position = [], 0
    for _ in range(count):
        dims, full = data[position], data[position + 1]
        sizes = struct.unpack_from(f"<{dims + max(0, full - 1)}Q", data, position + 2)
        shapes.append((sizes[:dims], sizes[dims:] if full else None))
        position += 2 + 8 * len(sizes)
    return shapes


def unpack(codec: int, data: bytes, size: int) -> bytes:
    if codec == 2:
        return zstandard.ZstdDecompressor().decompress(data)
    return lz4.block.decompress(data, uncompressed_size=size)


def planes(
    codec: int, code: int, raw_bytes: int, payload: bytes, stored: tuple[int, ...], encodings: tuple[int, ...]
) -> list[bytes]:
    if code in (8, 9, 10):
        count = raw_bytes // (4 if code == 8 else 2)
        sizes = [count, count, None]
    elif code:
        count = raw_bytes // sum(WIDTHS[code])
        sizes = [width * count for width in WIDTHS[code]]
        if code in PACKED:
            sizes = [(count + 1) // 2, *sizes[1:], None]
    else:
        sizes = [raw_bytes]
    found, position = [], 0 if codec == 2 else 7
    for size, num_bytes, encoding in zip(sizes, stored, encodings, strict=False):
        position += 4 if codec != 2 and num_bytes else 0
        part = payload[position : position + num_bytes]
        position += num_bytes
        if codec == 2 or encoding:
            part = unpack(codec, part, size or 0) if part else b""
        assert size is None or len(part) == size
        found.append(part)
    return found


def join(code: int, raw_bytes: int, parts: list[bytes]) -> bytes:
    """A page from its planes."""
    if code == 0:
        return parts[0]
    if code in (8, 9, 10):
        return dequantise(code, *parts)
    widths = WIDTHS[code]
    bits = 8 * sum(widths)
    count = raw_bytes // sum(widths)
    if code in PACKED:
        parts = [exponents(parts[0], parts[-1], count), *parts[1:-1]]
    page = bytearray()
    for number in range(count):
        value = 0
        for width, plane in zip(widths, parts, strict=True):
            part = plane[number * width : (number + 1) * width]
            value = value << 8 * width | int.from_bytes(part, "little")
        if code in (2, 4, 6, 7):
            value = value >> 1 | (value & 1) << (bits - 1)
        if code in (11, 12, 13, 14):
            exponent, sign = value >> (bits - 8), value >> (bits - 9) & 1
            value = sign << (bits - 1) | exponent << (bits - 9) | value & ((1 << bits - 9) - 1)
        page += value.to_bytes(bits // 8, "little")
    return bytes(page)


def exponents(nibbles: bytes, exceptions: bytes, count: int) -> bytes:
    pieces = -(-count // 32768)
    tops, escaped = exceptions[:pieces], iter(exceptions[pieces:])
    found = bytearray()
    for number, top in enumerate(tops):
        m = min(32768, count - 32768 * number)
        half = (m + 1) // 2
        stored = nibbles[16384 * number : 16384 * number + half]
        codes = [byte & 15 for byte in stored] + [byte >> 4 for byte in stored][: m - half]
        found += bytes(next(escaped) if code == 15 else (top - code) % 256 for code in codes)
    assert next(escaped, None) is None
    return bytes(found)


def dequantise(code: int, high: bytes, low: bytes, rows: bytes) -> bytes:
    (num_runs,) = struct.unpack_from("<I", rows)
    runs = [struct.unpack_from("<II", rows, 4 + 8 * number) for number in range(num_runs)]
    position = 4 + 8 * num_runs
    kept = position + 2 * sum(count for _, count in runs)
    signed = struct.Struct(f"<{len(high)}b")
    codes = [256 * h + b for h, b in zip(signed.unpack(high), signed.unpack(low), strict=True)]
    width = 4 if code == 8 else 2
    page, taken = bytearray(), 0
    for elements, count in runs:
        for _ in range(count):
            (bits,) = struct.unpack_from("<H", rows, position)
            (step,) = struct.unpack("<f", struct.pack("<I", bits << 16))
            position += 2
            if step != step:
                page += rows[kept : kept + elements * width]
                kept += elements * width
            else:
                page += b"".join(rounded(code, c * step) for c in codes[taken : taken + elements])
            taken += elements
    return bytes(page)


def rounded(code: int, value: float) -> bytes:
    # 16 bits of code by 8 of step are exact in float32, so that Python's doubles round nothing.
    if code == 10:
        return struct.pack("<e", value)
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    if code == 8:
        return struct.pack("<I", bits)
    return struct.pack("<H", (bits + 0x7FFF + (bits >> 16 & 1)) >> 16)


def records(*files: bytes) -> dict[Key, tuple[str, tuple[int, ...], tuple[int, ...] | None, bytes]]:
    """Rank, site, step and call -> dtype, shape, full shape and bytes, of all files as one; inputs among them."""
    found: dict[Key, tuple[str, tuple[int, ...], tuple[int, ...] | None, bytes]] = {}
    steps_before: dict[int, int] = {}
    everything = [segment for data in files for segment in segments(data)]
    for segment in sorted(everything, key=lambda segment: (segment.rank, segment.created)):
        first = steps_before.get(segment.rank, 0)
        for (site, step, call), parts in segment.parts.items():
            dtype, shape, full = segment.about[site, step, call]
            data = b"".join(parts[offset] for offset in sorted(parts))
            due = dict(DTYPES.values())[dtype]
            for size in shape:
                due *= size
            if len(data) == due:
                key = (segment.rank, segment.names[site][0], first + step, call)
                found[key] = (dtype, shape, full, data)
        steps_before[segment.rank] = first + segment.steps
    return found


if __name__ == "__main__":
    for key, (dtype, shape, _, data) in records(*(Path(name).read_bytes() for name in sys.argv[1:])).items():
        print(*key, dtype, shape, f"{zlib.crc32(data):08x}")
