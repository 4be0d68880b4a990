"""Marks for sites that are ops: planted where a module's forward ends, turned into taps behind its ops.

    traced   %attn  = scaled_dot_product_attention(...)  after   %attn = scaled_dot_product_attention(...)
             %out   = linear(...)                                %flat = flatten(transpose(%attn))
             %scope = op_scope(%token)                           %tap  = tap(%flat, %token)
                                                                 %out  = linear(...)

Which ops are the module's own is told by the module that Dynamo notes on every node.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from .marker import Marker, hook, is_exporting, op_scope, tap
from .ops import ATTENTION_OPS, heads_joined

_OPS = frozenset(ATTENTION_OPS.values())


class ScopeMarker:
    """The forward hook of all modules with an op that is a site."""

    def __init__(self, marker: Marker, *, is_live: bool = True) -> None:
        self.marker = marker
        self.is_live = is_live

    @hook
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self.marker.capturing or is_exporting():
            return
        if torch.compiler.is_dynamo_compiling():
            op_scope(module._fx_instrument_op_token)  # type: ignore[arg-type]

    # As the marker itself: in a copy of the model it stays, switched off for good.
    def __deepcopy__(self, memo: dict[int, Any]) -> ScopeMarker:
        return ScopeMarker(Marker({}), is_live=False)

    def __reduce__(self) -> tuple[Callable[[], ScopeMarker], tuple[()]]:
        return _switched_off, ()


def _switched_off() -> ScopeMarker:
    return ScopeMarker(Marker({}), is_live=False)


def plant_op_taps(graph: fx.Graph) -> None:
    """Replace every scope in ``graph`` by taps behind the ops of its module's call, in place.

    A scope without such an op (a graph break stands between them) leaves nothing: the site stays silent then, which
    an open capture reports.
    """
    for scope in [node for node in graph.nodes if node.op == "call_function" and node.target is op_scope]:
        (token,) = scope.args
        where = _innermost(scope)
        for node in list(graph.nodes):
            if node.op == "call_function" and node.target in _OPS and _innermost(node) == where:
                _plant(graph, node, token)
        graph.erase_node(scope)


def _plant(graph: fx.Graph, node: fx.Node, token: Any) -> None:
    fake = node.meta["example_value"]
    value = node
    steps: tuple[tuple[Callable[..., Any], tuple[Any, ...]], ...] = ()
    if fake.dim() >= 4:
        steps = ((torch.transpose, (-3, -2)), (torch.flatten, (-2,)))
    after = node.next
    with graph.inserting_before(after):
        for function, arguments in steps:
            new = graph.call_function(function, (value, *arguments))
            with fake.fake_mode, torch.no_grad():
                fake = function(fake, *arguments)
            new.meta = {**node.meta, "example_value": fake}
            value = new
        mark = graph.call_function(tap, (value, token))
    mark.meta = {**node.meta, "example_value": fake}


def _innermost(node: fx.Node) -> str | None:
    stack = node.meta.get("nn_module_stack") or {}
    return next(reversed(stack), None)


@contextlib.contextmanager
def seen_ops(modules: Mapping[str, nn.Module], keep: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """Show ``keep`` (site, value) of every op that the ``modules`` (by site) call themselves, in eager mode."""
    running: list[nn.Module] = []
    names = {id(module): name for name, module in modules.items()}

    class See(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            value = function(*args, **(kwargs or {}))
            if function in _OPS and running and id(running[-1]) in names:
                keep(names[id(running[-1])], heads_joined(value))
            return value

    handles = [
        nn.modules.module.register_module_forward_pre_hook(lambda module, args: running.append(module)),
        nn.modules.module.register_module_forward_hook(lambda module, args, output: _leave(running)),
    ]
    try:
        with See():
            yield
    finally:
        for handle in handles:
            handle.remove()


def _leave(running: list[nn.Module]) -> None:
    running.pop()
