"""Cut, flipped and random bytes: what is whole comes back, what is not is told, nothing else happens."""

from __future__ import annotations

import random
import struct
import tempfile
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stream_files import CODECS, Sample, contents, floats, put_all, small_samples, write

from fx_instrument.errors import (
    CorruptStreamError,
    NotAStreamError,
    StreamError,
    TruncatedStreamError,
    UnsupportedStreamError,
)
from fx_instrument.stream.frames import BLOCK, FRAME_HEAD, INDEX, PROLOG, SITES, read_frame
from fx_instrument.stream.reader import StreamReader
from fx_instrument.stream.segments import parse_block
from fx_instrument.stream.writer import StreamWriter

EXPECTED = {sample.key: sample.data for sample in small_samples(4)}


@pytest.fixture(params=CODECS)
def whole(request: pytest.FixtureRequest, tmp_path: Path) -> bytes:
    """A file of 12 records in six blocks, each with two records of a site."""
    return write(tmp_path / "whole.stream", small_samples(4), codec=request.param, seal_every=6).read_bytes()


def frames(data: bytes) -> list[tuple[int, int, int]]:
    """``(kind, offset, end)`` of every frame, blocks with their payload."""
    view, position = memoryview(data), len(data[: data.index(b"FXSTREAM") - 8])
    found = []
    while position < len(data):
        frame = read_frame(view, position)
        end = parse_block(view, frame).end if frame.kind == BLOCK else frame.end
        found.append((frame.kind, position, end))
        position = end
    return found


def recovered(path: Path) -> tuple[StreamReader, dict[tuple[str, int, int], bytes]]:
    reader = StreamReader(path, recover=True)
    found = contents(reader)
    assert {
        (reader.sites[ref.site_id].name, ref.step, ref.call): data.tobytes() for ref, data in reader.scan()
    } == found
    inputs = {site.name for site in reader.sites if site.role == "input"}
    assert reader.num_records == sum(name not in inputs for name, _, _ in found)
    assert reader.raw_bytes == sum(len(data) for (name, _, _), data in found.items() if name not in inputs)
    return reader, found


def test_a_file_cut_at_any_byte_gives_back_every_whole_block(tmp_path: Path, whole: bytes) -> None:
    """However a file is cut: an error without recover, with it exactly the blocks that end before the cut."""
    blocks = [(offset, end) for kind, offset, end in frames(whole) if kind == BLOCK]
    prolog_end = next(end for kind, _, end in frames(whole) if kind == PROLOG)
    view = memoryview(whole)
    path = tmp_path / "cut.stream"
    records_before = [
        (end, len(parse_block(view, read_frame(view, offset)).directory.rows)) for offset, end in blocks
    ]
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        with pytest.raises(TruncatedStreamError):
            StreamReader(path)
        if cut < prolog_end:
            with pytest.raises(TruncatedStreamError):
                StreamReader(path, recover=True)
            continue
        reader, found = recovered(path)
        assert found.items() <= EXPECTED.items()
        assert len(found) == sum(rows for end, rows in records_before if end <= cut)
        assert sum(lost.num_bytes for lost in reader.damage) < 3000
        reader.close()


def test_the_error_says_what_is_readable(tmp_path: Path) -> None:
    """The message of a cut file names the block that the cut went through, and the ones before it."""
    data = write(tmp_path / "a.stream", small_samples(6), codec="none", seal_every=6).read_bytes()
    offset, end = [(offset, end) for kind, offset, end in frames(data) if kind == BLOCK][3]
    path = tmp_path / "cut.stream"
    path.write_bytes(data[: end - 5])
    with pytest.raises(TruncatedStreamError) as error:
        StreamReader(path)
    assert str(error.value) == (
        f"{path}: the file ends inside block 3 ({end - 5 - offset} of {end - offset} bytes); "
        f"blocks 0-2 are readable with recover=True"
    )


