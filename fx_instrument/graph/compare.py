"""Is a rewritten graph, without its captures, the graph that it was made from? Compared node by node.

Written apart from the pass, and told nothing by it: what feeds only the outputs behind the original's is a capture,
everything else has to be there once, in the same order, with the same target and the same arguments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx


def difference(plain: fx.GraphModule, rewritten: fx.GraphModule) -> str | None:
    """The first difference between ``plain`` and ``rewritten`` less its captures; None if there is none."""
    plain_outputs, outputs = _outputs(plain), _outputs(rewritten)
    if len(outputs) < len(plain_outputs):
        return f"{len(outputs)} outputs where the original has {len(plain_outputs)}"
    captures = _captures(rewritten, len(plain_outputs))
    dead = _dead(plain)
    numbers: dict[fx.Node, int] = {}
    theirs = [node for node in plain.graph.nodes if node.op != "output"]
    plain_numbers = {node: number for number, node in enumerate(theirs)}
    theirs = _in_order_of(rewritten, theirs)
    for node in rewritten.graph.nodes:
        if node.op == "output":
            continue
        expected = theirs[len(numbers)] if len(numbers) < len(theirs) else None
        found = "a node more than the original" if expected is None else None
        if expected is not None:
            found = _node_difference(expected, node, plain_numbers, numbers, plain, rewritten)
        if node in captures and not (found is None and expected in dead):
            continue
        if found is not None:
            return f"node {len(numbers)} ({node.format_node()}): {found}"
        numbers[node] = plain_numbers[theirs[len(numbers)]]
    if len(numbers) < len(theirs):
        return f"the original's {theirs[len(numbers)].format_node()} is missing"
    kept = outputs[: len(plain_outputs)]
    if _canonical(plain_outputs, plain_numbers) != _canonical(kept, numbers):
        return "the outputs are others than the original's"
    return None


def _in_order_of(gm: fx.GraphModule, nodes: list[fx.Node]) -> list[fx.Node]:
    """``nodes`` with their arguments in the order that those of the same names have in ``gm``.

    A hook on the first module alone makes Dynamo meet a parameter before an input, or after it.
    """
    arguments = {node.target: node for node in nodes if node.op == "placeholder"}
    order = [node.target for node in gm.graph.nodes if node.op == "placeholder"]
    if len(order) != len(arguments) or set(order) != arguments.keys():
        return nodes
    return [arguments[target] for target in order] + [node for node in nodes if node.op != "placeholder"]


def _outputs(gm: fx.GraphModule) -> Sequence[Any]:
    output = next(node for node in reversed(gm.graph.nodes) if node.op == "output")
    values: Any = output.args[0]
    return values if isinstance(values, (tuple, list)) else (values,)


def _captures(gm: fx.GraphModule, num_outputs: int) -> set[fx.Node]:
    """Nodes that feed only outputs behind the first ``num_outputs``."""
    output = next(node for node in reversed(gm.graph.nodes) if node.op == "output")
    own: set[fx.Node] = set()
    fx.node.map_arg(tuple(_outputs(gm)[:num_outputs]), lambda node: own.add(node))
    found: set[fx.Node] = set()
    for node in reversed(gm.graph.nodes):
        if node.op in ("placeholder", "output") or node in own or not node.users:
            continue
        if all(user in found or user is output for user in node.users):
            found.add(node)
    return found


def _dead(gm: fx.GraphModule) -> set[fx.Node]:
    """Nodes whose values nothing uses."""
    found: set[fx.Node] = set()
    for node in reversed(gm.graph.nodes):
        if node.op != "output" and all(user in found for user in node.users):
            found.add(node)
    return found


def _node_difference(
    expected: fx.Node,
    node: fx.Node,
    plain_numbers: Mapping[fx.Node, int],
    numbers: Mapping[fx.Node, int],
    plain: fx.GraphModule,
    rewritten: fx.GraphModule,
) -> str | None:
    if node.op != expected.op or (node.op != "placeholder" and node.target != expected.target):
        return f"the original has {expected.format_node()}"
    if node.op == "get_attr":
        ours, theirs = _attribute(rewritten, node), _attribute(plain, expected)
        if isinstance(ours, fx.GraphModule) and isinstance(theirs, fx.GraphModule):
            inside = difference(theirs, ours)
            return f"inside {node.target}: {inside}" if inside is not None else None
        return None
    if _canonical(expected.args, plain_numbers) != _canonical(node.args, numbers):
        return f"arguments {node.args}, the original's are {expected.args}"
    if _canonical(expected.kwargs, plain_numbers) != _canonical(node.kwargs, numbers):
        return f"arguments {node.kwargs}, the original's are {expected.kwargs}"
    return None


def _attribute(gm: fx.GraphModule, node: fx.Node) -> Any:
    value: Any = gm
    for name in str(node.target).split("."):
        value = getattr(value, name, None)
    return value


def _canonical(argument: Any, numbers: Mapping[fx.Node, int]) -> Any:
    """Arguments as values that compare equal where they mean the same: nodes by their number, types apart."""
    if isinstance(argument, fx.Node):
        return ("node", numbers.get(argument, -1))
    if isinstance(argument, (tuple, list)):
        return tuple(_canonical(item, numbers) for item in argument)
    if isinstance(argument, Mapping):
        return {name: _canonical(value, numbers) for name, value in argument.items()}
    if isinstance(argument, slice):
        parts = (argument.start, argument.stop, argument.step)
        return ("slice", *(_canonical(part, numbers) for part in parts))
    if isinstance(argument, torch.Tensor):
        return ("tensor", id(argument))
    return (type(argument).__name__, repr(argument))
