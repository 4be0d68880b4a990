"""The bytes of the format stay as docs/format.md says: golden files, a second reader, and the standard tools."""

from __future__ import annotations

import shutil
import struct
import subprocess
import uuid
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import second_reader
from stream_files import CODECS, Sample, contents, floats, write

from fx_instrument.errors import UnsupportedStreamError
from fx_instrument.stream import filters
from fx_instrument.stream import writer as writer_module
from fx_instrument.stream.blocks import BLOCK_FIXED_BYTES, BlockHeader
from fx_instrument.stream.codec import PageEncoder, decode_page
from fx_instrument.stream.frames import BLOCK, CODEC_CODES, FRAME_HEAD, PROLOG, read_frame
from fx_instrument.stream.payload import RawFrame, build_payload, stored_zstd_blocks
from fx_instrument.stream.reader import StreamReader
from fx_instrument.stream.records import DTYPES
from fx_instrument.stream.segments import empty_frame_at, parse_block
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


def golden(codec: str, version: tuple[int, int]) -> Path:
    return GOLDEN / ".".join(map(str, version)) / f"{codec}.bin"


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
    """A file without compression is, byte for byte, the one that version 1.2 wrote."""
    written = write_golden(tmp_path / "a.stream", "none", monkeypatch)
    assert written == (GOLDEN / "1.2" / "none.bin").read_bytes()


@pytest.mark.parametrize("version", [(1, 0), (1, 1), (1, 2)])
@pytest.mark.parametrize("codec", CODECS)
def test_golden_files_are_read(codec: str, version: tuple[int, int]) -> None:
    """Files of every version are read, whatever the compression libraries have become."""
    with StreamReader(golden(codec, version)) as reader:
        assert contents(reader) == {sample.key: sample.data for sample in golden_samples()}
        assert reader.verify() == [] and reader.version == version and reader.codec == codec
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


@pytest.mark.parametrize("values", [np.uint16, np.uint32])
def test_signed_planes_are_as_documented(values: type[np.unsignedinteger[Any]]) -> None:
    """Exponents, then the sign above the mantissa's first seven bits, then the rest of the mantissa."""
    bits = 8 * np.dtype(values).itemsize
    page = np.random.default_rng(0).integers(0, 1 << bits, 70_000, values)
    code = filters.SIGNED16 if bits == 16 else filters.SIGNED32
    planes = filters.Planes().split(code, [page.view(np.uint8)], np.empty(page.nbytes, np.uint8))
    upper = (page >> (bits - 16)).astype(np.uint16)
    due = [(upper >> 7) & 0xFF, (upper >> 15 << 7) | (upper & 0x7F), page & 0xFFFF]
    assert len(planes) == bits // 16 + 1
    for plane, values_due in zip(planes, due, strict=False):
        assert np.array_equal(plane.view(f"<u{len(plane) // len(page)}"), values_due)


@pytest.mark.parametrize("code", sorted(second_reader.WIDTHS))
@pytest.mark.parametrize("num_bytes", [8 * 33_001, 8 * 330_001])
def test_every_filter_is_undone(code: int, num_bytes: int) -> None:
    """By the library and by the reader written from the document, those too that this version does not write."""
    page = np.frombuffer(np.random.default_rng(code).bytes(num_bytes), np.uint8)
    planes = filters.Planes().split(code, [page], np.empty(len(page) + 64, np.uint8))
    for how in (filters.Planes(), filters.Planes(filters.AT_ONCE_BYTES)):
        again = how.split(code, [page], np.empty(len(page) + 64, np.uint8))
        assert [plane.tobytes() for plane in again] == [plane.tobytes() for plane in planes]
        joined = np.zeros_like(page)
        how.join(code, planes, joined)
        assert np.array_equal(joined, page)
    assert np.array_equal(joined, page)
    assert second_reader.join(code, len(page), [plane.tobytes() for plane in planes]) == page.tobytes()


@pytest.mark.parametrize("code", [code for code, widths in second_reader.WIDTHS.items() if len(widths) > 1])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("count", [1, 65_536, 131_071, 131_072, 140_000, 524_288, 700_001])
def test_planes_are_joined_where_they_are_stored(code: int, shift: int, count: int) -> None:
    """In the raw blocks of zstd frames, at any address, pages of one piece and of several, some with a rest."""
    page = np.frombuffer(
        np.random.default_rng(count).bytes(count * sum(second_reader.WIDTHS[code])), np.uint8
    )
    planes = filters.Planes().split(code, [page], np.empty(len(page) + 64, np.uint8))
    stored = []
    for plane in planes:
        frame = b"".join(map(bytes, build_payload("zstd", filters.PLAIN, [[plane]]).pieces))
        memory = np.frombuffer(bytes(shift) + frame, np.uint8)
        stored.append(stored_zstd_blocks(memory[shift:].data, len(plane)))
    joined = np.zeros_like(page)
    filters.Planes().join(code, stored, joined)
    assert np.array_equal(joined, page)