def test_any_flipped_bit_is_detected(tmp_path: Path, whole: bytes) -> None:
    """A flipped bit anywhere is found by opening, or by verifying; recovery loses one block at most."""
    path = tmp_path / "flipped.stream"
    num_blocks = sum(kind == BLOCK for kind, *_ in frames(whole))
    rng = random.Random(5)
    for position in range(len(whole)):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        try:
            with StreamReader(path) as reader:
                damage = reader.verify()
        except StreamError:
            pass
        else:
            assert damage, position
        if position % 3:
            continue
        with StreamReader(path, recover=True) as reader:
            assert reader.damage, position
            assert sum(len(segment.block_offsets) for segment in reader.segments) >= num_blocks - 1
            for ref, data in reader.scan():
                name = reader.sites[ref.site_id].name
                if not name.startswith("unknown-"):
                    assert data.tobytes() == EXPECTED[name, ref.step, ref.call]


@pytest.mark.slow
@pytest.mark.parametrize("codec", CODECS)
def test_every_flipped_bit_is_detected(tmp_path: Path, codec: str) -> None:
    """Each bit of a file, flipped alone, is found, and costs its block at most."""
    data = write(tmp_path / "whole.stream", small_samples(2), codec=codec, seal_every=3).read_bytes()
    num_blocks = sum(kind == BLOCK for kind, *_ in frames(data))
    path = tmp_path / "flipped.stream"
    for position in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[position // 8] ^= 1 << position % 8
        path.write_bytes(flipped)
        try:
            with StreamReader(path) as reader:
                assert reader.verify(), position
        except StreamError:
            pass
        with StreamReader(path, recover=True) as reader:
            assert reader.damage, position
            assert sum(len(segment.block_offsets) for segment in reader.segments) >= num_blocks - 1


def test_a_flipped_bit_of_a_record_is_never_read_as_its_value(tmp_path: Path, whole: bytes) -> None:
    """Reading a record from a damaged block is an error; the records of other blocks still read."""
    blocks = [(offset, end) for kind, offset, end in frames(whole) if kind == BLOCK]
    path = tmp_path / "flipped.stream"
    for offset, end in blocks:
        flipped = bytearray(whole)
        flipped[end - 6] ^= 4
        path.write_bytes(flipped)
        with StreamReader(path) as reader:
            bad = good = 0
            for site in reader.sites:
                for ref in reader.refs(site.id):
                    try:
                        assert reader.read(ref).tobytes() == EXPECTED[site.name, ref.step, ref.call]
                        good += 1
                    except CorruptStreamError as error:
                        assert "block" in str(error) and str(path) in str(error)
                        bad += 1
            assert bad == 2 and good == 10
        reader, found = recovered(path)
        assert len(found) == 10
        assert [(lost.offset, lost.num_bytes) for lost in reader.damage] == [(offset, end - offset)]


def test_a_lost_part_loses_its_record_only(tmp_path: Path) -> None:
    """Where one part of a large record is damaged, recovery leaves that record out and counts without it."""
    big = floats(5000)
    samples = [Sample("a", 0, floats(16)), Sample("big", 0, big, "bfloat16"), Sample("a", 1, floats(16))]
    data = write(tmp_path / "a.stream", samples, codec="none", page_bytes=2048).read_bytes()
    parts = [(offset, end) for kind, offset, end in frames(data) if kind == BLOCK and end - offset > 1500]
    assert len(parts) == 5
    for offset, end in parts:
        flipped = bytearray(data)
        flipped[end - 100] ^= 1
        path = tmp_path / "b.stream"
        path.write_bytes(flipped)
        reader, found = recovered(path)
        assert set(found) == {("a", 0, 0), ("a", 1, 0)}
        assert reader.find(1, 0) is None
        assert [(lost.offset, lost.num_bytes) for lost in reader.damage] == [(offset, end - offset)]


@pytest.mark.parametrize("gone", [slice(0, 1), slice(2, 3), slice(1, 4), slice(5, 6)])
@pytest.mark.parametrize("cut", [0, 1], ids=["with its index", "without"])
def test_blocks_that_are_gone_without_a_trace_are_told(
    tmp_path: Path, whole: bytes, gone: slice, cut: int
) -> None:
    """Their numbers and the index tell; at the end of a file that lost its index nothing does."""
    blocks = [(start, end) for kind, start, end in frames(whole) if kind == BLOCK]
    (start, _), (_, end) = blocks[gone][0], blocks[gone][-1]
    path = tmp_path / "a.stream"
    path.write_bytes(whole[:start] + whole[end : len(whole) - cut])
    count = len(blocks[gone])
    what = "a block is" if count == 1 else f"{count} blocks are"
    with StreamReader(path, recover=True) as reader:
        told = [(lost.offset, lost.num_bytes) for lost in reader.damage if what in lost.reason]
        assert told == ([] if cut and gone.stop == 6 else [(start, 0)])
        assert len(reader.damage) == len(told) + cut
        assert reader.num_records < 12


def test_records_without_their_site_table_are_kept(tmp_path: Path) -> None:
    """If the site table and the index are lost, recovery makes names up rather than lose the values."""
    data = write(tmp_path / "a.stream", small_samples(2), codec="none").read_bytes()
    offset = next(offset for kind, offset, _ in frames(data) if kind == SITES)
    index = next(offset for kind, offset, _ in frames(data) if kind == INDEX)
    flipped = bytearray(data[:index])
    flipped[offset + 40] ^= 1
    path = tmp_path / "b.stream"
    path.write_bytes(flipped)
    with StreamReader(path, recover=True) as reader:
        assert {site.name for site in reader.sites} == {"unknown-0", "unknown-1", "unknown-2"}
        assert sorted(contents(reader).values()) == sorted(s.data for s in small_samples(2))


def test_records_without_their_prolog_are_kept(tmp_path: Path, whole: bytes) -> None:
    """If the prolog is lost, recovery reads the records, without metadata."""
    path = tmp_path / "b.stream"
    flipped = bytearray(whole)
    flipped[60] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(CorruptStreamError):
        StreamReader(path)
    reader, found = recovered(path)
    assert found == EXPECTED
    assert reader.metadata == {"summary": {}} and reader.damage[0].offset == 0


@pytest.mark.parametrize("data", [b"", b"(", b"hello", b"PK\x03\x04" * 99, b"\0" * 4096, b"(\xb5/\xfd" * 50])
@pytest.mark.parametrize("recover", [False, True])
def test_other_files_are_no_streams(tmp_path: Path, data: bytes, recover: bool) -> None:
    """A file of something else is refused by name; one too short to tell is truncated."""
    path = tmp_path / "other"
    path.write_bytes(data)
    kind = TruncatedStreamError if len(data) < 2 else NotAStreamError
    with pytest.raises(kind, match="other"):
        StreamReader(path, recover=recover)


def test_a_missing_file_is_pythons_error(tmp_path: Path) -> None:
    """A file that is not there is FileNotFoundError, a folder IsADirectoryError."""
    with pytest.raises(FileNotFoundError):
        StreamReader(tmp_path / "none.stream")
    with pytest.raises(IsADirectoryError):
        StreamReader(tmp_path)


def test_a_later_format_is_refused_by_version(tmp_path: Path) -> None:
    """A file of another major version is named as such, with recovery too."""
    path = write(tmp_path / "a.stream", [], codec="none")
    data = bytearray(path.read_bytes())
    start = data.index(b"FXSTREAM") - 8
    end = read_frame(memoryview(bytes(data)), start).end
    struct.pack_into("<H", data, start + FRAME_HEAD.size, 2)
    body = bytes(data[start + FRAME_HEAD.size : end])
    struct.pack_into("<I", data, start + 16, zlib.crc32(body))
    struct.pack_into("<I", data, start + 20, zlib.crc32(data[start : start + 20]))
    path.write_bytes(data)
    for recover in (False, True):
        with pytest.raises(UnsupportedStreamError, match=r"version 2\.2"):
            StreamReader(path, recover=recover)


def read_everything(data: bytes) -> None:
    """Use each way of reading; StreamError and its kin may happen, nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.stream")
        path.write_bytes(data)
        for recover in (False, True):
            try:
                with StreamReader(path, recover=recover) as reader:
                    reader.verify()
                    contents(reader)
                    for _ in reader.scan():
                        pass
            except StreamError:
                assert True


@settings(max_examples=150, deadline=None)
@given(
    codec=st.sampled_from(CODECS),
    edits=st.lists(
        st.tuples(st.integers(0, 1 << 14), st.binary(max_size=12), st.integers(0, 40)), min_size=1, max_size=4
    ),
    tail=st.binary(max_size=40),
)
def test_mutated_files_raise_nothing_else(
    codec: str, edits: list[tuple[int, bytes, int]], tail: bytes
) -> None:
    """Bytes changed, put in, taken out or added: only the documented errors are raised."""
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder, "a.stream"), small_samples(2), codec=codec, seal_every=3)
        data = bytearray(path.read_bytes())
    for position, new, removed in edits:
        position %= len(data) + 1
        data[position : position + removed] = new
    read_everything(bytes(data) + tail)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), codec=st.sampled_from(CODECS))
def test_false_numbers_under_right_checksums_raise_nothing_else(data: st.DataObject, codec: str) -> None:
    """A file whose checksums are right and whose numbers are not raises documented errors, and stays in bounds."""
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder, "a.stream"), small_samples(2), codec=codec)
        raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        _, offset, _ = data.draw(st.sampled_from(frames(bytes(raw))))
        end = read_frame(memoryview(bytes(raw)), offset).end
        place = data.draw(st.integers(offset + FRAME_HEAD.size, end - 1))
        new = data.draw(st.sampled_from([b"\xff", b"\xff" * 4, b"\0" * 4, b"\x80", b"\x01"]))
        raw[place : min(end, place + len(new))] = new[: end - place]
        struct.pack_into("<I", raw, offset + 16, zlib.crc32(raw[offset + FRAME_HEAD.size : end]))
        struct.pack_into("<I", raw, offset + 20, zlib.crc32(raw[offset : offset + 20]))
        try:
            frames(bytes(raw))
        except StreamError:
            break
    read_everything(bytes(raw))


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300))
def test_random_files_raise_nothing_else(data: bytes) -> None:
    """Random bytes, alone and behind a good beginning, raise documented errors only."""
    with tempfile.TemporaryDirectory() as folder:
        start = write(Path(folder, "a.stream"), small_samples(1), codec="lz4").read_bytes()
    read_everything(data)
    read_everything(start + data)
    read_everything(start[:-800] + data)


# -- resuming ----------------------------------------------------------------------------------------------


def resume(path: Path, samples: list[Sample], codec: str, summary: dict[str, object] | None = None) -> int:
    writer = StreamWriter(path, metadata={"ignored": True}, codec=codec, mode="a", num_workers=1)
    put_all(writer, samples)
    writer.close(summary or {})
    return writer.first_step


@pytest.mark.parametrize("codec", CODECS)
def test_a_whole_file_is_gone_on_with(tmp_path: Path, codec: str) -> None:
    """Mode "a" keeps records, sites and metadata, adds to them, and keeps the earlier summary."""
    path = write(tmp_path / "a.stream", small_samples(3), codec=codec, summary={"num_steps": 3, "n": 1})
    assert resume(path, small_samples(4)[9:], codec, {"n": 2}) == 3
    with StreamReader(path) as reader:
        assert contents(reader) == EXPECTED
        assert reader.metadata == {"model": "tiny", "summary": {"n": 2}}
        assert reader.segments[0].earlier_summaries == [{"num_steps": 3, "n": 1}]
        assert reader.num_records == 8 and reader.num_steps == 4 and len(reader.segments) == 1
        assert reader.verify() == [] == reader.damage
        assert len(reader.sites) == 3


@pytest.mark.parametrize("codec", CODECS)
def test_a_file_cut_anywhere_is_gone_on_with(tmp_path: Path, codec: str) -> None:
    """After a cut at any byte, resuming makes a whole file of what was whole and what is new."""
    data = write(tmp_path / "a.stream", small_samples(2), codec=codec, seal_every=3).read_bytes()
    path = tmp_path / "b.stream"
    new = Sample("new", 50, floats(3), "bfloat16")
    for cut in range(0, len(data), 7):
        path.write_bytes(data[:cut])
        before = {}
        if cut > 300:
            with StreamReader(path, recover=True) as reader:
                before = contents(reader)
        first_step = resume(path, [new], codec)
        assert first_step == max((step + 1 for _, step, _ in before), default=0)
        with StreamReader(path) as reader:
            assert contents(reader).items() >= before.items()
            assert contents(reader)[new.key] == new.data
            assert reader.verify() == []


def test_damage_is_voided_and_remembered(tmp_path: Path, whole: bytes) -> None:
    """Resuming over a damaged block makes the file readable without recover, and `damage` still says what is lost."""
    offset, end = [(offset, end) for kind, offset, end in frames(whole) if kind == BLOCK][2]
    flipped = bytearray(whole)
    flipped[end - 6] ^= 1
    path = tmp_path / "b.stream"
    path.write_bytes(flipped)
    with StreamReader(path) as reader:
        codec = reader.codec
    for count in range(2):
        assert resume(path, [Sample("new", 4 + count, floats(3), "bfloat16")], codec) == 4 + count
        with StreamReader(path) as reader:
            assert len(contents(reader)) == 10 + 1 + count
            assert [(lost.offset, lost.num_bytes) for lost in reader.damage] == [(offset, end - offset)]
            assert len(reader.verify()) == 1


def test_a_lost_part_stays_lost_when_resumed(tmp_path: Path) -> None:
    """A record that lost a part is not listed by the resumed file either."""
    samples = [Sample("a", 0, floats(16)), Sample("big", 0, floats(5000), "bfloat16")]
    path = write(tmp_path / "a.stream", samples, codec="zstd", page_bytes=2048)
    data = bytearray(path.read_bytes())
    _, end = [(offset, end) for kind, offset, end in frames(bytes(data)) if kind == BLOCK][2]
    data[end - 100] ^= 1
    path.write_bytes(data)
    resume(path, [Sample("a", 1, floats(16))], "zstd")
    with StreamReader(path) as reader:
        assert set(contents(reader)) == {("a", 0, 0), ("a", 1, 0)}
        assert reader.num_records == 2 == sum(1 for _ in reader.scan())


def test_resuming_refuses_what_it_would_spoil(tmp_path: Path, whole: bytes) -> None:
    """Another codec is ValueError, another kind of file NotAStreamError, a lost prolog CorruptStreamError."""
    path = tmp_path / "a.stream"
    path.write_bytes(whole)
    with StreamReader(path) as reader:
        other = "none" if reader.codec == "lz4" else "lz4"
    with pytest.raises(ValueError, match="codec must be"):
        resume(path, [], other)
    assert path.read_bytes() == whole
    note = tmp_path / "note.txt"
    note.write_text("some notes")
    with pytest.raises(NotAStreamError):
        resume(note, [], "zstd")
    assert note.read_text() == "some notes"
    flipped = bytearray(whole)
    flipped[60] ^= 1
    path.write_bytes(flipped)
    with pytest.raises((CorruptStreamError, ValueError)):
        resume(path, [], "zstd")
    assert path.read_bytes() == bytes(flipped)


@pytest.mark.parametrize("recover", [False, True])
def test_a_refused_file_is_let_go(tmp_path: Path, recover: bool) -> None:
    """While the error is handled, nothing maps the file any more: it may be deleted, its room used."""
    path = tmp_path / "junk.stream"
    path.write_bytes(b"no stream" * 100)
    try:
        StreamReader(path, recover=recover)
    except StreamError:
        assert str(path) not in Path("/proc/self/maps").read_text()
    else:
        pytest.fail("junk was read")
