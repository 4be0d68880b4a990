"""Marks inside nested graphs (activation checkpointing, nested compile regions), lifted to the graph around them.

    body     %mlp = linear(...)                      body     %mlp   = linear(...)
             %tap = tap(%mlp, %token)                         %clone = clone(detach(%mlp))
             return (%out,)                                   return (%out, %clone)

    before   %call = checkpoint(body, %x, %t)        after    %call  = checkpoint(body, %x)
             %out  = getitem(%call, 0)                        %out   = getitem(%call, 0)
                                                              %value = getitem(%call, 1)
                                                              %tap   = tap(%value, %t)

A region that is called once a layer has one body for all; each call gets marks of its own.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..errors import RewriteError
from .marker import MARKS, tap
from .scope import plant_op_taps

# Calls whose body runs once, on the operands behind it, and returns its outputs: what may get more of them.
_LIFTABLE = frozenset(
    {
        "tag_activation_checkpoint",
        "wrap_activation_checkpoint",
        "invoke_subgraph",
        "wrap",
        "wrap_with_autocast",
    }
)


@dataclass(frozen=True, slots=True)
class _Lifted:
    """A mark that left its body: which output has its value, and which operand was its token."""

    output: int
    token: int
    meta: dict[str, Any]


def has_marks(gm: fx.GraphModule) -> bool:
    return any(True for _ in _marks(gm.graph))


def lift_marks(gm: fx.GraphModule) -> None:
    """Lift the marks of all nested graphs into ``gm.graph``, in place; bodies are replaced by copies.

    Raises:
        RewriteError: a mark stands in a nested graph that may run never, or more than once (``cond``, loops).
    """
    bodies: dict[str, tuple[fx.GraphModule, list[_Lifted]]] = {}
    for node in list(gm.graph.nodes):
        if node.op != "call_function":
            continue
        for position, argument in enumerate(node.args):
            if not (isinstance(argument, fx.Node) and argument.op == "get_attr"):
                continue
            name = str(argument.target)
            body = getattr(gm, name, None) if "." not in name else gm.get_submodule(name)
            if not isinstance(body, fx.GraphModule):
                continue
            if name not in bodies:
                bodies[name] = _lift_body(body, node, name)
            _mark_call(gm.graph, node, position, bodies[name][1])
    for name, (body, lifted) in bodies.items():
        if lifted:
            gm.set_submodule(name, body)
    gm.recompile()


def _lift_body(body: fx.GraphModule, call: fx.Node, name: str) -> tuple[fx.GraphModule, list[_Lifted]]:
    """A copy of ``body`` that returns the values of its marks behind its own outputs."""
    copied = fx.GraphModule(body, copy_graph(body.graph)[0], type(body).__name__)
    copied.meta = body.meta.copy()
    plant_op_taps(copied.graph)
    lift_marks(copied)
    graph = copied.graph
    marks = list(_marks(graph))
    if not marks:
        return body, []
    kind = getattr(call.target, "__name__", str(call.target))
    if kind not in _LIFTABLE:
        raise RewriteError(
            f"a site runs inside the nested graph {name!r} of {kind}, which may run never or more than once, so its "
            f"values can't be captured exactly"
        )
    if any(mark.target is not tap for mark in marks):
        raise RewriteError(f"a forward call of the whole model runs inside the nested graph {name!r}")
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    (values,) = output.args
    if not isinstance(values, (tuple, list)):
        raise RewriteError(f"the nested graph {name!r} returns {values!r}, a tuple was expected")
    lifted: list[_Lifted] = []
    extra: list[fx.Node] = []
    for mark in marks:
        source: Any = mark.args[0]
        token: Any = mark.args[1]
        fake = source.meta["example_value"]
        with fake.fake_mode, torch.no_grad():
            fake = fake.detach().clone()
        meta = {**source.meta, "example_value": fake}
        with graph.inserting_before(mark):
            detached = graph.call_function(torch.detach, (source,))
            kept = graph.call_function(torch.clone, (detached,))
        detached.meta, kept.meta = dict(meta), dict(meta)
        where = placeholders.index(token)
        lifted.append(_Lifted(len(values) + len(extra), where, {**mark.meta, "example_value": fake}))
        extra.append(kept)
        mark.replace_all_uses_with(source)
        graph.erase_node(mark)
    output.args = ((*values, *extra),)
    for where in {mark.token for mark in lifted}:
        graph.erase_node(placeholders[where])
    graph.lint()
    copied.recompile()
    return copied, lifted


def _mark_call(graph: fx.Graph, call: fx.Node, position: int, lifted: list[_Lifted]) -> None:
    """Take the new outputs of one call of a body, and mark them in the graph around it."""
    if not lifted:
        return
    # Behind the body stand its operands; invoke_subgraph has the region's name between.
    places = [index for index in range(position + 1, len(call.args)) if not isinstance(call.args[index], str)]
    operands = [call.args[index] for index in places]
    tokens = {places[mark.token] for mark in lifted}
    call.args = tuple(argument for index, argument in enumerate(call.args) if index not in tokens)
    call.meta["example_value"] = (
        *call.meta["example_value"],
        *(mark.meta["example_value"] for mark in lifted),
    )
    after = call.next
    for mark in lifted:
        with graph.inserting_before(after):
            value = graph.call_function(operator.getitem, (call, mark.output))
            value.meta = dict(mark.meta)
            new = graph.call_function(tap, (value, operands[mark.token]))
            new.meta = dict(mark.meta)


def _marks(graph: fx.Graph) -> Iterator[fx.Node]:
    return (node for node in graph.nodes if node.op == "call_function" and node.target in MARKS)


def copy_graph(graph: fx.Graph) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """A copy of a graph, its output node included, and which node became which."""
    copied = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    result: Any = copied.graph_copy(graph, mapping, return_output_node=True)
    assert result is not None, "a traced graph has an output node"
    value, old_output = result
    copied.output(value).meta = old_output.meta.copy()
    return copied, mapping
