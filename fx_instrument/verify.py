"""What capturing changes: outputs, graphs and sites of one forward call, with and without, as a certificate."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from .config import HookGranularity, InstrumentationConfig
from .graph.attach import Attachment, is_ours, isolation
from .graph.backend import CaptureBackend, InnerBackend, needs_strictness, resolve_inner
from .graph.compare import difference
from .graph.guards import split_options
from .graph.nested import copy_graph
from .graph.reference import ComparingSink, SiteDifference, eager_values, largest_difference, same_bits
from .graph.rewrite import Sampling
from .graph.sites import Site
from .graph.twin import Twin, copied, make_twin, same_random_state, undisturbed, written_by


@dataclass(frozen=True)
class Certificate:
    """What was found when the same call ran eagerly, compiled, idle and capturing; ``print`` shows it."""

    ok: bool
    """Everything below is as it should be: ``problems`` is empty."""
    problems: tuple[str, ...]
    model: str
    backend: str
    strict_numerics: bool
    num_graphs_apart: int
    """Graphs whose captures would have changed the compiled kernels: under ``strict_numerics`` a graph of their own
    computes them."""
    outputs_bit_equal: bool
    """Capturing against the same model compiled without this package."""
    max_output_difference: float
    idle_bit_equal: bool
    """Instrumented and not capturing against the same."""
    sites: tuple[SiteDifference, ...]
    num_graphs: Mapping[str, int]
    """Graphs that the call ran in each state: "compiled", "idle", "capturing"."""
    num_recompiles: Mapping[str, int]
    """Graphs compiled again when the same call came again, switches between the states included."""
    graphs_equal: bool
    """Each rewritten graph without its captures is the original one, node by node."""

    def to_dict(self) -> dict[str, Any]:
        """The certificate as plain JSON values; a stream's metadata holds it under "certificate"."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["problems"] = list(self.problems)
        values["num_graphs"], values["num_recompiles"] = dict(self.num_graphs), dict(self.num_recompiles)
        values["sites"] = [{name: getattr(site, name) for name in site.__slots__} for site in self.sites]
        for found in (values, *values["sites"]):
            for name, value in found.items():
                if isinstance(value, float) and not math.isfinite(value):
                    found[name] = str(value)
        return values

    def __str__(self) -> str:
        equal = sum(site.bit_equal for site in self.sites)
        worst = max(self.sites, key=lambda site: site.relative_difference, default=None)
        lines = [
            f"{self.model}, {self.backend}: {'certified' if self.ok else 'NOT certified'}",
            f"outputs while capturing: {_verdict(self.outputs_bit_equal, self.max_output_difference)}",
            f"outputs while idle: {'bit-equal' if self.idle_bit_equal else 'differ'}",
            *([f"strict numerics: {self._strictly()}"] if self.strict_numerics else []),
            f"graphs: {_counts(self.num_graphs)}; compiled again: {_counts(self.num_recompiles)}",
            f"rewritten graphs without captures: {'the original ones' if self.graphs_equal else 'differ'}",
            f"sites against eager hooks: {equal} of {len(self.sites)} bit-equal"
            + (
                f", at most {worst.relative_difference:.2g} of the largest element off ({worst.name})"
                if worst is not None and not worst.bit_equal
                else ""
            ),
        ]
        return "\n".join([*lines, *(f"problem: {problem}" for problem in self.problems)])

    def _strictly(self) -> str:
        if not self.num_graphs_apart:
            return "captures leave every kernel as it is, nothing runs twice"
        return (
            f"captures of {self.num_graphs_apart} of {self.num_graphs['capturing']} graphs would change kernels: "
            f"computed by a graph of their own"
        )


