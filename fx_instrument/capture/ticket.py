"""The room that was made for the values of one graph run."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(slots=True)
class Ticket:
    num_bytes: int = 0
    dropped: bool = True
    """No room was granted."""
    device: torch.device | None = None
    overwritten: bool = False
    """The values lie where the next run of their graph writes."""
    early: bool = False
    """The values may be delivered while their graph still runs."""
    alike: object = None
    """The same for all runs whose values have the same shapes, dtypes and devices; None where nothing is known."""
    held_bytes: int = 0
    """Of values that were, and that it holds."""

    def grant(self, num_bytes: int) -> None:
        self.num_bytes, self.dropped = num_bytes, False
