"""What a transfer through pinned memory asks of a device; ``cuda.py`` answers for CUDA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeAlias

import torch

Place: TypeAlias = "tuple[torch.device, int]"
"""Where values are gathered: a device, and the number of bits of their size."""


class Event(Protocol):
    """A point of a device's stream."""

    def synchronize(self) -> None:
        """Wait until the device has reached it."""


class CopyEngine(Protocol):
    """What a device does for a transfer; ``cuda.py`` has the real one, tests a simulated one."""

    def allocate(self, num_bytes: int, device: torch.device) -> torch.Tensor:
        """Host memory, uint8, page-locked for every device; called once, for the first values, on ``device``."""

    def free(self, memory: torch.Tensor) -> None:
        """Take back what ``allocate`` gave."""

    def check(self) -> None:
        """Raise if what this thread's stream is told now runs later, or more than once."""

    def mark(self, device: torch.device) -> Event:
        """Where the stream that runs the model on this thread stands now."""

    def copy(self, host: torch.Tensor, value: torch.Tensor, after: Event) -> Event:
        """Copy ``value`` to ``host`` on the copy stream, once ``after`` is reached; answers when it is there."""

    def keep(self, value: torch.Tensor) -> torch.Tensor:
        """A copy on the device, made by the stream that runs the model on this thread."""

    def gather(
        self,
        place: Place,
        values: Sequence[torch.Tensor],
        starts: Sequence[int],
        num_bytes: int,
        after: Event | None,
    ) -> torch.Tensor:
        """The values, all of the place's device, in ``num_bytes`` bytes there, each from its number of ``starts`` on.

        The stream that runs the model on this thread copies them, once ``after`` is reached. The memory is that of the
        call before with the same place, if it is large enough.
        """