@pytest.mark.parametrize("code", [code for code in second_reader.WIDTHS if code >= filters.SIGNED16])
@pytest.mark.parametrize("count", [0, 1, 131_071, 131_072, 140_000, 524_289, 1_000_001])
def test_a_frame_made_before_its_plane_is_the_frame_around_it(code: int, count: int) -> None:
    """Byte for byte, whatever is split in one go."""
    page_bytes = count * sum(second_reader.WIDTHS[code])
    page = np.frombuffer(np.random.default_rng(count).bytes(page_bytes), np.uint8)
    planes = filters.Planes().split(code, [page], np.empty(page_bytes, np.uint8))
    due = build_payload("zstd", code, [[plane] for plane in planes])
    for how in (filters.Planes(), filters.Planes(filters.AT_ONCE_BYTES)):
        found = how.split_framed(code, [page], np.empty(filters.split_bytes(page_bytes), np.uint8))
        assert isinstance(found[1], RawFrame)
        payload = build_payload("zstd", code, [p if isinstance(p, RawFrame) else [p] for p in found])
        assert b"".join(map(bytes, payload.pieces)) == b"".join(map(bytes, due.pieces))
        assert payload.payload_crc == due.payload_crc and payload.plane_bytes == due.plane_bytes


def test_a_file_of_the_version_before_is_gone_on_with(tmp_path: Path) -> None:
    """New blocks behind those of 1.0: all of it is read, by both readers."""
    path = tmp_path / "a.stream"
    shutil.copy(golden("zstd", (1, 0)), path)
    more = Sample("model.layers.0.mlp", 9, floats(600, 1), "bfloat16", (600,))
    write(path, [more], codec="zstd", mode="a")
    due = {sample.key: sample.data for sample in (*golden_samples(), more)}
    with StreamReader(path) as reader:
        assert contents(reader) == due and reader.verify() == []
    found = second_reader.records(path.read_bytes())
    assert {key[1:]: record[3] for key, record in found.items()} == due


@pytest.mark.parametrize("version", [(1, 0), (1, 1), (1, 2)])
@pytest.mark.parametrize("codec", CODECS)
def test_the_document_is_enough_to_read_a_file(codec: str, version: tuple[int, int]) -> None:
    """A reader written from docs/format.md alone reads the golden files, with their index and without."""
    data = golden(codec, version).read_bytes()
    (segment,) = second_reader.segments(data)
    assert segment.steps == 5 and segment.metadata["note"] == "é" and segment.summary == {"num_steps": 5}
    index_bytes = struct.unpack_from("<I", data, len(data) - 16)[0]
    for part in (data, data[:-index_bytes]):
        found = second_reader.records(part)
        assert {key[1:]: record[3] for key, record in found.items()} == {
            sample.key: sample.data for sample in golden_samples()
        }
    for sample in golden_samples():
        assert found[(0, *sample.key)][:3] == (sample.dtype, sample.stored_shape, sample.full_shape)


