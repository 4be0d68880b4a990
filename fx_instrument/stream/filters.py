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
"""ROTATED16 with the exponents in four bits each: planes nibbles, low bytes, exceptions."""
PACKED32 = 7
"""ROTATED32 with the exponents in four bits each: planes nibbles, bits 16-23, bits 0-15, exceptions.

Of each piece of 32768 elements a top exponent t is chosen. An exponent e is the nibble t - e where that is from 0
to 14, else 15. The nibbles of a piece of m elements are (m + 1) // 2 bytes: byte i holds element i low and element
(m + 1) // 2 + i high (0 if there is none). The exceptions are the t of all pieces, then, in order, every exponent
whose nibble is 15.
"""

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
}
_ROTATED = (ROTATED16, ROTATED32, PACKED16, PACKED32)
_PACKED = (PACKED16, PACKED32)
PIECE = 32768
CHUNK_BYTES = 128 << 10
"""Raw blocks of zstd hold so much: whole pieces of every width."""
_AT_ONCE_BYTES = 2 * CHUNK_BYTES
"""So many bytes of a page are split or joined in one go. Each NumPy call lets go of the interpreter's lock and asks for
it again: at 64 KiB two threads had 1.35 times the speed of one, at 256 KiB 1.55 to 1.6 times (1.3 in one run of five),
and one was no slower."""
_EXCEPTION = 15

