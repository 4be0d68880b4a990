"""Exponents in four bits each, and the few that do not fit: the fast tier's compression, one byte a piece to tell how.

Of each piece of 32768 elements a top exponent t is chosen. An exponent e is the nibble t - e where that is from 0
to 14, else 15. The nibbles of a piece of m elements are (m + 1) // 2 bytes: byte i holds element i low and element
(m + 1) // 2 + i high (0 if there is none). The exceptions are the t of all pieces, then, in order, every exponent
whose nibble is 15. Many pieces are packed and unpacked at once, as rows: of one alone NumPy's calls would cost more
than what they do.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from ..errors import CorruptStreamError

U8 = npt.NDArray[np.uint8]

PIECE = 32768
"""Elements with one top."""
_AT_ONCE = 16
"""Pieces."""
_EXCEPTION = 15
_FEW = PIECE >> 6
"""With more exceptions, and a quarter more than the last best top left, a better top is looked for."""


class Packer:
    """Exponents of a page to nibbles, and what does not fit in them.

    Args:
        scratch: two bytes for each of the most exponents that come at once.
    """

    def __init__(self, scratch: U8) -> None:
        self._codes, mask = scratch.reshape(2, -1)
        self._mask = mask.view(np.bool_)
        self._tops: list[int] = []
        self._escaped: list[U8] = []
        self._top = 0
        self._usual = _FEW

    def pack(self, exponents: U8, nibbles: U8) -> None:
        """The next pieces, all whole, or but for the page's last one."""
        for start, num_pieces, length in _rows(len(exponents)):
            end, half = start + num_pieces * length, (length + 1) // 2
            first = start // 2
            self._pack(
                exponents[start:end].reshape(num_pieces, length),
                nibbles[first : first + num_pieces * half].reshape(num_pieces, half),
            )

    def _pack(self, exponents: U8, nibbles: U8) -> None:
        num_pieces, length = exponents.shape
        codes = self._codes[: exponents.size].reshape(exponents.shape)
        mask = self._mask[: exponents.size].reshape(exponents.shape)
        if not self._tops:
            self._top = _best_top(exponents[0])
        top = self._top
        self._code(exponents, codes, mask)
        num_escaped = 0
        for row in range(num_pieces):
            if self._top != top:
                self._code(exponents[row], codes[row], mask[row])
            found = int(np.count_nonzero(mask[row]))
            if found > self._usual:
                best = _best_top(exponents[row])
                if best != self._top:
                    self._top = best
                    self._code(exponents[row], codes[row], mask[row])
                    found = int(np.count_nonzero(mask[row]))
                self._usual = max(_FEW, found + (found >> 2))
            self._tops.append(self._top)
            num_escaped += found
        if num_escaped:
            self._escaped.append(_escaped(exponents.reshape(-1), mask.reshape(-1), num_escaped))
            # 0 or 255; np.minimum(codes, 15) takes five times as long.
            fill = mask.view(np.uint8)
            np.negative(fill, out=fill)
            np.bitwise_or(codes, fill, out=codes)
            np.bitwise_and(codes, 15, out=codes)
        half = nibbles.shape[1]
        low, high = codes[:, :half], codes[:, half:]
        shifted = mask.view(np.uint8)[:, :half]
        if length % 4:
            np.left_shift(high, 4, out=shifted[:, : length - half])
            shifted[:, length - half :] = 0
        else:
            # Bytes below 16 are shifted in wider words as well; NumPy's shift of bytes is slow.
            np.multiply(high.view(np.uint16), np.uint16(16), out=shifted.view(np.uint16))
        np.bitwise_or(low, shifted, out=nibbles)

    def _code(self, exponents: U8, codes: U8, mask: npt.NDArray[np.bool_]) -> None:
        np.subtract(np.uint8(self._top), exponents, out=codes)
        np.greater_equal(codes, _EXCEPTION, out=mask)

    def exceptions(self) -> U8:
        """The tops of the page's pieces, and the exponents that did not fit."""
        return np.concatenate([np.array(self._tops, np.uint8), *self._escaped])


