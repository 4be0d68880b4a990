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

from ..errors import CorruptStreamError, TruncatedStreamError, UnsupportedStreamError
from .records import SiteEntry

VERSION = (1, 2)
ALIGNMENT = 64
"""Values of uncompressed payloads, and segments, start at multiples of this, so that mapped values are aligned."""

Bytes: TypeAlias = "bytes | bytearray | memoryview"

FRAME_HEAD = struct.Struct("<II8sII")
SKIPPABLE_MIN, SKIPPABLE_MAX = 0x184D2A50, 0x184D2A5F
PROLOG, SITES, BLOCK, INDEX, FILL, VOID = (
    0x184D2A50,
    0x184D2A51,
    0x184D2A52,
    0x184D2A53,
    0x184D2A5E,
    0x184D2A5F,
)
TAGS = {
    PROLOG: b"FXSTREAM",
    SITES: b"FXSITES\0",
    BLOCK: b"FXBLOCK\0",
    INDEX: b"FXINDEX\0",
    FILL: b"FXFILL\0\0",
    VOID: b"FXVOID\0\0",
}
TAIL = struct.Struct("<II8s")
TAIL_MAGIC = b"FXSTREND"

CODEC_CODES = {"none": 0, "lz4": 1, "zstd": 2}
CODEC_NAMES = {code: name for name, code in CODEC_CODES.items()}


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


def write_fill(num_bytes: int) -> bytes:
    """A frame of ``num_bytes`` that says nothing; empty for 0, else at least a frame head."""
    return write_frame(FILL, bytes(num_bytes - FRAME_HEAD.size)) if num_bytes else b""


def write_void_head(num_bytes: int) -> bytes:
    """The head that turns ``num_bytes`` of damaged file into a frame that every reader skips."""
    head = FRAME_HEAD.pack(VOID, num_bytes - 8, TAGS[VOID], 0, 0)[:-4]
    return head + struct.pack("<I", zlib.crc32(head))


def dump_json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=True).encode()


def load_json(data: Bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(bytes(data))
    except (ValueError, RecursionError) as error:
        raise CorruptStreamError(f"the {what} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise CorruptStreamError(f"the {what} is no JSON object")
    return value


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
        return write_frame(PROLOG, head + dump_json(self.metadata))

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
        metadata = load_json(body[_PROLOG.size :], "metadata of the prolog")
        return cls(CODEC_NAMES[codec], uuid, metadata, rank, world, created_ns, (major, minor))


SEGMENT_ID_BYTES = 8
"""The first bytes of the uuid stand in every frame: a frame of another file inside a payload is none of ours."""


def site_to_json(site: SiteEntry) -> dict[str, Any]:
    return {"id": site.id, "name": site.name, "role": site.role}


@dataclass(frozen=True, slots=True)
class Earlier:
    """What a file that is gone on with says of the captures before, where its index was."""

    num_steps: int = 0
    summaries: list[dict[str, Any]] = field(default_factory=list)
    """Those that no earlier frame holds."""


def write_sites(sites: Sequence[SiteEntry], segment_id: bytes, earlier: Earlier | None = None) -> bytes:
    """A sites frame; its body is the segment's id, then ``{"sites": [{"id", "name", "role"}, ...]}``, and where a file
    is gone on with ``"num_steps"`` and ``"earlier_summaries": [{}, ...]``."""
    value: dict[str, Any] = {"sites": [site_to_json(site) for site in sites]}
    if earlier is not None:
        value |= {"num_steps": earlier.num_steps, "earlier_summaries": earlier.summaries}
    return write_frame(SITES, segment_id + dump_json(value))


def sites_of(value: Mapping[str, Any], what: str) -> list[SiteEntry]:
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


def read_sites(body: memoryview) -> tuple[list[SiteEntry], Earlier]:
    """The sites that a sites frame adds, and what it says of earlier captures."""
    value = load_json(body[SEGMENT_ID_BYTES:], "site table")
    num_steps, summaries = value.get("num_steps", 0), value.get("earlier_summaries", [])
    if (
        not (isinstance(num_steps, int) and 0 <= num_steps < 1 << 64)
        or not isinstance(summaries, list)
        or not all(isinstance(summary, dict) for summary in summaries)
    ):
        raise CorruptStreamError("what the site table says of earlier captures makes no sense")
    return sites_of(value, "site table"), Earlier(num_steps, summaries)


def segment_id_of(frame: Frame) -> bytes | None:
    """The segment that a sites frame, a block header or an index says it belongs to."""
    start = {SITES: 0, BLOCK: 8, INDEX: 0}.get(frame.kind)
    return None if start is None else bytes(frame.body[start : start + SEGMENT_ID_BYTES])
