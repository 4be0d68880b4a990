"""The Dynamo backend: rewrite a copy of the traced graph, compile it, hand its extra outputs on, strip them."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo import lookup_backend

from ..errors import RewriteError
from .marker import Marker, first_parameter
from .rewrite import Rewritten, Sampling, insert_captures
from .shapes import SizeReader
from .sites import Site

Compiled = Callable[..., Any]
InnerBackend = str | Callable[..., Any]


class SiteFinder:
    """Sites of one instrumented model by the identity of a module or of its first parameter."""

    def __init__(self, model: nn.Module, sites: Sequence[Site], siblings: Sequence[Site]) -> None:
        self._model = weakref.ref(model)
        self._marked = (*sites, *siblings)
        self._chosen = frozenset(site.name for site in sites)
        self.generation = 0
        self.refresh()

    def refresh(self) -> None:
        """Look at the model anew: parameters may have been replaced since."""
        model = self._model()
        if model is None:
            return
        self.generation += 1
        self.by_module: dict[int, Site] = {}
        self._by_parameter: dict[int, list[Site]] = {}
        for site in self._marked:
            module = model.get_submodule(site.name)
            self.by_module[id(module)] = site
            parameter = first_parameter(module)
            if parameter is not None:
                self._by_parameter.setdefault(id(parameter), []).append(site)

    def by_parameter(self, parameter: object) -> list[Site]:
        """The marked modules whose first parameter this is: one, or nested or tied ones in module order."""
        return self._by_parameter.get(id(parameter), [])

    def parameter_of(self, site: Site) -> nn.Parameter | None:
        """The first parameter of a site's module."""
        model = self._model()
        return first_parameter(model.get_submodule(site.name)) if model is not None else None

    def is_chosen(self, site: Site) -> bool:
        """A site, not a sibling of one that carries a marker as well."""
        return site.name in self._chosen


class CaptureBackend:
    """A backend for ``torch.compile`` that captures: rewrites each traced graph, then compiles it with ``inner``.

    Args:
        marker: the marker that planted the sites.
        finder: the model's sites by identity.
        sampling: sample inside the graph, or None for whole values.
        inner: what compiles the rewritten graph, a name that ``torch.compile`` knows or a callable.
        options: ``mode``, ``options`` and ``dynamic`` for the inner backend, as ``torch.compile`` takes them.
    """

    def __init__(
        self,
        marker: Marker,
        finder: SiteFinder,
        sampling: Sampling | None,
        inner: InnerBackend,
        *,
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
        dynamic: bool | None = None,
    ) -> None:
        self._marker = marker
        self._finder = finder
        self._sampling = sampling
        self._inner = _resolve(inner, mode, options, dynamic)
        self.compiler_name = getattr(self._inner, "compiler_name", None) or str(inner)

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Compiled:
        def site_of(node: fx.Node, anchor: int | None) -> Site | None:
            return self._site_of(node, example_inputs[anchor] if anchor is not None else None)

        rewritten = insert_captures(gm, site_of, self._sampling)
        if rewritten is None:
            compiled: Compiled = self._inner(gm, example_inputs, **kwargs)
            return compiled
        compiled = self._inner(rewritten.gm, example_inputs, **kwargs)
        return CapturedGraph(compiled, rewritten, example_inputs, self._marker, self._finder)

    def reset(self) -> None:
        if hasattr(self._inner, "reset"):
            self._inner.reset()

    def get_compiler_config(self) -> Any:
        inner = getattr(self._inner, "get_compiler_config", None)
        return inner() if inner is not None else None

    def _site_of(self, node: fx.Node, anchor: object) -> Site | None:
        # The hook runs inside the module's call, so the module is the innermost of the stack. Keys are
        # `str(id(module))`, with `@k` behind it when the module is called again in the same graph.
        stack = node.meta.get("nn_module_stack") or {}
        module_id = str(next(reversed(stack), "")).partition("@")[0]
        if module_id.isdigit() and (site := self._finder.by_module.get(int(module_id))) is not None:
            # A graph of the whole model runs for no other module, so there a sibling's value is never wanted.
            same = self._finder.by_parameter(anchor)
            if anchor is not None and site not in same:
                # The one body of a nested region, called for another layer than it was traced for.
                parameter = self._finder.parameter_of(site)
                return same[self._finder.by_parameter(parameter).index(site)]
            whole = str(next(reversed(stack.values()))[0]) == f"L['self'].{site.name}"
            return None if whole and not self._finder.is_chosen(site) else site
        # Behind a graph break the rest of a frame is traced without the module's stack.
        candidates = self._finder.by_parameter(anchor)
        if len(candidates) == 1:
            return candidates[0]
        raise RewriteError(
            f"a capture mark behind a graph break can't be told apart: it may be of {candidates}; choose one of them"
            if candidates
            else f"a capture mark stands in the traced graph without a site (innermost module: "
            f"{list(stack.values())[-1:]}): it has no parameters and stands behind a graph break, or the model was "
            f"changed after instrument_model"
        )