def hard_samples() -> list[Sample]:
    """What packing and quantising have to do with: exceptions, odd lengths, rows kept as they are."""
    rng = np.random.default_rng(5)
    samples = []
    for number, (dtype, width) in enumerate((("bfloat16", 33), ("float32", 40), ("float16", 31))):
        values = rng.standard_normal((7, width)).astype(np.float32)
        values[2] = 0
        values[3, :5] = [np.inf, -np.inf, np.nan, 1e-30, -6e4]
        values[4] *= 1e-20 if dtype == "bfloat16" else 1
        data = (
            (values.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else values.astype(dtype)
        )
        samples.append(Sample("mlp", number, data.tobytes(), dtype, (7, width)))
    samples.append(Sample("long", 3, floats(33_001, 3), "bfloat16", (33_001,)))
    return samples


def write_hard(path: Path, kind: str, codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed planes only, or values within an error of a hundredth."""
    if kind == "packed":
        monkeypatch.setattr(writer_module.TierControl, "choose", lambda control, dtype: FAST)
    error = 0.01 if kind == "quantised" else None
    write(path, hard_samples(), codec=codec, num_workers=1, max_relative_error=error)


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
@pytest.mark.parametrize(
    ("kind", "kept", "filters_due"),
    [("packed", "", {6, 7}), ("packed", "1.2", {13, 14}), ("quantised", "", {8, 9, 10})],
)
def test_packed_and_quantised_files_are_read_by_both_readers(
    tmp_path: Path,
    kind: str,
    codec: str,
    kept: str,
    filters_due: set[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The reader written from the document and the library's agree, bit for bit, on old files and on new ones."""
    write_hard(tmp_path / "new.stream", kind, codec, monkeypatch)
    golden_path = GOLDEN / kept / f"{kind}-{codec}.bin"
    for path in (tmp_path / "new.stream", golden_path):
        data = path.read_bytes()
        with StreamReader(path) as reader:
            expected = contents(reader)
            blocks = [
                parse_block(memoryview(data), read_frame(memoryview(data), offset))
                for offset in reader.segments[0].block_offsets.tolist()
            ]
        due = {13, 14} if kind == "packed" and path != golden_path else filters_due
        assert {block.header.filter for block in blocks} >= due
        found = second_reader.records(data)
        assert {key[1:]: record[3] for key, record in found.items()} == expected
        if kind == "packed":
            assert expected == {sample.key: sample.data for sample in hard_samples()}
    with StreamReader(golden_path) as old, StreamReader(tmp_path / "new.stream") as new:
        assert contents(old).keys() == contents(new).keys()


def test_joined_files_are_numbered_as_documented(tmp_path: Path) -> None:
    """Both readers give the records of several ranks and files the same ranks and steps."""
    files = []
    for number, (rank, created) in enumerate(((1, 5), (0, 9), (0, 3))):
        samples = [Sample("mlp", step, floats(20, 10 * number + step)) for step in range(2)]
        path = tmp_path / f"{number}.stream"
        files.append(write(path, samples, rank=rank, created_ns=created, summary={"num_steps": 3}))
    joined = tmp_path / "joined.stream"
    joined.write_bytes(b"".join(file.read_bytes() for file in files))
    expected = {(1, 0): 0, (1, 1): 1, (0, 3): 10, (0, 4): 11, (0, 0): 20, (0, 1): 21}
    found = second_reader.records(joined.read_bytes())
    assert {(rank, step): data for (rank, _, step, _), (*_, data) in found.items()} == {
        place: floats(20, seed) for place, seed in expected.items()
    }
    for source in (joined, files):
        with StreamReader(source) as reader:
            got = {(ref.rank, ref.step): reader.read(ref).tobytes() for ref in reader.refs(0)}
            assert got == {place: floats(20, seed) for place, seed in expected.items()}


def rewritten(data: bytes, change: Any) -> bytes:
    """The file with each frame's body as ``change(kind, body)`` has it, checksums right; same lengths."""
    out = bytearray(data)
    view = memoryview(data)
    position = 0
    while position < len(data):
        position += empty_frame_at(view, position)
        frame = read_frame(view, position)
        body = bytearray(frame.body)
        change(frame.kind, body)
        assert len(body) == len(frame.body)
        out[frame.offset + FRAME_HEAD.size : frame.end] = body
        struct.pack_into("<I", out, frame.offset + 16, zlib.crc32(body))
        struct.pack_into("<I", out, frame.offset + 20, zlib.crc32(out[frame.offset : frame.offset + 20]))
        position = frame.end
        if frame.kind == BLOCK:
            position += parse_block(view, frame).header.payload_bytes
    return bytes(out)


def test_a_later_minor_version_is_read(tmp_path: Path) -> None:
    """A 1.7 file with a frame and JSON keys that 1.0 does not know opens, and all of it that is known is read."""
    samples = [Sample("mlp", step, floats(40, step)) for step in range(3)]
    data = write(
        tmp_path / "a.stream", samples, seal_every=1, metadata={"model": "tiny", "new key": [1]}
    ).read_bytes()

    def later(kind: int, body: bytearray) -> None:
        if kind == PROLOG:
            struct.pack_into("<HH", body, 0, 1, 7)

    path = tmp_path / "b.stream"
    path.write_bytes(rewritten(data, later))
    with StreamReader(path) as reader:
        assert reader.version == (1, 7)
        assert contents(reader) == {sample.key: sample.data for sample in samples}
    # A frame of a kind that is not known yet, before a block: its head is good, so it is passed over.
    head = struct.pack("<II8sI", 0x184D2A58, 16 + 5, b"FXLATER\0", zlib.crc32(b"later"))
    unknown = head + struct.pack("<I", zlib.crc32(head)) + b"later"
    position = empty_frame_at(memoryview(data), 0)
    end = read_frame(memoryview(data), position).end
    index_bytes = struct.unpack_from("<I", data, len(data) - 16)[0]
    path.write_bytes(data[:end] + unknown + data[end:-index_bytes])
    with StreamReader(path, recover=True) as reader:
        assert reader.damage == []
        assert contents(reader) == {sample.key: sample.data for sample in samples}
    assert len(second_reader.records(path.read_bytes())) == 3


@pytest.mark.parametrize(("place", "what"), [(1, "dtype code 99"), (2, "filter 99")])
def test_a_block_of_a_later_version_is_refused_by_name(tmp_path: Path, place: int, what: str) -> None:
    """What a block needs and this version lacks is an error that says it, for that block alone."""
    samples = [Sample("mlp", step, floats(40, step)) for step in range(3)]
    data = write(tmp_path / "a.stream", samples, seal_every=1).read_bytes()
    blocks = 0

    def later(kind: int, body: bytearray) -> None:
        nonlocal blocks
        if kind == BLOCK:
            blocks += 1
            if blocks == 2:
                body[place] = 99

    path = tmp_path / "b.stream"
    path.write_bytes(rewritten(data, later))
    with StreamReader(path) as reader:
        refs = {step: reader.find(0, step) for step in (0, 2)}
        assert all(reader.read(ref).tobytes() == samples[step].data for step, ref in refs.items())
        with pytest.raises(UnsupportedStreamError, match=what):
            reader.read(reader.find(0, 1))


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
    assert encoded("lz4", BEST, "bfloat16", normal)[0] == filters.PACKED_SIGNED16
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
