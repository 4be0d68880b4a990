"""What of a stream is exported, and the names of its arrays."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator

import torch

from ..activations import ActivationStream, Record
from ..analysis import describe

Progress = Callable[[int, int], None]


class Selection:
    """The chosen records of a stream, counted as they pass."""

    def __init__(self, stream: ActivationStream, sites: frozenset[str], progress: Progress | None) -> None:
        self.stream = stream
        self.sites = [site for site in stream.sites if site.name in sites]
        everything = len(self.sites) == len(stream.sites)
        self.num_records = len(stream) if everything else sum(len(stream[site.name]) for site in self.sites)
        self._progress = progress
        self._positions: dict[str, torch.Tensor] = {}

    def __iter__(self) -> Iterator[Record]:
        """In the order of the file, which is read once."""
        names = {site.name for site in self.sites}
        done = 0
        for record in self.stream:
            if record.site in names:
                yield record
                done += 1
                if self._progress is not None:
                    self._progress(done, self.num_records)

    def inputs(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every recorded input, with the name of its array."""
        for rank in self.stream.ranks:
            for step in self.stream.input_steps():
                for name, tensor in self.stream.inputs(step, rank=rank).items():
                    yield f"{self._of_rank(rank)}inputs/{step}/{name}", tensor

    def dtypes(self) -> set[torch.dtype]:
        return {record.dtype for site in self.sites for record in self.stream[site.name]}

    def array_name(self, record: Record, separator: str = "/") -> str:
        """Name of a record's array."""
        return f"{self._of_rank(record.rank)}{record.site}/{record.step}{separator}{record.call}"

    def _of_rank(self, rank: int) -> str:
        return f"rank{rank}/" if len(self.stream.ranks) > 1 else ""

    def new_positions(self, record: Record) -> tuple[str, torch.Tensor] | None:
        """Name and positions of a sampled record, where no record had those before."""
        positions = record.positions()
        name = f"positions/{math.prod(record.full_shape)}"
        if positions is None:
            return None
        known = self._positions.setdefault(name, positions)
        if known is positions:
            return name, positions
        if not torch.equal(known, positions):
            raise ValueError("the files were sampled at different places; export them one by one")
        return None

    def description(self) -> str:
        """Everything that the arrays themselves don't say, as JSON."""
        sites = [{"name": site.name, "role": site.role} for site in self.sites]
        return json.dumps({"stream": describe(self.stream), "sites": sites})
