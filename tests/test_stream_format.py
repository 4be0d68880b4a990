"""The bytes of the format stay as docs/format.md says: golden files, a second reader, and the standard tools."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import uuid
import zlib
from pathlib import Path
from typing import Any

import lz4.frame
import numpy as np
import pytest
import zstandard
from stream_files import CODECS, Sample, contents, floats, write

from fx_instrument.stream import filters
from fx_instrument.stream import writer as writer_module
from fx_instrument.stream.blocks import BLOCK_FIXED_BYTES, BlockHeader
from fx_instrument.stream.codec import PageEncoder, decode_page
from fx_instrument.stream.frames import BLOCK, CODEC_CODES, read_frame
from fx_instrument.stream.reader import StreamReader
from fx_instrument.stream.records import DTYPES
from fx_instrument.stream.segments import parse_block
from fx_instrument.stream.tiers import BEST, FAST, RAW

GOLDEN = Path(__file__).parent / "golden"


def golden_samples() -> list[Sample]:
    """Every filter but the packed ones, parts, an input, a sampled record, an empty one, a scalar."""
    ramp = np.linspace(-3, 3, 600, dtype=np.float32)
    bf16 = (ramp.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return [
        Sample("input_ids", 0, np.arange(12, dtype=np.int64).tobytes(), "int64", (2, 6), role="input"),
        Sample("model.layers.0.attn", 0, bf16, "bfloat16", (2, 3, 100), role="attention"),
        Sample("model.layers.0.mlp", 0, ramp.tobytes(), "float32", (600,), full_shape=(2, 300, 7)),
        Sample("model.layers.0.mlp", 0, ramp.astype(np.float16).tobytes(), "float16", (600,), call=1),
        Sample("norm", 1, ramp.astype(np.float64).tobytes(), "float64", (600,), role="other"),
        Sample("norm", 2, b"", "bfloat16", (0, 4), role="other"),
        Sample("norm", 3, ramp[:1].tobytes(), "float32", (), role="other"),
    ]


def write_golden(path: Path, codec: str, monkeypatch: pytest.MonkeyPatch) -> bytes:
    monkeypatch.setattr(
        writer_module.uuid, "uuid4", lambda: uuid.UUID(int=0x0123456789ABCDEF0123456789ABCDEF)
    )
    monkeypatch.setattr(writer_module.time, "time_ns", lambda: 1_700_000_000_000_000_000)
    write(
        path,
        golden_samples(),
        codec=codec,
        page_bytes=2048,
        num_workers=1,
        metadata={"model": {"class": "Tiny"}, "note": "é"},
        summary={"num_steps": 5},
    )
    return path.read_bytes()


def test_stored_files_are_written_byte_for_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file without compression is, byte for byte, the one that version 1.0 wrote."""
    assert write_golden(tmp_path / "a.stream", "none", monkeypatch) == (GOLDEN / "none.bin").read_bytes()


@pytest.mark.parametrize("codec", CODECS)
def test_golden_files_are_read(codec: str) -> None:
    """Files that version 1.0 wrote are read, whatever the compression libraries have become."""
    with StreamReader(GOLDEN / f"{codec}.bin") as reader:
        assert contents(reader) == {sample.key: sample.data for sample in golden_samples()}
        assert reader.verify() == [] and reader.version == (1, 0) and reader.codec == codec
        assert reader.num_records == 6 and reader.num_steps == 5
        assert reader.metadata["note"] == "é"
        sampled = reader.find(2, 0)
        assert sampled is not None and sampled.full_shape == (2, 300, 7)


def test_packed_exponents_are_as_documented() -> None:
    """The planes of a packed page are, byte for byte, nibbles, low bytes and exceptions as documented."""
    values = np.array([0x3F80, 0xBF80, 0x4000, 0x0000, 0x3FC1, 0x7F80, 0x3F00], np.uint16)
    scratch = np.empty(100, np.uint8)
    nibbles, low, exceptions = filters.Planes().split(filters.PACKED16, [values.view(np.uint8)], scratch)
    # Exponents 7f 7f 80 00 7f ff 7e: the lowest top that covers most of them is 80.
    assert exceptions.tobytes().hex() == "8000ff"
    assert nibbles.tobytes().hex() == "11f1200f"
    assert low.tobytes().hex() == "00010000820000"


