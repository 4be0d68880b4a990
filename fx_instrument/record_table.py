"""Records one by one, with their first values, as a terminal or a script shows them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

from .activations import ActivationStream, Record
from .terminal import shown


def record_rows(stream: ActivationStream, sites: Sequence[str], num_values: int) -> Iterator[dict[str, Any]]:
    """The records of ``sites`` by step, then site, rank and call, ``num_values`` values of each, as JSON takes them."""
    for step in _steps(stream, sites):
        for site, rank in itertools.product(sites, stream.ranks):
            for call in itertools.count():
                # Found through the index one by one: the first ones are there at once.
                record = stream.find(site, step, call, rank=rank)
                if record is None:
                    break
                yield _row(record, num_values)


def _steps(stream: ActivationStream, sites: Sequence[str]) -> Iterator[int]:
    """The steps of which there are records, ascending; all records are looked for only after a step without any."""
    for step in range(stream.num_steps):
        places = itertools.product(sites, stream.ranks)
        if all(stream.find(site, step, rank=rank) is None for site, rank in places):
            yield from (later for later in stream.steps(sites) if later > step)
            return
        yield step


def record_table(rows: Sequence[Mapping[str, Any]], *, with_ranks: bool) -> Table:
    """``record_rows`` as a table."""
    table = Table(header_style="bold", box=None, pad_edge=False)
    numbers_shown = ("step", "call", "rank") if with_ranks else ("step", "call")
    for name in numbers_shown:
        table.add_column(name, justify="right")
    for name in ("site", "dtype", "shape", "values"):
        table.add_column(name, no_wrap=True)
    for row in rows:
        shape = str(tuple(row["shape"])) + (
            f" of {tuple(row['full_shape'])}" if row["full_shape"] != row["shape"] else ""
        )
        numbers = " ".join(
            f"{value:.4g}" if isinstance(value, float) else str(value) for value in row["values"]
        )
        table.add_row(
            *(str(row[name]) for name in numbers_shown), shown(row["site"]), row["dtype"], shape, numbers
        )
    return table


def _row(record: Record, num_values: int) -> dict[str, Any]:
    values = record.numpy().reshape(-1)[:num_values].tolist()
    return {
        "step": record.step,
        "call": record.call,
        "rank": record.rank,
        "site": record.site,
        "dtype": str(record.dtype).removeprefix("torch."),
        "shape": list(record.shape),
        "full_shape": list(record.full_shape),
        # JSON has no NaN, infinities or complex numbers.
        "values": [value if _is_plain(value) else str(value) for value in values],
    }


def _is_plain(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
