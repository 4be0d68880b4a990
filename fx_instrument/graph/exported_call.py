"""Running an instrumented exported program: its further outputs go to the open capture, the rest to the caller."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from ..errors import InstrumentationError
from ..forks import track
from .counting import checked, integer_inputs
from .exported import MARK, ExportedOutputs, read_spec
from .gate import Gate
from .sink import Sink
from .sites import Site
from .witness import Witness


class ExportedAttachment:
    """What a framework holds of exported programs, in the place of an instrumented model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        """What the streams' metadata describe."""
        self.sites: tuple[Site, ...] = ()
        self.gate = Gate()
        self.sink: Sink | None = None
        self.witness = Witness()
        track(self)

    def add_sites(self, sites: Sequence[Site]) -> None:
        self.sites = tuple(dict.fromkeys((*self.sites, *sites)))

    def open(self, sink: Sink, *, timeout_s: float | None = None) -> None:
        """Deliver to ``sink`` from now on; TimeoutError as ``Gate.switch``."""
        with self.gate.switch(timeout_s=timeout_s):
            self.witness = Witness()
            self.sink = sink

    def close(self, *, timeout_s: float | None = None) -> Witness:
        """Throw captured values away from now on; what the block saw. TimeoutError as ``Gate.switch``."""
        with self.gate.switch(timeout_s=timeout_s):
            self.sink = None
        return self.witness

    def forked(self) -> None:
        """In a forked process, where nobody drains: throw captured values away."""
        self.gate.forked()
        self.sink = None

    def check_unchanged(self) -> None:
        """An exported program's graph is not changed behind its back."""

    def detach(self) -> None:
        self.sink = None

    def __deepcopy__(self, memo: dict[int, Any]) -> ExportedAttachment:
        # A copy of a program, or of its module, delivers to the framework that the original delivers to.
        return self


_KNOWN_SHAPES = 1024
"""For so many inputs the size of the captured values is kept: a text that is generated has others for every token."""


class _Size(NamedTuple):
    """What the values of a run take."""

    num_bytes: int
    """On the host."""
    device: torch.device | None
    device_bytes: int

    @classmethod
    def of(cls, values: Sequence[torch.Tensor]) -> _Size:
        device = next((value.device for value in values if value.is_cuda), None)
        on_device = sum(value.nbytes for value in values if value.is_cuda)
        return cls(sum(value.nbytes for value in values) - on_device, device, on_device)

    def holds(self, other: _Size) -> bool:
        return (
            self.device == other.device
            and self.num_bytes >= other.num_bytes
            and self.device_bytes >= other.device_bytes
        )


