"""What a capture has done, in numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class CaptureReport:
    """What a capture has done so far; final once its block is left."""

    steps: int
    """Forward calls of the model."""
    records: int
    """Values handed to the writer."""
    raw_bytes: int
    """Their size uncompressed."""
    stored_bytes: int
    """Size of the file so far."""
    dropped_records: int
    dropped_inputs: int
    """Steps whose integer inputs found no room, so that their rows can't be matched with tokens."""
    stalled_seconds: float
    """How long forward calls waited for the buffer, over all threads."""
    eager_records: int
    """Records of modules that ran outside any compiled graph."""
    achieved_gbps: float
    """Raw GB/s (1e9) from the block's beginning until the last value was stored."""
    peak_buffer_bytes: int
    """The most that the buffer held at once, the writer's own memory included."""
    target_gbps: float
    duration_s: float
    dropped_by_site: Mapping[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "dropped_by_site": dict(self.dropped_by_site)}
