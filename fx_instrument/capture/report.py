"""What a capture has done, in numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_HELD = 0.95
"""Of the target counts as held: the controller aims 10 % above it, and costs are known within some percent."""
_STALLED = 0.05
"""Of the time: what a model may wait before it counts as held back."""


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
    silent_sites: Sequence[str] = ()
    """Sites that delivered nothing in the whole block; known once it is left."""

    capacity_gbps: float | None = None
    """Raw GB/s that this disk and these cores take at most, as measured on the pages that were written; None before
    one was."""
    bottleneck: str | None = None
    """What limits that: "disk" or "cores"."""

    @property
    def target_held(self) -> bool:
        """Whether the capture was as fast as the target, or as fast as the model where that was slower.

        False where values were dropped, or the model waited for the buffer for more than 5 % of the time, while fewer
        than 95 % of ``target_gbps`` were stored.
        """
        return self.achieved_gbps >= _HELD * self.target_gbps or not self._held_back

    @property
    def target_verdict(self) -> str:
        """``target_held`` in words, with the reason."""
        target = f"the target of {self.target_gbps:g} GB/s"
        if self.target_held:
            kept = "at the model's own rate" if not self._held_back else "under a load beyond the buffer"
            return f"{target} was held: {self.achieved_gbps:.3g} GB/s, {kept}"
        if self.capacity_gbps is not None and self.capacity_gbps >= self.target_gbps:
            return (
                f"{target} was not held: {self.achieved_gbps:.3g} GB/s, though the {self.bottleneck} would take "
                f"{self.capacity_gbps:.3g}; values come in bursts larger than the buffer, so raise max_memory_gb"
            )
        if self.capacity_gbps is None:
            return f"{target} was not held: {self.achieved_gbps:.3g} GB/s"
        beyond = "this disk" if self.bottleneck == "disk" else "these cores"
        return (
            f"{target} is beyond {beyond}, at most {self.capacity_gbps:.3g} GB/s; "
            f"{self.achieved_gbps:.3g} GB/s were stored"
        )

    @property
    def _held_back(self) -> bool:
        stalled = self.stalled_seconds > _STALLED * self.duration_s
        return stalled or self.dropped_records > 0

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values, the verdict on the target too."""
        return {
            **self.__dict__,
            "dropped_by_site": dict(self.dropped_by_site),
            "target_held": self.target_held,
            "target_verdict": self.target_verdict,
            "silent_sites": list(self.silent_sites),
        }
