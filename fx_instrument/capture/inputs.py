"""Copies of steps' integer inputs, until the first values of their step take them along."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .handover import Inputs
from .transfer import Transfer, device_of


class HeldInputs:
    """Of each step that has delivered nothing yet: inputs and values in one hand-over cost the model's thread less."""

    def __init__(self, transfer: Transfer) -> None:
        self._transfer = transfer
        self._held: dict[int, Inputs] = {}

    def __contains__(self, step: int | None) -> bool:
        return step in self._held

    def steps(self) -> list[int]:
        return list(self._held)

    def keep(
        self,
        step: int,
        inputs: Mapping[str, torch.Tensor],
        num_bytes: int,
        device: torch.device | None,
        place: Any,
    ) -> None:
        """Copy them where they are: the caller may change them as soon as its call has returned.

        Args:
            num_bytes: counted in for them.
            device: where some are, if they come through pinned memory.
            place: the stream of this thread there.
        """
        kept = self._transfer.keep(list(inputs.values()), device)
        self._held[step] = Inputs(list(inputs), kept, num_bytes, place)

    def take(self, step: int, device: torch.device | None) -> Inputs | None:
        """Those of a step, if they can go with values of ``device``: what another stream copied may not be there."""
        inputs = self._held.get(step)
        if inputs is None or (
            inputs.place is not None and (device is None or self._transfer.place(device) != inputs.place)
        ):
            return None
        # Another thread of the step may have been faster.
        return self._held.pop(step, None)

    def device(self, step: int) -> torch.device | None:
        """Where those of a step are, as ``device_of``."""
        inputs = self._held.get(step)
        return device_of(inputs.values) if inputs is not None else None

    def forget(self, step: int) -> int:
        """Let go of a step's; how many bytes were counted for them."""
        inputs = self._held.pop(step, None)
        return inputs.num_bytes if inputs is not None else 0
