"""The room that was made for the values of one graph run."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(slots=True)
class Ticket:
    num_bytes: int
    dropped: bool
    device: torch.device | None = None
    overwritten: bool = False
    """The values lie where the next run of their graph writes."""
    early: bool = False
    """The values may be delivered while their graph still runs."""
    held_bytes: int = 0
    """Of values that were, and that it holds."""
