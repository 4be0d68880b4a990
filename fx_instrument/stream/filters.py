"""Reversible rearrangements of a page's bytes that leave the compressible ones together.

Floats are noise in sign and mantissa, and narrow in the exponent: cut into planes of bytes, the plane with the
exponent compresses to its entropy and the others are best left alone. A plane holds the same bytes of all
elements of a page, in page order. Everything runs in pieces, through buffers of their size, in NumPy calls that release
the GIL.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from ..errors import CorruptStreamError, UnsupportedStreamError
from .blocks import MAX_PAGE_BYTES
from .packing import Packer, unpack
from .payload import RAW_BLOCK_BYTES, RawFrame, raw_frame_bytes
from .quantise import join_codes, restore

U8 = npt.NDArray[np.uint8]
Plane: TypeAlias = "U8 | tuple[U8, U8]"
"""One array, or one in blocks: rows of ``RAW_BLOCK_BYTES`` and what comes after them."""

Place: TypeAlias = "tuple[Plane, int]"
"""A value of a plane, from which on values are written or read."""
Values: TypeAlias = "npt.NDArray[np.unsignedinteger[Any]]"

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
"""bfloat16: exponents, then signs and mantissas (bit 15 above bits 0-6). As compressible as ROTATED16, and split and
joined in fewer passes."""
SIGNED32 = 12
"""float32: exponents, signs and mantissas' first bits (bit 31 above bits 16-22), bits 0-15."""
PACKED_SIGNED16 = 13
"""SIGNED16 with the exponents in four bits each (packing.py): planes nibbles, signs and mantissas, exceptions."""
PACKED_SIGNED32 = 14
"""SIGNED32 with the exponents in four bits each: planes nibbles, signs and mantissas' first bits, bits 0-15,
exceptions."""

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
    PACKED_SIGNED16: (1, 1),
    PACKED_SIGNED32: (1, 1, 2),
}
_ROTATED = (ROTATED16, ROTATED32, PACKED16, PACKED32)
_PACKED = (PACKED16, PACKED32, PACKED_SIGNED16, PACKED_SIGNED32)
_SIGNED = (SIGNED16, SIGNED32, PACKED_SIGNED16, PACKED_SIGNED32)
_SIGN_AND_MANTISSA = np.uint16(0x807F)
"""Of a bfloat16, and of the upper half of a float32."""
AT_ONCE_BYTES = 4 * RAW_BLOCK_BYTES
"""So many bytes of a page are split in one go by a thread that is alone: what it works on stays in its core's cache."""