def verify_model(
    model: nn.Module,
    sites: Sequence[Site],
    config: InstrumentationConfig,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    inner: InnerBackend,
    options: Mapping[str, Any],
) -> Certificate:
    """Run one forward call eagerly, compiled, idle and capturing, each on a twin of ``model``, and compare.

    Args:
        inner: the backend that compiles.
        options: ``mode``, ``options``, ``dynamic`` and ``fullgraph`` of ``torch.compile``.
    """
    outer = {name: options[name] for name in ("dynamic", "fullgraph") if options.get(name) is not None}
    guard_filter_fn, inner_options = split_options(options.get("options"))
    bound = (options.get("mode"), inner_options, options.get("dynamic"))
    filtered: dict[str, Any] = {"options": {"guard_filter_fn": guard_filter_fn}} if guard_filter_fn else {}
    strict = config.strict_numerics and needs_strictness(inner)

    written = written_by(model, is_ours, args, kwargs)

    def called(call: Callable[..., Any], twin: Twin) -> Callable[[], list[torch.Tensor]]:
        return lambda: _run(call, twin, args, kwargs)

    twin = make_twin(model, is_ours, written)
    with eager_values(twin.module, sites) as expected:
        _run(twin.module._call_impl, twin, args, kwargs)

    plain = _Recorder()
    with undisturbed():
        twin = make_twin(model, is_ours, written)
        backend: Any = plain.outer(plain.inner(resolve_inner(inner, *bound)))
        call = called(
            torch.compile(twin.module._call_impl, backend=backend, **outer, **isolation(), **filtered), twin
        )
        outputs = call()
        plain_graphs, num_plain = plain.take_run(), len(plain.graphs)
        call()

    captured = _Recorder()
    sink = ComparingSink(expected, _sampling(config))
    with undisturbed():
        twin = make_twin(model, is_ours, written)
        attachment = Attachment(twin.module, sites)
        backend = CaptureBackend(
            attachment.marker,
            attachment.finder,
            _sampling(config),
            captured.inner(resolve_inner(inner, *bound)),
            strict=strict,
        )
        backend = captured.outer(backend)
        idle, capturing = (
            called(attachment.compiled_variant(backend, guard_filter_fn=guard_filter_fn, **outer), twin)
            for _ in range(2)
        )
        idle_outputs = idle()
        idle_graphs = captured.take_run()
        attachment.open(sink)
        captured_outputs = capturing()
        capturing_graphs = captured.take_run()
        counts = [len(captured.graphs)]
        sink.paused = True
        capturing()
        counts.append(len(captured.graphs))
        attachment.close()
        idle()
        counts.append(len(captured.graphs))
        attachment.detach()
    again_capturing, again_idle = (b - a for a, b in itertools.pairwise(counts))
    found = _graph_difference(plain_graphs, idle_graphs, "idle")
    found = found or _graph_difference(plain_graphs, capturing_graphs, "capturing")
    differences = [largest_difference(a, b) for a, b in zip(outputs, captured_outputs, strict=True)]
    certificate = Certificate(
        ok=True,
        problems=(),
        model=type(model).__name__,
        backend=inner if isinstance(inner, str) else getattr(inner, "__name__", type(inner).__name__),
        strict_numerics=config.strict_numerics,
        # Without captures, with them, and the captures alone.
        num_graphs_apart=sum(len(graphs) == 3 for graphs in capturing_graphs),
        outputs_bit_equal=all(map(same_bits, outputs, captured_outputs)),
        max_output_difference=max(differences, default=0.0),
        idle_bit_equal=all(map(same_bits, outputs, idle_outputs)),
        sites=sink.differences(sites),
        num_graphs={
            "compiled": len(plain_graphs),
            "idle": len(idle_graphs),
            "capturing": len(capturing_graphs),
        },
        num_recompiles={
            "compiled": len(plain.graphs) - num_plain,
            "idle": again_idle,
            "capturing": again_capturing,
        },
        graphs_equal=found is None,
    )
    problems = tuple(_problems(certificate, found, sink))
    return replace(certificate, ok=not problems, problems=problems)


def _sampling(config: InstrumentationConfig) -> Sampling | None:
    if config.granularity is not HookGranularity.SAMPLED_SLICES:
        return None
    return Sampling(config.hook_config.sampling_rate, config.hook_config.seed)


