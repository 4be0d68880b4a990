"""What Dynamo and Inductor did: graphs, breaks, recompiles, kernels."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
import torch._dynamo
import torch._inductor.metrics
from torch._dynamo.utils import counters, get_compilation_metrics, set_compilation_metrics_limit


@dataclass
class CompileCounts:
    graphs: int = 0
    breaks: int = 0
    """Graph breaks that Dynamo reports, by place."""
    recompiles: int = 0
    """Frames compiled again since a guard failed, in the first run; graphs compiled in any later run."""
    kernels: int = 0
    """Kernels that Inductor generated for these graphs."""
    cudagraph_skips: int = 0
    """Graphs that were to run as CUDA graphs and could not."""


@dataclass
class _Counting:
    counts: CompileCounts


@contextlib.contextmanager
def counting() -> Iterator[_Counting]:
    """What is compiled inside the block; ``.counts`` is filled when it is left."""
    held = _Counting(CompileCounts())
    before = _now()
    try:
        yield held
    finally:
        after = _now()
        held.counts = CompileCounts(
            *(getattr(after, f.name) - getattr(before, f.name) for f in fields(CompileCounts))
        )


def _now() -> CompileCounts:
    # Dynamo keeps the last 64 compilations unless told otherwise; a frame's first one has no recompile reason.
    set_compilation_metrics_limit(1 << 20)
    return CompileCounts(
        graphs=counters["stats"]["unique_graphs"],
        breaks=sum(counters["graph_break"].values()),
        recompiles=sum(bool(metrics.recompile_reason) for metrics in get_compilation_metrics()),
        kernels=torch._inductor.metrics.generated_kernel_count,
        cudagraph_skips=counters["inductor"]["cudagraph_skips"],
    )
