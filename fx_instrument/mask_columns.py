"""Which tokens of a forward call are padding, by its attention mask or by its positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt


def step_columns(mask: npt.NDArray[Any], num_tokens: int) -> npt.NDArray[np.bool_] | None:
    """Which of a forward call's tokens the mask counts as real, (batch, ``num_tokens``); None where it doesn't tell.

    Args:
        mask: (batch, columns): all tokens so far, or all slots of a static cache; the call's tokens are the last
            columns that are in use. int8 where it is one row of a 4-D one, as inputs are recorded.
        num_tokens: of each sequence in this call; between 1 and the number of columns.
    """
    end = mask.shape[1]
    if end > num_tokens:
        # Of a static cache the mask has the columns of all slots; those behind the step's tokens no one sees.
        seen = np.flatnonzero(mask.any(axis=0))
        end = max(num_tokens, int(seen[-1]) + 1 if len(seen) else end)
    columns: npt.NDArray[np.bool_] = mask[:, end - num_tokens : end] != 0
    if mask.dtype == np.int8 and not columns[:, 0].any():
        # In a row of a 4-D one, that no sequence sees the step's first token means that a sliding window hides it, not
        # that it is padding.
        return None
    return columns


def padding_before(positions: Sequence[int]) -> int:
    """How many of a sequence's tokens are padding by their positions: those in front of position 0 that share one.

    So ``generate`` gives them, which passes some models no mask that tells. (Positions that are all 0 read as padding
    before a single token.)
    """
    if not positions:
        return 0
    first = len(positions) - 1 - positions[-1]
    if not 0 < first < len(positions) or len(set(positions[:first])) > 1:
        return 0
    return first if list(positions[first:]) == list(range(len(positions) - first)) else 0


def position_columns(positions: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Which of a forward call's tokens are real by their positions, both (batch, tokens)."""
    columns = np.ones(positions.shape, np.bool_)
    for row, padding in enumerate(map(padding_before, positions.tolist())):
        columns[row, :padding] = False
    return columns
