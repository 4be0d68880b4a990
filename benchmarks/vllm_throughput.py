"""What capturing costs a vLLM engine: nothing, 3 of 200 requests, all of them; times as ratios to plain vLLM.

    python -m benchmarks.vllm_throughput --model FOLDER [--requests 200] [--rounds 5] [--output results.json]

It needs vLLM (`make test-vllm` builds an environment).

Engines are started one after the other, each in a process of its own, and stay; rounds go through them in turn, so
that drift of the machine falls on all alike. An engine that is not measured sleeps in its process. Reported are the
medians over rounds of each variant's time divided by plain vLLM's of the same round, and the quartiles: of the wall
clock, of the CPU time of the thread that runs the model, and of that of the whole process, compressors included.
``own_share`` is the share of the wall clock that the model's thread spent in the capture's own functions, which tells
what the ratios' spread hides.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .machine import processor

MEASURES = ("wall_s", "model_thread_cpu_s", "process_cpu_s")
# What the capture runs on the model's thread in each step.
OWN = {
    "integrations.vllm": {"WorkerCapture": ("_begin_step",)},
    "engine_capture": {"EngineCapture": ("arm", "store")},
    "step_sink": {"StepSink": ("deliver", "reserve")},
}
VARIANTS = {
    "plain": None,
    "nobody asks": ("requested", 0),
    "3 of 200": ("requested", 3),
    "all": ("all", None),
}


def time_own() -> list[float]:
    """Have the capture's functions count their seconds; the sum is the list's only item."""
    spent = [0.0]

    def timed(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                spent[0] += time.perf_counter() - started

        return call

    for room, classes in OWN.items():
        module = importlib.import_module(f"fx_instrument.{room}")
        for owner, names in classes.items():
            for name in names:
                holder = getattr(module, owner)
                setattr(holder, name, timed(getattr(holder, name)))
    return spent


def serve(variant: str, arguments: argparse.Namespace, folder: Path) -> None:
    """The engine's process: a line with a seed comes in, the seconds of that round go out."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM logs to standard output
    from vllm import LLM, SamplingParams

    from fx_instrument import HookGranularity, InstrumentationConfig
    from fx_instrument.integrations.vllm import engine_arguments

    own = time_own()
    capture = VARIANTS[variant]
    options: dict[str, Any] = {}
    if capture is not None:
        config = InstrumentationConfig(
            granularity=HookGranularity(arguments.granularity), compression_algorithm=arguments.codec
        )
        options = engine_arguments(config, folder / f"{variant.replace(' ', '_')}.stream", capture=capture[0])
    llm = LLM(
        arguments.model,
        dtype=arguments.dtype,
        max_model_len=512,
        max_num_seqs=arguments.max_num_seqs,
        max_num_batched_tokens=2048,
        enable_prefix_caching=False,
        **options,
    )
    vocabulary = llm.get_tokenizer().vocab_size
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        draw = random.Random(int(line))
        prompts = [
            {"prompt_token_ids": [draw.randrange(100, vocabulary) for _ in range(draw.randint(16, 96))]}
            for _ in range(arguments.requests)
        ]
        asking = 0 if capture is None else round((capture[1] or 0) * arguments.requests / 200)
        every = len(prompts) // max(1, asking)
        sampling = [
            SamplingParams(
                temperature=0,
                max_tokens=arguments.max_tokens,
                ignore_eos=True,
                extra_args={"fx_instrument": True}
                if asking and index % every == 0 and index // every < asking
                else None,
            )
            for index in range(len(prompts))
        ]
        started = time.perf_counter(), time.thread_time(), time.process_time(), own[0]
        llm.generate(prompts, sampling, use_tqdm=False)
        ended = time.perf_counter(), time.thread_time(), time.process_time(), own[0]
        print(*(b - a for a, b in zip(started, ended, strict=True)), file=answers, flush=True)
    report = llm.collective_rpc("finish_capture")[0] if capture is not None else None
    print(json.dumps(report), file=answers, flush=True)


class Engine:
    def __init__(self, variant: str, folder: Path) -> None:
        log = (folder / f"{variant.replace(' ', '_')}.log").open("w")
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "benchmarks.vllm_throughput",
                *sys.argv[1:],
                "--serve",
                variant,
                "--folder",
                str(folder),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        )
        if self._read() != "ready":
            raise SystemExit(f"the engine {variant!r} did not start: see {log.name}")

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def round(self, seed: int) -> dict[str, float]:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{seed}\n")
        self._process.stdin.flush()
        return dict(zip((*MEASURES, "own_s"), map(float, self._read().split()), strict=True))

    def stop(self) -> dict[str, Any] | None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        report: dict[str, Any] | None = json.loads(self._read())
        self._process.wait(120)
        return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="a model folder or name that vLLM takes")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--max-num-seqs", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--granularity", default="full_tensor")
    parser.add_argument("--codec", default="zstd")
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--pause", action="store_true", help="wait for Enter once the engines are warm")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    parser.add_argument("--serve", choices=list(VARIANTS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        return serve(arguments.serve, arguments, arguments.folder)
    with tempfile.TemporaryDirectory() as folder:
        engines = {}
        for variant in arguments.variants:
            print(f"starting: {variant}", file=sys.stderr, flush=True)
            engines[variant] = Engine(variant, Path(folder))
        for engine in engines.values():
            engine.round(0)
        if arguments.pause:
            print("ready: press Enter to measure", file=sys.stderr, flush=True)
            sys.stdin.readline()
        seconds: dict[str, list[dict[str, float]]] = {variant: [] for variant in engines}
        for number in range(1, arguments.rounds + 1):
            order = list(engines)
            random.Random(number).shuffle(order)
            for variant in order:
                seconds[variant].append(engines[variant].round(number))
            latest = {variant: round(times[-1]["wall_s"], 2) for variant, times in seconds.items()}
            print(f"round {number} of {arguments.rounds}: {latest}", file=sys.stderr, flush=True)
        reports = {variant: engine.stop() for variant, engine in engines.items()}
    show(arguments, seconds, reports)
    return None


def show(
    arguments: argparse.Namespace, seconds: dict[str, list[dict[str, float]]], reports: dict[str, Any]
) -> None:
    import torch
    import vllm

    figures: dict[str, Any] = {}
    for variant, rounds in seconds.items():
        figures[variant] = {}
        for measure in MEASURES:
            ratios = [a[measure] / b[measure] for a, b in zip(rounds, seconds["plain"], strict=True)]
            quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
            figures[variant][measure] = {
                "median_ratio": statistics.median(ratios),
                "quartiles": [quartiles[0], quartiles[2]],
                "seconds": [found[measure] for found in rounds],
            }
            print(
                f"{variant:12} {measure:18} {statistics.median(ratios):.3f}  "
                f"[{quartiles[0]:.3f}, {quartiles[2]:.3f}]  {statistics.median(r[measure] for r in rounds):.2f} s"
            )
        shares = [found["own_s"] / found["wall_s"] for found in rounds]
        figures[variant]["own_share"] = {"median": statistics.median(shares), "largest": max(shares)}
        print(f"{variant:12} {'own_share':18} {statistics.median(shares):.5f}  at most {max(shares):.5f}")
    if arguments.output is not None:
        record = {
            "command": ["python", "-m", "benchmarks.vllm_throughput", *sys.argv[1:]],
            "hardware": {
                "cpu": processor(),
                "cores": os.cpu_count(),
                "threads": os.environ.get("OMP_NUM_THREADS"),
            },
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "vllm": vllm.__version__,
            },
            "figures": figures,
            "reports": {
                variant: report and {k: v for k, v in report.items() if k != "path"}
                for variant, report in reports.items()
            },
        }
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