def _rows(count: int) -> Iterator[tuple[int, int, int]]:
    """``(start, pieces, elements of each)`` of some pieces at a time; what is left is the last one, alone."""
    whole = count - count % PIECE
    for start in range(0, whole, _AT_ONCE * PIECE):
        yield start, min(_AT_ONCE, (whole - start) // PIECE), PIECE
    if whole < count:
        yield whole, 1, count - whole


def _best_top(exponents: U8) -> int:
    """The top of the 15 exponents that hold most of a sample."""
    counts = np.bincount(exponents[:: max(1, len(exponents) // 2048)], minlength=256)
    sums = np.cumsum(np.concatenate([np.zeros(_EXCEPTION, np.int64), counts]))
    return int(np.argmax(sums[_EXCEPTION:] - sums[:-_EXCEPTION]))


def _escaped(exponents: U8, mask: npt.NDArray[np.bool_], num_escaped: int) -> U8:
    """The exponents under the mask, in order: eight at a time, as few words have any."""
    whole = len(mask) & ~7
    if num_escaped > len(mask) >> 4:
        return exponents[mask]
    words = _words_with_any(mask)
    some = exponents[:whole].view(np.uint64)[words].view(np.uint8)
    rest = exponents[whole:][mask[whole:]]
    return np.concatenate([some[mask[:whole].view(np.uint64)[words].view(np.bool_)], rest])


def _words_with_any(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.intp]:
    """Which words of eight flags have one set; comparing first is three times as fast as nonzero on words."""
    words: npt.NDArray[np.intp] = (mask[: len(mask) & ~7].view(np.uint64) != 0).nonzero()[0]
    return words


def unpack(nibbles: U8, exceptions: U8, count: int) -> U8:
    """The exponents of a packed page."""
    num_pieces = -(-count // PIECE)
    if len(exceptions) < num_pieces:
        raise CorruptStreamError("a packed page lacks the tops of its pieces")
    tops, escaped = exceptions[:num_pieces], exceptions[num_pieces:]
    exponents = np.empty(count, np.uint8)
    taken = 0
    for start, num_rows, length in _rows(count):
        end, half, first = start + num_rows * length, (length + 1) // 2, start // 2
        rows = exponents[start:end].reshape(num_rows, length)
        stored = nibbles[first : first + num_rows * half].reshape(num_rows, half)
        np.bitwise_and(stored, 15, out=rows[:, :half])
        high = np.bitwise_and(stored, 0xF0)
        if half % 2:
            np.right_shift(high, 4, out=high)
        else:
            words = high.view(np.uint16)
            np.right_shift(words, 4, out=words)
        np.copyto(rows[:, half:], high[:, : length - half])
        codes = exponents[start:end]
        mask = np.equal(codes, _EXCEPTION)
        np.subtract(tops[start // PIECE :][:num_rows, None], rows, out=rows)
        if num_escaped := int(np.count_nonzero(mask)):
            if taken + num_escaped > len(escaped):
                raise CorruptStreamError("a packed page lacks exponents")
            codes[_places(mask, num_escaped)] = escaped[taken : taken + num_escaped]
            taken += num_escaped
    if taken != len(escaped):
        raise CorruptStreamError("a packed page has exponents left over")
    return exponents


def _places(mask: npt.NDArray[np.bool_], num_set: int) -> npt.NDArray[np.intp]:
    """Where the mask is set, in order."""
    if num_set > len(mask) >> 4:
        return np.flatnonzero(mask)
    rest = np.arange(len(mask) & ~7, len(mask))
    inside = np.concatenate([(8 * _words_with_any(mask)[:, None] + np.arange(8)).ravel(), rest])
    places: npt.NDArray[np.intp] = inside[mask[inside]]
    return places