class ExportedCall:
    """Calls a program with captures as if it had none: steps are counted, values handed to the open capture.

    The size of the captured values is known before a run once inputs of the same shapes were seen; room for the first
    of them is made after the run. So it is for every run of a program whose sizes turn out to depend on the data.
    """

    def __init__(
        self,
        call: Callable[..., Any],
        outputs: ExportedOutputs,
        attachment: ExportedAttachment,
        input_names: Sequence[str],
    ) -> None:
        self._call = call
        self._outputs = outputs
        self._attachment = attachment
        self._input_names = input_names
        self._sites = tuple(site for site, _ in outputs.keys)
        self._names = frozenset(site.name for site in self._sites)
        self._sizes: dict[tuple[Any, ...], _Size] = {}
        self._sizes_follow_data = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._call(*args, **kwargs)[0]
        gate = self._attachment.gate
        gate.enter()
        try:
            sink = self._attachment.sink
            return self._call(*args, **kwargs)[0] if sink is None else self._capture(sink, args, kwargs)
        finally:
            gate.leave()

    def _capture(self, sink: Sink, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        sink.begin_step(checked(integer_inputs(self._input_names, args, kwargs)))
        try:
            shapes = tuple(map(_shape_of, pytree.tree_leaves((args, kwargs))))
            size = self._sizes.get(shapes)
            ticket = self._reserve(sink, size) if size is not None else None
            try:
                result, further = self._call(*args, **kwargs)
            except BaseException:
                if size is not None:
                    sink.cancel(ticket)
                raise
            values, full_shapes = self._values(further)
            found = _Size.of(values)
            if size is None or not size.holds(found):
                if size is not None:
                    sink.cancel(ticket)
                ticket = self._reserve(sink, found)
            if size != found:
                self._note(shapes, size, found)
            sink.deliver(ticket, self._sites, values, full_shapes)
            self._attachment.witness.note(self._names)
            self._attachment.witness.completed = True
            return result
        finally:
            sink.end_step()

    def _reserve(self, sink: Sink, size: _Size) -> Any:
        return sink.reserve(self._sites, size.num_bytes, device=size.device, device_bytes=size.device_bytes)

    def _note(self, shapes: tuple[Any, ...], expected: _Size | None, found: _Size) -> None:
        if expected is not None or len(self._sizes) >= _KNOWN_SHAPES:
            self._sizes = {}
        self._sizes_follow_data |= expected is not None
        if not self._sizes_follow_data:
            self._sizes[shapes] = found

    def _values(self, further: Any) -> tuple[list[torch.Tensor], list[tuple[int, ...]] | None]:
        (captured,) = further[MARK].values()
        if self._outputs.sampling is None:
            return list(captured.values()), None
        pairs = list(captured.values())
        return [value for value, _ in pairs], [tuple(shape.tolist()) for _, shape in pairs]


def _shape_of(argument: object) -> object:
    """What sizes inside a program may follow from: a tensor's shape, a number."""
    if isinstance(argument, torch.Tensor):
        return argument.shape, argument.dtype
    return argument if isinstance(argument, (bool, int, float)) else None


class InstrumentedProgram(ExportedProgram):
    """An exported program with captures whose ``module()`` runs under the framework that made it.

    Saving, AOTInductor and ``run_decompositions`` see an exported program like any other, whose outputs are the
    original's and the captures; ``framework.attach_exported`` makes a framework of what they give.
    """

    def __init__(self, *args: Any, attachment: ExportedAttachment | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._attachment = attachment

    def module(self, check_guards: bool = True) -> fx.GraphModule:
        module = super().module(check_guards=check_guards)
        if self._attachment is not None:
            outputs = read_spec(self.call_spec.out_spec)
            assert outputs is not None, "it was made with captures"
            wrap_forward(module, outputs, self._attachment)
        return module


def wrap_forward(
    module: fx.GraphModule, outputs: ExportedOutputs, attachment: ExportedAttachment
) -> fx.GraphModule:
    """Let a program's module return the original's outputs; its graph and ``_out_spec`` stay what they are."""
    # On the instance: what compiles the graph itself, as AOTInductor does, sees the outputs behind the others.
    call = ExportedCall(
        functools.partial(type(module).forward, module), outputs, attachment, _input_names(module)
    )
    module.forward = call
    # A copy of a graph module is made from its class, whose forward returns the captures, too.
    module.__dict__["__deepcopy__"] = functools.partial(_copied, module, outputs, attachment)
    return module


def _copied(
    module: fx.GraphModule, outputs: ExportedOutputs, attachment: ExportedAttachment, memo: dict[int, Any]
) -> fx.GraphModule:
    """What ``copy.deepcopy`` gives: a module of its own, which delivers to the same framework."""
    copied: fx.GraphModule = fx.GraphModule.__deepcopy__(module, memo)
    return wrap_forward(copied, outputs, attachment)


def outputs_of(program: object) -> ExportedOutputs | None:
    """The captures that a program's module, or what AOTInductor's loader gives, returns; None if it has none."""
    codegen = getattr(getattr(program, "graph", None), "_codegen", None)
    spec = getattr(codegen, "pytree_info", None)
    if spec is not None:
        return read_spec(spec.out_spec)
    loader = getattr(program, "loader", None)
    if loader is not None and hasattr(loader, "get_call_spec"):
        return read_spec(pytree.treespec_loads(loader.get_call_spec()[1]))
    raise TypeError(
        f"expected an exported program's module or what aoti_load_package returned, got {type(program).__name__}"
    )


def attach_call(program: Any, outputs: ExportedOutputs, attachment: ExportedAttachment) -> Callable[..., Any]:
    """``program`` so that calls of it deliver to the attachment's capture and return the original's outputs."""
    if isinstance(program, fx.GraphModule):
        if isinstance(program.__dict__.get("forward"), ExportedCall):
            raise InstrumentationError("this module is attached to a framework already")
        return wrap_forward(program, outputs, attachment)
    names = _names_in(pytree.treespec_loads(program.loader.get_call_spec()[0]))
    return ExportedCall(program, outputs, attachment, names)


def _input_names(module: fx.GraphModule) -> tuple[str, ...]:
    codegen = module.graph._codegen
    info = getattr(codegen, "pytree_info", None)
    return tuple(info.orig_args) if info is not None else ()


def _names_in(spec: Any) -> tuple[str, ...]:
    """Names for positional inputs, which a compiled package does not keep."""
    return tuple(f"input_{index}" for index in range(spec.child(0).num_children))
