"""Plots of a result: bars with intervals, overhead against batch and length, sites, memory, the timeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OURS, HOOKS, OTHER = "#1f6f8b", "#d1495b", "#8d99ae"
LANE_COLOURS = {
    "forward": OTHER,
    "hand-over": "#edae49",
    "drain": "#66a182",
    "compress": OURS,
    "write": HOOKS,
}


def draw(result: dict[str, Any], folder: Path, stem: str) -> list[Path]:
    """PNG files of whatever the result holds."""
    sections = result["sections"]
    written = []
    tables = [
        (section, name, part)
        for section in ("real", "toy", "peers")
        for name, part in sections.get(section, {}).get("workloads", {}).items()
    ]
    for section, name, part in tables:
        slug = "".join(letter if letter.isalnum() else "-" for letter in name).replace("--", "-")
        title = f"{sections[section]['model']}, {name}"
        written.append(_save(_bars(title, part), folder / f"{stem}-{section}-{slug}.png"))
    if "shapes" in sections:
        written.append(_save(_shapes(sections["shapes"]), folder / f"{stem}-shapes.png"))
    if "scaling" in sections:
        written.append(_save(_sites(sections["scaling"]), folder / f"{stem}-sites.png"))
    if "memory" in sections:
        written.append(_save(_memory(sections["memory"]), folder / f"{stem}-memory.png"))
    if "timeline" in sections.get("real", {}):
        title = f"{sections['real']['model']}, zstd into a file"
        written.append(_save(_timeline(title, sections["real"]["timeline"]), folder / f"{stem}-timeline.png"))
    return written


def _bars(title: str, part: dict[str, Any]) -> Any:
    rows = [(v, row) for v, row in part["variants"].items() if "time_ratio" in row]
    figure, axes = plt.subplots(figsize=(9, 0.4 * len(rows) + 1.4))
    for place, (variant, row) in enumerate(reversed(rows)):
        low, high = row["time_ratio_interval"]
        middle = row["time_ratio"]
        colour = OURS if variant.startswith("FX") else HOOKS if "hooks" in variant else OTHER
        error = [[max(0.0, middle - low)], [max(0.0, high - middle)]]
        axes.barh(place, middle, xerr=error, color=colour, capsize=3, height=0.7)
        axes.text(high, place, f"  {middle:.3f}", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [variant for variant, _ in reversed(rows)], fontsize=8)
    axes.axvline(1, color="black", linewidth=0.8)
    if max(row["time_ratio"] for _, row in rows) > 4:
        axes.set_xscale("log")
    axes.margins(x=0.12)
    axes.set_xlabel("time by that of the compiled model, median and 95 % interval")
    axes.set_title(title, fontsize=10)
    return figure


def _shapes(section: dict[str, Any]) -> Any:
    figure, panes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    parts = list(section["workloads"].values())
    for pane, varied, fixed, value in ((panes[0], "batch", "length", 128), (panes[1], "length", "batch", 4)):
        chosen = sorted(
            (part for part in parts if part["workload"][fixed] == value),
            key=lambda part: part["workload"][varied],
        )
        for name in chosen[0]["variants"]:
            if name == "compiled":
                continue
            rows = [part["variants"][name] for part in chosen]
            x = [part["workload"][varied] for part in chosen]
            pane.plot(x, [row["time_ratio"] for row in rows], marker="o", label=name)
            bounds = [row["time_ratio_interval"] for row in rows]
            pane.fill_between(x, [low for low, _ in bounds], [high for _, high in bounds], alpha=0.15)
        pane.axhline(1, color="black", linewidth=0.8)
        pane.set_xscale("log", base=2)
        pane.set_xlabel(f"{varied} ({fixed} {value})")
    panes[0].set_ylabel("time by that of the compiled model")
    panes[0].legend(fontsize=8)
    figure.suptitle(f"Prefill, {section['model']}", fontsize=10)
    return figure


def _sites(section: dict[str, Any]) -> Any:
    figure, axes = plt.subplots(figsize=(7, 4))
    lines: dict[tuple[str, str], list[tuple[int, dict[str, Any]]]] = {}
    for key, part in section["workloads"].items():
        count, _, workload = key.partition(" sites, ")
        for name, row in part["variants"].items():
            if name != "compiled":
                lines.setdefault((workload, name), []).append((int(count), row))
    for (workload, name), points in lines.items():
        points.sort(key=lambda point: point[0])
        x = [count for count, _ in points]
        axes.plot(x, [row["time_ratio"] for _, row in points], marker="o", label=f"{workload}: {name}")
        bounds = [row["time_ratio_interval"] for _, row in points]
        axes.fill_between(x, [low for low, _ in bounds], [high for _, high in bounds], alpha=0.15)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("number of sites (32 layers of width 64)")
    axes.set_ylabel("time by that of the compiled model")
    axes.legend(fontsize=8)
    return figure


def _memory(section: dict[str, Any]) -> Any:
    figure, axes = plt.subplots(figsize=(6, 3.5))
    for name, growth in section["growth"].items():
        axes.plot(
            [row["raw_mb"] or row["steps"] for row in growth],
            [row["peak_mb"] for row in growth],
            "o-",
            label=name,
        )
    axes.set_xlabel("captured, MB (not capturing: steps)")
    axes.set_ylabel("growth of the resident set, MB")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    return figure


def _timeline(title: str, found: dict[str, Any]) -> Any:
    spans = found["spans"]
    lanes = sorted({(list(LANE_COLOURS).index(span["lane"]), span["lane"], span["thread"]) for span in spans})
    figure, axes = plt.subplots(figsize=(11, 0.5 * len(lanes) + 1.2))
    for place, (_, lane, thread) in enumerate(reversed(lanes)):
        mine = [span for span in spans if (span["lane"], span["thread"]) == (lane, thread)]
        bars = [(1e3 * span["start_s"], max(0.2, 1e3 * (span["end_s"] - span["start_s"]))) for span in mine]
        axes.broken_barh(bars, (place - 0.35, 0.7), facecolors=LANE_COLOURS[lane])
    axes.set_yticks(
        range(len(lanes)), [f"{lane} ({thread})" for _, lane, thread in reversed(lanes)], fontsize=8
    )
    axes.set_xlabel("ms from the beginning of the block")
    work = found["workload"]
    axes.set_title(f"{title}, {work['kind']} {work['batch']}x{work['length']}", fontsize=10)
    return figure


def _save(figure: Any, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
