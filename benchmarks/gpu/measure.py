"""Decode steps and prefills of all variants in turns, and what copies to the host do beside the model's kernels."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..overhead.measure import in_turns, interval
from .model import BASE, Variant

GAP_NS = 20_000
"""Between kernels of one run there may be as much."""


def synchronize() -> None:
    """Until the stream that runs the model is idle; copies may go on."""
    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()


class Decode:
    """``steps`` decode steps of ``batch`` sequences with a static cache, greedy; a call gives the last logits."""

    waits = False
    """Whether the host waits for each token, as ``generate`` does."""

    def __init__(self, model: Any, batch: int, steps: int, cache_length: int) -> None:
        from transformers import StaticCache

        self.name = f"decode {batch}x{cache_length}"
        self.steps, self.tokens = steps, batch * steps
        device = next(model.parameters()).device
        self._cache = StaticCache(config=model.config, max_cache_len=cache_length)
        self._first = torch.full((batch, 1), 11, device=device)
        self._positions = torch.arange(steps, device=device)
        # The first call makes the cache's memory; in a CUDA graph it would be overwritten by the next.
        model(self._first, past_key_values=self._cache, position_ids=self._first * 0, use_cache=True)

    def __call__(self, model: Any) -> torch.Tensor:
        cache, token = self._cache, self._first
        cache.reset()
        for step in range(self.steps):
            position = self._positions[step : step + 1].expand(token.shape[0], 1)
            logits = model(token, past_key_values=cache, position_ids=position, use_cache=True).logits
            token = logits[:, -1:].argmax(-1)
            if self.waits:
                token.tolist()
        last: torch.Tensor = logits
        return last

    def shortened(self, steps: int) -> Decode:
        """The same with fewer steps, the host ahead, on the same cache: CUDA graphs are recorded for its address."""
        other = copy.copy(self)
        other.waits, other.steps, other.tokens = False, steps, self.tokens // self.steps * steps
        return other


class Prefill:
    """``steps`` prefills of one prompt, back to back."""

    def __init__(self, model: Any, length: int, steps: int) -> None:
        self.name = f"prefill 1x{length}"
        self.steps, self.tokens = steps, length * steps
        device = next(model.parameters()).device
        self._ids = torch.arange(length, device=device)[None] % 1000 + 5

    def __call__(self, model: Any) -> torch.Tensor:
        for _ in range(self.steps):
            logits = model(self._ids, use_cache=False, logits_to_keep=1).logits
        last: torch.Tensor = logits
        return last


def settle(variants: Sequence[Variant], run: Any, say: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """Compile, warm up and record every variant; seconds that each took, and whether its last logits have the bits
    of the first variant's."""
    found: dict[str, dict[str, Any]] = {}
    expected = None
    for variant in variants:
        started = time.perf_counter()
        for _ in range(2):
            with variant.running():
                logits = run(variant.model).clone()
                synchronize()
        taken = time.perf_counter() - started
        expected = logits if expected is None else expected
        equal = bool(torch.equal(logits, expected))
        found[variant.name] = {"compile_s": taken, "outputs_equal": equal}
        differ = "" if equal else ", other outputs"
        say(f"{run.name}, {variant.name}: ready after {taken:.1f} s{differ}")
    return found


def rounds(variants: Sequence[Variant], run: Any, num_rounds: int) -> dict[str, Any]:
    """Every variant once a round, in turning order: medians and their intervals against the baseline's round."""
    device = torch.cuda.is_available()
    seconds: dict[str, list[float]] = {variant.name: [] for variant in variants}
    given: dict[str, list[float]] = {variant.name: [] for variant in variants}
    memory = {variant.name: 0 for variant in variants}
    for variant in in_turns(variants, num_rounds):
        if device:
            torch.cuda.reset_peak_memory_stats()
        with variant.running():
            synchronize()
            started = time.perf_counter()
            run(variant.model)
            given[variant.name].append(time.perf_counter() - started)
            synchronize()
            seconds[variant.name].append(time.perf_counter() - started)
        if device:
            memory[variant.name] = max(memory[variant.name], torch.cuda.max_memory_allocated())
    base = np.array(seconds[BASE])
    found: dict[str, Any] = {}
    for variant in variants:
        name = variant.name
        median, low, high = interval(np.array(seconds[name]) / base)
        found[name] = {
            "ratio": median,
            "interval": [low, high],
            "ms_a_step": 1e3 * float(np.median(seconds[name])) / run.steps,
            "host_ms_a_step": 1e3 * float(np.median(given[name])) / run.steps,
            "tokens_per_s": run.tokens / float(np.median(seconds[name])),
            "seconds": seconds[name],
        }
        if device:
            found[name]["device_mb_more"] = (memory[name] - memory[BASE]) / 1e6
        if variant.report is not None:
            report = variant.report
            found[name]["records"] = report.records
            found[name]["raw_mb"] = report.raw_bytes / 1e6
            found[name]["stalled_s"] = report.stalled_seconds
            found[name]["dropped"] = report.dropped_records
            found[name]["peak_buffer_mb"] = report.peak_buffer_bytes / 1e6
    return found


