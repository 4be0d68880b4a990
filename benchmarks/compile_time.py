"""How long the capturing variant takes to compile, against the plain model: Dynamo, Inductor and the C++ compiler.

    OMP_NUM_THREADS=1 python -m benchmarks.compile_time [--model smollm|toy] [--rounds N] [--json FILE]

Every figure is one process: the first call of a model that was never compiled on this machine, with all of torch's
caches switched off, less the second call. Rounds run plain and capturing one after the other, in an order that
changes from round to round, and the figure is the median over rounds of their ratio; CPU time, of the process and of
the compilers that it starts, is given beside wall time, since a busy machine moves it less.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .machine import processor

LENGTH = 32


def build(name: str) -> tuple[Any, Any]:
    import torch

    from .overhead.models import smollm, toy

    torch.set_num_threads(1)
    ids = torch.arange(1, LENGTH + 1)[None]
    if name == "smollm":
        return smollm(torch.float32, "cpu")[0], ids
    return toy(torch.float32, "cpu", depth=32, width=64), ids


def cpu_seconds() -> float:
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def child(name: str, capturing: bool) -> None:
    """Print the seconds of the first call less those of the second, wall and CPU."""
    import contextlib

    import torch
    import torch._dynamo
    import torch._inductor.compile_fx

    from fx_instrument import InstrumentationFramework

    model, ids = build(name)
    framework = InstrumentationFramework()
    if capturing:
        framework.instrument_model(model)
        block: Any = framework.capture_activations(None)
    else:
        model.compile()
        block = contextlib.nullcontext()
    took = []
    with torch.inference_mode(), block:
        for _ in range(2):
            wall, cpu = time.perf_counter(), cpu_seconds()
            model(ids, use_cache=False)
            took.append((time.perf_counter() - wall, cpu_seconds() - cpu))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    if capturing:
        assert block.report.records == 2 * len(framework.sites), block.report
    (first, second) = took
    print(json.dumps({"wall": first[0] - second[0], "cpu": first[1] - second[1], "graphs": graphs}))


def measure(name: str, capturing: bool) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as cache:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TORCHINDUCTOR_CACHE_DIR": cache,
            "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
            # One process compiles, so that its CPU time is all there is.
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(
                filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")])
            ),
        }
        me = [sys.executable, "-m", "benchmarks.compile_time", "--model", name, "--child"]
        command = [*me, "capturing" if capturing else "plain"]
        done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("smollm", "toy"), default="toy")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--child", choices=("plain", "capturing"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.model, arguments.child == "capturing")
        return
    import torch
    import transformers

    rounds = []
    for number in range(arguments.rounds):
        order = (False, True) if number % 2 == 0 else (True, False)
        taken = {capturing: measure(arguments.model, capturing) for capturing in order}
        plain, capturing = taken[False], taken[True]
        rounds.append({"plain": plain, "capturing": capturing})
        print(
            f"round {number}: plain {plain['wall']:.1f} s ({plain['cpu']:.1f} s CPU), capturing "
            f"{capturing['wall']:.1f} s ({capturing['cpu']:.1f} s CPU), ratio {capturing['wall'] / plain['wall']:.3f} "
            f"({capturing['cpu'] / plain['cpu']:.3f})",
            flush=True,
        )
        ratios = {
            kind: statistics.median(r["capturing"][kind] / r["plain"][kind] for r in rounds)
            for kind in ("wall", "cpu")
        }
        if arguments.json:
            # Written after every round, so that a run that is cut short leaves what it measured.
            result = {
                "command": f"OMP_NUM_THREADS=1 python -m benchmarks.compile_time --model {arguments.model} "
                f"--rounds {arguments.rounds}",
                "model": arguments.model,
                "median_ratio": ratios,
                "rounds": rounds,
                "cpu": processor(),
                "versions": {
                    "python": platform.python_version(),
                    "torch": torch.__version__,
                    "transformers": transformers.__version__,
                },
            }
            arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(f"median of {len(rounds)}: wall {ratios['wall']:.3f}, CPU {ratios['cpu']:.3f}")


if __name__ == "__main__":
    main()
