"""Interleaved rounds: every variant once a round, in turning order, compared with the baseline of the same round."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fx_instrument.capture.heap import return_freed_memory

from ..machine import resident
from .counts import CompileCounts, counting
from .variants import BASE, Variant
from .workloads import Bench

Floats = npt.NDArray[np.float64]

CONFIDENCE = 0.95
RESAMPLES = 2000
FEW_STEPS = 2
"""Enough to compile all that prefill and decoding with a static cache need."""


@dataclass(frozen=True)
class Sample:
    """One timed block, seconds."""

    wall: float
    """From entering the block until it is left: draining, the index and the fsync included."""
    cpu: float
    """Of all threads of the process."""
    inside: float
    """Wall clock of the model's calls alone."""
    minor_faults: int
    switches: int
    """Context switches, voluntary or not."""
    graphs: int
    """Compiled within the block: none, or the figure is not that of the compiled model."""


@dataclass
class Checked:
    """What one untimed run showed."""

    counts: CompileCounts
    rows: int
    expected: int
    equal: bool | None
    largest_difference: float | None
    peak_mb: float | None
    """Growth of the resident set at its highest, MB (1e6)."""
    peak_device_mb: float | None = None
    """The same of the device's allocator; None on a CPU."""


def clock(variant: Variant, bench: Bench, folder: Path) -> Sample:
    """One timed block of a variant."""
    run = bench.ready()
    synchronize()
    before = resource.getrusage(resource.RUSAGE_SELF)
    with counting() as compiling:
        wall, cpu = time.perf_counter(), time.process_time()
        with variant.block(folder):
            entered = time.perf_counter()
            run(variant.run)
            synchronize()
            inside = time.perf_counter() - entered
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    after = resource.getrusage(resource.RUSAGE_SELF)
    switches = after.ru_nvcsw + after.ru_nivcsw - before.ru_nvcsw - before.ru_nivcsw
    faults = after.ru_minflt - before.ru_minflt
    return Sample(wall, cpu, inside, faults, switches, compiling.counts.graphs)


def check(
    variant: Variant, bench: Bench, folder: Path, reference: torch.Tensor | None
) -> tuple[Checked, torch.Tensor]:
    """Compile, count what was compiled, then run all steps and look at rows, outputs and memory."""
    # A growing cache compiles anew for more steps than the first.
    few = FEW_STEPS if bench.workload.kind in ("prefill", "decode-static") else None
    with counting() as first, variant.block(folder):
        bench.ready(few)(variant.run)
    with counting() as later:
        run = bench.ready()
        gc.collect()
        with peak_memory() as peak, variant.block(folder) as rows:
            output = run(variant.run)
    counts = first.counts
    counts.recompiles += later.counts.graphs
    found = Checked(
        counts,
        rows(),
        variant.expected * bench.workload.rows,
        None if reference is None else bool(torch.equal(output, reference)),
        None if reference is None else _difference(output, reference),
        peak.mb,
        peak.device_mb,
    )
    return found, output.detach().clone()


def rounds(
    variants: Sequence[Variant],
    bench: Bench,
    folder: Path,
    num_rounds: int,
    progress: Callable[[], None],
    is_over: Callable[[], bool],
) -> dict[str, list[Sample]]:
    """Samples of each variant; sample ``k`` of all variants comes from round ``k``.

    Args:
        is_over: asked after each round whether it was the last.
    """
    samples: dict[str, list[Sample]] = {variant.name: [] for variant in variants}
    for number, variant in enumerate(in_turns(variants, num_rounds)):
        if number and not number % len(variants) and is_over():
            break
        samples[variant.name].append(clock(variant, bench, folder))
        progress()
    return samples


def in_turns(variants: Sequence[Any], num_rounds: int) -> Iterator[Any]:
    """Each variant once a round, in turning order; garbage is collected between rounds alone."""
    gc.collect()
    gc.disable()
    try:
        for number in range(num_rounds):
            turn = number % len(variants)
            yield from (*variants[turn:], *variants[:turn])
            gc.collect()
    finally:
        gc.enable()


def ratios(samples: dict[str, list[Sample]], name: str, what: str) -> Floats:
    """The variant's figure by that of the baseline in the same round."""
    mine = np.array([getattr(sample, what) for sample in samples[name]])
    base = np.array([getattr(sample, what) for sample in samples[BASE]])
    found: Floats = mine / base
    return found


def interval(values: Floats, seed: int = 0) -> tuple[float, float, float]:
    """Median and its 95 % bootstrap interval (percentile method, 2000 resamples of the rounds)."""
    generator = np.random.default_rng(seed)
    picks = generator.integers(0, len(values), (RESAMPLES, len(values)))
    medians = np.median(values[picks], axis=1)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(medians, [tail, 100 - tail])
    return float(np.median(values)), float(low), float(high)


def figures(samples: dict[str, list[Sample]], name: str, bench: Bench) -> dict[str, Any]:
    """A variant's row: ratios with intervals, seconds, tokens a second."""
    mine = samples[name]
    seconds = float(np.median([sample.wall for sample in mine]))
    found: dict[str, Any] = {}
    for key, what in (("time", "wall"), ("cpu_time", "cpu"), ("time_inside", "inside")):
        median, low, high = interval(ratios(samples, name, what))
        found[f"{key}_ratio"] = median
        found[f"{key}_ratio_interval"] = [low, high]
    found["seconds"] = seconds
    found["cpu_seconds"] = float(np.median([sample.cpu for sample in mine]))
    found["tokens_per_s"] = bench.workload.tokens / seconds
    found["minor_faults"] = float(np.median([sample.minor_faults for sample in mine]))
    found["context_switches"] = float(np.median([sample.switches for sample in mine]))
    return found


def described(checked: Checked) -> dict[str, Any]:
    row = asdict(checked)
    row.update(row.pop("counts"))
    return row


class peak_memory:
    """How far the resident set (on CUDA: the allocator's bytes too) rises above where it began.

    What the heap kept of earlier blocks goes back to the kernel first, or the block would find its memory there.
    """

    mb: float | None = None
    device_mb: float | None = None

    def __enter__(self) -> peak_memory:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self._device = torch.cuda.memory_allocated()
        return_freed_memory()
        # "5" resets the peak (proc(5)); where the kernel refuses, there is no figure.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
            self._before = resident("VmRSS")
            self.mb = 0.0
        return self

    def __exit__(self, *exception: object) -> None:
        if self.mb is not None:
            self.mb = (resident("VmHWM") - self._before) / 1e6
        if torch.cuda.is_available():
            self.device_mb = (torch.cuda.max_memory_allocated() - self._device) / 1e6


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """Keep this thread, and the threads it starts, on one core: none is idle then."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _difference(output: torch.Tensor, reference: torch.Tensor) -> float:
    if output.shape != reference.shape:
        return float("inf")
    return float((output.double() - reference.double()).abs().max())
