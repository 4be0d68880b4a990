"""Statistics of sites, as a terminal shows them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

# Wide enough for every column with site names such as model.layers.10.self_attn.
WIDE = 118
_WIDE_COLUMNS = {
    "tokens": "tokens",
    "mean": "mean",
    "std": "std",
    "min": "min",
    "max": "max",
    "mean norm": "mean_token_norm",
    "max norm": "max_token_norm",
    "zeros": "zero_fraction",
    "kurtosis": "excess_kurtosis",
}
_NARROW_COLUMNS = ("std", "mean norm", "max norm", "kurtosis")


def site_table(sites: Mapping[str, Mapping[str, Any]], width: int) -> Table:
    """The ``sites`` of ``analyze_activations`` as a table for a terminal of ``width`` columns."""
    columns = [name for name in _WIDE_COLUMNS if width >= WIDE or name in _NARROW_COLUMNS]
    table = Table(header_style="bold", box=None, pad_edge=False)
    table.add_column("site", overflow="fold")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("top channels", no_wrap=True)
    for site, found in sites.items():
        numbers = [_number(found[_WIDE_COLUMNS[name]]) for name in columns]
        nonfinite = f" ({found['nonfinite']} nonfinite)" if found["nonfinite"] else ""
        channels = " ".join(str(channel) for channel, _ in found["top_channels"][:3])
        table.add_row(escape(site) + nonfinite, *numbers, channels)
    return table


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"
