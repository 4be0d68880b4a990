"""Planting the markers into a model, counting its forward calls, and undoing both."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch._dynamo import OptimizedModule
from torch._dynamo.external_utils import wrap_inline
from torch.utils.hooks import RemovableHandle

from ..errors import AlreadyInstrumentedError, InstrumentationError
from ..forks import track
from .backend import SiteFinder
from .calls import Calls
from .counting import BeginStep, CountedCall, EndStep, positional_names
from .gate import Gate
from .guards import GuardFilter, GuardFilterFn
from .marker import Marker, give_token, take_token
from .ops import ATTENTION_OPS, op_of
from .scope import ScopeMarker
from .sink import Sink
from .sites import Site, find_siblings
from .witness import Witness


def inner_module(model: nn.Module) -> nn.Module:
    """The module that was compiled, of ``torch.compile``'s wrapper; any other module itself."""
    while isinstance(model, OptimizedModule):
        model = model._orig_mod
    return model


class Attachment:
    """One instrumented model: its markers, its step counting, and what it takes to undo them."""

    def __init__(self, model: nn.Module, sites: Sequence[Site]) -> None:
        inner = inner_module(model)
        self.model = inner
        self._outer = model if model is not inner else None
        self.sites = tuple(sites)
        # First, as a forward without a signature is refused.
        self._input_names = positional_names(inner)
        marked = {site: op_of(inner, site.name) for site in (*sites, *find_siblings(inner, sites))}
        self._modules = {site.name: weakref.ref(marked[site][0]) for site in sites}
        self.marker = Marker({id(marked[site][0]): site for site in sites if marked[site][1] is None})
        self._scope_marker = ScopeMarker(self.marker)
        self._marked = tuple(module for module, _ in marked.values())
        tokens = {site: give_token(module, is_op=op is not None) for site, (module, op) in marked.items()}
        self.finder = SiteFinder(tokens, sites)
        self.gate = Gate()
        self._handles: list[RemovableHandle] = [
            module.register_forward_hook(self.marker if op is None else self._scope_marker)
            for module, op in marked.values()
        ]
        self._before: list[tuple[nn.Module, Any]] = []
        self._compiled_before: dict[str, Any] = {}
        self._generation_config: tuple[Any, Any] | None = None
        track(self)

    def compile(self, backend: Callable[..., Any], **options: Any) -> None:
        """Compile the model in place, so that ``model(...)`` and ``model.generate(...)`` run the rewritten graph.

        ``options`` are those of ``compiled_variant``.
        """
        model = self.model
        idle, capturing = (self.compiled_variant(backend, **options) for _ in range(2))
        on_cpu = is_on_cpu(model)
        eager = model._call_impl if not on_cpu and getattr(backend, "replays", False) else None
        for module in (model,) if self._outer is None else (model, self._outer):
            # In the instance's __dict__, as Module.compile leaves it; absent where only the class has it.
            self._before.append((module, module.__dict__.get("_compiled_call_impl")))
            module.__dict__["_compiled_call_impl"] = CountedCall(
                idle,
                capturing,
                self.marker,
                self.gate,
                self._input_names,
                eager,
                mixes_threads=not isolation(),
            )
        generation_config = getattr(model, "generation_config", None)
        if generation_config is not None and not on_cpu and hasattr(generation_config, "disable_compile"):
            # On accelerators generate() compiles static-cache decoding itself, past this backend.
            self._generation_config = (generation_config, generation_config.disable_compile)
            generation_config.disable_compile = True

    def compiled_variant(
        self, backend: Callable[..., Any], *, guard_filter_fn: GuardFilterFn | None = None, **options: Any
    ) -> Callable[..., Any]:
        """The model's forward call, compiled to be called in one state only: idle, or capturing.

        ``options`` are ``dynamic`` and ``fullgraph`` of ``torch.compile``.
        """
        call = self.model._call_impl
        if any(site.name in ATTENTION_OPS for site in self.sites):
            # Dynamo runs a root's hooks as Python; inside a function of its own the root is no root.
            call = wrap_inline(call)
        hook_ids = [handle.id for handle in self._handles]
        keep = GuardFilter(self.model, (self.marker, self._scope_marker), hook_ids, guard_filter_fn)
        compiled: Callable[..., Any] = torch.compile(
            call, backend=backend, **options, **isolation(), options={"guard_filter_fn": keep}
        )
        return compiled

    @property
    def compiled(self) -> bool:
        """Whether the model runs compiled code of this attachment's own."""
        return bool(self._before)

    def count_steps_in_trace(self) -> None:
        """Count forward calls of a model that the user compiles: by marks in the graph, or eagerly around it."""
        model, marker = self.model, self.marker
        names = self._input_names
        # Dynamo does not see hooks that are added to what it compiled already.
        self._compiled_before = {
            name: module.__dict__.get("_compiled_call_impl")
            for name, module in model.named_modules()
            if name and _is_compiled(module) and any(site.name.startswith(f"{name}.") for site in self.sites)
        }
        self._handles.append(model.register_forward_pre_hook(BeginStep(marker, names), with_kwargs=True))
        # A call that an exception cuts off is over too: else a file in a server would wait for its end for good.
        self._handles.append(model.register_forward_hook(EndStep(marker), always_call=True))

    def open(self, sink: Sink, *, timeout_s: float | None = None) -> None:
        """Run the capturing variant from now on, and deliver to ``sink``; TimeoutError as ``Gate.switch``."""
        with self.gate.switch(timeout_s=timeout_s):
            self.marker.witness = Witness()
            self.marker.capturing = True
            self.marker.sink = sink

    def close(self, *, timeout_s: float | None = None) -> Witness:
        """Run the idle variant from now on; calls of other threads that deliver have finished then.

        Returns what the block saw; TimeoutError as ``Gate.switch``. After an interrupt the idle variant runs all the
        same, also while such calls go on.
        """
        try:
            with self.gate.switch(timeout_s=timeout_s):
                self._run_idle()
        except TimeoutError:
            raise
        except BaseException:
            self._run_idle()
            raise
        return self.marker.witness

    def _run_idle(self) -> None:
        self.marker.sink = None
        self.marker.capturing = False
        # The next block's; a call that Ctrl-C cut off is still held by these.
        self.marker.calls = Calls()

    def forked(self) -> None:
        """In a forked process, where nobody drains: run the idle variant."""
        self.gate.forked()
        self._run_idle()

    def check_unchanged(self) -> None:
        """Raise if a site's module was replaced, moved or stripped of its marker since it was instrumented."""
        changed = []
        for name, reference in self._modules.items():
            try:
                module = op_of(self.model, name)[0]
            except AttributeError:
                changed.append(f"{name} (gone)")
                continue
            if module is not reference():
                changed.append(f"{name} (replaced)")
            elif not any(
                installed in (self.marker, self._scope_marker) for installed in module._forward_hooks.values()
            ):
                changed.append(f"{name} (its hooks were removed)")
        if self._before and not isinstance(self.model.__dict__.get("_compiled_call_impl"), CountedCall):
            changed.append("the model itself (compiled again after instrument_model)")
        for name, compiled in self._compiled_before.items():
            module = self.model.get_submodule(name)
            if isinstance(module, OptimizedModule) or module.__dict__.get("_compiled_call_impl") is compiled:
                raise InstrumentationError(
                    f"{name} was compiled before instrument_model(model, backend=None), by a backend that knows no "
                    f"captures: compile it again with backend=framework.backend(...), or instrument the model before "
                    f"its parts are compiled"
                )
        if changed:
            raise InstrumentationError(
                f"the model was changed after instrument_model, so captures would be incomplete: "
                f"{', '.join(changed[:5])}{', ...' if len(changed) > 5 else ''}; "
                f"call restore and instrument_model again"
            )

    def detach(self) -> None:
        """Take everything back: hooks, step counting, and the compiled call that stood there before."""
        self.marker.capturing = False
        self.marker.sink = None
        for handle in self._handles:
            handle.remove()
        for module in self._marked:
            take_token(module)
        for module, before in self._before:
            if before is None:
                module.__dict__.pop("_compiled_call_impl", None)
            else:
                module.__dict__["_compiled_call_impl"] = before
        if self._generation_config is not None:
            config, disabled = self._generation_config
            config.disable_compile = disabled


