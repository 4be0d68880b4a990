"""Which elements SAMPLED_SLICES keeps: the same arithmetic in the graph (torch) and in the reader (numpy).

The flat tensor is cut into ``k = max(1, round(rate * numel))`` strata; each gives one element at a hashed
place, so the positions are distinct, ascending and a function of (numel, rate, seed) alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

_MASK = 0xFFFFFFFF


def fold_seed(seed: int) -> int:
    """Any Python int as 32 bits that differ for nearby seeds (splitmix64's finaliser, folded)."""
    z = (seed + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    z ^= z >> 31
    return (z ^ (z >> 32)) & _MASK


def num_samples(numel: int, rate: float) -> int:
    """How many of ``numel`` elements are kept: ``max(1, round(rate * numel))``, 0 of an empty tensor."""
    if numel == 0:
        return 0
    return min(numel, max(1, round(rate * numel)))


def place(index: Any, numel: Any, count: Any, folded_seed: int) -> Any:
    """The flat position taken from stratum ``index`` of ``count``; for int64 arrays, tensors and FX proxies.

    The hash is Ettinger's lowbias32 with the top bit of its second multiplier cleared: a 32-bit value times
    a 31-bit one stays inside int64, where torch and numpy agree.
    """
    low = index * numel // count
    width = (index + 1) * numel // count - low
    h = (index ^ folded_seed) & _MASK
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & _MASK
    h = ((h ^ (h >> 15)) * 0x046CA68B) & _MASK
    h = h ^ (h >> 16)
    return low + h % width


def positions(numel: int, rate: float, seed: int) -> npt.NDArray[np.int64]:
    """The kept flat positions, int64, ascending, shape ``(num_samples(numel, rate),)``."""
    count = num_samples(numel, rate)
    if count == 0:
        return np.zeros(0, np.int64)
    return np.asarray(place(np.arange(count, dtype=np.int64), numel, count, fold_seed(seed)))
