"""The Dynamo backend: rewrite a copy of the traced graph, compile it, hand its extra outputs on, strip them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo import lookup_backend

from ..errors import RewriteError
from .marker import Marker
from .rewrite import Rewritten, Sampling, insert_captures
from .shapes import SizeReader
from .sites import Site

Compiled = Callable[..., Any]
InnerBackend = str | Callable[..., Any]


class Names:
    """Modules and parameters of one instrumented model, by identity, without keeping them alive."""

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self._fqns: dict[int, str] = {}
        self.refresh()

    def refresh(self) -> None:
        model = self._model()
        if model is None:
            return
        self._fqns = {id(p): name for name, p in model.named_parameters()}
        self._fqns.update({id(b): name for name, b in model.named_buffers()})

    def of(self, tensor: object) -> str | None:
        name = self._fqns.get(id(tensor))
        if name is None and isinstance(tensor, nn.Parameter):
            self.refresh()
            name = self._fqns.get(id(tensor))
        return name


class CaptureBackend:
    """A backend for ``torch.compile`` that captures: rewrites each traced graph, then compiles it with ``inner``.

    Args:
        marker: the marker that planted the sites.
        names: the model's parameters by identity.
        sampling: sample inside the graph, or None for whole values.
        inner: what compiles the rewritten graph, a name that ``torch.compile`` knows or a callable.
        options: ``mode``, ``options`` and ``dynamic`` for the inner backend, as ``torch.compile`` takes them.
    """

    def __init__(
        self,
        marker: Marker,
        names: Names,
        sampling: Sampling | None,
        inner: InnerBackend,
        *,
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
        dynamic: bool | None = None,
    ) -> None:
        self._marker = marker
        self._names = names
        self._sampling = sampling
        self._inner = _resolve(inner, mode, options, dynamic)
        self.compiler_name = getattr(self._inner, "compiler_name", None) or str(inner)

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Compiled:
        rewritten = insert_captures(gm, self._site_of, self._sampling)
        if rewritten is None:
            compiled: Compiled = self._inner(gm, example_inputs, **kwargs)
            return compiled
        compiled = self._inner(rewritten.gm, example_inputs, **kwargs)
        return CapturedGraph(compiled, rewritten, example_inputs, self._marker, self._names)

    def reset(self) -> None:
        if hasattr(self._inner, "reset"):
            self._inner.reset()

    def get_compiler_config(self) -> Any:
        inner = getattr(self._inner, "get_compiler_config", None)
        return inner() if inner is not None else None

    def _site_of(self, node: fx.Node) -> Site:
        # The hook runs inside the module's call, so the module is the innermost of the stack. Keys are
        # `str(id(module))`, with `@k` behind it when the module is called again in the same graph.
        stack = node.meta.get("nn_module_stack") or {}
        for key in reversed(stack):
            module_id = str(key).partition("@")[0]
            if module_id.isdigit() and (site := self._marker.sites.get(int(module_id))) is not None:
                return site
            break
        raise RewriteError(
            f"a capture mark stands in the traced graph without a site (innermost module: "
            f"{list(stack.values())[-1:]}): the model was changed after instrument_model; restore and instrument again"
        )


def _resolve(
    inner: InnerBackend, mode: str | None, options: Mapping[str, Any] | None, dynamic: bool | None
) -> Callable[..., Any]:
    """The inner backend as ``torch.compile`` itself would build it."""
    wrapped: Callable[..., Any]
    if inner == "inductor":
        # Mode and options act as patches of Inductor's configuration, so they must be bound as torch binds them.
        wrapped = torch._TorchCompileInductorWrapper(mode, dict(options) if options else None, dynamic)
        return wrapped
    if not callable(inner) and not isinstance(inner, str):
        raise TypeError(f"backend must be a name or a callable, got {inner!r}")
    backend = lookup_backend(inner)
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
        names: Names,
    ) -> None:
        self._compiled = compiled
        self._marker = marker
        self._names = names
        self._num_outputs = rewritten.num_outputs
        self._sites = tuple(planned.site for planned in rewritten.planned)
        self._begins, self._ends = rewritten.begins_step, rewritten.ends_step
        self._input_names, self._inputs = rewritten.input_names, rewritten.inputs
        sizes = SizeReader(rewritten.gm)
        kept = [planned.kept for planned in rewritten.planned]
        self._num_bytes = sizes.total([(value.numel(), value.element_size()) for value in kept])
        self._full_shapes = (
            sizes.shapes([planned.value.shape for planned in rewritten.planned]) if rewritten.sampled else None
        )
        self._anchor, self._anchor_name, self._anchor_ref = self._find_anchor(example_inputs)
        self._renamed: dict[str, tuple[Site, ...]] = {}

    def __call__(self, *args: Any) -> Any:
        sink = self._marker.sink
        if sink is None:
            # The capture was closed while this call was on its way in another thread.
            return self._compiled(*args)[: self._num_outputs]
        if self._begins:
            named = zip(self._input_names, self._inputs, strict=True)
            sink.begin_step({name: args[index] for name, index in named})
        sites = self._sites_of(args)
        full_shapes = self._full_shapes(args) if self._full_shapes is not None else None
        num_bytes = self._num_bytes(args) if self._num_bytes is not None else None
        ticket = sink.reserve(sites, num_bytes) if num_bytes is not None else None
        try:
            outputs = self._compiled(*args)
        except BaseException:
            if ticket is not None:
                sink.cancel(ticket)
            raise
        values = outputs[self._num_outputs :]
        if ticket is None:
            # The size depends on the data: it is known only now.
            ticket = sink.reserve(sites, sum(value.nbytes for value in values))
        sink.deliver(ticket, sites, values, full_shapes)
        if self._ends:
            sink.end_step()
        return outputs[: self._num_outputs]

    def _find_anchor(self, example_inputs: Sequence[Any]) -> tuple[int, str, Any]:
        """A parameter among the arguments that tells which module the graph runs for."""
        for index, value in enumerate(example_inputs):
            if isinstance(value, nn.Parameter) and (name := self._names.of(value)) is not None:
                return index, name, weakref.ref(value)
        return -1, "", lambda: None

    def _sites_of(self, args: Sequence[Any]) -> tuple[Site, ...]:
        """The sites of this run: equal layers compiled one by one share a graph, and their parameters tell them."""
        if self._anchor < 0 or args[self._anchor] is self._anchor_ref():
            return self._sites
        name = self._names.of(args[self._anchor])
        if name is None or name == self._anchor_name:
            return self._sites
        sites = self._renamed.get(name)
        if sites is None:
            sites = self._renamed[name] = self._rename(name)
        return sites

    def _rename(self, name: str) -> tuple[Site, ...]:
        here, there = self._anchor_name.split("."), name.split(".")
        while here and there and here[-1] == there[-1]:
            here.pop()
            there.pop()
        old, new = ".".join(here), ".".join(there)
        known = {site.name: site for site in self._marker.sites.values()}
        renamed = []
        for site in self._sites:
            moved = new + site.name[len(old) :] if site.name == old or site.name.startswith(f"{old}.") else None
            if moved not in known:
                raise RewriteError(
                    f"a graph compiled for {self._anchor_name!r} ran for {name!r}, where the site {site.name!r} has "
                    f"no counterpart among the sites: choose the same sites in each of the layers that are compiled "
                    f"one by one"
                )
            renamed.append(known[moved])
        return tuple(renamed)
