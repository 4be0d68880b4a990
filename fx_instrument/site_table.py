"""What a stream is and what its sites hold, as a terminal shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from .config import HookGranularity
from .terminal import shown

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
        table.add_row(shown(site) + nonfinite, *numbers, channels)
    return table


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"


def info_table(found: Mapping[str, Any], sites: Sequence[Mapping[str, str]], inputs: Sequence[str]) -> Table:
    """The ``metadata`` of ``analyze_activations``, names and roles of the sites, names of the inputs."""
    table = Table.grid(padding=(0, 2))
    model, config = found["model"] or {}, found["config"] or {}
    hooks = config.get("hook_config") or {}
    roles = ", ".join(
        f"{sum(site['role'] == role for site in sites)} {role}" for role in {s["role"]: 0 for s in sites}
    )
    rows = {
        "file": f"{found['file']}  ({_bytes(found['stored_bytes'])})",
        "parts": _parts(found["parts"]),
        "model": " ".join(
            str(model[key]) for key in ("class", "name_or_path", "dtype", "device") if model.get(key)
        ),
        "granularity": config.get("granularity"),
        "sampling": f"rate {hooks.get('sampling_rate')}, seed {hooks.get('seed')}"
        if config.get("granularity") == HookGranularity.SAMPLED_SLICES.value
        else None,
        "target layers": ", ".join(hooks["target_layers"]) if hooks.get("target_layers") else None,
        "sites": f"{len(sites)} ({roles})",
        "steps": found["steps"],
        "records": found["records"],
        "values": f"{_bytes(found['raw_bytes'])}, {_ratio(found['ratio'])} in the file ({found['codec']})",
        "duration": None
        if found["duration_s"] is None
        else f"{found['duration_s']:.2f} s, {(found['achieved_gbps'] or 0) * 1000:.4g} MB/s captured, "
        f"{found['stalled_seconds'] or 0:.3f} s stalled",
        "dropped": sum((found["dropped_records"] or {}).values()) or None,
        "eager records": found["eager_records"] or None,
        "inputs": ", ".join(inputs) or None,
        "versions": " ".join(f"{name} {version}" for name, version in (found["versions"] or {}).items()),
        "damage": _damage(found["damage"]),
    }
    for name, value in rows.items():
        if value is not None:
            table.add_row(f"[bold]{name}[/]", shown(value))
    return table


def _parts(parts: Sequence[dict[str, Any]]) -> str | None:
    """How many files, ranks; None of a single one."""
    if len(parts) == 1:
        return None
    ranks = sorted({part["rank"] for part in parts})
    shown = ", ".join(map(str, ranks[:8])) + (" ..." if len(ranks) > 8 else "")
    return f"{len(parts)}, of rank{'s' if len(ranks) > 1 else ''} {shown}"


def _damage(damage: Sequence[dict[str, Any]]) -> str | None:
    if not damage:
        return None
    lost = sum(gap["num_bytes"] for gap in damage)
    return f"{len(damage)} gaps, {_bytes(lost)}: " + "; ".join(gap["reason"] for gap in damage[:3])


def _ratio(ratio: float) -> str:
    """Of a file with few values most is what it says of itself."""
    return f"{1 / ratio:.2f}x larger" if 0 < ratio < 1 else f"{ratio:.2f}x smaller"


def _bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"
