"""What a model's markers and graphs need of an open capture."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from .sites import Site

Join = Callable[[], contextlib.AbstractContextManager[None]]
"""Of a forward call: what a thread delivers inside belongs to it."""


class Sink(Protocol):
    """Where captured values go: an open capture. All methods may be called from several threads."""

    def begin_step(self, inputs: Mapping[str, torch.Tensor]) -> Join | None:
        """A forward call of the model starts on this thread; how other threads deliver to it."""

    def end_step(self) -> None:
        """The forward call that began last on this thread is over."""

    def reserve(
        self,
        sites: Sequence[Site],
        num_bytes: int,
        *,
        device: torch.device | None = None,
        device_bytes: int = 0,
        replays: bool = False,
        early: bool = False,
        alike: object = None,
    ) -> Any:
        """Make room before a graph runs: waits, refuses, or answers that the values are to be dropped.

        Args:
            sites: whose values come.
            num_bytes: of values on the host.
            device: where the others are; None if there are none.
            device_bytes: of those; 0 where the data decides.
            replays: they may lie where the graph's next run writes.
            alike: the same object for all runs whose values have the same shapes, dtypes and devices; None where they
                may differ.
            early: they may be delivered while the graph still runs and holds them; ``returned`` follows in any case.
        """

    def deliver(
        self,
        ticket: Any,
        sites: Sequence[Site],
        values: Sequence[torch.Tensor],
        full_shapes: Sequence[tuple[int, ...]] | None,
    ) -> None:
        """Take over the values of a graph that ran."""

    def cancel(self, ticket: Any) -> None:
        """Give back the room of a graph that failed."""

    def returned(self, ticket: Any) -> None:
        """The graph of a ticket that was reserved as early is over, and lets go of its values."""

    def record_eager(self, site: Site, value: torch.Tensor) -> None:
        """Take a copy of a value that was computed outside any graph."""


class Onlooker:
    """What a sink leaves out that looks at values when they come: it needs no room, and tells no steps apart."""

    def begin_step(self, inputs: Mapping[str, torch.Tensor]) -> None: ...
    def end_step(self) -> None: ...
    def cancel(self, ticket: Any) -> None: ...
    def returned(self, ticket: Any) -> None: ...
