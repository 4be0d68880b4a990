"""Reversible rearrangements of a page's bytes that leave the compressible ones together.

Floats are noise in sign and mantissa, and narrow in the exponent: cut into planes of bytes, the plane with the
exponent compresses to its entropy and the others are best left alone. A plane holds the same bytes of all
elements of a page, in page order. Everything runs in pieces through buffers that stay in the L2 cache (three times
as fast as over a whole page), in NumPy calls that release the GIL.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import CorruptStreamError, UnsupportedStreamError
from .packing import PIECE, Packer, unpack
from .quantise import join_codes, restore

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
PACKED16 = 6
"""ROTATED16 with the exponents in four bits each (packing.py): planes nibbles, low bytes, exceptions."""
PACKED32 = 7
"""ROTATED32 with the exponents in four bits each: planes nibbles, bits 16-23, bits 0-15, exceptions."""
SIGNED16 = 11
"""bfloat16: exponents, then signs and mantissas (bit 15 above bits 0-6). As compressible as ROTATED16, and joined in
five passes over the page instead of seven."""
SIGNED32 = 12
"""float32: exponents, signs and mantissas' first bits (bit 31 above bits 16-22), bits 0-15."""

QUANTISED = {"float32": 8, "bfloat16": 9, "float16": 10}
"""Values with a bounded error (quantise.py): high bytes of the codes, low bytes, steps and rows kept as they are."""

_QUANTISED_DTYPES = {code: dtype for dtype, code in QUANTISED.items()}
_WIDTHS: dict[int, tuple[int, ...]] = {
    PLAIN: (1,),
    SPLIT16: (1, 1),
    ROTATED16: (1, 1),
    SPLIT32: (1, 1, 2),
    ROTATED32: (1, 1, 2),
    SPLIT64: (1, 1, 2, 4),
    PACKED16: (1, 1),
    PACKED32: (1, 1, 2),
    SIGNED16: (1, 1),
    SIGNED32: (1, 1, 2),
}
_ROTATED = (ROTATED16, ROTATED32, PACKED16, PACKED32)
_PACKED = (PACKED16, PACKED32)
_SIGNED = (SIGNED16, SIGNED32)
_SIGN_AND_MANTISSA = np.uint16(0x807F)
"""Of a bfloat16, and of the upper half of a float32."""
CHUNK_BYTES = 128 << 10
"""Raw blocks of zstd hold so much: whole pieces of every width."""
_AT_ONCE_BYTES = 2 * CHUNK_BYTES
"""So many bytes of a page are split or joined in one go. Each NumPy call lets go of the interpreter's lock and asks for
it again: at 64 KiB two threads had 1.35 times the speed of one, at 256 KiB 1.55 to 1.6 times (1.3 in one run of five),
and one was no slower; whole pages at once gained no more."""

_SPLIT_OF = {
    "bfloat16": SIGNED16,
    "float16": SPLIT16,
    "complex32": SPLIT16,
    "float32": SIGNED32,
    "complex64": SIGNED32,
    "float64": SPLIT64,
    "complex128": SPLIT64,
}
_PACKED_OF = {"bfloat16": PACKED16, "float32": PACKED32, "complex64": PACKED32}


def split_filter(dtype: str) -> int:
    """The filter into planes that suits a dtype: PLAIN for everything but floats wider than a byte."""
    return _SPLIT_OF.get(dtype, PLAIN)


def packed_filter(dtype: str) -> int | None:
    """The filter that is itself the compression, at two thirds of the gain of an entropy coder; None: none."""
    return _PACKED_OF.get(dtype)


