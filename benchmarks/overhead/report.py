"""The same figures as a table for people: on the terminal and as Markdown beside the JSON."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import Any

import torch

from ..machine import processor

COLUMNS = (
    "time",
    "95 % interval",
    "CPU time",
    "tokens/s",
    "peak MB",
    "graphs",
    "breaks",
    "recompiles",
    "kernels",
    "rows",
    "same bits",
)
DEVICE_COLUMNS = ("peak device MB", "CUDA graphs skipped")
"""More where the model ran on a device."""

GOALS = {
    "FX, null sink": 1.02,
    "FX, zstd file": 1.05,
    "FX, 1.0% sampled, zstd file": 1.01,
    "FX, not capturing": 1.005,
}
"""What the time ratio is asked to be at most, where a core is idle."""
GOALS_BUSY = {**GOALS, "FX, zstd file": 1.10}
GOAL_INSTRUCTIONS = 1.002
"""The most instructions, of "FX, not capturing" by those of the base."""


def cells(row: dict[str, Any], columns: Sequence[str] = COLUMNS) -> list[str]:
    if "time_ratio" not in row:
        return [row.get("error", "not run")] + [""] * (len(columns) - 1)
    low, high = row["time_ratio_interval"]
    same = "-"
    if row["equal"] is not None:
        same = "yes" if row["equal"] else f"no ({row['largest_difference']:.1e})"
    found = [
        f"{row['time_ratio']:.3f}",
        f"{low:.3f}-{high:.3f}",
        f"{row['cpu_time_ratio']:.3f}",
        f"{row['tokens_per_s']:.0f}",
        "-" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}",
        *(str(row[name]) for name in ("graphs", "breaks", "recompiles", "kernels")),
        f"{row['rows']}/{row['expected']}" if row["expected"] else "-",
        same,
    ]
    if len(columns) > len(found):
        on_device = row["peak_device_mb"]
        found += ["-" if on_device is None else f"{on_device:.0f}", str(row["cudagraph_skips"])]
    return found


def tables(result: dict[str, Any]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """(title, header, rows) of every workload of every section."""
    columns = COLUMNS if result["machine"]["device"] == "cpu" else (*COLUMNS, *DEVICE_COLUMNS)
    for section, found in result["sections"].items():
        for group in ("workloads", "by_depth"):
            for name, part in found.get(group, {}).items():
                rows = [[variant, *cells(row, columns)] for variant, row in part["variants"].items()]
                steps = part["workload"]["steps"]
                title = f"{section}: {name}, {found['model']}, {part['rounds']} rounds of {steps} steps"
                yield title, ["variant", *columns], rows
        if section == "instructions":
            if "error" in found:
                yield f"instructions: {found['error']}", [], []
            else:
                lines = [
                    [name, f"{count:,}", f"{found['ratio'][name]:.4f}"]
                    for name, count in found["instructions_per_call"].items()
                ]
                yield f"instructions: {found['model']}", ["variant", "instructions a call", "ratio"], lines
        if section == "memory":
            lines = [
                [name, str(row["steps"]), f"{row['raw_mb']:.0f}", f"{row['peak_mb']:.0f}"]
                for name, growth in found["growth"].items()
                for row in growth
            ]
            yield f"memory: {found['model']}", ["variant", "steps", "captured MB", "peak growth MB"], lines
    if cost := result.get("cost_model"):
        lines = [
            [point["label"], f"{point['measured_ratio']:.3f}", f"{point['predicted_ratio']:.3f}", kind]
            for kind in ("fitted", "held_out")
            for point in cost[kind]
        ]
        title = (
            f"cost model: CPU seconds a step = {cost['seconds_per_byte'] * 1e9:.3f} ns x bytes + "
            f"{cost['seconds_per_site'] * 1e6:.1f} us x sites + {cost['seconds_per_step'] * 1e6:.0f} us"
        )
        yield title, ["workload", "measured ratio", "predicted ratio", ""], lines


def goals(result: dict[str, Any]) -> list[list[str]]:
    """[workload, what, goal, figure, interval, verdict] of everything that has a goal."""
    found = []
    parts = [
        (f"{label}: {name}", part)
        for section, label in (("real", "SmolLM2-135M"), ("toy", "toy"))
        for name, part in result["sections"].get(section, {}).get("workloads", {}).items()
    ]
    for name, part in parts:
        rows = part["variants"]
        for variant, goal in (GOALS_BUSY if "no idle" in name else GOALS).items():
            if "time_ratio" in rows.get(variant, {}):
                figure, (low, high) = rows[variant]["time_ratio"], rows[variant]["time_ratio_interval"]
                found.append(
                    [
                        name,
                        variant,
                        f"<= {goal}",
                        f"{figure:.3f}",
                        f"{low:.3f}-{high:.3f}",
                        _met(figure <= goal),
                    ]
                )
        found += list(_against_hooks(name, rows))
    ratio = result["sections"].get("instructions", {}).get("ratio", {}).get("FX, not capturing")
    if ratio is not None:
        met = _met(ratio <= GOAL_INSTRUCTIONS)
        found.append(
            ["toy", "FX, not capturing: instructions", f"<= {GOAL_INSTRUCTIONS}", f"{ratio:.5f}", "", met]
        )
    return found


def _against_hooks(name: str, rows: dict[str, Any]) -> Iterator[list[str]]:
    ours = rows.get("FX, zstd file", {}).get("time_ratio")
    null = rows.get("FX, null sink", {}).get("time_ratio")
    hooks = rows.get("compiled + hooks, zstd file", {}).get("time_ratio")
    traced = rows.get("compiled + traced hooks, zstd file", {}).get("time_ratio")
    traced_null = rows.get("compiled + traced hooks, null sink", {}).get("time_ratio")
    if ours is not None and hooks is not None and hooks > 1:
        share = (ours - 1) / (hooks - 1)
        yield [
            name,
            "added, of what hooks under compile add",
            "<= 0.1",
            f"{share:.2f}",
            "",
            _met(share <= 0.1),
        ]
    for mine, theirs, sink in ((ours, traced, "file"), (null, traced_null, "null sink")):
        if mine is not None and theirs is not None:
            text = f"added, against traced hooks, {sink}"
            yield [name, text, f"<= {theirs - 1:.3f}", f"{mine - 1:.3f}", "", _met(mine <= theirs)]


def _met(met: bool) -> str:
    return "met" if met else "missed"


def markdown(result: dict[str, Any]) -> str:
    lines = [
        f"# Overhead, {result['date']}, {result['machine']['device']}",
        "",
        *(f"    {command}" for command in result["commands"]),
        "",
        ", ".join(f"{key}: {value}" for key, value in result["machine"].items()) + ".",
        ", ".join(f"{key} {value}" for key, value in result["versions"].items()) + ".",
        "",
        "Ratios are medians over interleaved rounds to the compiled model with nothing captured, of the same round; "
        "intervals are 95 % bootstrap (percentiles; of three rounds that is their range). "
        "Time includes opening and leaving the capture block (drain, index, fsync).",
        "",
    ]
    lines += [line for note in result.get("notes", ()) for line in (note, "")]
    if found := goals(result):
        lines += [
            "## Goals",
            "",
            *_table(["workload", "what", "goal", "figure", "95 % interval", ""], found),
            "",
        ]
    for title, header, rows in tables(result):
        lines += [f"## {title}", ""]
        lines += [*_table(header, rows), ""] if header else []
    return "\n".join(lines)


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [
        "| " + " | ".join(header) + " |",
        "|" + " --- |" * len(header),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def machine(device: str) -> dict[str, Any]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"
    return {
        "device": name,
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory_gb": round(memory / 1e9, 1),
        "system": platform.platform(),
        # Far above the number of threads, something else was running: then intervals are wide.
        "load_average": round(os.getloadavg()[1], 1),
    }


def versions() -> dict[str, str]:
    from fx_instrument import __version__

    # Of torch the build too, as in 2.11.0+cu130, which the package's metadata may not say.
    found = {"python": platform.python_version(), "fx_instrument": __version__, "torch": torch.__version__}
    for name in ("transformers", "numpy", "zstandard", "lz4"):
        found[name] = metadata.version(name)
    return found
