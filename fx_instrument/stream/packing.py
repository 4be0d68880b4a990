"""Exponents in four bits each, and the few that do not fit: the fast tier's compression, one byte a piece to tell how.

Of each piece of 32768 elements a top exponent t is chosen. An exponent e is the nibble t - e where that is from 0
to 14, else 15. The nibbles of a piece of m elements are (m + 1) // 2 bytes: byte i holds element i low and element
(m + 1) // 2 + i high (0 if there is none). The exceptions are the t of all pieces, then, in order, every exponent
whose nibble is 15.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..errors import CorruptStreamError

U8 = npt.NDArray[np.uint8]

PIECE = 32768
"""Elements with one top."""
_EXCEPTION = 15


class Packer:
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


def unpack(nibbles: U8, exceptions: U8, count: int) -> U8:
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