def plain_copy_gbps(num_bytes: int = 1 << 30, times: int = 5) -> float:
    """The best of a few copies of one block to pinned memory of torch's own, GB/s."""
    source = torch.randint(0, 255, (num_bytes,), dtype=torch.uint8, device="cuda")
    target = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    best = 0.0
    for _ in range(times):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        target.copy_(source, non_blocking=True)
        end.record()
        end.synchronize()
        best = max(best, num_bytes / begin.elapsed_time(end) / 1e6)
    return best


def timeline(variant: Variant, run: Any, picture: Path) -> dict[str, Any]:
    """One block under torch's profiler: how copies to the host lie beside the kernels; drawn to ``picture``."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled, variant.running():
        run(variant.model)
        torch.cuda.synchronize()
    kernels: list[tuple[int, int]] = []
    copies: list[tuple[int, int]] = []
    names: dict[str, int] = {}
    for event in profiled.profiler.kineto_results.events():
        name, start, length = event.name(), event.start_ns(), event.duration_ns()
        if str(event.device_type()).rpartition(".")[2] != "CUDA" or not length:
            continue
        if name.startswith("Memcpy DtoH"):
            copies.append((start, start + length))
        elif not name.startswith(("Memset", "Memcpy HtoD")):
            kernels.append((start, start + length))
            names[name] = names.get(name, 0) + length
    busy, copying = union(kernels), union(copies)
    overlap = sum(
        max(0, min(a[1], b[1]) - max(a[0], b[0]))
        for a, b in itertools.product(union(kernels, GAP_NS), copying)
    )
    copied = sum(end - start for start, end in copying)
    found = {
        "kernels": len(kernels),
        "copies": len(copies),
        "kernel_ms": sum(end - start for start, end in busy) / 1e6,
        "copy_ms": copied / 1e6,
        "copies_beside_kernels": overlap / copied if copied else None,
        "copy_gbps": variant.report.raw_bytes / copied if copied and variant.report else None,
        "most_time": {
            name[:80]: length / 1e6 for name, length in sorted(names.items(), key=lambda item: -item[1])[:12]
        },
    }
    draw(busy, copying, variant.name, run.name, picture)
    return found


def union(spans: list[tuple[int, int]], gap_ns: int = 0) -> list[tuple[int, int]]:
    """Spans in order, those that overlap or lie at most ``gap_ns`` apart as one."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1] + gap_ns:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((start, end))
    return merged


def draw(
    busy: list[tuple[int, int]], copying: list[tuple[int, int]], variant: str, run: str, picture: Path
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    zero = min(start for start, _ in [*busy, *copying])
    figure, axes = pyplot.subplots(figsize=(10, 2.2), layout="constrained")
    for row, (spans, colour) in enumerate(((copying, "tab:orange"), (busy, "tab:blue"))):
        bars = [((start - zero) / 1e6, (end - start) / 1e6) for start, end in spans]
        axes.broken_barh(bars, (row + 0.1, 0.8), color=colour, linewidth=0)
    axes.set_yticks([0.5, 1.5], ["copies to the host", "kernels"])
    axes.set_xlabel("ms")
    axes.set_title(f"{run}, {variant}")
    figure.savefig(picture, dpi=130)
    pyplot.close(figure)
