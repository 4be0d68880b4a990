"""Which token of a forward call each row of a value belongs to, by their shapes and the value's site."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

Order = Literal["batch first", "tokens first"]

# Names of parts that read images or sound: as many rows as the text has tokens would be chance.
_OTHER_INPUTS = frozenset(
    {"vision", "visual", "audio", "speech"}
    | {
        f"{kind}_{part}"
        for kind in ("vision", "image", "audio", "speech")
        for part in ("tower", "model", "encoder")
    }
)


def reads_tokens(site: str) -> bool:
    """Whether rows of a site's values may be those of tokens."""
    return _OTHER_INPUTS.isdisjoint(site.split("."))


def order_of(rows: Sequence[int], batch: int, tokens: int) -> Order | None:
    """In which order a value has rows for ``tokens`` tokens of each of ``batch`` sequences; None: it has others.

    Args:
        rows: all dimensions of the value but the last.
    """
    wide = [size for size in rows if size != 1]
    sizes = [size for size in (batch, tokens) if size != 1]
    # As many sequences as tokens look the same both ways: nearly all modules have the batch first.
    if wide == sizes or (len(wide) == 1 and wide[0] == batch * tokens):
        return "batch first"
    return "tokens first" if wide == sizes[::-1] else None


def is_tokens_first(rows: Sequence[int], batch: int, tokens: int) -> bool:
    """Whether a value's shape alone shows that tokens come first, as of as many sequences as tokens it never does."""
    return tuple(rows) == (tokens, batch) != (batch, tokens)


def num_rows(shape: Sequence[int]) -> int:
    """How many rows a value of this shape has: all but the last dimension count them; a vector has one an element."""
    return math.prod(rows_of(shape)) if shape else 0


def rows_of(shape: Sequence[int]) -> Sequence[int]:
    """The dimensions that count the rows of a value of this shape."""
    return shape[: max(1, len(shape) - 1)]
