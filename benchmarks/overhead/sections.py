"""The parts of the benchmark; each returns plain JSON values."""

from __future__ import annotations

import contextlib
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch._dynamo

from fx_instrument import HookGranularity

from . import costs, instructions, measure, models, peers, timeline, variants
from .measure import clock
from .table import Options, table
from .variants import AGAIN, BASE, Setup, Variant
from .workloads import KINDS, Bench, Workload


def main_workloads(name: str, options: Options) -> list[Workload]:
    """Of a second or more a block on the real model: opening and closing one takes milliseconds to tens of them."""
    if options.kinds:
        kinds: Sequence[str] = options.kinds
    elif options.full:
        kinds = KINDS
    elif name == "toy":
        # One token a step: nothing is as short.
        kinds = ("decode-static",)
    else:
        # Every kind is compiled anew, on the real model half a minute a variant.
        kinds = ("prefill",) if options.quick else ("prefill", "decode-static")
    steps = {"prefill": 6, "decode-static": 36, "decode-dynamic": 36, "generate": 36}
    lengths = {"prefill": 128}
    times = (8 if name == "toy" else 1) * (0.5 if options.quick else 1)
    if options.device != "cpu":
        # A call of the real model takes milliseconds there, one of the toy half of one.
        times *= 4 if name == "toy" else 16
    return [
        Workload(kind, 4, lengths.get(kind, 32), options.steps or int(steps[kind] * times)) for kind in kinds
    ]


def real(options: Options) -> dict[str, Any]:
    """Hooks and ours on SmolLM2-135M; then once more with no core idle; and a timeline."""
    setup = _smollm(options)
    section = _compare("real", "SmolLM2-135M-Instruct", setup, options)
    if any(name.startswith("prefill") for name in section["workloads"]):
        options.say("timeline")
        # The capture is compiled by now: a variant of its own finds it in Inductor's cache.
        section["timeline"] = _lanes(setup, options)
    return section


def _smollm(options: Options) -> Setup:
    options.say("loading SmolLM2-135M")
    model, tokenizer = models.smollm(options.dtype, options.device)
    return Setup(model, options=options.compile_options, tokenizer=tokenizer)


def toy(options: Options) -> dict[str, Any]:
    """All variants of ours and of hooks on a toy, whose forward call is so short that fixed costs show."""
    setup = Setup(models.toy(options.dtype, options.device), options=options.compile_options)
    return _compare("toy", "toy, 4 layers of width 256", setup, options)


def _compare(name: str, title: str, setup: Setup, options: Options) -> dict[str, Any]:
    ours = variants.ours(setup)
    key = [variants.compiled(setup), *ours]
    traced = variants.traced_hooks(setup)
    hooks = [*traced, variants.hooked(setup, compiled=True)]
    sampled = variants.sampled(setup, 0.01)
    rest = [
        sampled,
        variants.compiled(setup, AGAIN),
        variants.plain(setup),
        variants.hooked(setup, compiled=False),
    ]

    def wanted(kind: str) -> list[Variant]:
        # Of the real model each more is half a minute of compiling.
        if options.quick and name == "real":
            those = key
        elif (
            options.quick or kind == "generate" or (kind != "prefill" and name == "real" and not options.full)
        ):
            those = [*key, *hooks]
        else:
            those = [*key, *hooks, *rest]
        parts = options.variants
        return [v for v in those if v.name == BASE or not parts or any(part in v.name for part in parts)]

    found: dict[str, Any] = {}
    section = {"model": title, "workloads": found}
    for workload in main_workloads(name, options):
        if options.is_over:
            break
        chosen = wanted(workload.kind)
        rows = found[workload.name] = table(chosen, workload, setup.model, options)
        options.keep(name, section)
        no_idle_core = KINDS if options.full else ("prefill",)
        has_time = not options.quick and not options.is_over
        if has_time and options.device == "cpu" and workload.kind in no_idle_core:
            few = [v for v in chosen if v in (*key, *traced, sampled)]
            with measure.one_core():
                busy = table(few, workload, setup.model, options, checked=rows["variants"])
            found[f"{workload.name}, no idle core"] = busy
            options.keep(name, section)
    return section


