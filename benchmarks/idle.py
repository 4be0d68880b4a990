"""What an instrumented model costs outside a capture block, in instructions, under valgrind's callgrind.

    python -m benchmarks.idle [--calls N] [--json FILE]

Each variant runs in a process of its own under callgrind, which counts only while the compiled model is called:
N calls, then N more. Both counts are divided by N, and their difference shows how well they repeat; the figure is the
second. "compiled" is ``model.compile()`` and nothing else, "instrumented" the same model behind ``instrument_model``
before any block, "after a block" behind one that captured. Timings would need thousands of rounds to tell 0.1 %;
instructions repeat to a millionth or so.

The model is a Llama of 4 layers (width 256, 512 in its MLP, 8 heads of 32, vocabulary 1000) on random weights: a
hundredth of a real model's work a call, so that the fixed costs show a hundred times larger than they are there.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .machine import processor

VARIANTS = ("compiled", "instrumented", "after a block")
LENGTH = 16


def build() -> tuple[Any, Any]:
    import torch

    from .overhead.models import toy

    torch.set_num_threads(1)
    return toy(torch.float32, "cpu"), torch.arange(LENGTH)[None]


def child(variant: str, calls: int, count: bool) -> None:
    """Run one variant; callgrind, if it is there, counts the calls alone."""
    import torch
    import torch._inductor.config

    from fx_instrument import InstrumentationFramework

    if platform.machine() == "x86_64":
        # Valgrind knows AVX2 and no AVX-512; ATEN_CPU_CAPABILITY says the same to Inductor's vector width.
        torch._inductor.config.cpp.march = "x86-64-v3"
    model, ids = build()
    # inference_mode and a plain positional call: what is left is the model, Dynamo's guards and the wrapper.
    with torch.inference_mode():
        if variant == "compiled":
            model.compile()
        else:
            framework = InstrumentationFramework()
            framework.instrument_model(model)
        for _ in range(3):
            model(ids)
        if variant == "after a block":
            with framework.capture_activations(None) as capture:
                model(ids)
            assert capture.report.records == 8, capture.report
        for _ in range(10):
            model(ids)
        gc.collect()
        gc.disable()
        if count:
            # Only from here on callgrind counts, and only between the toggles: import and tracing run at full speed.
            subprocess.run(
                ["callgrind_control", "-i", "on", str(os.getpid())], check=True, stdout=subprocess.DEVNULL
            )
        for _ in range(2 if count else 0):
            torch._C._valgrind_toggle()
            for _ in range(calls):
                model(ids)
            torch._C._valgrind_toggle_and_dump_stats()


def measure(variant: str, calls: int, folder: Path, environment: dict[str, str]) -> list[int]:
    """Instructions a call, in the first N and in the second N calls."""
    me = [sys.executable, "-m", "benchmarks.idle", "--calls", str(calls), "--child", variant]
    out = folder / variant.replace(" ", "-")
    valgrind = [
        "valgrind",
        "--tool=callgrind",
        "--instr-atstart=no",
        "--collect-atstart=no",
        f"--callgrind-out-file={out}",
    ]
    subprocess.run([*valgrind, "--quiet", *me, "--count"], env=environment, check=True)
    totals = []
    for number in (1, 2):
        text = Path(f"{out}.{number}").read_text()
        found = re.search(r"^(?:totals|summary): (\d+)", text, re.M)
        assert found is not None, f"{out}.{number} has no total"
        totals.append(int(found[1]) // calls)
    return totals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=100, help="calls counted at a time (default 100)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument(
        "--keep", type=Path, help="keep callgrind's files in this folder, for callgrind_annotate"
    )
    parser.add_argument("--child", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--count", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.calls, arguments.count)
        return
    if shutil.which("valgrind") is None:
        sys.exit("valgrind is not installed: apt-get install valgrind")
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        # Compiled once outside valgrind; the counted processes find the code in Inductor's cache.
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONHASHSEED": "0",
            "ATEN_CPU_CAPABILITY": "avx2",
            "TORCHINDUCTOR_CACHE_DIR": f"{temporary}/cache",
            "PYTHONPATH": os.pathsep.join(
                filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")])
            ),
        }
        me = [sys.executable, "-m", "benchmarks.idle"]
        figures = {}
        for variant in VARIANTS:
            started = time.monotonic()
            subprocess.run([*me, "--child", variant], env=environment, check=True)
            figures[variant] = measure(variant, arguments.calls, folder, environment)
            print(
                f"{variant:15} {figures[variant][1]:>12,} instructions a call"
                f"   ({figures[variant][1] - figures[variant][0]:+,} from the first {arguments.calls})"
                f"   ratio {figures[variant][1] / figures['compiled'][1]:.5f}"
                f"   [{time.monotonic() - started:.0f} s]",
                flush=True,
            )
    plain = figures["compiled"][1]
    if arguments.json:
        result = {
            "command": "python -m benchmarks.idle " + " ".join(sys.argv[1:]),
            "model": "Llama, 4 layers, width 256, one call of 16 tokens, fp32",
            "calls": arguments.calls,
            "instructions_per_call": {variant: totals[1] for variant, totals in figures.items()},
            "added_per_call": {variant: totals[1] - plain for variant, totals in figures.items()},
            "ratio": {variant: totals[1] / plain for variant, totals in figures.items()},
            "cpu": processor(),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "valgrind": subprocess.run(
                    ["valgrind", "--version"], capture_output=True, text=True, check=True
                ).stdout.strip(),
            },
        }
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