def _run(
    call: Callable[..., Any], twin: Twin, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[torch.Tensor]:
    """The tensors that a call returns, copied; random states and what the twin holds stay as they were."""
    with same_random_state(), twin.as_before():
        result = call(*copied(tuple(args)), **copied(dict(kwargs)))
        return [value.detach().clone() for value in _tensors(result)]


def _tensors(output: object) -> Iterator[torch.Tensor]:
    """The tensors of an output, through tuples, lists, dicts and dataclasses; caches in it are left out."""
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _tensors(value)
    elif is_dataclass(output) and not isinstance(output, type):
        for field in fields(output):
            yield from _tensors(getattr(output, field.name))


class _Recorder:
    """Keeps the graphs that a backend is given: for each graph of Dynamo's, those that were compiled for it.

    Which of them a call runs is noted too: behind graph breaks frames without marks are shared by both variants where
    torch has no ``isolate_recompiles``, so that a call may run what another one compiled.
    """

    def __init__(self) -> None:
        self.graphs: list[list[fx.GraphModule]] = []
        self._run: dict[int, list[fx.GraphModule]] = {}

    def take_run(self) -> list[list[fx.GraphModule]]:
        """The graphs that ran since this was asked last, each once, in the order in which they ran first."""
        run, self._run = list(self._run.values()), {}
        return run

    def outer(self, backend: Callable[..., Any]) -> Callable[..., Any]:
        def call(gm: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Any:
            graphs: list[fx.GraphModule] = []
            self.graphs.append(graphs)
            try:
                compiled = backend(gm, inputs, **kwargs)
            except BaseException:
                # Dynamo traces again, where Inductor tells it to read a number as a constant for example.
                self.graphs.pop()
                raise

            def run(*args: Any) -> Any:
                self._run.setdefault(id(graphs), graphs)
                return compiled(*args)

            return run

        return call

    def inner(self, backend: Callable[..., Any]) -> Callable[..., Any]:
        def call(gm: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Any:
            # Copied, as compilers change graphs in place.
            self.graphs[-1].append(fx.GraphModule(gm, copy_graph(gm.graph)[0]))
            return backend(gm, inputs, **kwargs)

        return call


def _problems(certificate: Certificate, found: str | None, sink: ComparingSink) -> Iterator[str]:
    if not certificate.outputs_bit_equal:
        way_out = "" if certificate.strict_numerics else "; strict_numerics=True keeps them"
        yield f"capturing changes the outputs by up to {certificate.max_output_difference:.3g}{way_out}"
    if not certificate.idle_bit_equal:
        yield "the outputs differ while nothing is captured"
    if len(set(certificate.num_graphs.values())) != 1:
        yield f"the number of graphs differs: {_counts(certificate.num_graphs)}"
    if max(certificate.num_recompiles.values()) > certificate.num_recompiles["compiled"]:
        yield f"the same call compiles again: {_counts(certificate.num_recompiles)}"
    if found is not None:
        yield f"a rewritten graph without its captures is not the original one: {found}"
    if sink.missing:
        yield f"not captured, though forward hooks saw them: {_some(sink.missing)}"
    if sink.unexpected:
        yield f"captured, though forward hooks did not see them: {_some(sink.unexpected)}"
    if far := list(sink.too_far()):
        yield f"captured values far from what eager forward hooks see: {_some(far)}"


def _graph_difference(
    plain: Sequence[Sequence[fx.GraphModule]], rewritten: Sequence[Sequence[fx.GraphModule]], state: str
) -> str | None:
    if len(plain) != len(rewritten):
        return f"{len(plain)} graphs compiled, {len(rewritten)} {state}"
    for number, (originals, candidates) in enumerate(zip(plain, rewritten, strict=True)):
        found = [difference(originals[0], candidate) for candidate in candidates]
        if all(why is not None for why in found):
            return f"graph {number} ({state}): {found[0] if found else 'was not compiled'}"
    return None


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {state}" for state, count in counts.items())


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def _verdict(bit_equal: bool, off: float) -> str:
    return "bit-equal" if bit_equal else f"differ by up to {off:.3g}"