_SPLIT_OF = {
    "bfloat16": ROTATED16,
    "float16": SPLIT16,
    "complex32": SPLIT16,
    "float32": ROTATED32,
    "complex64": ROTATED32,
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
        packer = _Packer(self._first.view(np.uint8)[-2 * PIECE :]) if packed else None
        bits = 8 * element.itemsize
        position = 0
        for values in _pieces(buffers, element, length):
            count = len(values)
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
            planes = [_unpack(nibbles, exceptions, len(page) // element.itemsize), *planes[1:-1]]
        target = page.view(element)
        # Products in place of left shifts, whose count NumPy checks.
        piece = _AT_ONCE_BYTES // element.itemsize
        scratch = self._first.view(element)[:piece]
        aligned = self._second.view(np.uint8)[:CHUNK_BYTES]
        shifts = [element.type(1 << 8 * width) for width in widths]
        for start in range(0, len(target), piece):
            values = target[start : start + piece]
            count = len(values)
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


class _Packer:
    """Exponents to nibbles, piece by piece, and what does not fit in them."""

    def __init__(self, scratch: U8) -> None:
        self._codes = scratch[:PIECE]
        self._mask = scratch[PIECE : 2 * PIECE]
        self._tops = bytearray()
        self._escaped: list[U8] = []
        self._top: int | None = None

    def pack(self, exponents: U8, nibbles: U8) -> None:
        count = len(exponents)
        codes, mask = self._codes[:count], self._mask[:count]
        if self._top is None:
            self._top = _best_top(exponents)
        np.subtract(np.uint8(self._top), exponents, out=codes)
        np.greater_equal(codes, _EXCEPTION, out=mask.view(np.bool_))
        num_escaped = int(np.count_nonzero(mask.view(np.bool_)))
        self._tops.append(self._top)
        if num_escaped:
            self._escaped.append(_escaped(exponents, mask, num_escaped))
            # 0 or 255; np.minimum(codes, 15) takes ten times as long.
            np.negative(mask, out=mask)
            np.bitwise_or(codes, mask, out=codes)
            np.bitwise_and(codes, 15, out=codes)
            if num_escaped > count >> 6:
                self._top = None
        half = (count + 1) // 2
        high = mask[:half]
        high[-1] = 0
        np.copyto(high[: count - half], codes[half:])
        # Bytes below 16 shift in wider words as well; NumPy's shift of bytes is slow.
        wide = high[: half & ~7].view(np.uint64)
        np.left_shift(wide, 4, out=wide)
        np.left_shift(high[half & ~7 :], 4, out=high[half & ~7 :])
        np.bitwise_or(codes[:half], high, out=nibbles)

    def exceptions(self) -> U8:
        return np.concatenate([np.frombuffer(bytes(self._tops), np.uint8), *self._escaped])


def _best_top(exponents: U8) -> int:
    """The top of the 15 exponents that hold most of a sample."""
    counts = np.bincount(exponents[:: max(1, len(exponents) // 2048)], minlength=256)
    sums = np.cumsum(np.concatenate([np.zeros(_EXCEPTION, np.int64), counts]))
    return int(np.argmax(sums[_EXCEPTION:] - sums[:-_EXCEPTION]))


def _escaped(exponents: U8, mask: U8, num_escaped: int) -> U8:
    """The exponents under the mask, in order: eight at a time, as few words have any."""
    whole = len(mask) & ~7
    if num_escaped > len(mask) >> 4:
        return exponents[mask.view(np.bool_)]
    words = _words_with_any(mask)
    some = exponents[:whole].view(np.uint64)[words].view(np.uint8)
    rest = exponents[whole:][mask[whole:].view(np.bool_)]
    return np.concatenate([some[mask[:whole].view(np.uint64)[words].view(np.bool_)], rest])


def _words_with_any(mask: U8) -> npt.NDArray[np.intp]:
    """Which words of eight flags have one set; comparing first is three times as fast as nonzero on words."""
    words: npt.NDArray[np.intp] = (mask[: len(mask) & ~7].view(np.uint64) != 0).nonzero()[0]
    return words


def _unpack(nibbles: U8, exceptions: U8, count: int) -> U8:
    """The exponents of a packed page."""
    num_pieces = -(-count // PIECE)
    if len(exceptions) < num_pieces:
        raise CorruptStreamError("a packed page lacks the tops of its pieces")
    tops, escaped = exceptions[:num_pieces], exceptions[num_pieces:]
    exponents = np.empty(count, np.uint8)
    taken = 0
    for number, start in enumerate(range(0, count, PIECE)):
        piece = exponents[start : start + PIECE]
        half = (len(piece) + 1) // 2
        stored = nibbles[start // 2 : start // 2 + half]
        np.bitwise_and(stored, 15, out=piece[:half])
        np.copyto(piece[half:], _high_nibbles(stored)[: len(piece) - half])
        mask = np.equal(piece, _EXCEPTION)
        np.subtract(tops[number], piece, out=piece)
        if num_escaped := int(np.count_nonzero(mask)):
            if taken + num_escaped > len(escaped):
                raise CorruptStreamError("a packed page lacks exponents")
            if num_escaped > len(piece) >> 4:
                places = mask.nonzero()[0]
            else:
                words = _words_with_any(mask.view(np.uint8))
                inside = np.concatenate([(8 * words[:, None] + np.arange(8)).ravel(), _rest(len(piece))])
                places = inside[mask[inside]]
            piece[places] = escaped[taken : taken + num_escaped]
            taken += num_escaped
    if taken != len(escaped):
        raise CorruptStreamError("a packed page has exponents left over")
    return exponents


def _rest(count: int) -> npt.NDArray[np.intp]:
    """The places behind the last whole word of eight."""
    return np.arange(count & ~7, count)


def _high_nibbles(stored: U8) -> U8:
    padded = np.zeros(-(-len(stored) // 8) * 8, np.uint8)
    np.bitwise_and(stored, 0xF0, out=padded[: len(stored)])
    words = padded.view(np.uint64)
    np.right_shift(words, 4, out=words)
    return padded


def gather(buffers: Sequence[U8], scratch: U8) -> U8:
    """The buffers joined in ``scratch``; a single buffer as it is, without a copy."""
    if len(buffers) == 1:
        return buffers[0]
    total = sum(map(len, buffers))
    if not total:
        return scratch[:0]
    return np.concatenate(buffers, out=scratch[:total])
