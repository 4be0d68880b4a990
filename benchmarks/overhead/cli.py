"""``python -m benchmarks``: hooks against the rewritten graph, measured; a table, JSON and plots."""

from __future__ import annotations

import datetime
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from fx_instrument.errors import InstrumentationError

from ..machine import short_name
from . import plots, report, sections
from .table import Options
from .workloads import KINDS

SCHEMA = 1
RESULTS = Path(__file__).resolve().parents[1] / "results"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--quick", is_flag=True, help="Fewer variants, workloads and rounds: 3 minutes on 2 cores.")
@click.option("--full", is_flag=True, help="Every section and workload.")
@click.option(
    "--only",
    multiple=True,
    type=click.Choice(list(sections.SECTIONS)),
    help="Only this section; may be given several times. Adds to --output's file if it is there.",
)
@click.option(
    "--workload",
    "kinds",
    multiple=True,
    type=click.Choice(KINDS),
    help="Only this kind of workload; may be given several times.",
)
@click.option("--variant", "names", multiple=True, help="Only variants whose name holds this text, e.g. FX.")
@click.option(
    "--rounds", type=click.IntRange(min=1), help="Interleaved rounds of each workload [5, with --quick 3]."
)
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    help="Steps of a block of real, toy and parts [a second's or two]. Where others slow the machine down for seconds "
    "at a time, many rounds of short blocks say more than few of long ones; the ends of a block weigh more there.",
)
@click.option(
    "--within",
    type=click.FloatRange(min=0, min_open=True),
    help="Begin no round, workload or section after so many seconds; what was measured is kept.",
)
@click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), default="bfloat16", show_default=True)
@click.option("--device", help="cpu or cuda [cuda where there is one].")
@click.option("--mode", help="torch.compile's mode for every compiled variant, e.g. reduce-overhead.")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="torch's threads.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The JSON file; tables (.md) and plots (.png) beside it [benchmarks/results/DATE-overhead-DEVICE.json].",
)
def main(
    quick: bool,
    full: bool,
    only: tuple[str, ...],
    kinds: tuple[str, ...],
    names: tuple[str, ...],
    rounds: int | None,
    steps: int | None,
    within: float | None,
    dtype: str,
    device: str | None,
    mode: str | None,
    threads: int,
    output: Path | None,
) -> None:
    """What capturing costs: the compiled model with captures in its graph, beside hooks and beside nothing.

    Every variant runs once a round in one process, in turning order; figures are medians over rounds of its time by
    that of "compiled, nothing captured" in the same round, with 95 % bootstrap intervals.
    """
    if quick and full:
        raise click.UsageError("--quick and --full exclude each other")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise click.BadParameter("this torch finds no CUDA device", param_hint="--device")
    logging.getLogger("torch").setLevel(logging.ERROR)
    torch.set_num_threads(threads)
    today = datetime.date.today().isoformat()
    if output is None:
        output = RESULTS / f"{today}-overhead-{short_name(device)}{'-quick' if quick else ''}.json"
    options = Options(
        dtype=getattr(torch, dtype),
        device=device,
        rounds=rounds or (3 if quick else 5),
        quick=quick,
        full=full,
        compile_options={"mode": mode} if mode else {},
        kinds=kinds,
        variants=names,
        steps=steps,
        ends=time.monotonic() + within if within else None,
    )
    result = begin(output, bool(only), today, device, dtype)
    # Tables have a dozen columns: in a log, which has no width of its own, none is cut off.
    console = Console(width=None if sys.stdout.isatty() else 220)
    parts = only or (sections.QUICK if quick else tuple(sections.SECTIONS) if full else sections.usual())
    with _progress() as progress:
        task = progress.add_task("", total=len(parts))
        options.say = lambda text: progress.update(task, description=text)
        options.keep = lambda name, section: keep(result, name, section, output)
        for name in parts:
            if options.is_over:
                result["notes"].append(f"from {name} on nothing was begun: {within:g} seconds had passed")
                write(result, output)
                break
            try:
                add(result["sections"], name, sections.run(name, options))
            except InstrumentationError as error:
                # The real model can't be had: the others still can.
                left_out = f"{name} was left out: {error}"
                result["notes"].append(left_out)
                progress.console.print(left_out)
            progress.advance(task)
            write(result, output)
    show(result, console)
    console.print(f"figures in {output}, tables in {output.with_suffix('.md')}, plots beside them")


def begin(output: Path, adds: bool, today: str, device: str, dtype: str) -> dict[str, Any]:
    """The result so far: that of ``output`` if sections are added to it, else an empty one."""
    command = " ".join(["python -m benchmarks", *sys.argv[1:]])
    result: dict[str, Any] = {"commands": [], "sections": {}}
    run = {"machine": report.machine(device), "versions": report.versions(), "dtype": dtype}
    if adds and output.exists():
        result = json.loads(output.read_text())
        if result.get("schema") != SCHEMA:
            raise click.BadParameter(
                f"{output} has schema {result.get('schema')!r}, expected {SCHEMA}: give another file",
                param_hint="--output",
            )
        if other := [key for key in run if _constant(result[key]) != _constant(run[key])]:
            raise click.BadParameter(
                f"{output} has figures of another {' and '.join(other)}: give another file",
                param_hint="--output",
            )
    result["commands"].append(command)
    return {
        "schema": SCHEMA,
        "date": today,
        **run,
        "notes": result.get("notes", []),
        **{key: result[key] for key in ("commands", "sections")},
    }


def _constant(described: Any) -> Any:
    """Without what is another in each run on one machine."""
    if isinstance(described, dict):
        return {key: value for key, value in described.items() if key != "load_average"}
    return described


def add(found: dict[str, Any], name: str, section: dict[str, Any]) -> None:
    """A section beside, or its workloads into, what is there."""
    before = found.get(name, {}).get("workloads", {})
    found[name] = section
    if "workloads" in section:
        section["workloads"] = {**before, **section["workloads"]}


def keep(result: dict[str, Any], name: str, section: dict[str, Any], output: Path) -> None:
    """Write the result with a section that is not complete yet."""
    sections_so_far = dict(result["sections"])
    add(sections_so_far, name, dict(section))
    write({**result, "sections": sections_so_far}, output)


def write(result: dict[str, Any], output: Path) -> None:
    """JSON, tables and plots; after each section, so that a run that is cut off keeps what it has."""
    result["cost_model"] = sections.cost_model({**result["sections"], "dtype": result["dtype"]})
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
    output.with_suffix(".md").write_text(report.markdown(result))
    plots.draw(result, output.parent, output.stem)


def show(result: dict[str, Any], console: Console) -> None:
    for title, header, rows in report.tables(result):
        shown = Table(title=title, title_justify="left", show_edge=False)
        for name in header:
            shown.add_column(name, justify="left" if name == "variant" else "right", no_wrap=True)
        for row in rows:
            shown.add_row(*row)
        console.print(shown)
    if found := report.goals(result):
        shown = Table(title="goals", title_justify="left", show_edge=False)
        for name in ("workload", "what", "goal", "figure", "95 % interval", ""):
            shown.add_column(name)
        for row in found:
            shown.add_row(*row)
        console.print(shown)


def _progress() -> Progress:
    return Progress(
        SpinnerColumn(),
        BarColumn(bar_width=20),
        TextColumn("{task.completed}/{task.total} {task.description}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )
