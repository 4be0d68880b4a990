"""A model traced and run once for what its graphs are: their sites, symbolic shapes, breaks and the bytes they give."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
import torch._dynamo
from torch import fx, nn
from torch._dynamo.utils import counters, get_compilation_metrics
from torch.fx.experimental import _config as shape_config

from ..sampling import num_samples
from .attach import Attachment, isolation
from .backend import CaptureBackend, CapturedGraph, SiteFinder
from .counting import positional_names
from .rewrite import Sampling
from .sink import Onlooker
from .sites import Site
from .twin import copied, same_random_state, undisturbed

# Inputs of these names have dimensions that go by names of their own in the symbolic shapes.
_TOKEN_INPUTS = {
    "input_ids": ("batch", "tokens"),
    "inputs_embeds": ("batch", "tokens"),
    "decoder_input_ids": ("batch", "decoder_tokens"),
    "decoder_inputs_embeds": ("batch", "decoder_tokens"),
}


@dataclass(frozen=True, slots=True)
class GraphBreak:
    """A place where tracing stopped and Python ran: one graph became two, or a frame none."""

    reason: str
    location: str | None
    """``file:line`` of the user's code, where Dynamo says it."""
    count: int

    def to_dict(self) -> dict[str, Any]:
        return {"reason": self.reason, "location": self.location, "count": self.count}


@dataclass(frozen=True, slots=True)
class SeenValue:
    """One value that a capture would have recorded."""

    site: Site
    shape: tuple[int, ...]
    """Of the module's whole output."""
    symbolic: tuple[str, ...]
    """The same with names for what changes from call to call."""
    dtype: torch.dtype
    num_bytes: int
    """What is recorded of it: everything, or its sampled elements."""
    eager: bool
    """Computed outside any graph."""


@dataclass(frozen=True, slots=True)
class Traced:
    """What one forward call showed."""

    values: tuple[SeenValue, ...]
    num_graphs: int
    breaks: tuple[GraphBreak, ...]
    largest_run_bytes: int
    """The most that one run of a graph captures at once."""
    symbols: Mapping[str, str]
    """Name in a symbolic shape -> where it comes from and its size here."""


class TraceSink(Onlooker):
    """Takes the values of one traced call: counts them and shows each to ``keep``, holds on to none."""

    def __init__(self, sampling: Sampling | None, keep: Callable[[Site, torch.Tensor], None]) -> None:
        self.values: list[SeenValue] = []
        self.largest_run_bytes = 0
        self.symbolic: Sequence[tuple[str, ...]] = ()
        """Of the graph that runs now, one a value."""
        self._sampling = sampling
        self._keep = keep
        self._thread = threading.get_ident()

    def reserve(self, sites: Sequence[Site], num_bytes: int, **of_a_device: Any) -> None:
        self.largest_run_bytes = max(self.largest_run_bytes, num_bytes)

    def deliver(
        self,
        ticket: Any,
        sites: Sequence[Site],
        values: Sequence[torch.Tensor],
        full_shapes: Sequence[tuple[int, ...]] | None,
    ) -> None:
        for index, (site, value) in enumerate(zip(sites, values, strict=True)):
            shape = full_shapes[index] if full_shapes is not None else tuple(value.shape)
            symbolic = self.symbolic[index] if index < len(self.symbolic) else tuple(map(str, shape))
            self.values.append(SeenValue(site, shape, symbolic, value.dtype, value.nbytes, eager=False))
            self._keep(site, value)

    def let_go(self) -> None:
        """Drop ``keep`` and what it kept: Dynamo holds the backend, and so this, until it is reset."""
        self._keep = lambda site, value: None

    def record_eager(self, site: Site, value: torch.Tensor) -> None:
        shape = tuple(value.shape)
        count = value.numel()
        if self._sampling is not None:
            count = num_samples(count, self._sampling.rate)
        num_bytes = count * value.element_size()
        self.reserve((site,), num_bytes)
        self.values.append(SeenValue(site, shape, tuple(map(str, shape)), value.dtype, num_bytes, eager=True))
        self._keep(site, value.detach().flatten()[:count])