def _lanes(setup: Setup, options: Options) -> dict[str, Any]:
    """A timeline of forward, hand-over, compression and writing."""
    variant = variants.ours(setup)[2]
    workload = Workload("prefill", 4, 128, 4)
    bench = Bench(workload, setup.model)
    with tempfile.TemporaryDirectory() as folder:
        clock(variant, bench, Path(folder))
        spans = timeline.record(variant, bench, Path(folder))
    return {"workload": asdict(workload), "spans": spans}


PEER_WORKLOAD = Workload("prefill", 4, 128, 6)


def others(options: Options) -> dict[str, Any]:
    """Other libraries on SmolLM2-135M, each in a process of its own: what it does to torch is done to nobody else.

    The compiled model runs in turns with each of them there; its speed in each process shows whether it is disturbed.
    """
    setup = _smollm(options)
    chosen = [variants.compiled(setup), variants.plain(setup), variants.ours(setup)[2]]
    found = table(chosen, PEER_WORKLOAD, setup.model, options)
    section = {"model": "SmolLM2-135M-Instruct", "workloads": {PEER_WORKLOAD.name: found}}
    for name in peers.PEERS:
        if options.variants and not any(part in name for part in options.variants):
            continue
        options.say(f"{PEER_WORKLOAD.name}: {name}, in a process of its own")
        found["variants"].update(_alone(name, options))
        options.keep("peers", section)
    return section


def _alone(name: str, options: Options) -> dict[str, dict[str, Any]]:
    """What :func:`beside` gives in another process."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.json")
        command = [
            sys.executable,
            "-m",
            "benchmarks.overhead.alone",
            name,
            str(torch.get_num_threads()),
            str(path),
        ]
        try:
            subprocess.run(command, input=options.to_json(), text=True, stdout=subprocess.DEVNULL, check=True)
        except subprocess.CalledProcessError as error:
            return {name: {"error": f"its process ended with {error.returncode}"}}
        rows: dict[str, dict[str, Any]] = json.loads(path.read_text())
        return rows


def beside(name: str, options: Options) -> dict[str, dict[str, Any]]:
    """Rows of one peer and of the compiled model beside it, both in this process; or why there are none."""
    with fresh():
        setup = _smollm(options)
        peer = peers.peer(name, setup)
        if isinstance(peer, str):
            return {name: {"error": peer}}
        workload = PEER_WORKLOAD if name not in peers.SLOW else replace(PEER_WORKLOAD, steps=1)
        rows = table([variants.compiled(setup), peer], workload, setup.model, options)["variants"]
        return {f"{BASE}, beside {name}": rows.pop(BASE), **rows}


def kinds(options: Options) -> dict[str, Any]:
    """Granularities, codecs and sampling rates, on a toy."""
    model = models.toy(options.dtype, options.device)
    setup = Setup(model, options=options.compile_options)
    attention = variants.ours(setup, name="FX attention only", granularity=HookGranularity.ATTENTION_ONLY)
    mlp = variants.ours(setup, name="FX MLP only", granularity=HookGranularity.MLP_ONLY)
    chosen = [
        variants.compiled(setup),
        *variants.ours(setup, codecs=("none", "lz4", "zstd")),
        attention[2],
        mlp[2],
        *(variants.sampled(setup, rate) for rate in (0.001, 0.01, 0.1)),
    ]
    for variant in chosen:
        variant.counts_of = variant.counts_of if variant.counts_of == "FX, null sink" else ""
    workloads = [Workload("prefill", 4, 128, 48), Workload("decode-static", 4, 32, 288)]
    found = {workload.name: table(chosen, workload, model, options) for workload in workloads}
    return {"model": "toy, 4 layers of width 256", "workloads": found}


def shapes(options: Options) -> dict[str, Any]:
    """Overhead against batch and length, prefill of a toy; returns the tables and points for the cost model."""
    model = models.toy(options.dtype, options.device)
    setup = Setup(model, options=options.compile_options)
    chosen = [variants.compiled(setup), *variants.ours(setup)[1:], variants.traced_hooks(setup)[1]]
    sizes = [(1, 128), (2, 128), (4, 128), (8, 128), (4, 32), (4, 64), (4, 256), (4, 512)]
    found = {}
    for batch, length in sizes:
        # As many tokens in each block, or what opening and closing it costs would look like a matter of shape.
        workload = Workload("prefill", batch, length, 32768 // (batch * length))
        found[workload.name] = table(chosen, workload, model, options)
    return {"model": "toy, 4 layers of width 256", "workloads": found}


def parts(options: Options) -> dict[str, Any]:
    """Where capturing's time goes, by leaving parts of it out, on the real model."""
    setup = _smollm(options)
    chosen = [variants.compiled(setup), *variants.left_out(setup), *variants.ours(setup)]
    workloads = [w for w in main_workloads("real", options) if w.kind in ("prefill", "decode-static")]
    found = {workload.name: table(chosen, workload, setup.model, options) for workload in workloads}
    return {"model": "SmolLM2-135M-Instruct", "workloads": found}


