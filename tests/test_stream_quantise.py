"""Bounded-error storage: the stated error holds on every row, whatever the values."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fx_instrument.errors import CorruptStreamError
from fx_instrument.stream.quantise import DTYPES, narrow, quantise, restore, widen


def round_trip(data: npt.NDArray[np.uint8], width: int, dtype: str, error: float) -> npt.NDArray[np.uint8]:
    stored = quantise([data], [width], dtype, error)
    out = np.empty_like(data)
    restore(stored.codes, stored.table, np.frombuffer(stored.kept, np.uint8), dtype, out)
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
    extra=st.integers(0, 3),
)
def test_every_row_holds_the_error(
    values: npt.NDArray[np.float32], dtype: str, error: float, extra: int
) -> None:
    """Each row comes back within the error, or bit for bit; a last, shorter row too."""
    width = values.shape[1]
    flat = np.concatenate([values.reshape(-1), values.reshape(-1)[: min(extra, width - 1)]])
    data = np.ascontiguousarray(narrow(flat, dtype)).view(np.uint8)
    back = round_trip(data, width, dtype, error)
    before, after = widen(data, dtype).astype(np.float64), widen(back, dtype).astype(np.float64)
    itemsize = len(data) // len(before)
    for start in range(0, len(before), width):
        row, got = before[start : start + width], after[start : start + width]
        cut = slice(start * itemsize, (start + width) * itemsize)
        if np.array_equal(data[cut], back[cut]):
            continue
        assert np.isfinite(row).all()
        assert np.sum((got - row) ** 2) <= np.sum(row**2) * error**2


def test_normal_values_reach_the_rate() -> None:
    """Rows of normal values are all quantised, at the entropy that theory gives."""
    values = np.random.default_rng(0).normal(size=(200, 576)).astype(np.float32)
    stored = quantise([values.view(np.uint8).reshape(-1)], [576], "float32", 1e-3)
    assert stored.kept == b""
    counts = np.unique(stored.codes, return_counts=True)[1] / stored.codes.size
    # log2(sqrt(2 pi e) / (sqrt(12) * 0.93e-3)) = 10.32 bits; few samples for so many codes: a little under.
    assert 9.9 < -(counts * np.log2(counts)).sum() < 10.35


def test_damaged_tables_are_refused() -> None:
    """A table, codes or rows of another length are an error, never a read beyond."""
    values = np.arange(12, dtype=np.float32)
    values[0] = np.nan
    stored = quantise([values.view(np.uint8)], [4], "float32", 1e-3)
    kept, out = np.frombuffer(stored.kept, np.uint8), np.empty(48, np.uint8)
    for table, rows in [
        (stored.table[:3], kept),
        (stored.table[:-1], kept),
        (b"\xff\xff\xff\xff" + stored.table[4:], kept),
        (stored.table, kept[:-4]),
        (stored.table, np.concatenate([kept, kept])),
    ]:
        with pytest.raises(CorruptStreamError):
            restore(stored.codes, table, rows, "float32", out)
    with pytest.raises(CorruptStreamError):
        restore(stored.codes[:-1], stored.table, kept, "float32", out)
