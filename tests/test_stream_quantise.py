"""Bounded-error storage: the stated error holds on every row, whatever the values."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fx_instrument.errors import CorruptStreamError
from fx_instrument.stream.quantise import (
    DTYPES,
    Layout,
    join_codes,
    layout_of,
    narrow,
    quantise,
    restore,
    split_codes,
    widen,
)
from fx_instrument.stream.reader import StreamReader
from fx_instrument.stream.records import RecordMeta
from fx_instrument.stream.writer import StreamWriter


def round_trip(
    data: npt.NDArray[np.uint8], layout: Layout, dtype: str, error: float
) -> npt.NDArray[np.uint8]:
    stored = quantise([data], [layout], dtype, error)
    out = np.empty_like(data)
    restore(stored.codes, np.frombuffer(stored.table + stored.kept, np.uint8), dtype, out)
    return out


@given(
    values=hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 6), st.integers(1, 40)),
        elements=st.one_of(
            st.floats(-10, 10, width=32),
            st.floats(width=32),
            st.sampled_from([0.0, -0.0, 1e-45, 3e38, np.inf, -np.inf, np.nan]),
        ),
    ),
    dtype=st.sampled_from(DTYPES),
    error=st.sampled_from([1e-4, 1e-3, 1e-2, 0.3]),
    lead=st.integers(0, 39),
    tail=st.integers(0, 39),
)
def test_every_row_holds_the_error(
    values: npt.NDArray[np.float32], dtype: str, error: float, lead: int, tail: int
) -> None:
    """Each row comes back within the error, or bit for bit; those cut at the ends of a page too."""
    width = values.shape[1]
    lead, tail = lead % width, tail % width
    flat = np.concatenate([values[0, width - lead :], values.reshape(-1), values[0, :tail]])
    data = np.ascontiguousarray(narrow(flat, dtype)).view(np.uint8)
    back = round_trip(data, (width, lead), dtype, error)
    before, after = widen(data, dtype).astype(np.float64), widen(back, dtype).astype(np.float64)
    itemsize = len(data) // len(before)
    cuts = [0, *range(lead, len(before), width), len(before)]
    for start, end in itertools.pairwise(cuts):
        if np.array_equal(data[start * itemsize : end * itemsize], back[start * itemsize : end * itemsize]):
            continue
        assert np.isfinite(before[start:end]).all()
        assert (
            np.sum((after[start:end] - before[start:end]) ** 2) <= np.sum(before[start:end] ** 2) * error**2
        )


def test_long_rows_go_in_pieces() -> None:
    """A row longer than what is at work at once keeps the bound too."""
    values = np.random.default_rng(0).normal(size=100_001).astype(np.float32)
    data = values.view(np.uint8).reshape(-1)
    back = round_trip(data, layout_of((100_001,), True, 0), "float32", 1e-3).view(np.float32)
    assert 0 < np.linalg.norm(back - values) <= 1e-3 * np.linalg.norm(values)


def test_normal_values_reach_the_rate() -> None:
    """Rows of normal values are all quantised, at the entropy that theory gives."""
    values = np.random.default_rng(0).normal(size=(200, 576)).astype(np.float32)
    stored = quantise([values.view(np.uint8).reshape(-1)], [(576, 0)], "float32", 1e-3)
    assert stored.kept == b""
    counts = np.unique(stored.codes, return_counts=True)[1] / stored.codes.size
    # log2(sqrt(2 pi e) / (sqrt(12) * 0.93e-3)) = 10.32 bits; few samples for so many codes: a little under.
    assert 9.9 < -(counts * np.log2(counts)).sum() < 10.35


def test_damaged_tables_are_refused() -> None:
    """A table, codes or rows of another length are an error, never a read beyond."""
    values = np.arange(12, dtype=np.float32)
    values[0] = np.nan
    stored = quantise([values.view(np.uint8)], [(4, 0)], "float32", 1e-3)
    rest, out = stored.table + stored.kept, np.empty(48, np.uint8)
    for data in (b"", rest[:3], rest[:-1], b"\xff\xff\xff\xff" + rest[4:], rest + b"\0", stored.table):
        with pytest.raises(CorruptStreamError):
            restore(stored.codes, np.frombuffer(data, np.uint8), "float32", out)
    with pytest.raises(CorruptStreamError):
        restore(stored.codes[:-1], np.frombuffer(rest, np.uint8), "float32", out)


@pytest.mark.parametrize("codec", ["none", "lz4", "zstd"])
def test_a_file_within_an_error(tmp_path: Path, codec: str) -> None:
    """Through writer and reader: every token holds the error, over pages that cut tokens in two; ints stay exact."""
    generator = np.random.default_rng(0)
    values = generator.normal(size=(40, 700)).astype(np.float32) * generator.lognormal(0, 3, (40, 1)).astype(
        np.float32
    )
    ids = generator.integers(0, 50_000, (4, 10))
    writer = StreamWriter(tmp_path / "f", metadata={}, codec=codec, page_bytes=16384, max_relative_error=1e-3)
    site, inputs = writer.add_site("a", "mlp"), writer.add_site("input_ids", "input")
    writer.put(RecordMeta(site, 0, 0, "float32", values.shape), values.view(np.uint8).reshape(-1))
    writer.put(RecordMeta(inputs, 0, 0, "int64", ids.shape), ids.view(np.uint8).reshape(-1))
    writer.close({})
    with StreamReader(tmp_path / "f") as reader:
        found, found_ids = reader.find(site, 0), reader.find(inputs, 0)
        assert found is not None and found_ids is not None
        back = reader.read(found).view(np.float32).reshape(values.shape)
        assert np.array_equal(reader.read(found_ids).view(np.int64).reshape(ids.shape), ids)
    assert not np.array_equal(back, values)
    errors = np.linalg.norm(back.astype(np.float64) - values, axis=1) / np.linalg.norm(
        values.astype(np.float64), axis=1
    )
    assert errors.max() <= 1e-3


def test_the_ratio_on_normal_values(tmp_path: Path) -> None:
    """fp32 at 1e-3 takes a third of its bytes."""
    values = np.random.default_rng(0).normal(size=(2048, 576)).astype(np.float32)
    writer = StreamWriter(None, metadata={}, codec="zstd", max_relative_error=1e-3)
    site = writer.add_site("a", "mlp")
    writer.put(RecordMeta(site, 0, 0, "float32", values.shape), values.view(np.uint8).reshape(-1))
    writer.close({})
    assert values.nbytes / writer.stored_bytes > 3.05


@given(hnp.arrays(np.int16, st.integers(0, 50), elements=st.integers(-32639, 32639)))
def test_codes_split_and_join(codes: npt.NDArray[np.int16]) -> None:
    """Any code comes back from its two bytes, and small ones have a high byte of 0."""
    high, low = split_codes(codes)
    assert np.array_equal(join_codes(high, low), codes)
    assert not high[(codes >= -128) & (codes < 128)].any()