_SPLIT_OF = {
    "bfloat16": SIGNED16,
    "float16": SPLIT16,
    "complex32": SPLIT16,
    "float32": SIGNED32,
    "complex64": SIGNED32,
    "float64": SPLIT64,
    "complex128": SPLIT64,
}
_PACKED_OF = {"bfloat16": PACKED_SIGNED16, "float32": PACKED_SIGNED32, "complex64": PACKED_SIGNED32}


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
    """Splits pages into planes, and joins them, in scratch memory that it keeps: one for each thread.

    Each NumPy call lets go of the interpreter's lock and asks for it again, and threads that ask at once wait for each
    other (docs/performance.md), so calls are few and large, and cast on their way.

    Args:
        at_once_bytes: so much of a page is split or joined in one go: ``AT_ONCE_BYTES``, or at least the largest page.
    """

    def __init__(self, at_once_bytes: int = MAX_PAGE_BYTES) -> None:
        at_once = -(-at_once_bytes // 8) * 8
        self._scratch = np.empty(at_once, np.uint8)
        self._half = np.empty(at_once // 2, np.uint8)
        """Exponents that are to be packed."""
        self._packing = np.empty(at_once // 2 * 2, np.uint8)

    def split(self, filter_code: int, buffers: Sequence[U8], scratch: U8) -> list[U8]:
        """The planes of the page whose bytes are ``buffers``, one after another, each of whole elements.

        They lie in ``scratch``, which has room for the page.
        """
        return cast("list[U8]", self._split(filter_code, buffers, scratch, False))

    def split_framed(self, filter_code: int, buffers: Sequence[U8], scratch: U8) -> list[U8 | RawFrame]:
        """As ``split``, in room for ``split_bytes``; signs and mantissas come in the zstd frame that stores them.

        They hardly ever compress, and in one piece with their frame they are summed and written in one go.
        """
        return self._split(filter_code, buffers, scratch, True)

    def _split(
        self, filter_code: int, buffers: Sequence[U8], scratch: U8, framed: bool
    ) -> list[U8 | RawFrame]:
        widths = _WIDTHS[filter_code]
        element = np.dtype(f"<u{sum(widths)}")
        planes: list[U8 | RawFrame] = []
        start = 0
        for number, size in enumerate(plane_sizes(filter_code, sum(map(len, buffers)))):
            if size is None:
                continue
            if framed and number == 1 and filter_code in _SIGNED:
                planes.append(RawFrame(scratch[start:], size))
                start += len(planes[-1])
                # The plane behind it has elements of two bytes.
                start += start % 2
            else:
                planes.append(scratch[start : start + size])
                start += size
        outs: list[Plane] = [plane.blocks if isinstance(plane, RawFrame) else plane for plane in planes]
        length = len(self._scratch) // element.itemsize
        packer = Packer(self._packing) if filter_code in _PACKED else None
        position = 0
        for values in _pieces(buffers, element, length):
            count = len(values)
            places = [(out, position) for out in outs]
            if packer is not None:
                places[0] = self._half, 0
            if filter_code in _SIGNED:
                self._split_signed(values, places)
            else:
                if filter_code in _ROTATED:
                    piece = self._scratch.view(element)[:count]
                    np.right_shift(values, 8 * element.itemsize - 1, out=piece)
                    np.add(piece, values, out=piece)
                    np.add(piece, values, out=piece)
                    values = piece
                shift = 8 * element.itemsize
                for place, width in zip(places, widths, strict=True):
                    shift -= 8 * width
                    _cut(values, shift, place, width)
            if packer is not None:
                packer.pack(self._half[:count], scratch[position // 2 : (position + count + 1) // 2])
            position += count
        return [*planes, packer.exceptions()] if packer is not None else planes

    def _split_signed(self, values: Values, places: Sequence[Place]) -> None:
        """A piece's exponents, signs beside mantissas, and of 32 bits the lower half, to their places."""
        half = self._scratch.view(np.uint16)[: len(values)]
        upper = values
        if len(places) == 3:
            _cut(values, 0, places[2], 2)
            upper = self._scratch.view(np.uint16)[-len(values) :]
            np.right_shift(values, 16, out=upper, casting="unsafe")
        _cut(upper, 7, places[0], 1)
        np.bitwise_and(upper, _SIGN_AND_MANTISSA, out=half)
        # The sign's byte added to the mantissa's, in the upper byte.
        np.multiply(half, np.uint16(0x101), out=half)
        _cut(half, 8, places[1], 1)

    def join(self, filter_code: int, planes: Sequence[Plane], page: U8) -> None:
        """Fill ``page`` from ``planes``: the inverse of ``split``."""
        if filter_code in _QUANTISED_DTYPES:
            high, low, rest = (joined(plane) for plane in planes)
            restore(join_codes(high, low), rest, _QUANTISED_DTYPES[filter_code], page)
            return
        widths = _WIDTHS[filter_code]
        element = np.dtype(f"<u{sum(widths)}")
        if filter_code in _PACKED:
            nibbles, exceptions = joined(planes[0]), joined(planes[-1])
            planes = [unpack(nibbles, exceptions, len(page) // element.itemsize), *planes[1:-1]]
        target = page.view(element)
        piece = len(self._scratch) // element.itemsize
        for start in range(0, len(target), piece):
            values = target[start : start + piece]
            if filter_code in _SIGNED:
                self._join_signed(planes, start, values)
                continue
            for number, (plane, width) in enumerate(zip(planes, widths, strict=True)):
                if number:
                    # A product in place of a left shift, whose count NumPy checks.
                    np.multiply(values, element.type(1 << 8 * width), out=values)
                for rows, part in _parts(values, (plane, start), width):
                    np.add(rows, part, out=rows) if number else np.copyto(rows, part)
            if filter_code in _ROTATED:
                first_bits = self._scratch.view(element)[: len(values)]
                np.multiply(values, element.type(1 << 8 * element.itemsize - 1), out=first_bits)
                np.right_shift(values, 1, out=values)
                np.add(values, first_bits, out=values)

    def _join_signed(self, planes: Sequence[Plane], start: int, values: Values) -> None:
        """The inverse of ``_split_signed``: fills ``values``, of the page those from the ``start``-th on."""
        count = len(values)
        scratch = self._scratch.view(np.uint16)
        upper = values if values.dtype == np.uint16 else scratch[count : 2 * count]
        for rows, part in _parts(upper, (planes[0], start), 1):
            np.multiply(part, np.uint16(1 << 7), out=rows, dtype=np.uint16)
        both = scratch[:count]
        for rows, part in _parts(both.view(np.int16), (planes[1], start), 1):
            # A signed byte fills the bits above its own with its sign.
            np.bitwise_and(part.view(np.int8), _SIGN_AND_MANTISSA.view(np.int16), out=rows)
        np.bitwise_or(upper, both, out=upper)
        for plane in planes[2:]:
            np.multiply(upper, np.uint32(1 << 16), out=values, dtype=np.uint32)
            for rows, part in _parts(values, (plane, start), 2):
                np.bitwise_or(rows, part, out=rows)


def joined(plane: U8 | tuple[U8, ...], out: U8 | None = None) -> U8:
    """All of a plane as one array: in ``out``, if given; itself, where it is one."""
    if isinstance(plane, np.ndarray) and out is None:
        return plane
    parts = [plane] if isinstance(plane, np.ndarray) else plane
    whole = np.empty(sum(part.size for part in parts), np.uint8) if out is None else out
    position = 0
    for part in parts:
        np.copyto(whole[position : position + part.size].reshape(part.shape), part)
        position += part.size
    return whole


def split_bytes(page_bytes: int) -> int:
    """The most that the planes of a page, one of them framed, take."""
    return page_bytes + raw_frame_bytes(page_bytes // 2) - page_bytes // 2 + 1


def _cut(values: Values, shift: int, place: Place, width: int) -> None:
    """The bits of values from ``shift`` on, as many as ``width`` bytes have, to their place in a plane."""
    for part, target in _parts(values, place, width):
        if shift:
            np.right_shift(part, shift, out=target, casting="unsafe")
        else:
            np.copyto(target, part, casting="unsafe")


def _parts(
    values: npt.NDArray[Any], place: Place, width: int
) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
    """The values, and where in a plane they lie: in one piece, or at the end of a plane in blocks in two.

    Raises:
        CorruptStreamError: the plane is too short.
    """
    plane, start = place
    first, num_bytes = start * width, len(values) * width
    if isinstance(plane, np.ndarray):
        lying: tuple[U8, ...] = (plane[first : first + num_bytes],)
    else:
        assert first % RAW_BLOCK_BYTES == 0, "what is worked on in one go begins with a block"
        number, num_whole = first // RAW_BLOCK_BYTES, num_bytes // RAW_BLOCK_BYTES
        lying = plane[0][number : number + num_whole], plane[1][: num_bytes - num_whole * RAW_BLOCK_BYTES]
    if sum(part.size for part in lying) != num_bytes:
        raise CorruptStreamError("a plane is shorter than its page")
    position = 0
    for part in lying:
        if part.size:
            part = part.view(f"<u{width}")
            yield values[position : position + part.size].reshape(part.shape), part
            position += part.size


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