def _resolve(
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


class CapturedGraph:
    """One compiled graph with its captures: what Dynamo calls in place of the plain one."""

    def __init__(
        self,
        compiled: Compiled,
        rewritten: Rewritten,
        example_inputs: Sequence[Any],
        marker: Marker,
        finder: SiteFinder,
    ) -> None:
        self._compiled = compiled
        self._marker = marker
        self._finder = finder
        self._num_outputs = rewritten.num_outputs
        self._sites = tuple(planned.site for planned in rewritten.planned)
        self._begins, self._ends = rewritten.begins_step, rewritten.ends_step
        self._input_names, self._inputs = rewritten.input_names, rewritten.inputs
        sizes = SizeReader(rewritten.gm)
        kept = [planned.kept for planned in rewritten.planned]
        self._num_bytes = sizes.total([(value.numel(), value.element_size()) for value in kept])
        self._full_shapes = (
            sizes.shapes([planned.value.shape for planned in rewritten.planned])
            if rewritten.sampled
            else None
        )
        self._anchors = [planned.anchor for planned in rewritten.planned]
        # Where each site stands among those with the same first parameter: the same place for another layer's.
        self._places = [
            finder.by_parameter(example_inputs[planned.anchor]).index(planned.site)
            if planned.anchor is not None
            else 0
            for planned in rewritten.planned
        ]
        distinct = sorted({anchor for anchor in self._anchors if anchor is not None})
        self._pick_anchors = operator.itemgetter(*distinct) if distinct else None
        self._known: dict[Any, tuple[Site | None, ...]] = {}
        self._generation = -1

    def __call__(self, *args: Any) -> Any:
        sink = self._marker.sink
        if sink is None:
            # The capture was closed while this call was on its way in another thread.
            return self._compiled(*args)[: self._num_outputs]
        if self._begins:
            named = zip(self._input_names, self._inputs, strict=True)
            sink.begin_step({name: args[index] for name, index in named})
        chosen = self._sites_of(args)
        full_shapes: Sequence[tuple[int, ...]] | None = None
        if self._full_shapes is not None:
            full_shapes = self._full_shapes(args)
        sites = tuple(site for site in chosen if site is not None)
        num_bytes = self._num_bytes(args) if self._num_bytes is not None else None
        ticket = sink.reserve(sites, num_bytes) if num_bytes is not None else None
        try:
            outputs = self._compiled(*args)
        except BaseException:
            if ticket is not None:
                sink.cancel(ticket)
            raise
        values = outputs[self._num_outputs :]
        if len(sites) != len(chosen):
            keep = [index for index, site in enumerate(chosen) if site is not None]
            values = [values[index] for index in keep]
            full_shapes = [full_shapes[index] for index in keep] if full_shapes is not None else None
        if ticket is None:
            # The size depends on the data: it is known only now.
            ticket = sink.reserve(sites, sum(value.nbytes for value in values))
        sink.deliver(ticket, sites, values, full_shapes)
        if self._ends:
            sink.end_step()
        return outputs[: self._num_outputs]

    def _sites_of(self, args: Sequence[Any]) -> tuple[Site | None, ...]:
        """The sites of this run; None for a module that runs this graph too and is no site."""
        if self._pick_anchors is None:
            return tuple(self._site_at(args, index) for index in range(len(self._sites)))
        if self._generation != self._finder.generation:
            self._generation = self._finder.generation
            self._known.clear()
        anchors = self._pick_anchors(args)
        key = tuple(map(id, anchors)) if isinstance(anchors, tuple) else id(anchors)
        sites = self._known.get(key)
        if sites is None:
            sites = self._known[key] = tuple(self._site_at(args, index) for index in range(len(self._sites)))
        return sites

    def _site_at(self, args: Sequence[Any], index: int) -> Site | None:
        anchor = self._anchors[index]
        if anchor is None:
            return self._sites[index] if self._finder.is_chosen(self._sites[index]) else None
        candidates = self._finder.by_parameter(args[anchor])
        place = self._places[index]
        site = candidates[place] if place < len(candidates) else None
        return site if site is not None and self._finder.is_chosen(site) else None