class SecondReader:
    """Reads a one-segment file with what docs/format.md says, and nothing of the library."""

    def __init__(self, data: bytes) -> None:
        self.records: dict[tuple[str, int, int], bytes] = {}
        frame_bytes, crc, magic = struct.unpack("<II8s", data[-16:])
        assert magic == b"FXSTREND" and crc == zlib.crc32(data[-16:-12])
        body = self.frame(data, len(data) - frame_bytes, 0x184D2A53, b"FXINDEX\0")
        _, segment_bytes, self.num_steps, _, _, num_blocks, bitmap_bytes, json_bytes, _ = struct.unpack_from(
            "<8sQQQQIIII", body
        )
        assert segment_bytes == len(data)
        row_bytes = 40 + bitmap_bytes
        text = body[56 + num_blocks * row_bytes :][:json_bytes]
        self.names = {site["id"]: site["name"] for site in json.loads(text)["sites"]}
        for number in range(num_blocks):
            row = body[56 + number * row_bytes :][:row_bytes]
            offset, _, _, length = struct.unpack_from("<QQQI", row)
            self.block(data, offset, length)

    @staticmethod
    def frame(data: bytes, offset: int, kind: int, tag: bytes) -> bytes:
        magic, length, found, body_crc, head_crc = struct.unpack_from("<II8sII", data, offset)
        body = data[offset + 24 : offset + 8 + length]
        assert (magic, found) == (kind, tag)
        assert head_crc == zlib.crc32(data[offset : offset + 20]) and body_crc == zlib.crc32(body)
        return body

    def block(self, data: bytes, offset: int, length: int) -> None:
        body = self.frame(data, offset, 0x184D2A52, b"FXBLOCK\0")
        fields = struct.unpack_from("<BBBBI8sQQQQIIIIII4I4BI", body)
        codec, _, code, encoding, num_rows = fields[:5]
        num_shapes, directory_bytes, directory_raw, raw_bytes, payload_bytes, payload_crc = fields[10:16]
        payload = data[offset + 24 + len(body) : offset + length]
        assert len(payload) == payload_bytes and zlib.crc32(payload) == payload_crc
        if codec == 2:
            plane_bytes = [
                zstandard.ZstdDecompressor().decompress(frame)
                for frame in split_at(payload, [size for size in fields[16:20] if size])
            ]
            values = b"".join(plane_bytes)
        else:
            values = lz4.frame.decompress(payload)
        page = self.page(code, values, raw_bytes)
        directory = body[96 : 96 + directory_bytes]
        if encoding:
            unpack = zstandard.ZstdDecompressor().decompress if codec == 2 else None
            directory = unpack(directory) if unpack else lz4.block.decompress(directory, directory_raw)
        table = np.frombuffer(directory, np.uint8, 32 * num_rows).reshape(32, num_rows).T.copy()
        columns: dict[str, list[int]] = {}
        position = 0
        for name, width in (("step", 8), ("part", 8), ("site", 4), ("call", 4), ("shape", 4), ("offset", 4)):
            column = table[:, position : position + width].copy().view(f"<u{width}").reshape(-1)
            columns[name] = np.cumsum(column, dtype=f"u{width}").tolist()
            position += width
        shapes = directory[32 * num_rows :]
        assert num_shapes <= num_rows and len(shapes) >= 2 * num_shapes
        for row in range(num_rows):
            start = columns["offset"][row]
            end = columns["offset"][row + 1] if row + 1 < num_rows else raw_bytes
            key = (self.names[columns["site"][row]], columns["step"][row], columns["call"][row])
            before = self.records.get(key, b"")
            assert len(before) == columns["part"][row]
            self.records[key] = before + page[start:end]

    @staticmethod
    def page(code: int, values: bytes, raw_bytes: int) -> bytes:
        widths = {0: (1,), 1: (1, 1), 2: (1, 1), 3: (1, 1, 2), 4: (1, 1, 2), 5: (1, 1, 2, 4)}[code]
        count = raw_bytes // sum(widths)
        if code == 0:
            return values
        bits = 8 * sum(widths)
        elements = [0] * count
        for width, plane in zip(widths, split_at(values, [width * count for width in widths]), strict=True):
            for number in range(count):
                part = int.from_bytes(plane[number * width : (number + 1) * width], "little")
                elements[number] = elements[number] << 8 * width | part
        if code in (2, 4):
            elements = [(value >> 1) | (value & 1) << (bits - 1) for value in elements]
        return b"".join(value.to_bytes(bits // 8, "little") for value in elements)


def split_at(data: bytes, sizes: list[int]) -> list[bytes]:
    parts = []
    for size in sizes:
        parts.append(data[:size])
        data = data[size:]
    return parts


@pytest.mark.parametrize("codec", CODECS)
def test_the_document_is_enough_to_read_a_file(codec: str) -> None:
    """A reader written from docs/format.md alone reads the golden files."""
    reader = SecondReader((GOLDEN / f"{codec}.bin").read_bytes())
    assert reader.records == {sample.key: sample.data for sample in golden_samples()}
    assert reader.num_steps == 5


@pytest.mark.parametrize("codec", CODECS)
def test_command_line_tools_decode_files(tmp_path: Path, codec: str) -> None:
    """The distribution's zstd or lz4 tests a file, and decodes it to the planes of its pages, one after another."""
    tool = "zstd" if codec == "zstd" else "lz4"
    if shutil.which(tool) is None:
        pytest.skip(f"the {tool} tool is not installed")
    samples = [
        *golden_samples(),
        Sample("a", 7, floats(300_000), "bfloat16"),
        Sample("ids", 7, bytes(range(256)) * 8 * 400, "int64", role="input"),
        Sample("b", 7, floats(70_001, 2, "float32"), "float32"),
    ]
    path = write(tmp_path / "a.stream", samples, codec=codec)
    joined = tmp_path / "joined.stream"
    joined.write_bytes(path.read_bytes() * 2)
    subprocess.run([tool, "-t", "-q", str(joined)], check=True)
    output = subprocess.run([tool, "-d", "-c", "-q", str(joined)], check=True, capture_output=True).stdout
    expected = b""
    data = memoryview(path.read_bytes())
    with StreamReader(path) as reader:
        for offset in reader.segments[0].block_offsets.tolist():
            block = parse_block(data, read_frame(data, offset))
            page = decode_page(block.header, block.payload(data))
            scratch = np.empty(len(page) + 64, np.uint8)
            planes = [page]
            if block.header.filter:
                planes = filters.Planes().split(block.header.filter, [page], scratch)
            expected += b"".join(plane.tobytes() for plane in planes)
    assert output == 2 * expected


def encoded(codec: str, tier: int, dtype: str, data: np.ndarray[Any, Any]) -> tuple[int, int]:
    """``(filter, payload bytes)`` of a page that was encoded and decoded again."""
    raw = data.view(np.uint8)
    encoder = PageEncoder(codec, 4 << 20)
    page = encoder.encode([raw], dtype, tier=tier)
    payload = b"".join(bytes(piece) for piece in page.pieces)
    assert zlib.crc32(payload) == page.payload_crc and len(payload) == page.payload_bytes
    header = BlockHeader(
        page.plane_bytes,
        page.plane_encodings,
        CODEC_CODES[codec],
        DTYPES[dtype][0],
        page.filter,
        0, 0, bytes(8), 0, 0, 0, 0, 0, 0, 0, len(raw), len(payload), page.payload_crc,
    )  # fmt: skip
    assert decode_page(header, memoryview(payload)).tobytes() == raw.tobytes()
    return page.filter, len(payload)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("tier", [RAW, FAST, BEST])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64", "int64", "uint8"])
def test_every_tier_comes_back(codec: str, tier: int, dtype: str) -> None:
    """Each tier of each codec gives any page back, also where pieces and words don't come out even."""
    for count in (0, 1, 2, 7, 8, 32767, 32768, 32769, 100_003):
        encode_noise_and_values(codec, tier, dtype, count)


def encode_noise_and_values(codec: str, tier: int, dtype: str, count: int) -> None:
    width = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8, "int64": 8, "uint8": 1}[dtype]
    rng = np.random.default_rng(count)
    noise = np.frombuffer(rng.bytes(count * width), np.uint8)
    encoded(codec, tier, dtype, noise)
    kind = dtype if dtype in ("bfloat16", "float32", "float64", "float16") else "float32"
    smooth = np.frombuffer(floats(count, 1, kind) * 4, np.uint8)[: count * width].copy()
    encoded(codec, tier, dtype, smooth)
    smooth[: len(smooth) // 2] = 0
    encoded(codec, tier, dtype, smooth)


def test_each_tier_earns_its_place() -> None:
    """On normal bfloat16 values the tiers are in order of ratio, and repetition is found by probing."""
    normal = np.frombuffer(floats(1 << 20), np.uint8)
    raw, fast, best = (
        len(normal) / encoded("zstd", tier, "bfloat16", normal)[1] for tier in (RAW, FAST, BEST)
    )
    assert raw < 1 < 1.32 < fast < 1.34 < 1.45 < best
    assert encoded("lz4", BEST, "bfloat16", normal)[0] == filters.PACKED16
    repeated = np.tile(normal[:8192], 128)
    for codec in ("lz4", "zstd"):
        assert len(repeated) / encoded(codec, BEST, "bfloat16", repeated)[1] > 20
    sparse = normal.view(np.uint16) * (np.random.default_rng(0).random(1 << 20) < 0.1).astype(np.uint16)
    assert 3 * encoded("zstd", BEST, "bfloat16", sparse)[1] < 2 << 20
    assert 2 * encoded("lz4", BEST, "bfloat16", sparse)[1] < 2 << 20


def test_a_directory_row_costs_less_than_four_bytes(tmp_path: Path) -> None:
    """What the format adds to a record of 1 KiB is at most 4 bytes in a full page, header and index included."""
    samples = [Sample(f"s{n}", step, bytes(1024), "bfloat16") for step in range(60) for n in range(60)]
    for codec in CODECS:
        path = write(tmp_path / "a.stream", samples, codec=codec)
        data = memoryview(path.read_bytes())
        position, payload = len(data[: bytes(data).index(b"FXSTREAM") - 8]), 0
        while position < len(data):
            frame = read_frame(data, position)
            position = frame.end
            if frame.kind == BLOCK:
                header = parse_block(data, frame).header
                payload += header.payload_bytes
                position += header.payload_bytes
        assert (len(data) - payload) / len(samples) <= 4
    assert BLOCK_FIXED_BYTES == 120
