"""Values with a bounded error: each row (a token's vector) on a uniform grid of its own, checked as it is made.

The error of rounding to a grid of width ``step`` is ``step / sqrt(12)`` in the mean square, so a row of root mean
square ``r`` keeps a relative error ``e`` (L2) with ``step = sqrt(12) * e * r``; a little less leaves room for chance.
The codes are then close to the rate that any quantiser needs at this error. A row whose error comes out larger, whose
codes don't fit 16 bits, or that holds an infinity or NaN is kept as it is.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fx_instrument.errors import CorruptStreamError

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]

DTYPES = ("float32", "bfloat16", "float16")
"""What can be quantised; everything else stays lossless."""

_ROOM = 0.93
"""Of the step that meets the error in the mean: chance stays below the bound in rows of some dozen elements."""
_RUN = struct.Struct("<II")
_COUNT = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Quantised:
    """A page of rows on their grids."""

    codes: npt.NDArray[np.int16]
    """One an element, in page order; 0 in rows that are kept as they are."""
    table: bytes
    """``runs u32 · (elements a row u32, rows u32) a run · step f32 a row``; NaN for a row kept as it is."""
    kept: bytes
    """The rows kept as they are, one after another."""


def quantise(
    buffers: Sequence[U8], row_elements: Sequence[int], dtype: str, max_relative_error: float
) -> Quantised:
    """The rows of ``buffers``, each cut into rows of its ``row_elements`` (a shorter one may end it).

    Every row's error is at most ``max_relative_error`` times its norm (L2), after rounding to ``dtype``.
    """
    codes, runs, steps, kept = [], [], [], []
    for buffer, elements in zip(buffers, row_elements, strict=True):
        values = widen(buffer, dtype)
        itemsize = len(buffer) // len(values) if len(values) else 1
        whole = len(values) // elements * elements
        for start, end, width in ((0, whole, elements), (whole, len(values), len(values) - whole)):
            if start == end:
                continue
            rows = values[start:end].reshape(-1, width)
            row_codes, row_steps = _quantise_rows(rows, dtype, max_relative_error)
            raw = buffer[start * itemsize : end * itemsize].reshape(len(rows), -1)
            codes.append(row_codes.reshape(-1))
            runs.append((width, len(rows)))
            steps.append(row_steps)
            kept.append(raw[np.isnan(row_steps)].tobytes())
    table = b"".join(
        [
            _COUNT.pack(len(runs)),
            *(_RUN.pack(*run) for run in runs),
            *(step.astype("<f4").tobytes() for step in steps),
        ]
    )
    joined = np.concatenate(codes) if codes else np.zeros(0, np.int16)
    return Quantised(joined, table, b"".join(kept))


def restore(codes: npt.NDArray[np.int16], table: bytes | memoryview, kept: U8, dtype: str, out: U8) -> None:
    """Fill ``out`` with the values of a page; every length is checked before it is used."""
    itemsize = 4 if dtype == "float32" else 2
    if len(table) < _COUNT.size:
        raise CorruptStreamError("a table of quantised rows ends early")
    (num_runs,) = _COUNT.unpack_from(table)
    position = _COUNT.size + num_runs * _RUN.size
    if position > len(table):
        raise CorruptStreamError("a table of quantised rows ends early")
    runs = [_RUN.unpack_from(table, _COUNT.size + number * _RUN.size) for number in range(num_runs)]
    num_elements = sum(width * count for width, count in runs)
    num_rows = sum(count for _, count in runs)
    if (
        num_elements != len(codes)
        or num_elements * itemsize != len(out)
        or position + 4 * num_rows != len(table)
    ):
        raise CorruptStreamError(
            f"a table of quantised rows describes {num_elements} elements in {num_rows} rows, "
            f"its page has {len(codes)}"
        )
    steps = np.frombuffer(table, "<f4", num_rows, position)
    start, row, taken = 0, 0, 0
    for width, count in runs:
        end = start + width * count
        of_run = steps[row : row + count]
        whole = np.isnan(of_run)
        values = codes[start:end].reshape(count, width).astype(np.float32)
        values *= np.where(whole, np.float32(0), of_run)[:, None]
        target = out[start * itemsize : end * itemsize]
        target[:] = narrow(values.reshape(-1), dtype).view(np.uint8)
        num_kept = int(whole.sum()) * width * itemsize
        if taken + num_kept > len(kept):
            raise CorruptStreamError("the rows kept as they are end early")
        target.reshape(count, width * itemsize)[whole] = kept[taken : taken + num_kept].reshape(
            -1, width * itemsize
        )
        start, row, taken = end, row + count, taken + num_kept
    if taken != len(kept):
        raise CorruptStreamError(f"{len(kept) - taken} bytes of rows kept as they are belong to none")


def _quantise_rows(rows: F32, dtype: str, error: float) -> tuple[npt.NDArray[np.int16], F32]:
    with np.errstate(all="ignore"):
        squares = np.einsum("ij,ij->i", rows, rows, dtype=np.float64)
        scale = np.sqrt(12.0) * _ROOM * error * np.sqrt(squares / rows.shape[1])
        steps = scale.astype(np.float32)
        # A row of zeros has its one code at any step; a step that underflows cannot be divided by.
        exact = (steps > 0) | (squares == 0)
        divisor = np.where(steps > 0, steps, np.float32(1))[:, None]
        wide = np.rint(rows / divisor)
        fits = exact & (np.abs(wide).max(axis=1, initial=0) <= 32767)
        codes = np.where(fits[:, None], wide, np.float32(0)).astype(np.int16)
        back = widen(
            narrow((codes.astype(np.float32) * steps[:, None]).reshape(-1), dtype).view(np.uint8), dtype
        )
        apart = back.reshape(rows.shape).astype(np.float64) - rows
        good = fits & (np.einsum("ij,ij->i", apart, apart) <= squares * (error * error))
    codes[~good] = 0
    steps[~good] = np.nan
    return codes, steps


def widen(data: U8, dtype: str) -> F32:
    """The values of raw bytes as float32, 1-D."""
    if dtype == "float32":
        whole: F32 = data.view("<f4")
        return whole
    if dtype == "float16":
        half: F32 = data.view("<f2").astype(np.float32)
        return half
    upper: npt.NDArray[np.uint32] = data.view("<u2").astype(np.uint32)
    bits: F32 = (upper << np.uint32(16)).view(np.float32)
    return bits


def narrow(values: F32, dtype: str) -> npt.NDArray[Any]:
    """float32 values in ``dtype`` (bfloat16 as its bits), rounded to nearest, ties to even."""
    if dtype == "float32":
        return values
    if dtype == "float16":
        with np.errstate(over="ignore"):
            half: npt.NDArray[Any] = values.astype("<f2")
        return half
    bits = values.view(np.uint32)
    rounded = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    upper: npt.NDArray[Any] = (rounded >> np.uint32(16)).astype("<u2")
    return upper
