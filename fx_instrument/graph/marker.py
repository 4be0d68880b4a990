"""The identity op that is planted while tracing, and the forward hook that plants it.

    traced with capture on        %mlp = linear(...)
                                  %tap = tap(%mlp, %token)    # no user; impure, so that no pass removes it
    traced with capture off       %mlp = linear(...)

The hook is Python that only Dynamo's tracing runs; the backend replaces each ``tap`` by plain capture nodes, so
nothing of it is left in compiled code. One hook object serves all sites: a closure per layer would keep equal
layers from sharing a graph. Which site a mark belongs to is told at run time by ``%token``, an empty tensor that is
the module's own and that Dynamo makes an argument of the graph: a graph that was compiled for one layer, or for the
rest of a frame behind a graph break, runs for others too. The pass takes tokens out of the graph again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import nn
from torch._dynamo.eval_frame import skip_code
from torch._subclasses.fake_tensor import is_fake
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.fx.node import has_side_effect

from ..errors import RewriteError
from .sites import Site

Hook = TypeVar("Hook", bound=Callable[..., None])


class Sink(Protocol):
    """Where captured values go: an open capture. All methods may be called from several threads."""

    def begin_step(self, inputs: Mapping[str, torch.Tensor]) -> None:
        """A forward call of the model starts on this thread."""

    def end_step(self) -> None:
        """The forward call that began last on this thread is over."""

    def reserve(self, sites: Sequence[Site], num_bytes: int) -> Any:
        """Make room before a graph runs: waits, refuses, or answers that the values are to be dropped."""

    def deliver(
        self,
        ticket: Any,
        sites: Sequence[Site],
        values: Sequence[torch.Tensor],
        full_shapes: Sequence[tuple[int, ...]] | None,
    ) -> None:
        """Take over the values of a graph that ran."""

    def cancel(self, ticket: Any) -> None:
        """Give back the room of a graph that failed."""

    def record_eager(self, site: Site, value: torch.Tensor) -> None:
        """Take a copy of a value that was computed outside any graph."""


def give_token(module: nn.Module) -> torch.Tensor:
    """Give ``module`` a tensor of its own, which compiled graphs take as an argument; no parameter and no buffer."""
    with torch.inference_mode(False):
        token = torch.empty(0, device="cpu")
    module._fx_instrument_token = token
    return token


def take_token(module: nn.Module) -> None:
    module.__dict__.pop("_fx_instrument_token", None)


def tap(value: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """Mark ``value`` in a traced graph as a site's; the framework's backend replaces the mark.

    The body runs on fake tensors while Dynamo traces. Anywhere else the graph went to a backend that does not
    know the mark, and the values would be lost in silence.
    """
    if not is_fake(value) or get_proxy_mode() is not None:
        raise RewriteError(
            "the model was traced for a backend other than the framework's, so its captures would be lost: "
            "let instrument_model compile the model, or pass backend=framework.backend(...) to torch.compile"
        )
    return value


def step_begin(names: tuple[str, ...], *inputs: torch.Tensor) -> None:
    """Mark where a traced forward call of the model begins, with its integer inputs."""


def step_end() -> None:
    """Mark where a traced forward call of the model ends."""


MARKS = (tap, step_begin, step_end)
"""Everything that the hooks leave in a traced graph, and the pass takes out again."""

for mark in MARKS:
    torch.compiler.allow_in_graph(mark)  # type: ignore[no-untyped-call]
    has_side_effect(mark)


def first_tensor(output: object) -> torch.Tensor | None:
    """The first tensor of a module's output, depth first through tuples, lists, dicts and dataclasses."""
    if isinstance(output, torch.Tensor):
        return output
    items: Iterable[object]
    if isinstance(output, Mapping):
        items = output.values()
    elif isinstance(output, (tuple, list)):
        items = output
    elif is_dataclass(output) and not isinstance(output, type):
        items = [getattr(output, field.name) for field in fields(output)]
    else:
        return None
    for item in items:
        tensor = first_tensor(item)
        if tensor is not None:
            return tensor
    return None


def hook(function: Hook) -> Hook:
    """Keep Dynamo from compiling a hook that it meets as a frame of its own: there it runs as Python.

    It does so behind graph breaks, and for the root's hooks. Where Dynamo traces the caller it inlines the hook
    all the same.
    """
    skip_code(function.__code__)
    return function


class Marker:
    """The forward hook of all sites of one instrumented model, and the switch between its two variants.

    Dynamo guards on ``capturing``: a model has one compiled variant with marks and one without.
    """

    def __init__(self, sites: Mapping[int, Site]) -> None:
        self.capturing = False
        self.sink: Sink | None = None
        self.sites = dict(sites)  # id(module) -> site

    @hook
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self.capturing:
            return
        if torch.compiler.is_dynamo_compiling():
            value = first_tensor(output)
            if value is not None:
                tap(value, module._fx_instrument_token)  # type: ignore[arg-type]
        else:
            self._record(module, output)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _record(self, module: nn.Module, output: Any) -> None:
        """Hand over the value of a module that runs outside any graph."""
        value, site, sink = first_tensor(output), self.sites.get(id(module)), self.sink
        if value is not None and site is not None and sink is not None:
            sink.record_eager(site, value)

    # A copy of an instrumented model is a plain model: its hooks stay, switched off for good.
    def __deepcopy__(self, memo: dict[int, Any]) -> Marker:
        return Marker({})

    def __reduce__(self) -> tuple[type[Marker], tuple[dict[int, Site]]]:
        return Marker, ({},)
