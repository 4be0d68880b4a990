"""Values with a bounded error: each row (a token's vector) on a uniform grid of its own, checked as it is made.

The error of rounding to a grid of width ``step`` is ``step / sqrt(12)`` in the mean square, so a row of root mean
square ``r`` keeps a relative error ``e`` (L2) with ``step = sqrt(12) * e * r``; a little less leaves room for chance.
The codes are then close to the rate that any quantiser needs at this error. A row whose error comes out larger, whose
codes don't fit 16 bits, or that holds an infinity or NaN is kept as it is.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import CorruptStreamError

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]

DTYPES = ("float32", "bfloat16", "float16")
"""What can be quantised; everything else stays lossless."""

Layout = tuple[int, int]
"""Elements a row, and how many of a row's elements come before the first whole one."""

_ROOMS = (1.005, 0.995, 0.985, 0.97, 0.94, 0.9)
"""Of the step that meets the error in the mean, the widest that a row comes out within the bound with. The error of
576 elements varies by 2 %, so most rows take one of the first three."""
_MAX_CODE = 32767 - 128
_PIECE = 32768
"""Elements at work at once: a dozen temporaries of them fit in a megabyte or two."""
_RUN = struct.Struct("<II")
_COUNT = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Quantised:
    """A page of rows on their grids."""

    codes: npt.NDArray[np.int16]
    """One an element, in page order; 0 in rows that are kept as they are."""
    table: bytes
    """``runs u32 · (elements a row u32, rows u32) a run · step bf16 a row``; the step of a row kept as it is is NaN."""
    kept: bytes
    """The rows kept as they are, one after another."""


def quantise(
    buffers: Sequence[U8], layouts: Sequence[Layout], dtype: str, max_relative_error: float
) -> Quantised:
    """The rows of ``buffers``, cut as the ``layouts`` beside them say.

    Every row's error is at most ``max_relative_error`` times its norm (L2), after rounding to ``dtype``. Of a row in
    several pieces each piece keeps the bound, and so does the row.
    """
    codes, steps, kept = [], [], []
    runs: list[list[int]] = []
    for buffer, layout in zip(buffers, layouts, strict=True):
        values = widen(buffer, dtype)
        itemsize = len(buffer) // max(1, len(values))
        for start, width, count in _runs(len(values), *layout):
            end = start + width * count
            row_codes, row_steps = _quantise_rows(
                values[start:end].reshape(count, width), dtype, max_relative_error
            )
            raw = buffer[start * itemsize : end * itemsize].reshape(count, width * itemsize)
            codes.append(row_codes.reshape(-1))
            if runs and runs[-1][0] == width:
                runs[-1][1] += count
            else:
                runs.append([width, count])
            steps.append(row_steps)
            kept.append(raw[np.isnan(row_steps)].tobytes())
    table = b"".join(
        [
            _COUNT.pack(len(runs)),
            *(_RUN.pack(*run) for run in runs),
            *(narrow(step, "bfloat16").tobytes() for step in steps),
        ]
    )
    joined = np.concatenate(codes) if codes else np.zeros(0, np.int16)
    return Quantised(joined, table, b"".join(kept))


def split_codes(codes: npt.NDArray[np.int16]) -> tuple[U8, U8]:
    """High and low bytes; the low one is signed, so that the high one of small codes is 0 whatever their sign."""
    high: U8 = ((codes + np.int16(128)) >> np.int16(8)).astype(np.uint8)
    return high, codes.astype(np.uint8)


def join_codes(high: U8, low: U8) -> npt.NDArray[np.int16]:
    codes: npt.NDArray[np.int16] = high.view(np.int8) * np.int16(256) + low.view(np.int8)
    return codes


def layout_of(shape: tuple[int, ...], sampled: bool, part_elements: int) -> Layout:
    """How a record, from its element ``part_elements`` on, falls into rows: along its last dimension.

    The elements that were sampled from a tensor are one row, and so are those of a scalar.
    """
    width = shape[-1] if shape and not sampled else math.prod(shape)
    return width, -part_elements % max(1, width)


