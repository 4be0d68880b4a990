"""What capturing costs: hooks against the rewritten graph, interleaved in one process, on the real SmolLM2-135M.

    OMP_NUM_THREADS=1 python benchmarks/overhead.py [--quick] [--json FILE]

Every round runs each variant once, in an order that changes from round to round, and a variant's figure is the
median over rounds of its time divided by that of "compiled, nothing captured" in the same round: a machine whose
speed drifts drifts for both. Times are wall and CPU (all threads of the process, so that the compressor's work counts
there).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._dynamo

import fx_instrument
from fx_instrument import HookConfig, HookGranularity, InstrumentationConfig, InstrumentationFramework
from fx_instrument.demo.smollm import load_model

Run = Callable[[Any], None]


@dataclass
class Variant:
    """One way to run the model: what to call, and what is open while it is timed."""

    name: str
    model: Any
    capture: Callable[[], contextlib.AbstractContextManager[Any]]
    records: int = 0
    expected: int = 0


@dataclass
class Measured:
    wall: float
    cpu: float
    records: int


def variants(model: Any, folder: Path, only: str | None) -> Iterator[Variant]:
    """Each with its own copy of the weights, since an instrumented model has hooks that a plain one has not."""

    def instrumented(backend: Any, **config: Any) -> tuple[Any, InstrumentationFramework]:
        duplicate = copy.deepcopy(model)
        framework = InstrumentationFramework(InstrumentationConfig(**config))
        framework.instrument_model(duplicate, backend=backend)
        return duplicate, framework

    def into(framework: InstrumentationFramework, name: str | None) -> Callable[[], Any]:
        path = None if name is None else folder / f"{name}.stream"
        return lambda: framework.capture_activations(path)

    compiled = copy.deepcopy(model)
    compiled.compile()
    yield Variant("compiled", compiled, contextlib.nullcontext)
    rewritten, framework = instrumented("inductor", max_memory_gb=2.0)
    yield Variant("instrumented, idle", rewritten, contextlib.nullcontext)
    yield Variant("captured, null sink", rewritten, into(framework, None))
    yield Variant("captured, zstd file", rewritten, into(framework, "zstd"))
    sampled, framework = instrumented(
        "inductor", granularity=HookGranularity.SAMPLED_SLICES, hook_config=HookConfig(sampling_rate=0.01)
    )
    yield Variant("sampled 1 %, zstd file", sampled, into(framework, "sampled"))
    if only == "quick":
        return
    yield Variant("eager", copy.deepcopy(model), contextlib.nullcontext)
    # Without a compile the marks are plain forward hooks that clone into the same writer.
    hooked, framework = instrumented(None, max_memory_gb=2.0)
    yield Variant("eager + hooks, zstd file", hooked, into(framework, "hooks"))


def measure(variant: Variant, run: Run) -> Measured:
    wall, cpu = time.perf_counter(), time.process_time()
    with variant.capture() as capture:
        run(variant.model)
    records = capture.report.records if capture is not None else 0
    return Measured(time.perf_counter() - wall, time.process_time() - cpu, records)


def workload(name: str, batch: int, length: int, steps: int, vocabulary: int) -> Run:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (batch, length), generator=generator)

    def prefill(model: Any) -> None:
        for _ in range(steps):
            model(ids, use_cache=False)

    def decode(model: Any) -> None:
        model.generate(ids, max_new_tokens=steps, do_sample=False, eos_token_id=None, pad_token_id=0)

    return prefill if name == "prefill" else decode


def spread(values: list[float]) -> tuple[float, float]:
    ordered = sorted(values)
    return ordered[len(ordered) // 4], ordered[(3 * len(ordered)) // 4]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds, no eager variants")
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--json", type=Path, default=None, help="also write the figures here")
    arguments = parser.parse_args()
    rounds = arguments.rounds or (5 if arguments.quick else 15)
    model, _ = load_model(getattr(torch, arguments.dtype))
    results: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "machine": {
            "processor": _processor(),
            "threads": torch.get_num_threads(),
            "system": platform.platform(),
        },
        "versions": {"fx_instrument": fx_instrument.__version__, "torch": torch.__version__},
        "model": "SmolLM2-135M-Instruct",
        "dtype": arguments.dtype,
        "rounds": rounds,
        "workloads": {},
    }
    shapes = {"prefill": (4, 96, 2), "decode": (4, 16, 24)}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        chosen = list(variants(model, Path(folder), "quick" if arguments.quick else None))
        for name, (batch, length, steps) in shapes.items():
            run = workload(name, batch, length, steps, model.config.vocab_size)
            for variant in chosen:
                for _ in range(2):  # compiles, then settles
                    measure(variant, run)
            samples: dict[str, list[Measured]] = {variant.name: [] for variant in chosen}
            for number in range(rounds):
                turn = chosen[number % len(chosen) :] + chosen[: number % len(chosen)]
                for variant in turn:
                    samples[variant.name].append(measure(variant, run))
                print(f"\r{name}: round {number + 1} of {rounds}", end="", file=sys.stderr, flush=True)
            print(file=sys.stderr)
            print(f"\n{name}, batch {batch}, prompt {length}, {steps} steps, {arguments.dtype}")
            print(f"{'variant':28} {'time':>7} {'quartiles':>15} {'cpu time':>9} {'records':>8}")
            base = samples["compiled"]
            table = results["workloads"][name] = {
                "batch": batch,
                "prompt": length,
                "steps": steps,
                "variants": {},
            }
            for variant in chosen:
                mine = samples[variant.name]
                wall = [m.wall / b.wall for m, b in zip(mine, base, strict=True)]
                cpu = [m.cpu / b.cpu for m, b in zip(mine, base, strict=True)]
                low, high = spread(wall)
                print(
                    f"{variant.name:28} {statistics.median(wall):7.3f} {low:7.3f}-{high:7.3f} "
                    f"{statistics.median(cpu):9.3f} {mine[-1].records:8}"
                )
                table["variants"][variant.name] = {
                    "time_ratio": statistics.median(wall),
                    "time_ratio_quartiles": [low, high],
                    "cpu_time_ratio": statistics.median(cpu),
                    "seconds": statistics.median(m.wall for m in mine),
                    "records": mine[-1].records,
                }
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
