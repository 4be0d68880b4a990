"""Where the values of an engine's forward call wait until it is known whose rows they are, and how these are stored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from .capture.layout import device_of
from .capture.session import Session
from .errors import InstrumentationError
from .graph.sink import Onlooker
from .graph.sites import Site
from .requests import NEW_INPUT, ROWS_INPUT, TOKENS_INPUT, encode_new, encode_rows
from .row_plan import Group


class StepSink(Onlooker):
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
        self.in_replays: set[Site] = set()
        """Sites whose hook ran while the engine recorded a CUDA graph: a replay does not run it."""

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
        if self.starting and value.is_cuda and torch.cuda.is_current_stream_capturing():
            self.in_replays.add(site)
        if self.armed or self.starting:
            # An engine's norms may add into what a module returned.
            self.deliver(True, (site,), (value.detach().clone(),), None)

    def take(self) -> list[tuple[Site, torch.Tensor]]:
        values, self.values, self.armed = self.values, [], False
        return values


def gather(source: torch.Tensor, rows: torch.Tensor, total: int) -> torch.Tensor:
    """Rows of a step's value in memory of their own, but for a CPU's value that is kept whole."""
    if source.shape[0] < total:
        raise InstrumentationError(f"a value has {source.shape[0]} rows, the step has {total} tokens")
    if len(rows) == total == source.shape[0] and source.device.type == "cpu":
        return source
    return source.index_select(0, rows.to(source.device, non_blocking=True))


def pieces(
    values: Sequence[tuple[Site, torch.Tensor]], num_rows: int, piece_bytes: int
) -> Iterator[tuple[list[Site], list[torch.Tensor]]]:
    """The sites' values in turn, in pieces whose rows take so many bytes at most; of one site, whatever it takes."""
    sites: list[Site] = []
    sources: list[torch.Tensor] = []
    size = 0
    for site, value in values:
        num_bytes = value[0].nbytes * num_rows
        if sites and size + num_bytes > piece_bytes:
            yield sites, sources
            sites, sources, size = [], [], 0
        sites.append(site)
        sources.append(value)
        size += num_bytes
    if sites:
        yield sites, sources


def store_rows(
    session: Session,
    group: Group,
    values: Sequence[tuple[Site, torch.Tensor]],
    token_ids: torch.Tensor | None,
    total: int,
    piece_bytes: int,
) -> bool:
    """Bring a group's rows of ``values``, of ``total`` tokens, to the file; whether it was told whose they are."""
    rows = torch.from_numpy(group.rows())
    placed = rows.to(values[0][1].device, non_blocking=True)
    inputs = {ROWS_INPUT: encode_rows(group.runs)}
    if group.new_requests:
        inputs[NEW_INPUT] = encode_new(group.new_requests)
    if token_ids is not None:
        inputs[TOKENS_INPUT] = gather(token_ids, rows, total)
    before = session.dropped_inputs
    session.begin_step(inputs)
    try:
        told = session.dropped_inputs == before
        for sites, sources in pieces(values, len(rows), piece_bytes):
            num_bytes = sum(source[0].nbytes for source in sources) * len(rows)
            device = device_of(sources)
            ticket = session.reserve(sites, 0 if device is not None else num_bytes, device=device)
            kept = () if ticket.dropped else [gather(source, placed, total) for source in sources]
            session.deliver(ticket, sites, kept, None)
    finally:
        session.end_step()
    return told
