"""What a capture would record, and what it would take, before anything is recorded."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from .capture.layout import host_bytes
from .config import BYTES_PER_GB, HookGranularity, InstrumentationConfig
from .graph.attach import is_ours
from .graph.counting import integer_inputs, positional_names
from .graph.rewrite import Sampling
from .graph.roles import Role
from .graph.sites import Site
from .graph.trace import GraphBreak, SeenValue, Traced, trace_call
from .graph.twin import make_twin, written_by
from .stream.records import RecordMeta
from .stream.writer import StreamWriter

SAMPLE_BYTES = 16 << 20
"""Of the call's values so many bytes are compressed to see what compression gives: a few hundredths of a second."""
_LEAST_SAMPLE_BYTES = 256 << 10
"""Of less, headers and tables of a page are too large a share."""
_TYPICAL_RATIOS = {
    ("zstd", "bfloat16"): 1.49,
    ("zstd", "float32"): 1.20,
    ("lz4", "bfloat16"): 1.33,
    ("lz4", "float32"): 1.14,
}
"""Attention and MLP outputs of SmolLM2-135M, prefill (benchmarks/results)."""


@dataclass(frozen=True, slots=True)
class SitePlan:
    """What one site gives in a forward call like the one that was traced."""

    name: str
    role: Role
    calls: int
    """Records a step; 0: the module did not run."""
    shape: tuple[int, ...]
    """Of the module's output in its first call."""
    symbolic_shape: tuple[str, ...]
    """The same with names for the sizes that may change from call to call."""
    dtype: str
    bytes_per_step: int
    """What is recorded, sampling included."""
    eager: bool
    """Computed outside any graph, and captured as Python."""

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class Compression:
    """What the configured codec is likely to give."""

    codec: str
    ratio: float
    """Raw bytes for each stored byte."""
    gb_per_cpu_second: float | None
    """Raw GB (1e9) that one core compressed in a second; None if it was not measured."""
    source: str
    """Where the figures come from."""

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True)
class Plan:
    """What a capture of such forward calls would record; ``print`` shows it as a table."""

    model: str
    sites: tuple[SitePlan, ...]
    num_tokens: int
    """Tokens of the traced call, of encoder and decoder together."""
    bytes_per_step: int
    """What a capture records of such a call: the ``raw_bytes`` of its report."""
    bytes_per_token: float
    input_bytes_per_step: int
    """The integer inputs, which are recorded beside the sites."""
    num_graphs: int
    graph_breaks: tuple[GraphBreak, ...]
    symbols: Mapping[str, str]
    """Name in a symbolic shape -> where it comes from."""
    largest_run_bytes: int
    """The most that one run of a graph captures at once; has to fit into ``max_memory_gb``."""
    compression: Compression
    target_throughput_gbps: float
    max_memory_gb: float

    @property
    def tokens_per_second_at_target(self) -> float:
        """The model's speed up to which ``target_throughput_gbps`` is enough."""
        return self.target_throughput_gbps * BYTES_PER_GB / max(self.bytes_per_token, 1e-9)

    @property
    def disk_mb_per_second_at_target(self) -> float:
        """What the disk has to take at the target rate, MB (1e6) a second."""
        return self.target_throughput_gbps * 1e3 / self.compression.ratio

    @property
    def cores_at_target(self) -> float | None:
        """Cores that compression keeps busy at the target rate; None if its speed was not measured."""
        speed = self.compression.gb_per_cpu_second
        return self.target_throughput_gbps / speed if speed else None

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain JSON values."""
        return {
            "model": self.model,
            "sites": [site.to_dict() for site in self.sites],
            "num_tokens": self.num_tokens,
            "bytes_per_step": self.bytes_per_step,
            "bytes_per_token": self.bytes_per_token,
            "input_bytes_per_step": self.input_bytes_per_step,
            "num_graphs": self.num_graphs,
            "graph_breaks": [found.to_dict() for found in self.graph_breaks],
            "symbols": dict(self.symbols),
            "largest_run_bytes": self.largest_run_bytes,
            "max_memory_gb": self.max_memory_gb,
            "compression": self.compression.to_dict(),
            "target_throughput_gbps": self.target_throughput_gbps,
            "tokens_per_second_at_target": self.tokens_per_second_at_target,
            "disk_mb_per_second_at_target": self.disk_mb_per_second_at_target,
            "cores_at_target": self.cores_at_target,
        }

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def plan_model(
    model: nn.Module,
    sites: Sequence[Site],
    config: InstrumentationConfig,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    dynamic: bool | None = None,
) -> Plan:
    """Trace one forward call of ``model``'s twin, and say what a capture of such calls would record."""
    sampled = config.granularity is HookGranularity.SAMPLED_SLICES
    hook_config = config.hook_config
    sampling = Sampling(hook_config.sampling_rate, hook_config.seed) if sampled else None
    sample = _Sample(max(_LEAST_SAMPLE_BYTES, SAMPLE_BYTES // len(sites)))
    twin = make_twin(model, is_ours, written_by(model, is_ours, args, kwargs)).module
    traced = trace_call(twin, sites, sampling, args, kwargs, dynamic=dynamic, keep=sample.keep)
    inputs = integer_inputs(positional_names(model), args, kwargs)
    by_site: dict[Site, list[SeenValue]] = {site: [] for site in sites}
    for value in traced.values:
        by_site[value.site].append(value)
    bytes_per_step = sum(value.num_bytes for value in traced.values)
    num_tokens = _num_tokens(positional_names(model), args, kwargs, traced)
    return Plan(
        model=type(model).__name__,
        sites=tuple(_site_plan(site, values) for site, values in by_site.items()),
        num_tokens=num_tokens,
        bytes_per_step=bytes_per_step,
        bytes_per_token=bytes_per_step / max(1, num_tokens),
        input_bytes_per_step=sum(value.nbytes for value in inputs.values()),
        num_graphs=traced.num_graphs,
        graph_breaks=traced.breaks,
        symbols=traced.symbols,
        largest_run_bytes=traced.largest_run_bytes,
        compression=sample.compress(config),
        target_throughput_gbps=config.target_throughput_gbps,
        max_memory_gb=config.max_memory_gb,
    )


def _site_plan(site: Site, values: Sequence[SeenValue]) -> SitePlan:
    first = values[0] if values else None
    return SitePlan(
        name=site.name,
        role=site.role,
        calls=len(values),
        shape=first.shape if first else (),
        symbolic_shape=first.symbolic if first else (),
        dtype=str(first.dtype).removeprefix("torch.") if first else "",
        bytes_per_step=sum(value.num_bytes for value in values),
        eager=any(value.eager for value in values),
    )


def _num_tokens(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any], traced: Traced) -> int:
    named = {**dict(zip(names, args, strict=False)), **kwargs}
    count = 0
    for ids, embeds in (("input_ids", "inputs_embeds"), ("decoder_input_ids", "decoder_inputs_embeds")):
        if isinstance(value := named.get(ids), torch.Tensor):
            count += value.numel()
        elif isinstance(value := named.get(embeds), torch.Tensor):
            count += value[..., 0].numel()
    if count == 0 and traced.values:
        # No token ids: the rows of the first site's value (images: patches).
        shape = traced.values[0].shape
        count = int(np.prod(shape[:-1])) if len(shape) > 1 else 1
    return count


class _Sample:
    """Copies of some of a call's values, to compress."""

    def __init__(self, bytes_per_value: int) -> None:
        self._bytes_per_value = bytes_per_value
        self._values: list[torch.Tensor] = []

    def keep(self, site: Site, value: torch.Tensor) -> None:
        rows = value.detach().reshape(-1, value.shape[-1] if value.dim() > 1 else 1)
        held = sum(kept.nbytes for kept in self._values)
        room = min(self._bytes_per_value, SAMPLE_BYTES - held)
        row_bytes = rows.shape[-1] * rows.element_size()
        if rows.numel() and room >= row_bytes:
            self._values.append(rows[: room // row_bytes].to("cpu", copy=True))

    def compress(self, config: InstrumentationConfig) -> Compression:
        codec = config.compression_algorithm
        raw = sum(value.nbytes for value in self._values)
        dtype = str(self._values[0].dtype).removeprefix("torch.") if self._values else ""
        if raw < _LEAST_SAMPLE_BYTES:
            ratio = _TYPICAL_RATIOS.get((codec, dtype), 1.0)
            source = f"typical of {dtype} values; this call has too few to measure" if dtype else "no values"
            return Compression(codec, 1.0 if codec == "none" else ratio, None, source)
        writer = StreamWriter(
            None, metadata={}, codec=codec, num_workers=1, max_relative_error=config.max_relative_error
        )
        before_bytes, before_s = writer.stored_bytes, time.process_time()
        for step, value in enumerate(self._values):
            dtype = str(value.dtype).removeprefix("torch.")
            writer.put(
                RecordMeta(writer.add_site(f"{step}", "other"), 0, 0, dtype, tuple(value.shape), None),
                host_bytes(value),
            )
        writer.close({})
        seconds = time.process_time() - before_s
        return Compression(
            codec,
            raw / (writer.stored_bytes - before_bytes),
            raw / seconds / BYTES_PER_GB if seconds > 0 else None,
            f"measured on {raw / 1e6:.1f} MB of this call's values",
        )


def _lines(plan: Plan) -> list[str]:
    lines = [f"{plan.model}: {len(plan.sites)} sites, {_count(plan.num_graphs, 'graph')}", ""]
    lines += _table(plan)
    silent = [site.name for site in plan.sites if site.calls == 0]
    if silent:
        lines.append(f"not run in this call: {', '.join(silent[:4])}{', ...' if len(silent) > 4 else ''}")
    lines += [f"{name} = {where}" for name, where in plan.symbols.items() if _is_used(name, plan)]
    lines.append("")
    lines.append(
        f"a step: {_bytes(plan.bytes_per_step)} of {plan.num_tokens} tokens, {plan.bytes_per_token:.0f} bytes a "
        f"token; inputs {_bytes(plan.input_bytes_per_step)} more"
    )
    compression = plan.compression
    lines.append(f"compression: {compression.codec}, {compression.ratio:.2f}x smaller ({compression.source})")
    lines.append(
        f"target {plan.target_throughput_gbps:g} GB/s: enough for {plan.tokens_per_second_at_target:,.0f} tokens/s; "
        f"the disk takes {plan.disk_mb_per_second_at_target:.0f} MB/s"
        + (f", compression keeps {plan.cores_at_target:.1f} cores busy" if plan.cores_at_target else "")
    )
    share = plan.largest_run_bytes / (plan.max_memory_gb * BYTES_PER_GB)
    lines.append(
        f"buffer: one graph run captures {_bytes(plan.largest_run_bytes)}, {share:.1%} of max_memory_gb="
        f"{plan.max_memory_gb:g}" + (": too much, raise it" if share > 1 else "")
    )
    for found in plan.graph_breaks:
        times = f" ({found.count} times)" if found.count > 1 else ""
        lines.append(f"graph break at {found.location or 'unknown place'}{times}: {found.reason}")
    return lines


def _is_used(symbol: str, plan: Plan) -> bool:
    return any(symbol in size for site in plan.sites for size in site.symbolic_shape)


def _table(plan: Plan) -> list[str]:
    """One row for all sites that differ in their layer's number alone."""
    groups: dict[tuple[Any, ...], list[SitePlan]] = {}
    for site in plan.sites:
        key = (
            re.sub(r"\d+", "*", site.name),
            site.role,
            site.symbolic_shape,
            site.dtype,
            site.calls,
            site.eager,
        )
        groups.setdefault(key, []).append(site)
    rows = [("site", "count", "role", "shape", "dtype", "calls", "bytes a token", "bytes a step")]
    for (pattern, role, shape, dtype, calls, eager), sites in groups.items():
        num_bytes = sum(site.bytes_per_step for site in sites)
        rows.append(
            (
                (sites[0].name if len(sites) == 1 else pattern) + (" (no graph)" if eager else ""),
                str(len(sites)),
                role,
                f"({', '.join(shape)})" if calls else "-",
                dtype or "-",
                str(calls),
                f"{num_bytes / max(1, plan.num_tokens):.0f}",
                _bytes(num_bytes),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    right = {1, 5, 6, 7}
    return [
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"
