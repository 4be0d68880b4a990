"""The positions of SAMPLED_SLICES: a law of (numel, rate, seed)."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from fx_instrument.sampling import fold_seed, num_samples, place, positions

NUMELS = st.one_of(st.integers(1, 300), st.integers(1, 50_000))
RATES = st.one_of(st.sampled_from([1.0, 0.5, 0.01, 1e-9]), st.floats(1e-6, 1.0))


@given(numel=NUMELS, rate=RATES, seed=st.integers(-(2**70), 2**70))
def test_positions(numel: int, rate: float, seed: int) -> None:
    """Exactly max(1, round(rate * numel)) positions, distinct, ascending, inside the tensor, the same every time."""
    where = positions(numel, rate, seed)
    assert len(where) == num_samples(numel, rate) == min(numel, max(1, round(rate * numel)))
    assert where.dtype == np.int64
    assert where[0] >= 0 and where[-1] < numel
    assert np.all(np.diff(where) > 0)
    assert np.array_equal(where, positions(numel, rate, seed))


@given(numel=NUMELS, rate=RATES, seed=st.integers(0, 2**64))
def test_torch_agrees(numel: int, rate: float, seed: int) -> None:
    """The arithmetic in the graph gives what the reader computes."""
    count = num_samples(numel, rate)
    in_graph = place(torch.arange(count), numel, count, fold_seed(seed))
    assert np.array_equal(in_graph.numpy(), positions(numel, rate, seed))


def test_positions_spread_and_differ_by_seed() -> None:
    """Seeds choose different positions, and inside a stratum every place is about as likely."""
    assert not np.array_equal(positions(10_000, 0.01, 0), positions(10_000, 0.01, 1))
    offsets = np.concatenate([positions(1_000_000, 0.01, seed) % 100 for seed in range(4)])
    counts = np.bincount(offsets, minlength=100)
    expected = len(offsets) / 100
    # 99 degrees of freedom: a chi-squared above 160 has a probability of 1e-4, and the seeds are fixed.
    assert ((counts - expected) ** 2 / expected).sum() < 160


def test_empty_tensor() -> None:
    assert len(positions(0, 0.5, 0)) == 0
