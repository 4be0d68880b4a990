"""Statistics of sites, as a terminal shows them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table


def site_table(sites: Mapping[str, Mapping[str, Any]]) -> Table:
    """The ``sites`` of ``analyze_activations`` as a table for a terminal."""
    table = Table(header_style="bold", box=None, pad_edge=False)
    for name in (
        "site",
        "role",
        "tokens",
        "mean",
        "std",
        "min",
        "max",
        "mean norm",
        "max norm",
        "zeros",
        "kurtosis",
    ):
        table.add_column(name, justify="left" if name in ("site", "role") else "right", no_wrap=True)
    table.add_column("top channels", no_wrap=True)
    for name, found in sites.items():
        table.add_row(
            escape(name),
            found["role"],
            str(found["tokens"]),
            *(
                _number(found[key])
                for key in ("mean", "std", "min", "max", "mean_token_norm", "max_token_norm")
            ),
            "-" if found["zero_fraction"] is None else f"{found['zero_fraction']:.1%}",
            _number(found["excess_kurtosis"]),
            " ".join(str(channel) for channel, _ in found["top_channels"][:3]),
        )
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