class TracingBackend(CaptureBackend):
    """Captures as the real backend does, runs the graphs as they are, and notes what Dynamo said of them."""

    def __init__(
        self,
        attachment: Attachment,
        sampling: Sampling | None,
        sink: TraceSink,
        names: Sequence[str],
    ) -> None:
        super().__init__(attachment.marker, attachment.finder, sampling, _run_as_it_is)
        self._sites: SiteFinder = attachment.finder
        self._sink = sink
        self._names = names
        self.num_graphs = 0
        self.locations: dict[str, str] = {}
        """Reason of a graph break -> where."""
        self.symbols: dict[str, str] = {}

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
        self.num_graphs += 1
        stopped = getattr(gm, "compile_subgraph_reason", None)
        if stopped is not None and stopped.graph_break and stopped.user_stack:
            frame = stopped.user_stack[-1]
            self.locations.setdefault(stopped.reason, f"{frame.filename}:{frame.lineno}")
        compiled = super().__call__(gm, example_inputs, **kwargs)
        if not isinstance(compiled, CapturedGraph):
            return compiled
        labels = self._labels(gm)
        shapes = [
            (planned.token, tuple(_spell(size, labels) for size in planned.value.shape))
            for planned in compiled.planned
        ]

        def run(*args: Any) -> Any:
            chosen = [shape for token, shape in shapes if self._sites.chosen(args[token]) is not None]
            self._sink.symbolic = chosen
            return compiled(*args)

        return run

    def _labels(self, gm: fx.GraphModule) -> dict[sympy.Symbol, sympy.Symbol]:
        """Readable names for the symbols of one graph, by the inputs that they are sizes of."""
        labels: dict[sympy.Symbol, sympy.Symbol] = {}
        for node in gm.graph.nodes:
            value = node.meta.get("example_value") if node.op == "placeholder" else None
            source = getattr(node, "_dynamo_source", None)
            if not isinstance(value, torch.Tensor) or source is None:
                continue
            name = self._argument(source.name if isinstance(source.name, str) else source.name())
            for dim, size in enumerate(value.shape):
                if not isinstance(size, torch.SymInt) or not size.node.expr.is_Symbol:
                    continue
                known = _TOKEN_INPUTS.get(name, ())
                label = known[dim] if dim < len(known) else f"{name}.{dim}"
                if size.node.expr not in labels:
                    labels[size.node.expr] = sympy.Symbol(label, integer=True)
                    self.symbols.setdefault(label, f"{name}.shape[{dim}] ({size.node.hint} here)")
        return labels

    def _argument(self, source: str) -> str:
        position = re.fullmatch(r"L\['args'\]\[(\d+)\]", source)
        if position is not None and int(position[1]) < len(self._names):
            return self._names[int(position[1])]
        quoted = re.findall(r"\['(\w+)'\]", source)
        return quoted[-1] if quoted else source


def _run_as_it_is(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    return gm.forward


def _spell(size: int | torch.SymInt, labels: Mapping[sympy.Symbol, sympy.Symbol]) -> str:
    return str(size.node.expr.xreplace(labels)) if isinstance(size, torch.SymInt) else str(size)


def trace_call(
    twin: nn.Module,
    sites: Sequence[Site],
    sampling: Sampling | None,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    dynamic: bool | None,
    keep: Callable[[Site, torch.Tensor], None],
) -> Traced:
    """Run one forward call of ``twin``, graph by graph as Dynamo traces it, and say what a capture would record.

    Args:
        dynamic: as ``torch.compile`` takes it; under None the sizes of the inputs' batch and token dimensions are
            traced as symbols, as they would be once a second length is seen.
        keep: shown every value that would be recorded; may copy some of it.
    """
    attachment = Attachment(twin, sites)
    sink = TraceSink(sampling, keep)
    backend = TracingBackend(attachment, sampling, sink, positional_names(twin))
    args, kwargs = copied(tuple(args)), copied(dict(kwargs))
    if dynamic is None:
        _mark_dynamic([*args, *kwargs.values()])
    attachment.open(sink)
    try:
        with undisturbed(), same_random_state(), shape_config.patch(use_duck_shape=False):  # type: ignore[attr-defined]
            counters["graph_break"].clear()
            earlier = get_compilation_metrics()
            run = torch.compile(twin._call_impl, backend=backend, dynamic=dynamic, **isolation())
            run(*args, **kwargs)
            breaks = _breaks(backend.locations, earlier)
    finally:
        attachment.close()
        attachment.detach()
        sink.let_go()
    return Traced(
        tuple(sink.values), backend.num_graphs, breaks, sink.largest_run_bytes, dict(backend.symbols)
    )


def _mark_dynamic(arguments: Sequence[Any]) -> None:
    for value in arguments:
        if not isinstance(value, torch.Tensor):
            continue
        # (batch, tokens) of ids and masks, (batch, tokens, hidden) of embeddings; of images only the batch.
        dims = 2 if value.dim() in (2, 3) else 1
        for dim in range(min(dims, value.dim())):
            if value.shape[dim] > 1:
                torch._dynamo.maybe_mark_dynamic(value, dim)


def _breaks(locations: Mapping[str, str], earlier: Sequence[Any]) -> tuple[GraphBreak, ...]:
    """What Dynamo counted since the ``earlier`` compilations: breaks with their reasons, and frames it gave up."""
    found = [
        GraphBreak(_first_lines(reason), locations.get(reason), count)
        for reason, count in counters["graph_break"].items()
    ]
    known = set(map(id, earlier))
    for metrics in get_compilation_metrics():
        if metrics.fail_reason and id(metrics) not in known:
            where = f"{metrics.co_filename}:{metrics.fail_user_frame_lineno or metrics.co_firstlineno}"
            found.append(GraphBreak(_first_lines(metrics.fail_reason), where, 1))
    return tuple(found)


def _first_lines(reason: str) -> str:
    """What happened and why, without Dynamo's hints and links."""
    kept = []
    for line in reason.splitlines():
        if line.strip().startswith(("Hint:", "Developer debug context:", "For more details")):
            break
        kept.append(line.strip().removeprefix("Explanation: "))
    return " ".join(line for line in kept if line)
