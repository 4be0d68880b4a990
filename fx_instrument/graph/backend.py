"""The Dynamo backend: rewrite a copy of the traced graph, compile it, hand its extra outputs on, strip them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._dynamo import lookup_backend
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import is_fake

from ..errors import RewriteError
from .counting import checked
from .early import Taker
from .marker import Marker, check_dtype, is_recomputing
from .rewrite import Rewritten, Sampling, insert_captures
from .shapes import SizeReader
from .sink import Sink
from .sites import Site
from .strict import compile_strictly

_STRANGE_MARK = (
    "a capture mark stands in the traced graph without a site: the model was changed after instrument_model, or a "
    "module of it was instrumented by itself; restore both and instrument the model again"
)

Compiled = Callable[..., Any]
InnerBackend = str | Callable[..., Any]


class SiteFinder:
    """The marked modules of one instrumented model by their tokens."""

    def __init__(self, tokens: Mapping[Site, torch.Tensor], chosen: Collection[Site]) -> None:
        self._tokens = tuple(tokens.values())  # kept alive: an id is a name only as long as its tensor lives
        self._by_id = {id(token): site for site, token in tokens.items()}
        self._chosen = frozenset(chosen)

    def marked(self, token: object) -> Site | None:
        """The site, or sibling of a site, that the token was given to."""
        return self._by_id.get(id(token))

    def chosen(self, token: object) -> Site | None:
        """The site that the token was given to; None for a sibling of one."""
        site = self._by_id.get(id(token))
        return site if site in self._chosen else None


class CaptureBackend:
    """A backend for ``torch.compile`` that captures: rewrites each traced graph, then compiles it with ``inner``.

    Args:
        marker: the marker that planted the sites.
        finder: the model's sites by identity.
        sampling: sample inside the graph, or None for whole values.
        inner: what compiles the rewritten graph, a name that ``torch.compile`` knows or a callable.
        strict: keep the model's outputs bit for bit those of the graph without captures, at a price where it must.
        options: ``mode``, ``options`` and ``dynamic`` for the inner backend, as ``torch.compile`` takes them.
    """

    def __init__(
        self,
        marker: Marker,
        finder: SiteFinder,
        sampling: Sampling | None,
        inner: InnerBackend,
        *,
        strict: bool = False,
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
        dynamic: bool | None = None,
    ) -> None:
        self._marker = marker
        self._finder = finder
        self._sampling = sampling
        self._inner = resolve_inner(inner, mode, options, dynamic)
        self._strict = strict
        # Other compilers may not know how to call an op of ours.
        self._hand_over = inner == "inductor"
        self.replays = _replays(inner, mode, options)
        """Whether its graphs may run as CUDA graphs, where they have a CUDA device."""
        self.compiler_name = getattr(self._inner, "compiler_name", None) or str(inner)

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Compiled:
        def is_wanted(mark: fx.Node, token: int) -> bool:
            return self._is_wanted(mark, example_inputs[token])

        sizes = SizeReader(gm)
        rewritten = insert_captures(gm, is_wanted, self._sampling, hand_over=self._hand_over)
        if rewritten is None:
            compiled: Compiled = self._inner(gm, example_inputs, **kwargs)
            return compiled
        inputs = [example_inputs[index] for index in rewritten.arguments]
        plain = insert_captures(gm, lambda mark, token: False, None) if self._strict else None
        if plain is not None:
            compiled = compile_strictly(self._inner, plain.gm, rewritten, inputs, **kwargs)
        else:
            compiled = self._inner(rewritten.gm, inputs, **kwargs)
        return CapturedGraph(compiled, rewritten, sizes, self._marker, self._finder, self.replays)

    def reset(self) -> None:
        if hasattr(self._inner, "reset"):
            self._inner.reset()

    def get_compiler_config(self) -> Any:
        inner = getattr(self._inner, "get_compiler_config", None)
        return inner() if inner is not None else None

    def _is_wanted(self, mark: fx.Node, token: object) -> bool:
        if is_fake(token):
            # DistributedDataParallel has Dynamo split the graph by buckets and compile the pieces on fake arguments:
            # whose values they are is known when they run.
            return True
        site = self._finder.marked(token)
        if site is None:
            raise RewriteError(_STRANGE_MARK)
        stack = mark.meta.get("nn_module_stack") or {}
        path = str(next(reversed(stack.values()))[0]) if stack else ""
        # A graph of the whole model runs for no other module, so there a sibling's value is never wanted.
        return path != f"L['self'].{site.name}" or self._finder.chosen(token) is not None


def needs_strictness(inner: InnerBackend) -> bool:
    """Whether captures may change what ``inner`` computes; these run each operation as it stands in the graph."""
    return inner not in ("eager", "aot_eager")


def resolve_inner(
    inner: InnerBackend, mode: str | None, options: Mapping[str, Any] | None, dynamic: bool | None
) -> Callable[..., Any]:
    """The inner backend as ``torch.compile`` itself would build it."""
    wrapped: Callable[..., Any]
    if inner == "inductor":
        # Mode and options act as patches of Inductor's configuration, so they must be bound as torch binds them.
        build: Any = torch._TorchCompileInductorWrapper
        wrapped = build(mode, dict(options) if options else None, dynamic)
        return wrapped
    if not callable(inner) and not isinstance(inner, str):
        raise TypeError(f"backend must be a name or a callable, got {inner!r}")
    backend: Callable[..., Any] = lookup_backend(inner)
    extra = {key: value for key, value in (("mode", mode), ("options", options)) if value}
    if not extra:
        return backend

    def bound(gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Compiled:
        compiled: Compiled = backend(gm, example_inputs, **extra, **kwargs)
        return compiled

    return bound


def _replays(inner: InnerBackend, mode: str | None, options: Mapping[str, Any] | None) -> bool:
    """Whether compiled graphs may run as CUDA graphs, whose outputs the next run overwrites."""
    if inner == "inductor":
        from torch._inductor import config  # loads Inductor, which other backends need not

        asked = (options or {}).get("triton.cudagraphs", config.triton.cudagraphs)
        return bool(asked) or mode in ("reduce-overhead", "max-autotune")
    return inner not in ("eager", "aot_eager")


class CapturedGraph:
    """One compiled graph with its captures: what Dynamo calls in place of the plain one."""

    def __init__(
        self,
        compiled: Compiled,
        rewritten: Rewritten,
        sizes: SizeReader,
        marker: Marker,
        finder: SiteFinder,
        replays: bool,
    ) -> None:
        self._compiled = compiled
        self._marker = marker
        self._finder = finder
        self.planned = rewritten.planned
        self._num_outputs = rewritten.num_outputs
        self._hands_over = rewritten.hands_over
        self._begins, self._ends = rewritten.begins_step, rewritten.ends_step
        self._input_names, self._inputs = rewritten.input_names, rewritten.inputs
        kept = [planned.kept for planned in rewritten.planned]
        self._device = next((value.device for value in kept if value.device.type == "cuda"), None)
        self._is_fixed = all(isinstance(size, int) for value in kept for size in value.shape)
        """Whether values have the same shapes in every run."""
        self._replays = replays
        self._ran = False
        # What stays on a device needs no room on the host before it is on its way there.
        self._num_bytes, self._device_bytes = (
            sizes.total(
                [(v.numel(), v.element_size()) for v in kept if (v.device.type == "cuda") is on_device]
            )
            for on_device in (False, True)
        )
        self._full_shapes = None
        if rewritten.sampled:
            self._full_shapes = sizes.shapes([planned.value.shape for planned in rewritten.planned])
            if self._full_shapes is None:
                raise RewriteError(
                    "SAMPLED_SLICES can't tell the shape of a site whose size depends on the data: capture whole "
                    "tensors, or choose other sites"
                )
        self._arguments = _picker(rewritten.arguments)
        self._tokens = _picker([planned.token for planned in rewritten.planned])
        self._known: dict[tuple[int, ...], _Chosen] = {}
        self._last: tuple[tuple[Any, ...], _Chosen] | None = None
        """The tokens of the run before, nearly always those of the next one, and what they chose."""

    def __call__(self, *args: Any) -> Any:
        marker = self._marker
        sink, calls = marker.sink, marker.calls
        if sink is None or is_recomputing() or TracingContext.try_get() is not None:
            # The capture was closed while this call was on its way in another thread; or activation checkpointing
            # runs, in the backward pass, what was captured in the forward pass; or DistributedDataParallel's pieces
            # are tried out on fake tensors while they are compiled.
            return self._compiled(*self._arguments(args))[: self._num_outputs]
        if self._begins:
            named = zip(self._input_names, self._inputs, strict=True)
            calls.begin(sink, checked({name: args[index] for name, index in named}))
        sink = calls.sink_here(sink)
        if sink is None:
            return self._compiled(*self._arguments(args))[: self._num_outputs]
        chosen = self._chosen(args)
        sites = chosen.sites
        full_shapes: Sequence[tuple[int, ...]] | None = None
        if self._full_shapes is not None:
            full_shapes = self._full_shapes(args)
        num_bytes = self._num_bytes(args) if self._num_bytes is not None else None
        alike = chosen if self._is_fixed else None
        ticket = None
        if self._device is not None:
            device_bytes = self._device_bytes(args) if self._device_bytes is not None else 0
            ticket = sink.reserve(
                sites,
                num_bytes or 0,
                device=self._device,
                device_bytes=device_bytes,
                replays=self._replays,
                alike=alike,
            )
        elif num_bytes is not None:
            ticket = sink.reserve(sites, num_bytes, early=self._hands_over, alike=alike)
        if chosen.keep is not None and full_shapes is not None:
            full_shapes = [full_shapes[index] for index in chosen.keep]
        if self._hands_over and ticket is not None:

            def take(values: Sequence[torch.Tensor]) -> None:
                sink.deliver(ticket, sites, chosen.kept_of(values), full_shapes)

            return self._finish(sink, chosen, self._run_early(args, sink, ticket, take))
        outputs, values = self._run(args, sink, ticket)
        values = chosen.kept_of(values)
        if ticket is None:
            # The size depends on the data: it is known only now.
            ticket = sink.reserve(sites, sum(value.nbytes for value in values))
        sink.deliver(ticket, sites, values, full_shapes)
        return self._finish(sink, chosen, outputs)

    def _run(
        self, args: Sequence[Any], sink: Sink, ticket: Any, taker: Taker | None = None
    ) -> tuple[Sequence[Any], Sequence[torch.Tensor]]:
        """The graph's outputs and the values among them; if it fails, their room is given back."""
        try:
            outputs = self._compiled(*self._arguments(args))
            values = outputs[self._num_outputs : len(outputs) - self._hands_over]
            if not self._ran:
                # Example values of quantised tensors have the dtype of what they were made from.
                for value in values:
                    check_dtype(value, "a site's value")
                self._ran = True
            if len(values) != len(self.planned):
                raise RewriteError(
                    f"a graph with {len(self.planned)} planned captures returned {len(values)}: the inner backend "
                    f"changed the graph's outputs, so its values can't be told apart"
                )
        except BaseException:
            if ticket is not None and not (taker is not None and taker.took):
                sink.cancel(ticket)
            if self._begins:
                # The forward call began in this graph, and no hook of its model sees it cut off.
                self._marker.calls.end(sink)
            raise
        return outputs, values

    def _run_early(
        self, args: Sequence[Any], sink: Sink, ticket: Any, take: Callable[[Sequence[torch.Tensor]], None]
    ) -> Sequence[Any]:
        """The graph's outputs; its values are taken while it runs. If it fails after that, they stay captured."""
        try:
            with Taker(take) as taker:
                outputs, values = self._run(args, sink, ticket, taker)
            if not taker.took:
                take(values)
            return outputs
        finally:
            sink.returned(ticket)

    def _finish(self, sink: Sink, chosen: _Chosen, outputs: Sequence[Any]) -> Any:
        witness = self._marker.witness
        witness.note(chosen.names)
        if self._ends:
            self._marker.calls.end(sink)
            witness.completed = True
        return outputs[: self._num_outputs]

    def _chosen(self, args: Sequence[Any]) -> _Chosen:
        """The sites of this run; a module that runs this graph too may be no site."""
        tokens = self._tokens(args)
        last = self._last
        if last is not None and all(map(operator.is_, tokens, last[0])):
            return last[1]
        key = tuple(map(id, tokens))
        known = self._known.get(key)
        if known is None:
            if any(self._finder.marked(token) is None for token in tokens):
                raise RewriteError(_STRANGE_MARK)
            found = tuple(map(self._finder.chosen, tokens))
            sites = tuple(site for site in found if site is not None)
            keep = tuple(index for index, site in enumerate(found) if site is not None)
            known = self._known[key] = _Chosen(
                sites,
                frozenset(site.name for site in sites),
                None if len(sites) == len(found) else keep,
            )
        self._last = tokens, known
        return known


@dataclass(frozen=True, slots=True, eq=False)
class _Chosen:
    """Whose values one run of a graph delivers."""

    sites: tuple[Site, ...]
    names: frozenset[str]
    keep: tuple[int, ...] | None
    """Which of the planned values; None for all."""

    def kept_of(self, values: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        return values if self.keep is None else [values[index] for index in self.keep]


def _picker(indices: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """Picks arguments by position, at C speed."""
    if len(indices) < 2:
        return lambda args: tuple(args[index] for index in indices)
    return operator.itemgetter(*indices)