def strict(options: Options) -> dict[str, Any]:
    """``strict_numerics`` where it runs graphs twice: outputs of layers, which Inductor keeps wider inside kernels."""
    found = {}
    for name, model, steps in (
        ("toy", models.toy(options.dtype, options.device), 32),
        ("SmolLM2", models.smollm(options.dtype, options.device)[0], 2),
    ):
        layers = len(model.model.layers)  # type: ignore[arg-type, union-attr]
        sites = [f"model.layers.{layer}" for layer in range(layers)]
        setup = Setup(model, sites=sites, options=options.compile_options)
        strictly = variants.ours(setup, name="FX strict", strict_numerics=True)[1]
        chosen = [variants.compiled(setup), variants.ours(setup)[1], strictly]
        workload = Workload("prefill", 4, 128, steps)
        found[f"{name}, {workload.name}"] = table(chosen, workload, model, options)
    return {"model": "outputs of all layers", "workloads": found}


PARTS = (".self_attn", ".mlp", ".self_attn.q_proj", ".self_attn.k_proj", ".self_attn.v_proj", "",
         ".input_layernorm", ".post_attention_layernorm")  # fmt: skip
"""Modules of a layer whose outputs are all as wide as the model; "" is the layer itself."""


def scaling(options: Options) -> dict[str, Any]:
    """Overhead against the number of sites at a constant model, against depth, and the cost model."""
    options.say("scaling: the deep toy")
    deep = models.toy(options.dtype, options.device, depth=32, width=64)
    layers = len(deep.model.layers)  # type: ignore[arg-type, union-attr]
    names = [f"model.layers.{layer}{part}" for part in PARTS for layer in range(layers)]
    by_sites, points = {}, []
    held_out = 128
    workloads = [Workload("prefill", 4, 64, 48), Workload("decode-static", 4, 16, 96)]
    plain = variants.compiled(Setup(deep, options=options.compile_options))
    for count in (8, 64, held_out, 256):
        setup = Setup(deep, sites=names[:count], options=options.compile_options)
        chosen = [plain, *variants.ours(setup)[1:]]
        for workload in workloads:
            key = f"{count} sites, {workload.name}"
            rows = table(chosen, workload, deep, options)
            by_sites[key] = rows
            points += _points(rows, key, count, _bytes_of(deep, count, workload))
    by_depth = {}
    for depth in (2, 8):
        model = models.toy(options.dtype, options.device, depth=depth, width=64)
        setup = Setup(model, options=options.compile_options)
        chosen = [variants.compiled(setup), *variants.ours(setup)[1:]]
        by_depth[f"{depth} layers, {workloads[0].name}"] = table(chosen, workloads[0], model, options)
    by_depth[f"{layers} layers, {workloads[0].name}"] = by_sites[f"64 sites, {workloads[0].name}"]
    return {
        "model": "toys of width 64; 32 layers where the number of sites changes",
        "workloads": by_sites,
        "by_depth": by_depth,
        "points": [asdict(point) for point in points],
        "held_out": f"{held_out} sites",
    }


def _bytes_of(model: Any, sites: int, workload: Workload) -> float:
    return workload.rows / workload.calls * sites * variants.row_bytes(model)


def _points(rows: dict[str, Any], label: str, sites: int, num_bytes: float) -> list[costs.Point]:
    """What a file with zstd adds to a step, for the cost model."""
    steps = rows["workload"]["steps"]
    base = rows["variants"][BASE]["cpu_seconds"] / steps
    found = []
    for name, row in rows["variants"].items():
        if name == "FX, zstd file":
            added = base * (row["cpu_time_ratio"] - 1)
            found.append(costs.Point(label, num_bytes, sites, base, added))
    return found


