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

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from torch._dynamo.eval_frame import skip_code
from torch._subclasses.fake_tensor import is_fake
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.fx.node import has_side_effect

from ..errors import RewriteError
from .calls import Calls
from .sink import Sink
from .sites import Site
from .witness import Witness

Hook = TypeVar("Hook", bound=Callable[..., Any])


INTEGER_DTYPES = frozenset(
    {torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64}
    | {torch.int8, torch.int16, torch.int32, torch.int64}
)
"""Of the inputs that are recorded."""
_DTYPES = INTEGER_DTYPES | {
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.complex32, torch.complex64, torch.complex128),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
    torch.float8_e8m0fnu,
}
"""That streams hold; quantised tensors and packed elements of less than a byte are not among them."""

_PLAIN = frozenset({torch.Tensor, nn.Parameter})

_TOKENS = {False: "_fx_instrument_token", True: "_fx_instrument_op_token"}


def give_token(module: nn.Module, *, is_op: bool = False) -> torch.Tensor:
    """Give ``module`` a tensor of its own, which compiled graphs take as an argument; no parameter and no buffer.

    The module and an op in it may both be sites, so each has a token.
    """
    with torch.inference_mode(False):
        token = torch.empty(0, device="cpu")
    setattr(module, _TOKENS[is_op], token)
    return token


def take_token(module: nn.Module) -> None:
    for name in _TOKENS.values():
        module.__dict__.pop(name, None)


def tap(value: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """Mark ``value`` in a traced graph as a site's; the framework's backend replaces the mark.

    The body runs on fake tensors while Dynamo traces. Anywhere else the graph went to a backend that does not
    know the mark, and the values would be lost in silence.
    """
    if not is_fake(value) or get_proxy_mode() is not None:
        raise RewriteError(
            "the model was traced for a backend other than the framework's, so its captures would be lost: "
            "call an instrumented model outside functions that you compile yourself, or instrument it with "
            "backend=None and pass backend=framework.backend(...) to torch.compile"
        )
    return value


def step_begin(names: tuple[str, ...], *inputs: torch.Tensor) -> None:
    """Mark where a traced forward call of the model begins, with its integer inputs."""


def step_end() -> None:
    """Mark where a traced forward call of the model ends."""


def op_scope(token: torch.Tensor) -> None:
    """Mark where a module's forward ends of which an op is a site."""


MARKS = (tap, step_begin, step_end, op_scope)
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
    """Keep Dynamo from compiling a hook, or a call, that it meets as a frame of its own: there it runs as Python.

    It does so behind graph breaks, and for the root's hooks. Where Dynamo traces the caller it inlines the hook
    all the same.
    """
    skip_code(function.__code__)
    return function


def is_exporting() -> bool:
    """Whether ``torch.export`` runs; torch 2.11 takes ``torch.compiler.is_exporting()`` for true in any trace."""
    return torch.compiler._is_exporting_flag


def is_recomputing() -> bool:
    """Whether this thread runs a backward pass: what runs modules there is activation checkpointing, once more."""
    task: int = torch._C._current_graph_task_id()
    return task != -1


class Marker:
    """The forward hook of all sites of one instrumented model, and the switch between its two variants.

    Dynamo guards on ``capturing``: a model has one compiled variant with marks and one without.
    """

    def __init__(self, sites: Mapping[int, Site]) -> None:
        self.capturing = False
        self.sink: Sink | None = None
        self.witness = Witness()
        self.calls = Calls()
        self.sites = dict(sites)  # id(module) -> site

    @hook
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self.capturing or is_exporting():
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
        if value is None or site is None or sink is None or is_recomputing():
            return
        sink = self.calls.sink_here(sink)
        if sink is None:
            return
        value = unwrapped(value, "the output of", site.name)
        if not is_plain(value):
            raise RewriteError(
                f"{site.name} returned a {type(value).__name__} of layout {value.layout}; only plain dense tensors can "
                f"be captured: choose other sites"
            )
        check_dtype(value, f"the output of {site.name}")
        sink.record_eager(site, value)
        self.witness.note(frozenset((site.name,)))

    # A copy of an instrumented model is a plain model: its hooks stay, switched off for good.
    def __deepcopy__(self, memo: dict[int, Any]) -> Marker:
        return Marker({})

    def __reduce__(self) -> tuple[type[Marker], tuple[dict[int, Site]]]:
        return Marker, ({},)


def unwrapped(value: torch.Tensor, what: str, name: str) -> torch.Tensor:
    """A value as the file can hold it, under ``torch.func``'s transforms too.

    Raises:
        RewriteError: it stands for many values at once (``vmap``).
    """
    functorch: Any = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(value):
        if functorch.is_batchedtensor(value):
            raise RewriteError(
                f"{what} {name} is computed under torch.vmap, where a value stands for many calls at once: capture "
                f"without vmap, or give the model the batch itself"
            )
        value = functorch.get_unwrapped(value)
    return value


def check_dtype(value: torch.Tensor, what: str) -> None:
    """RewriteError where streams hold no values of this dtype."""
    if value.dtype not in _DTYPES:
        raise RewriteError(f"{what} has dtype {value.dtype}, which no stream can hold: choose other sites")


def is_plain(value: torch.Tensor) -> bool:
    """A dense tensor and no subclass: its bytes are its values."""
    return type(value) in _PLAIN and value.layout is torch.strided