def _runs(total: int, width: int, lead: int) -> Iterator[tuple[int, int, int]]:
    """``(start, width, rows)`` of equal rows, at most ``_PIECE`` elements each: what is at work at once is bounded."""
    position = 0
    while position < total:
        row = lead if position < lead else width
        here = min(row, total - position)
        if here > _PIECE:
            for start in range(0, here, _PIECE):
                yield position + start, min(_PIECE, here - start), 1
            position += here
            continue
        rows = (
            1 if row != width or here < width else min((total - position) // width, max(1, _PIECE // width))
        )
        yield position, here, rows
        position += here * rows


def restore(codes: npt.NDArray[np.int16], rest: U8, dtype: str, out: U8) -> None:
    """Fill ``out`` with the values of a page, from its codes and ``table + kept``; every length is checked first."""
    itemsize = 4 if dtype == "float32" else 2
    data = np.ascontiguousarray(rest).data
    num_runs = _COUNT.unpack_from(data)[0] if len(data) >= _COUNT.size else 0
    position = _COUNT.size + num_runs * _RUN.size
    if position > len(data):
        raise CorruptStreamError("a table of quantised rows ends early")
    runs = [_RUN.unpack_from(data, _COUNT.size + number * _RUN.size) for number in range(num_runs)]
    num_elements = sum(width * count for width, count in runs)
    num_rows = sum(count for _, count in runs)
    if (
        num_elements != len(codes)
        or num_elements * itemsize != len(out)
        or position + 2 * num_rows > len(data)
    ):
        raise CorruptStreamError(
            f"a table of quantised rows describes {num_elements} elements in {num_rows} rows, its page has {len(codes)}"
        )
    steps = widen(np.frombuffer(data, np.uint8, 2 * num_rows, position), "bfloat16")
    kept = np.frombuffer(data, np.uint8, offset=position + 2 * num_rows)
    start, row, taken = 0, 0, 0
    for width, count in runs:
        end = start + width * count
        whole = np.isnan(steps[row : row + count])
        values = codes[start:end].reshape(count, width).astype(np.float32)
        values *= np.where(whole, np.float32(0), steps[row : row + count])[:, None]
        target = out[start * itemsize : end * itemsize]
        target[:] = narrow(values.reshape(-1), dtype).view(np.uint8)
        num_kept = int(whole.sum()) * width * itemsize
        if taken + num_kept > len(kept):
            raise CorruptStreamError("the rows kept as they are end early")
        rows = target.reshape(count, width * itemsize)
        rows[whole] = kept[taken : taken + num_kept].reshape(-1, width * itemsize)
        start, row, taken = end, row + count, taken + num_kept
    if taken != len(kept):
        raise CorruptStreamError(f"{len(kept) - taken} bytes of rows kept as they are belong to none")


def _quantise_rows(rows: F32, dtype: str, error: float) -> tuple[npt.NDArray[np.int16], F32]:
    with np.errstate(all="ignore"):
        squares = np.einsum("ij,ij->i", rows, rows, dtype=np.float64)
    codes = np.zeros(rows.shape, np.int16)
    steps = np.full(len(rows), np.nan, np.float32)
    left = np.arange(len(rows))
    for room in _ROOMS:
        tried = rows[left], squares[left]
        found, found_steps, good = _try_step(*tried, dtype, error, room)
        codes[left[good]], steps[left[good]] = found[good], found_steps[good]
        left = left[~good]
        if not len(left):
            break
    return codes, steps


def _try_step(
    rows: F32, squares: npt.NDArray[np.float64], dtype: str, error: float, room: float
) -> tuple[npt.NDArray[np.int16], F32, npt.NDArray[np.bool_]]:
    """Codes and steps of the rows at one share of the mean step, and which rows hold the error."""
    with np.errstate(all="ignore"):
        scale = np.sqrt(12.0) * room * error * np.sqrt(squares / rows.shape[1])
        # Two bytes of a step are enough, and half a percent of a row of 576 elements.
        steps = widen(narrow(scale.astype(np.float32), "bfloat16").view(np.uint8), "bfloat16")
        # A row of zeros has its one code at any step; a step that underflows cannot be divided by.
        exact = (steps > 0) | (squares == 0)
        wide = np.rint(rows / np.where(steps > 0, steps, np.float32(1))[:, None])
        fits = exact & (np.abs(wide).max(axis=1, initial=0) <= _MAX_CODE)
        codes = np.where(fits[:, None], wide, np.float32(0)).astype(np.int16)
        back = widen(
            narrow((codes.astype(np.float32) * steps[:, None]).reshape(-1), dtype).view(np.uint8), dtype
        )
        apart = back.reshape(rows.shape).astype(np.float64) - rows
        good = fits & (np.einsum("ij,ij->i", apart, apart) <= squares * (error * error))
    return codes, steps, good


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
