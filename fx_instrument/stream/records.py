"""What a stream holds: records of sites, and what a file says of bytes that were lost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

DTYPES: dict[str, tuple[int, int]] = {
    "bool": (1, 1),
    "uint8": (2, 1),
    "int8": (3, 1),
    "int16": (4, 2),
    "int32": (5, 4),
    "int64": (6, 8),
    "uint16": (7, 2),
    "uint32": (8, 4),
    "uint64": (9, 8),
    "float16": (16, 2),
    "bfloat16": (17, 2),
    "float32": (18, 4),
    "float64": (19, 8),
    "complex32": (24, 4),
    "complex64": (25, 8),
    "complex128": (26, 16),
    "float8_e4m3fn": (32, 1),
    "float8_e5m2": (33, 1),
    "float8_e4m3fnuz": (34, 1),
    "float8_e5m2fnuz": (35, 1),
    "float8_e8m0fnu": (36, 1),
}
"""Name, as torch spells it -> (code in the file, bytes an element)."""
DTYPE_NAMES = {code: name for name, (code, _) in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class SiteEntry:
    """A row of the site table."""

    id: int
    name: str
    role: str

    @property
    def key(self) -> tuple[str, bool]:
        """What a site is known by: its name, and whether it is an input."""
        return self.name, self.role == "input"


@dataclass(frozen=True, slots=True)
class RecordMeta:
    """What the producer says of one captured tensor."""

    site_id: int
    step: int
    call: int
    dtype: str
    shape: tuple[int, ...]
    """Of the stored values; of a sampled record ``(k,)``."""
    full_shape: tuple[int, ...] | None = None
    """Of the tensor that the values were sampled from; None where the whole tensor is stored."""


@dataclass(frozen=True, slots=True)
class Damage:
    """Bytes of a file that recovery had to skip."""

    offset: int
    num_bytes: int
    reason: str
    file: str = ""
    """Path of the file, where a reader knows it."""


@dataclass(frozen=True, slots=True)
class StreamPart:
    """What one writer wrote, among all that are read as one: a file, or a part of a file that was joined."""

    path: str
    rank: int
    """Which process of ``world`` wrote it."""
    world: int
    first_step: int
    """Its own step 0 is this step of the whole stream."""
    num_steps: int
    num_records: int
    created_ns: int
    """Nanoseconds since 1970."""
    metadata: dict[str, Any]
    """As ``ActivationStream.metadata``, of this part."""
    summaries: tuple[dict[str, Any], ...]
    """What each capture into this part says of itself at its end; several if it was gone on with."""


def element_bytes(dtype: str) -> int:
    """Bytes of one element of a dtype, by its torch name; ValueError for a dtype that the format lacks."""
    try:
        return DTYPES[dtype][1]
    except KeyError:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}") from None


def record_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a whole record; exact for any shape (Python integers don't overflow)."""
    total = element_bytes(dtype)
    for size in shape:
        total *= size
    return total