def plane_sizes(filter_code: int, raw_bytes: int) -> tuple[int | None, ...]:
    """Raw bytes of each plane of a page, None for one as long as it is stored; errors as of a file's nonsense."""
    if filter_code in _QUANTISED_DTYPES:
        count = raw_bytes // (4 if _QUANTISED_DTYPES[filter_code] == "float32" else 2)
        return count, count, None
    try:
        widths = _WIDTHS[filter_code]
    except KeyError:
        raise UnsupportedStreamError(f"this version does not know filter {filter_code}") from None
    count, rest = divmod(raw_bytes, sum(widths))
    if rest:
        raise CorruptStreamError(
            f"a page of {raw_bytes} bytes holds no whole elements of {sum(widths)} bytes"
        )
    sizes = tuple(count * width for width in widths)
    # All pieces but the last have an even number of elements.
    return ((count + 1) // 2, *sizes[1:], None) if filter_code in _PACKED else sizes


class Planes:
    """Splits pages into planes, and joins them, in scratch memory that it keeps: one for each thread."""

    def __init__(self) -> None:
        self._first = np.empty(PIECE, np.uint64)
        self._second = np.empty(PIECE, np.uint64)

    def split(self, filter_code: int, buffers: Sequence[U8], scratch: U8) -> list[U8]:
        """The planes of the page whose bytes are ``buffers``, one after another, each of whole elements.

        They lie in ``scratch``, which has room for the page.
        """
        widths = _WIDTHS[filter_code]
        element = np.dtype(f"<u{sum(widths)}")
        total = sum(map(len, buffers))
        packed = filter_code in _PACKED
        planes, start = [], 0
        for size in plane_sizes(filter_code, total):
            if size is not None:
                planes.append(scratch[start : start + size])
                start += size
        outs = [plane.view(f"<u{width}") for plane, width in zip(planes, widths, strict=True)]
        # What packs has a unit of its own.
        length = PIECE if packed else _AT_ONCE_BYTES // element.itemsize
        turned = self._first.view(element)[:length]
        shifted = self._second.view(element)[:length]
        exponents = self._second.view(np.uint8)[-PIECE:]
        packer = Packer(self._first.view(np.uint8)[-2 * PIECE :]) if packed else None
        bits = 8 * element.itemsize
        position = 0
        for values in _pieces(buffers, element, length):
            count = len(values)
            if filter_code in _SIGNED:
                self._split_signed(values, [out[position : position + count] for out in outs])
                position += count
                continue
            if filter_code in _ROTATED:
                piece = turned[:count]
                np.right_shift(values, bits - 1, out=piece)
                np.add(piece, values, out=piece)
                np.add(piece, values, out=piece)
                values = piece
            shift = bits
            for number, (out, width) in enumerate(zip(outs, widths, strict=True)):
                shift -= 8 * width
                target = out[position : position + count]
                if packer is not None and number == 0:
                    target = exponents[:count]
                if shift:
                    part = shifted[:count]
                    np.right_shift(values, shift, out=part)
                    np.copyto(target, part, casting="unsafe")
                else:
                    np.copyto(target, values, casting="unsafe")
            if packer is not None:
                packer.pack(exponents[:count], outs[0][position // 2 : (position + count + 1) // 2])
            position += count
        return [*planes, packer.exceptions()] if packer is not None else planes

    def _split_signed(
        self, values: npt.NDArray[np.unsignedinteger], outs: Sequence[npt.NDArray[Any]]
    ) -> None:
        """A piece's exponents, signs beside mantissas, and of 32 bits the lower half, to ``outs``."""
        count = len(values)
        upper = values
        first, second = self._first.view(np.uint16)[:count], self._second.view(np.uint16)[-count:]
        if len(outs) == 3:
            np.copyto(outs[2], values, casting="unsafe")
            shifted = self._second.view(np.uint32)[:count]
            np.right_shift(values, 16, out=shifted)
            upper = self._first.view(np.uint16)[-count:]
            np.copyto(upper, shifted, casting="unsafe")
        np.right_shift(upper, 7, out=first)
        np.copyto(outs[0], first, casting="unsafe")
        np.bitwise_and(upper, _SIGN_AND_MANTISSA, out=first)
        np.right_shift(first, 8, out=second)
        np.bitwise_or(first, second, out=first)
        np.copyto(outs[1], first, casting="unsafe")

    def join(self, filter_code: int, planes: Sequence[U8 | Sequence[U8]], page: U8) -> None:
        """Fill ``page`` from ``planes``: the inverse of ``split``.

        A plane is one array, or, of the filters that only split and rotate, arrays of ``CHUNK_BYTES``, the last one
        shorter.
        """
        if filter_code in _QUANTISED_DTYPES:
            high, low, rest = (_whole(plane) for plane in planes)
            restore(join_codes(high, low), rest, _QUANTISED_DTYPES[filter_code], page)
            return
        widths = _WIDTHS[filter_code]
        element = np.dtype(f"<u{sum(widths)}")
        if filter_code in _PACKED:
            nibbles, exceptions = _whole(planes[0]), _whole(planes[-1])
            planes = [unpack(nibbles, exceptions, len(page) // element.itemsize), *planes[1:-1]]
        target = page.view(element)
        # Products in place of left shifts, whose count NumPy checks.
        piece = _AT_ONCE_BYTES // element.itemsize
        scratch = self._first.view(element)[:piece]
        aligned = self._second.view(np.uint8)[:CHUNK_BYTES]
        shifts = [element.type(1 << 8 * width) for width in widths]
        for start in range(0, len(target), piece):
            values = target[start : start + piece]
            count = len(values)
            if filter_code in _SIGNED:
                parts = [
                    _piece(plane, start, count, width, aligned)
                    for plane, width in zip(planes, widths, strict=True)
                ]
                self._join_signed(parts, values)
                continue
            part = scratch[:count]
            np.copyto(values, _piece(planes[0], start, count, widths[0], aligned))
            for number, width in enumerate(widths[1:], 1):
                np.multiply(values, shifts[number], out=values)
                np.copyto(part, _piece(planes[number], start, count, width, aligned))
                np.add(values, part, out=values)
            if filter_code in _ROTATED:
                np.multiply(values, element.type(1 << 8 * element.itemsize - 1), out=part)
                np.right_shift(values, 1, out=values)
                np.add(values, part, out=values)

    def _join_signed(self, parts: Sequence[npt.NDArray[Any]], values: npt.NDArray[Any]) -> None:
        """The inverse of ``_split_signed``: fills ``values``."""
        count = len(values)
        upper = values if len(parts) == 2 else self._first.view(np.uint16)[-count:]
        signs = self._first.view(np.uint16)[:count]
        np.copyto(upper, parts[0])
        np.multiply(upper, np.uint16(1 << 7), out=upper)
        # A signed byte fills the bits above its own with its sign.
        np.copyto(signs.view(np.int16), parts[1].view(np.int8))
        np.bitwise_and(signs, _SIGN_AND_MANTISSA, out=signs)
        np.bitwise_or(upper, signs, out=upper)
        if len(parts) == 3:
            low = self._first.view(np.uint32)[:count]
            np.copyto(values, upper)
            np.multiply(values, np.uint32(1 << 16), out=values)
            np.copyto(low, parts[2])
            np.bitwise_or(values, low, out=values)


def _whole(plane: U8 | Sequence[U8]) -> U8:
    if isinstance(plane, np.ndarray):
        return plane
    return np.concatenate(plane) if plane else np.empty(0, np.uint8)


def _piece(plane: U8 | Sequence[U8], start: int, count: int, width: int, aligned: U8) -> npt.NDArray[Any]:
    """``count`` values of a plane from the ``start``-th on, none of which spans two chunks."""
    first, num_bytes = start * width, count * width
    if not isinstance(plane, np.ndarray):
        plane, first = plane[first // CHUNK_BYTES], first % CHUNK_BYTES
    part = plane[first : first + num_bytes]
    if len(part) != num_bytes:
        raise CorruptStreamError("a plane is shorter than its page")
    if width > 1 and part.ctypes.data % width:
        # NumPy reads values that are not aligned one by one.
        np.copyto(aligned[:num_bytes], part)
        part = aligned[:num_bytes]
    return part.view(f"<u{width}")


def _pieces(
    buffers: Sequence[U8], element: np.dtype[np.unsignedinteger], length: int
) -> Iterator[npt.NDArray[np.unsignedinteger]]:
    """The elements of the buffers in arrays of ``length``, the last one shorter.

    A piece that spans buffers is copied together, so that pieces don't depend on how a page came about.
    """
    pending: list[npt.NDArray[np.unsignedinteger]] = []
    room = length
    for buffer in buffers:
        values = buffer.view(element)
        start = 0
        while start < len(values):
            piece = values[start : start + room]
            start += len(piece)
            room -= len(piece)
            pending.append(piece)
            if not room:
                yield pending[0] if len(pending) == 1 else np.concatenate(pending)
                pending, room = [], length
    if pending:
        yield pending[0] if len(pending) == 1 else np.concatenate(pending)


def gather(buffers: Sequence[U8], scratch: U8) -> U8:
    """The buffers joined in ``scratch``; a single buffer as it is, without a copy."""
    if len(buffers) == 1:
        return buffers[0]
    total = sum(map(len, buffers))
    if not total:
        return scratch[:0]
    return np.concatenate(buffers, out=scratch[:total])
