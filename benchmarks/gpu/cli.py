"""``python -m benchmarks.gpu``: decoding under CUDA graphs and long prefills of an 8B-shaped Llama, captured."""

from __future__ import annotations

import datetime
import json
import logging
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch

from ..machine import short_name, versions
from . import measure, planes
from .model import AGAIN, BASE, FILE, HOST, NULL, captured, captured_layers, llama, plain, plain_layers

RESULTS = Path(__file__).resolve().parents[1] / "results"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--layers", default=32, show_default=True)
@click.option("--hidden", default=4096, show_default=True)
@click.option("--batch", "batches", multiple=True, type=int, help="Of decoding [1, 8, 64]; 0 for none.")
@click.option("--length", default=8192, show_default=True, help="Tokens of a prefill; 0 for none.")
@click.option("--steps", default=96, show_default=True, help="Decode steps of a block.")
@click.option("--cache", default=1024, show_default=True, help="Length of the static cache.")
@click.option("--rounds", default=7, show_default=True)
@click.option("--early/--no-early", default=True, help="Prefill with each layer compiled by itself, too.")
@click.option("--planes/--no-planes", "with_planes", default=True, help="Where bytes are split into planes.")
@click.option("--memory-gb", default=6.0, show_default=True, help="max_memory_gb of prefills.")
@click.option("--device", default="cuda", show_default=True)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="The JSON file; added to.")
def main(
    layers: int,
    hidden: int,
    batches: tuple[int, ...],
    length: int,
    steps: int,
    cache: int,
    rounds: int,
    early: bool,
    with_planes: bool,
    memory_gb: float,
    device: str,
    output: Path | None,
) -> None:
    """Ratios to the same model compiled without captures, in turns in one process, medians over rounds."""
    logging.getLogger("torch").setLevel(logging.ERROR)
    cuda = device.startswith("cuda")
    if cuda and not torch.cuda.is_available():
        raise click.BadParameter("this torch finds no CUDA device", param_hint="--device")
    name = torch.cuda.get_device_name() if cuda else "cpu"
    if output is None:
        output = RESULTS / f"{datetime.date.today().isoformat()}-gpu-{short_name(device)}.json"
    result = json.loads(output.read_text()) if output.exists() else {"runs": []}
    started = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - started:6.1f} s] {text}", flush=True)

    def keep() -> None:
        assert output is not None
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=1) + "\n")

    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        model = llama(layers, hidden, device)
        say(f"a Llama of {sum(p.numel() for p in model.parameters()) / 1e9:.2f} billion parameters")
        found: dict[str, Any] = {
            "device": name,
            "torch": torch.__version__,
            **versions(),
            "parameters": sum(p.numel() for p in model.parameters()),
            "rounds": rounds,
            "workloads": {},
        }
        result["runs"].append(found)
        for batch in (batches or (1, 8, 64)) if batches != (0,) else ():
            options: dict[str, Any] = {"mode": "reduce-overhead"} if cuda else {}
            # A file takes what compressor threads do: more than these of few sequences is beyond them.
            sinks = (HOST, NULL) if batch > 8 else (HOST, NULL, FILE)
            variants = [
                plain(model, BASE, **options),
                *captured(model, 1.0, Path(folder), sinks, **options),
                plain(model, AGAIN, **options),
            ]
            run = measure.Decode(model, batch, steps, cache)
            entry: dict[str, Any] = {"variants": measure.settle(variants, run, say)}
            found["workloads"][run.name] = entry
            for key, run.waits in (("free", False), ("each", True)):
                entry[key] = measure.rounds(variants, run, min(rounds, 5) if run.waits else rounds)
                how = "waits for each token" if run.waits else "runs ahead"
                show(f"{run.name}, host {how}", entry[key], say)
                keep()
            if cuda:
                picture = output.with_name(f"{output.stem}-decode-{batch}.png")
                entry["timeline"] = measure.timeline(variants[2], run.shortened(4), picture)
                entry["timeline_base"] = measure.timeline(
                    variants[0], run.shortened(4), picture.with_suffix(".base.png")
                )
                say(f"timeline: {summary(entry['timeline'])}; base: {summary(entry['timeline_base'])}")
            del variants, run
            torch._dynamo.reset()
            keep()
        if length:
            run = measure.Prefill(model, length, 4)
            sinks = (HOST, NULL)
            whole = [
                plain(model, BASE),
                *captured(model, memory_gb, Path(folder), sinks),
                plain(model, AGAIN),
            ]
            groups = {run.name: whole}
            if early:
                groups[f"{run.name}, layers compiled by themselves"] = [
                    plain_layers(model, BASE),
                    *captured_layers(model, memory_gb, Path(folder), sinks),
                ]
            if cuda:
                found["plain_copy_gbps"] = measure.plain_copy_gbps()
                say(f"a plain pinned copy: {found['plain_copy_gbps']:.1f} GB/s")
            for title, variants in groups.items():
                entry = {"variants": measure.settle(variants, run, say)}
                found["workloads"][title] = entry
                entry["free"] = measure.rounds(variants, run, rounds)
                show(f"{title}, back to back", entry["free"], say)
                if cuda:
                    kind = "prefill" if variants is whole else "prefill-layers"
                    to_host = next(variant for variant in variants if variant.name == HOST)
                    picture = output.with_name(f"{output.stem}-{kind}.png")
                    entry["timeline"] = measure.timeline(to_host, run, picture)
                    say(f"timeline: {summary(entry['timeline'])}")
                keep()
        if with_planes:
            found["planes"] = planes.compare(device, say)
            keep()
    say(f"figures in {output}")


def show(title: str, rows: dict[str, Any], say: Any) -> None:
    say(title)
    for name, row in rows.items():
        low, high = row["interval"]
        more = f"  device {row['device_mb_more']:+.0f} MB" if "device_mb_more" in row else ""
        if "records" in row:
            more += f"  {row['raw_mb']:.0f} MB in {row['records']} records, stalled {row['stalled_s']:.3f} s"
        print(
            f"    {name:24s} {row['ratio']:.4f} ({low:.4f}-{high:.4f})  {row['ms_a_step']:.3f} ms, "
            f"host {row['host_ms_a_step']:.3f} ms{more}",
            flush=True,
        )


def summary(found: dict[str, Any]) -> str:
    shown = {key: value for key, value in found.items() if key != "most_time"}
    return ", ".join(f"{key} {value:.4g}" for key, value in shown.items() if value is not None)
