"""Which of its arguments a traced graph writes to."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket

_IN_PLACE = frozenset(
    {operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv}
    | {operator.imatmul, operator.iand, operator.ior, operator.ixor, operator.ipow, operator.imod}
)
_STATISTICS = ("running_mean", "running_var")
"""Arguments that normalisations write to when they train; their schemas don't say so."""


def written_arguments(gm: fx.GraphModule) -> list[fx.Node]:
    """Arguments that the graph may write to, by the storage that they share with what is written."""
    storages = {_storage(value) for node in gm.graph.nodes for value in _written(gm, node)} - {None}
    found = []
    for node in gm.graph.nodes:
        if node.op != "placeholder":
            continue
        value = node.meta.get("example_value")
        if isinstance(value, torch.Tensor) and (_storage(node) in storages or _version(value) > 0):
            found.append(node)
    return found


def _written(gm: fx.GraphModule, node: fx.Node) -> Iterator[fx.Node]:
    """The arguments that a node writes to, or may."""
    target: Any = node.target
    nodes = [argument for argument in node.args if isinstance(argument, fx.Node)]
    out = node.kwargs.get("out")
    if isinstance(out, fx.Node):
        yield out
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    if node.op == "call_function" and isinstance(target, HigherOrderOperator):
        found = [getattr(gm, str(n.target), None) for n in node.all_input_nodes if n.op == "get_attr"]
        bodies = [body for body in found if isinstance(body, fx.GraphModule)]
        # A Triton kernel of the model's own has no body to look into.
        if name.startswith("triton_kernel_wrapper") or any(map(_writes, bodies)):
            yield from (argument for argument in node.all_input_nodes if argument.op != "get_attr")
    elif node.op == "call_function" and isinstance(target, (OpOverload, OpOverloadPacket)):
        overloads = [target] if isinstance(target, OpOverload) else _overloads(target)
        for overload in overloads:
            yield from _written_by(overload._schema, node)
    elif name in ("batch_norm", "instance_norm"):
        named = (node.kwargs.get(name) for name in _STATISTICS)
        yield from nodes[1:3]
        yield from (value for value in named if isinstance(value, fx.Node))
    elif node.op in ("call_function", "call_method") and node.args:
        in_place = name.endswith("_") and not name.endswith("__")
        if target in _IN_PLACE or in_place or node.kwargs.get("inplace"):
            first = node.args[0]
            yield from (value for value in _listed(first) if isinstance(value, fx.Node))


def _overloads(packet: OpOverloadPacket) -> list[OpOverload]:
    names: list[str] = packet.overloads()  # type: ignore[no-untyped-call]
    return [getattr(packet, name) for name in names]


def _written_by(schema: torch.FunctionSchema, node: fx.Node) -> Iterator[fx.Node]:
    for index, argument in enumerate(schema.arguments):
        is_write = argument.alias_info is not None and argument.alias_info.is_write
        if is_write or argument.name in _STATISTICS:
            value = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
            yield from (value for value in _listed(value) if isinstance(value, fx.Node))


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (tuple, list)) else (value,)


def _writes(body: fx.GraphModule) -> bool:
    return any(True for node in body.graph.nodes for _ in _written(body, node))


def _storage(node: fx.Node) -> int | None:
    value = node.meta.get("example_value")
    while isinstance(value, torch.Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(value):
        # Under torch.vmap it stands for the rows of another one, in that one's memory.
        value = torch._C._functorch.get_unwrapped(value)
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
        return None
    cdata: int = value.untyped_storage()._cdata
    return cdata


def _version(value: torch.Tensor) -> int:
    return 0 if value.is_inference() else value._version
