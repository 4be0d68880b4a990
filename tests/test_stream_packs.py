"""Records that are put together, packed or each where it lies, read back as records that were put one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stream_files import CODECS, DoneCounts, contents, floats

from fx_instrument.stream.reader import StreamReader
from fx_instrument.stream.records import RecordMeta
from fx_instrument.stream.writer import StreamWriter

U8 = np.uint8
Kind = tuple[int, int, tuple[int, ...]]
"""Site, call, shape."""
Way = Literal["packed", "apart", "single"]
"""How the records of a step are put: in one piece of memory, together but each in its own, one by one."""

KINDS = st.lists(
    st.tuples(st.integers(0, 4), st.integers(0, 1), st.sampled_from([(3, 8), (1, 8), (24,), (0, 2), ()])),
    min_size=1,
    max_size=8,
    unique_by=lambda kind: kind[:2],
)


def values(kind: Kind, step: int) -> bytes:
    return floats(int(np.prod(kind[2])), 31 * step + 7 * kind[0] + kind[1])


def write(path: Path, runs: list[tuple[list[Kind], Way]], codec: str, **options: object) -> DoneCounts:
    """A step for each run; of each kind of run one layout."""
    writer = StreamWriter(path, metadata={}, codec=codec, num_workers=1, **options)  # type: ignore[arg-type]
    for site in range(5):
        writer.add_site(f"s{site}", "mlp")
    layouts: dict[tuple[Kind, ...], object] = {}
    done = DoneCounts()
    for step, (kinds, way) in enumerate(runs):
        kinds = sorted(kinds)
        if way != "single":
            made = writer.layout("bfloat16", [(site, call, (shape, None)) for site, call, shape in kinds])
            layout = layouts.setdefault(tuple(kinds), made)
            pieces = [np.frombuffer(values(kind, step), U8) for kind in kinds]
            data = pieces if way == "apart" else np.concatenate(pieces)
            writer.put_packed(layout, step, data, done.of(step))  # type: ignore[arg-type]
        else:
            for number, (site, call, shape) in enumerate(kinds):
                meta = RecordMeta(site, step, call, "bfloat16", shape)
                data = np.frombuffer(values((site, call, shape), step), U8)
                writer.put(meta, data, done.of((step, number)))
    writer.close({"num_steps": len(runs)})
    return done


LARGE = [(site, 0, (5, 4000)) for site in range(4)]
"""40 KB each."""


@pytest.mark.parametrize("page_bytes", [1 << 20, 200_000], ids=["six packs a page", "one"])
@pytest.mark.parametrize("max_relative_error", [None, 0.01])
@pytest.mark.parametrize("way", ["packed", "apart"])
@pytest.mark.parametrize("codec", CODECS)
def test_large_packs_are_records(
    tmp_path: Path, codec: str, way: Way, page_bytes: int, max_relative_error: float | None
) -> None:
    """Laid out by site without a copy of the page, and a page of one pack as it is."""
    options = {"page_bytes": page_bytes, "max_relative_error": max_relative_error}
    done = write(tmp_path / "packed", [(LARGE, way)] * 7, codec, **options)
    write(tmp_path / "single", [(LARGE, "single")] * 7, codec, **options)
    assert set(done.counts.values()) == {1}
    with StreamReader(tmp_path / "packed") as packed, StreamReader(tmp_path / "single") as single:
        found = contents(packed)
        assert found == contents(single) and len(found) == 7 * len(LARGE)
        if max_relative_error is None:
            assert found == {
                (f"s{kind[0]}", step, 0): values(kind, step) for step in range(7) for kind in LARGE
            }
        assert packed.verify() == []


@settings(max_examples=60, deadline=None)
@given(st.lists(KINDS, min_size=1, max_size=3), st.data(), st.sampled_from(CODECS))
def test_packs_are_records(
    tmp_path_factory: pytest.TempPathFactory, layouts: list[list[Kind]], data: st.DataObject, codec: str
) -> None:
    """Any mix of packs of several layouts and of single records: the same content, each record told off once."""
    runs = data.draw(
        st.lists(
            st.tuples(st.sampled_from(layouts), st.sampled_from(get_args(Way))), min_size=1, max_size=12
        ),
        label="runs",
    )
    folder = tmp_path_factory.mktemp("packs")
    done = write(folder / "packed", runs, codec)
    write(folder / "single", [(kinds, "single") for kinds, _ in runs], codec)
    assert set(done.counts.values()) == {1}
    with StreamReader(folder / "packed") as packed, StreamReader(folder / "single") as single:
        expected = {
            (f"s{kind[0]}", step, kind[1]): values(kind, step)
            for step, (kinds, _) in enumerate(runs)
            for kind in kinds
        }
        assert contents(packed) == contents(single) == expected
        assert packed.num_records == single.num_records == len(expected)
        assert packed.raw_bytes == single.raw_bytes
        assert packed.verify() == []


@pytest.mark.parametrize("codec", CODECS)
def test_pages_of_packs_are_those_of_records(tmp_path: Path, codec: str) -> None:
    """Laid out by site in one go or record by record: the same pages, and blocks of the same size."""
    kinds = [(site, 0, (4, 64)) for site in range(5)]
    write(tmp_path / "packed", [(kinds, "packed")] * 40, codec, page_bytes=16384)
    write(tmp_path / "single", [(kinds, "single")] * 40, codec, page_bytes=15360 // 2560 * 2560)
    with StreamReader(tmp_path / "packed") as packed, StreamReader(tmp_path / "single") as single:
        assert [ref for ref, _ in packed.scan()] == [ref for ref, _ in single.scan()]
        assert list(packed.refs(2)) == list(single.refs(2)) and len(packed.refs(2)) == 40
    assert (tmp_path / "packed").stat().st_size == (tmp_path / "single").stat().st_size


def test_packs_of_bounded_error_keep_it(tmp_path: Path) -> None:
    """With max_relative_error each packed record is rounded by its own rows."""
    kinds = [(0, 0, (4, 64)), (1, 0, (2, 128))]
    ways: tuple[Way, ...] = get_args(Way)
    found = []
    for way in ways:
        write(tmp_path / way, [(kinds, way)] * 6, "zstd", max_relative_error=1e-2)
        with StreamReader(tmp_path / way) as reader:
            found.append(contents(reader))
    assert found[0] == found[1] == found[2]


def test_a_pack_that_contradicts_itself_is_refused() -> None:
    """Sites out of order, bytes that are not the layout's, an unknown site and too large a pack are ValueErrors."""
    writer = StreamWriter(None, metadata={}, codec="none", page_bytes=4096, num_workers=1)
    for site in range(2):
        writer.add_site(f"s{site}", "mlp")
    with pytest.raises(ValueError, match="ascending order"):
        writer.layout("bfloat16", [(1, 0, ((2,), None)), (0, 0, ((2,), None))])
    with pytest.raises(ValueError, match="ascending order"):
        writer.layout("bfloat16", [])
    layout = writer.layout("bfloat16", [(0, 0, ((2,), None)), (1, 0, ((3,), None))])
    with pytest.raises(ValueError, match="has 10 bytes, got 8"):
        writer.put_packed(layout, 0, np.zeros(8, U8))
    with pytest.raises(ValueError, match="has 10 bytes, got 10"):
        writer.put_packed(layout, 0, [np.zeros(6, U8), np.zeros(4, U8)])
    with pytest.raises(ValueError, match="was not added"):
        writer.put_packed(writer.layout("bfloat16", [(2, 0, ((2,), None))]), 0, np.zeros(4, U8))
    with pytest.raises(ValueError, match="a page takes 4096 bytes"):
        writer.put_packed(writer.layout("uint8", [(0, 0, ((5000,), None))]), 0, np.zeros(5000, U8))
    writer.close({})
    assert writer.num_records == 0
