"""Reversible rearrangements of a page's bytes that leave the compressible ones together.

Floats are noise in sign and mantissa, and narrow in the exponent: cut into planes of bytes, the plane with the
exponent compresses to its entropy and the others are best left alone. A plane holds the same bytes of all
elements of a page, in page order. Everything runs in pieces of ``_PIECE`` elements through buffers that stay in
the L2 cache (64 KiB: three times as fast as over a whole page), in NumPy calls that release the GIL.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from fx_instrument.errors import CorruptStreamError, UnsupportedStreamError

U8 = npt.NDArray[np.uint8]

PLAIN = 0
"""One plane: the page as it is."""
SPLIT16 = 1
"""16-bit elements: high bytes, low bytes."""
ROTATED16 = 2
"""16-bit elements rotated left by one bit (bfloat16: the high byte is the whole exponent), then SPLIT16."""
SPLIT32 = 3
"""32-bit elements: bits 24-31, bits 16-23, bits 0-15."""
ROTATED32 = 4
"""32-bit elements rotated left by one bit (float32: the first plane is the whole exponent), then SPLIT32."""
SPLIT64 = 5
"""64-bit elements: bits 56-63, bits 48-55, bits 32-47, bits 0-31."""

_WIDTHS: dict[int, tuple[int, ...]] = {
    PLAIN: (1,),
    SPLIT16: (1, 1),
    ROTATED16: (1, 1),
    SPLIT32: (1, 1, 2),
    ROTATED32: (1, 1, 2),
    SPLIT64: (1, 1, 2, 4),
}
_ROTATED = (ROTATED16, ROTATED32)
_PIECE = 32768

_FLOAT_FILTERS = {
    "bfloat16": ROTATED16,
    "float16": SPLIT16,
    "complex32": SPLIT16,
    "float32": ROTATED32,
    "complex64": ROTATED32,
    "float64": SPLIT64,
    "complex128": SPLIT64,
}


def filter_for(dtype: str) -> int:
    """The filter that suits a dtype: planes for floats wider than a byte, PLAIN for everything else."""
    return _FLOAT_FILTERS.get(dtype, PLAIN)


def plane_sizes(filter_code: int, raw_bytes: int) -> tuple[int, ...]:
    """Raw bytes of each plane of a page; the errors are those of a file that says nonsense."""
    try:
        widths = _WIDTHS[filter_code]
    except KeyError:
        raise UnsupportedStreamError(f"this version does not know filter {filter_code}") from None
    count, rest = divmod(raw_bytes, sum(widths))
    if rest:
        raise CorruptStreamError(
            f"a page of {raw_bytes} bytes holds no whole elements of {sum(widths)} bytes"
        )
    return tuple(count * width for width in widths)


class PlaneSplitter:
    """Splits pages into planes through scratch memory that it keeps: one for each thread."""

    def __init__(self) -> None:
        self._scratch = np.empty(2 * _PIECE, np.uint64)

    def split(self, filter_code: int, buffers: Iterable[U8], planes: Sequence[U8]) -> None:
        """Fill ``planes`` (of ``plane_sizes``) from the page whose bytes are ``buffers`` one after another.

        A buffer holds whole elements.
        """
        widths = _WIDTHS[filter_code]
        element = np.dtype(f"<u{sum(widths)}")
        outs = [plane.view(f"<u{width}") for plane, width in zip(planes, widths, strict=True)]
        first = self._scratch[:_PIECE].view(element)[:_PIECE]
        second = self._scratch[_PIECE:].view(element)[:_PIECE]
        rotated = filter_code in _ROTATED
        bits = 8 * element.itemsize
        position = 0
        for buffer in buffers:
            source = buffer.view(element)
            for start in range(0, len(source), _PIECE):
                values = source[start : start + _PIECE]
                count = len(values)
                shifted = second[:count]
                if rotated:
                    turned = first[:count]
                    np.right_shift(values, bits - 1, out=turned)
                    np.add(turned, values, out=turned)
                    np.add(turned, values, out=turned)
                    values = turned
                shift = bits
                for out, width in zip(outs, widths, strict=True):
                    shift -= 8 * width
                    if shift:
                        np.right_shift(values, shift, out=shifted)
                        np.copyto(out[position : position + count], shifted, casting="unsafe")
                    else:
                        np.copyto(out[position : position + count], values, casting="unsafe")
                position += count

    def join(self, filter_code: int, planes: Sequence[U8], page: U8) -> None:
        """Fill ``page`` from its planes: the inverse of ``split``."""
        widths = _WIDTHS[filter_code]
        element = np.dtype(f"<u{sum(widths)}")
        sources = [plane.view(f"<u{width}") for plane, width in zip(planes, widths, strict=True)]
        target = page.view(element)
        scratch = self._scratch[:_PIECE].view(element)[:_PIECE]
        bits = 8 * element.itemsize
        for start in range(0, len(target), _PIECE):
            values = target[start : start + _PIECE]
            part = scratch[: len(values)]
            np.copyto(values, sources[0][start : start + _PIECE])
            for source, width in zip(sources[1:], widths[1:], strict=True):
                np.left_shift(values, 8 * width, out=values)
                np.copyto(part, source[start : start + _PIECE])
                np.bitwise_or(values, part, out=values)
            if filter_code in _ROTATED:
                np.left_shift(values, bits - 1, out=part)
                np.right_shift(values, 1, out=values)
                np.bitwise_or(values, part, out=values)


def gather(buffers: Sequence[U8], scratch: U8) -> U8:
    """The buffers joined in ``scratch``; a single buffer as it is, without a copy."""
    if len(buffers) == 1:
        return buffers[0]
    total = sum(map(len, buffers))
    if not total:
        return scratch[:0]
    return np.concatenate(buffers, out=scratch[:total])