def cost_model(sections: dict[str, Any]) -> dict[str, Any] | None:
    """Fit the points of ``scaling`` and ``shapes``; hold it against the number of sites left out and the real model."""
    points = [costs.Point(**point) for point in sections.get("scaling", {}).get("points", [])]
    for name, rows in sections.get("shapes", {}).get("workloads", {}).items():
        workload = Workload(**rows["workload"])
        num_bytes = workload.rows / workload.calls * models.TOY_WIDTH * rows_itemsize(sections) * 8
        points += _points(rows, f"8 sites of width 256, {name}", 8, num_bytes)
    left_out = sections.get("scaling", {}).get("held_out", "")
    seen = [point for point in points if not point.label.startswith(left_out or "-")]
    unseen = [point for point in points if point not in seen]
    for name, rows in sections.get("real", {}).get("workloads", {}).items():
        workload = Workload(**rows["workload"])
        if workload.kind != "generate" and "idle" not in name:
            num_bytes = workload.rows / workload.calls * 576 * rows_itemsize(sections) * 60
            unseen += _points(rows, f"SmolLM2-135M, {name}", 60, num_bytes)
    if len(seen) < 4:
        return None
    model = costs.fit(seen)
    return {**asdict(model), "fitted": costs.against(model, seen), "held_out": costs.against(model, unseen)}


def rows_itemsize(sections: dict[str, Any]) -> int:
    return 4 if sections.get("dtype") == "float32" else 2


def memory(options: Options) -> dict[str, Any]:
    """Growth of the resident set against the length of a capture: flat."""
    model = models.toy(options.dtype, options.device)
    setup = Setup(model, options=options.compile_options)
    chosen = {variant.name: variant for variant in (*variants.ours(setup)[2:], variants.compiled(setup))}
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for steps in (1000, 4000) if options.full else (25, 100, 400):
            bench = Bench(Workload("prefill", 4, 128, steps), model)
            for name, variant in chosen.items():
                options.say(f"memory: {steps} steps, {name}")
                clock(variant, Bench(Workload("prefill", 4, 128, 3), model), Path(folder))
                gc.collect()
                with measure.peak_memory() as peak:
                    sample = clock(variant, bench, Path(folder))
                raw = bench.workload.rows * variant.expected * variants.row_bytes(model)
                found.setdefault(name, []).append(
                    {"steps": steps, "raw_mb": raw / 1e6, "peak_mb": peak.mb, "seconds": sample.wall}
                )
    return {"model": "toy, 4 layers of width 256", "prefill": "4x128", "growth": found}


def counted(options: Options) -> dict[str, Any]:
    """Instructions a call, under callgrind."""
    if reason := instructions.available():
        return {"error": reason}
    done = iter(range(1, 100))
    total = len(instructions.VARIANTS)
    options.say("instructions: under callgrind")
    found = instructions.measure(progress=lambda: options.say(f"instructions: {next(done)} of {total}"))
    base = found[BASE]
    return {
        "model": "toy, 2 layers of width 256, float32, one call of 16 tokens, AVX2",
        "calls": instructions.CALLS,
        "instructions_per_call": found,
        "ratio": {name: count / base for name, count in found.items()},
    }


SECTIONS: dict[str, Callable[[Options], dict[str, Any]]] = {
    "real": real,
    "toy": toy,
    "parts": parts,
    "strict": strict,
    "kinds": kinds,
    "shapes": shapes,
    "scaling": scaling,
    "memory": memory,
    "instructions": counted,
    "peers": others,
}
QUICK = ("real", "toy")


def usual() -> tuple[str, ...]:
    """What runs if nothing else is said: other libraries where one is installed."""
    return ("real", "toy", "memory", *(("peers",) if peers.installed() else ()))


@contextlib.contextmanager
def fresh() -> Any:
    """Compiled code of one section is not found, or kept alive, by the next."""
    torch._dynamo.reset()
    gc.collect()
    with torch.no_grad():
        yield


def run(name: str, options: Options) -> dict[str, Any]:
    with fresh():
        return SECTIONS[name](options)
