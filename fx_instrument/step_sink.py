"""Where the values of an engine's forward call wait until it is known whose rows they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .errors import InstrumentationError
from .graph.sites import Site


class StepSink:
    """Takes the values of a forward call from its graphs; rows and requests are known only after it."""

    def __init__(self) -> None:
        self.armed = False
        """Whether the forward call that runs has a row that is wanted."""
        self.starting = True
        """Whether the engine warms up: values only show that their sites work."""
        self.values: list[tuple[Site, torch.Tensor]] = []
        self.fired: dict[Site, int] = {}
        """Bytes of a row by site, of the sites that delivered while the engine started."""
        self.eager = False

    def reserve(self, sites: Sequence[Site], num_bytes: int, **of_a_device: Any) -> bool:
        return True

    def deliver(
        self,
        ticket: Any,
        sites: Sequence[Site],
        values: Sequence[torch.Tensor],
        full_shapes: Any,
    ) -> None:
        if self.armed:
            self.values.extend(zip(sites, values, strict=True))
        elif self.starting:
            for site, value in zip(sites, values, strict=True):
                if value.dim() < 2 or not value.shape[0]:
                    raise InstrumentationError(
                        f"{site.name} gives a value of shape {tuple(value.shape)}; (tokens, ...) was expected: choose "
                        f"other sites"
                    )
                self.fired[site] = value[0].nbytes

    def record_eager(self, site: Site, value: torch.Tensor) -> None:
        self.eager = True
        if self.armed or self.starting:
            # An engine's norms may add into what a module returned.
            self.deliver(True, (site,), (value.detach().clone(),), None)

    def cancel(self, ticket: Any) -> None: ...
    def returned(self, ticket: Any) -> None: ...
    def begin_step(self, inputs: Mapping[str, torch.Tensor]) -> None: ...
    def end_step(self) -> None: ...

    def take(self) -> list[tuple[Site, torch.Tensor]]:
        values, self.values, self.armed = self.values, [], False
        return values
