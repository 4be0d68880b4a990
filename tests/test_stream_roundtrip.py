"""What is put into a stream comes out of it."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stream_files import CODECS, Sample, contents, floats, put_all, small_samples, write

from fx_instrument.stream.reader import StreamReader
from fx_instrument.stream.records import DTYPES, element_bytes
from fx_instrument.stream.writer import StreamWriter

shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@st.composite
def sample_lists(draw: st.DrawFn) -> list[Sample]:
    samples = []
    for step in range(draw(st.integers(0, 4))):
        for site in draw(st.lists(st.sampled_from("abcd"), max_size=4, unique=True)):
            dtype = draw(st.sampled_from(sorted(DTYPES)))
            shape = draw(shapes)
            size = int(np.prod(shape, dtype=int)) * element_bytes(dtype)
            data = draw(st.binary(min_size=size, max_size=size) | st.just(bytes(size)))
            full = draw(st.none() | shapes)
            role = draw(st.sampled_from(["mlp", "input"]))
            calls = draw(st.integers(1, 2))
            samples += [Sample(site, step, data, dtype, shape, call, role, full) for call in range(calls)]
    return samples


@settings(max_examples=60, deadline=None)
@given(
    samples=sample_lists(),
    codec=st.sampled_from(CODECS),
    page_bytes=st.sampled_from([1024, 4096, 1 << 22]),
    seal_every=st.integers(0, 5),
)
def test_every_dtype_and_shape_comes_back(
    samples: list[Sample], codec: str, page_bytes: int, seal_every: int
) -> None:
    """Records of any dtype and shape, scalars and empty ones too, come back as they were, both ways of reading."""
    with tempfile.TemporaryDirectory() as folder:
        path = write(
            Path(folder, "a.stream"),
            samples,
            codec=codec,
            page_bytes=page_bytes,
            num_workers=2,
            seal_every=seal_every,
        )
        with StreamReader(path) as reader:
            roles = {site.id: (site.name, site.role) for site in reader.sites}
            expected = {(*s.key, s.role): (s.data, s.dtype, s.stored_shape, s.full_shape) for s in samples}
            scanned = {}
            for ref, data in reader.scan():
                name, role = roles[ref.site_id]
                scanned[name, ref.step, ref.call, role] = (
                    data.tobytes(),
                    ref.dtype,
                    ref.shape,
                    ref.full_shape,
                )
                assert reader.find(ref.site_id, ref.step, ref.call) == ref
                assert reader.read(ref).tobytes() == data.tobytes()
            assert scanned == expected
            captured = [s for s in samples if s.role != "input"]
            assert reader.num_records == len(captured)
            assert reader.raw_bytes == sum(len(s.data) for s in captured)
            assert reader.num_steps == max((s.step + 1 for s in samples), default=0)
            assert reader.verify() == []


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_float_pages_come_back(tmp_path: Path, codec: str, dtype: str) -> None:
    """Floats of many magnitudes, zeros, infinities and NaNs of any payload survive every filter bit for bit."""
    rng = np.random.default_rng(3)
    width = element_bytes(dtype)
    samples = [
        Sample("normal", 0, floats(70_001, 1, dtype), dtype),
        Sample("noise", 0, rng.bytes(50_000 * width), dtype),
        Sample("zeros", 0, bytes(40_000 * width), dtype),
        Sample("ones", 0, b"\xff" * (33_000 * width), dtype),
        Sample("rows", 0, floats(64, 2, dtype) * 1000, dtype),
        Sample("spikes", 0, (floats(4096, 5, dtype)[:-width] + b"\xff" * width) * 8, dtype),
    ]
    path = write(tmp_path / "a.stream", samples, codec=codec, seal_every=2)
    assert contents(StreamReader(path)) == {s.key: s.data for s in samples}


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("num_bytes", [4 << 20, (4 << 20) + 2, 9_000_000])
def test_records_larger_than_a_page_are_joined(tmp_path: Path, codec: str, num_bytes: int) -> None:
    """A record of several pages reads as one, whatever lies between its parts."""
    samples = [
        Sample("small", 0, floats(10)[:20], "bfloat16"),
        Sample("big", 0, floats(num_bytes // 2), "bfloat16"),
        Sample("small", 1, floats(10)[:20], "bfloat16"),
    ]
    path = write(tmp_path / "a.stream", samples, codec=codec, num_workers=2)
    with StreamReader(path) as reader:
        assert contents(reader) == {s.key: s.data for s in samples}
        assert sum(1 for _ in reader.scan()) == reader.num_records == 3
        with StreamReader(path, recover=True) as recovered:
            assert contents(recovered) == {s.key: s.data for s in samples}
            assert recovered.raw_bytes == reader.raw_bytes


def test_refs_ascend_by_step_and_call(tmp_path: Path) -> None:
    """The records of a site come in order of step and call, however they were put."""
    order = [(3, 0), (0, 1), (2, 0), (0, 0), (1, 5)]
    samples = [Sample("a", step, floats(4), "bfloat16", call=call) for step, call in order]
    with StreamReader(write(tmp_path / "a.stream", samples, seal_every=2)) as reader:
        refs = reader.refs(reader.sites[0].id)
        assert [(ref.step, ref.call) for ref in refs] == sorted(order)
        assert [ref.step for ref in refs[-2:]] == [2, 3]
        assert refs[-1].step == 3
        with pytest.raises(IndexError):
            refs[5]


def test_unknown_places_are_none_or_empty(tmp_path: Path) -> None:
    """A site, step or call that a file does not have is no error."""
    with StreamReader(write(tmp_path / "a.stream", small_samples())) as reader:
        assert list(reader.refs(99)) == []
        assert reader.find(99, 0) is None
        assert reader.find(1, 99) is None
        assert reader.find(1, 0, call=7) is None
        assert reader.find(1, -1) is None


def test_uncompressed_records_are_views_on_the_file(tmp_path: Path) -> None:
    """Codec none reads without a copy: the array is read-only, aligned, and outlives the reader."""
    data = floats(5000, dtype="float64")
    path = write(tmp_path / "a.stream", [Sample("a", 0, data, "float64")], codec="none")
    reader = StreamReader(path)
    values = reader.read(reader.refs(0)[0])
    assert not values.flags.writeable and not values.flags.owndata
    assert values.ctypes.data % 64 == 0
    reader.close()
    assert values.tobytes() == data


@pytest.mark.parametrize("codec", CODECS)
def test_scanned_arrays_stay_as_they_were(tmp_path: Path, codec: str) -> None:
    """An array of scan that is still held is not written over by later pages, whose memory is used again."""
    samples = [
        Sample("a", step, floats(size, step), "bfloat16") for step in range(20) for size in [3000 + step]
    ]
    samples += [Sample("big", step, floats(20_000, step), "bfloat16") for step in range(20)]
    path = write(tmp_path / "a.stream", samples, codec=codec, seal_every=2, page_bytes=16384)
    with StreamReader(path) as reader:
        held = [(reader.sites[ref.site_id].name, ref.step, data) for ref, data in reader.scan()]
        expected = {s.key: s.data for s in samples}
        assert all(data.tobytes() == expected[name, step, 0] for name, step, data in held)
        assert len(held) == 40
        again = [
            data.tobytes() == expected[reader.sites[ref.site_id].name, ref.step, 0]
            for ref, data in reader.scan()
        ]
        assert all(again)


def test_metadata_and_summary_come_back(tmp_path: Path) -> None:
    """Metadata of the beginning and the summary of the end are both there, and steps without records count."""
    path = write(
        tmp_path / "a.stream", small_samples(2), metadata={"a": [1, {"b": "é"}]}, summary={"num_steps": 9}
    )
    with StreamReader(path) as reader:
        assert reader.metadata == {"a": [1, {"b": "é"}], "summary": {"num_steps": 9}}
        assert reader.num_steps == 9
        assert [(site.name, site.role) for site in reader.sites] == [
            ("input_ids", "input"),
            ("attn", "attention"),
            ("mlp", "mlp"),
        ]
        assert reader.codec == "zstd"
        assert reader.stored_bytes == path.stat().st_size


def test_an_empty_capture_reads_as_empty(tmp_path: Path) -> None:
    """A capture in which nothing ran is a file with no records."""
    with StreamReader(write(tmp_path / "a.stream", [])) as reader:
        assert reader.num_records == reader.num_steps == 0
        assert list(reader.scan()) == [] and reader.sites == []


def test_files_concatenate(tmp_path: Path) -> None:
    """`cat a b > c` reads as one: sites of one name are one site, and refs say the segment."""
    parts = []
    for number, codec in enumerate(("zstd", "zstd", "zstd")):
        samples = [Sample(f"own{number}", 0, floats(9, 7), "bfloat16"), *small_samples(2)]
        parts.append(write(tmp_path / f"{number}.stream", samples, codec=codec, rank=number, world=3))
    joined = tmp_path / "joined.stream"
    joined.write_bytes(b"".join(part.read_bytes() for part in parts))
    for recover in (False, True):
        with StreamReader(joined, recover=recover) as reader:
            assert [segment.prolog.rank for segment in reader.segments] == [0, 1, 2]
            assert reader.damage == []
            assert reader.num_records == 3 * 5 and reader.num_steps == 2
            attn = next(site.id for site in reader.sites if site.name == "attn")
            assert [(ref.step, ref.segment) for ref in reader.refs(attn)] == [
                (0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)
            ]  # fmt: skip
            assert all(reader.read(ref).tobytes() == floats(24, ref.step) for ref in reader.refs(attn))
            own = next(site.id for site in reader.sites if site.name == "own1")
            assert [ref.segment for ref in reader.refs(own)] == [1]
            assert reader.verify() == []


def test_concatenating_needs_no_order_of_wholeness(tmp_path: Path) -> None:
    """Behind a file that was cut off, a whole one is still found by recovery."""
    first = write(tmp_path / "1.stream", small_samples(6), seal_every=3).read_bytes()
    second = write(tmp_path / "2.stream", small_samples(2)).read_bytes()
    for cut in range(len(first) - 900, len(first), 13):
        joined = tmp_path / "joined.stream"
        joined.write_bytes(first[:cut] + second)
        with StreamReader(joined, recover=True) as reader:
            assert [segment.whole for segment in reader.segments] == [False, True]
            assert len(reader.refs(reader.sites[1].id)) >= 2


def test_new_file_replaces_the_old_one_under_a_reader(tmp_path: Path) -> None:
    """A reader of the old file goes on reading it when mode "w" puts a new file in its place."""
    path = write(tmp_path / "a.stream", small_samples(), codec="none")
    old = StreamReader(path)
    write(path, small_samples(1), codec="none")
    assert len(contents(old)) == 12
    assert len(contents(StreamReader(path))) == 3


def test_many_sites_and_calls(tmp_path: Path) -> None:
    """Sites added after the first blocks are known to the file before their first record."""
    writer = StreamWriter(tmp_path / "a.stream", metadata={}, codec="lz4", num_workers=3, page_bytes=1024)
    samples = [
        Sample(f"s{n}", step, floats(8, n), "bfloat16") for step in range(5) for n in range(40 * (step + 1))
    ]
    put_all(writer, samples)
    writer.abandon()
    with StreamReader(tmp_path / "a.stream", recover=True) as reader:
        got = contents(reader)
        assert got.items() <= {s.key: s.data for s in samples}.items()
        assert not any(site.name.startswith("unknown") for site in reader.sites)


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("page_bytes", [1024, 1030, 70_001, 262_150, 524_290, 1_000_002])
def test_records_larger_than_a_page_of_any_size_come_back(
    tmp_path: Path, page_bytes: int, dtype: str, num_workers: int
) -> None:
    """No part is larger than the page, whatever its size is a multiple of."""
    itemsize = element_bytes(dtype)
    samples = [
        Sample(name, 0, np.random.default_rng(count).bytes(count * itemsize), dtype, (count,))
        for name, count in (("a", 2 * (page_bytes // itemsize)), ("b", 3 * (page_bytes // itemsize) + 5))
    ]
    path = write(tmp_path / "a.stream", samples, codec="zstd", page_bytes=page_bytes, num_workers=num_workers)
    with StreamReader(path) as reader:
        names = {site.name: site.id for site in reader.sites}
        for sample in samples:
            ref = reader.find(names[sample.site], 0)
            assert ref is not None and reader.read(ref).tobytes() == sample.data
        headers = [reader._block(0, number).header for number in range(len(reader.segments[0].block_offsets))]
        assert max(header.raw_bytes for header in headers) <= page_bytes