def _is_compiled(module: nn.Module) -> bool:
    return isinstance(module, OptimizedModule) or module.__dict__.get("_compiled_call_impl") is not None


def check_free(model: nn.Module) -> None:
    """Raise if ``model``, or a module inside it, is instrumented already."""
    for name, module in inner_module(model).named_modules():
        for installed in module._forward_hooks.values():
            if (isinstance(installed, Marker) and installed.sites) or (
                isinstance(installed, ScopeMarker) and installed.is_live
            ):
                raise AlreadyInstrumentedError(
                    f"{type(inner_module(model)).__name__} is instrumented already (at {name or 'its root'!r}); "
                    f"call restore(model) of the framework that instrumented it first"
                )


def is_on_cpu(model: nn.Module) -> bool:
    return all(parameter.device.type == "cpu" for parameter in model.parameters())


def isolation() -> dict[str, Any]:
    """The compile option for Dynamo entries of one's own; torch 2.11 has none.

    Dynamo keeps compiled code by code object, which all instances of a class share. Entries of its own give each
    model, and each of its two variants, the whole recompile limit (8), and keep the guards of one out of the other's
    lookups.
    """
    known = "isolate_recompiles" in inspect.signature(torch.compile).parameters
    return {"isolate_recompiles": True} if known else {}


def is_ours(installed: object) -> bool:
    """One of the hooks that an attachment installs."""
    return isinstance(installed, (Marker, ScopeMarker, BeginStep, EndStep))
