"""The pass: capture ops after the marked nodes, delivered as extra outputs of the traced graph.

    before   %attn = linear(...)                      after   %attn = linear(...)
             %tap  = tap(%attn)                               %detach = detach(%attn)
             %h    = add(%res, %attn)                         %clone  = clone(%detach)
             return (%logits,)                                %h      = add(%res, %attn)
                                                              return (%logits, %clone)

Only plain torch functions are inserted, and ``early.hand_over`` where that pays: Inductor elides the clone where the
value is materialised anyway, and the FX-graph and AOTAutograd caches take the graph. The clone stands where the module
returned, so that what is changed in place later (Falcon's ``mlp_output += attention_output``) is captured before.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..errors import RewriteError
from ..sampling import fold_seed, num_samples, place
from . import early
from .marker import MARKS, check_dtype, step_begin, tap
from .nested import copy_graph, has_marks, lift_marks
from .scope import plant_op_taps

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sampling:
    """Keep ``max(1, round(rate * numel))`` elements of each value, at positions that ``seed`` chooses."""

    rate: float
    seed: int


@dataclass(frozen=True, slots=True)
class Planned:
    """One captured value of a graph: whose, and its (symbolic) shape as the fake tensor knows it."""

    token: int
    """Which argument of the traced graph is the token of the module."""
    value: torch.Tensor
    """The site's whole value, fake."""
    kept: torch.Tensor
    """What leaves the graph, fake: the value itself, or its sampled elements."""


@dataclass(frozen=True, slots=True)
class Rewritten:
    """A traced graph with capture ops, and what its extra outputs are."""

    gm: fx.GraphModule
    num_outputs: int
    """Outputs of the original graph; the planned values follow."""
    arguments: tuple[int, ...]
    """Which arguments of the traced graph it still takes: all but the tokens."""
    planned: tuple[Planned, ...]
    sampled: bool
    begins_step: bool
    ends_step: bool
    input_names: tuple[str, ...]
    """Names of the integer inputs of the step that this graph begins."""
    inputs: tuple[int, ...]
    """Where they stand among the traced graph's arguments."""
    hands_over: bool
    """Whether the graph calls ``early.hand_over``, whose result is its last output."""


def insert_captures(
    gm: fx.GraphModule,
    is_wanted: Callable[[fx.Node, int], bool],
    sampling: Sampling | None,
    *,
    hand_over: bool = False,
) -> Rewritten | None:
    """Replace every mark in a copy of ``gm`` by capture ops; None if ``gm`` has no mark.

    Where ``is_wanted(mark, argument index of its token)`` says no, the mark is only removed. With ``hand_over`` the
    values of a graph on the host are handed over before the rest of it runs, where that pays.

    Raises:
        RewriteError: a value is no plain tensor, a graph holds two forward calls of the model, or a mark stands in a
            nested graph that it can't be lifted from.
    """
    if not any(has_marks(child) for child in gm.modules() if isinstance(child, fx.GraphModule)):
        return None
    copy = _copy(gm)
    plant_op_taps(copy.graph)
    lift_marks(copy)
    graph = copy.graph
    planned: list[Planned] = []
    extra: list[fx.Node] = []
    tokens: set[int] = set()
    begins = ends = False
    input_names: tuple[str, ...] = ()
    inputs: tuple[int, ...] = ()
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in MARKS:
            continue
        if node.target is tap:
            source, token = node.args
            index = placeholders.index(token)
            tokens.add(index)
            node.replace_all_uses_with(source)
            if not is_wanted(node, index):
                graph.erase_node(node)
                continue
            _check_plain(source)
            with graph.inserting_before(node):
                kept = _sample(graph, source, sampling) if sampling else _clone(graph, source)
            fakes = source.meta["example_value"], kept.meta["example_value"]
            planned.append(Planned(index, *fakes))
            extra.append(kept)
        elif node.target is step_begin:
            if begins:
                raise RewriteError(
                    "one compiled function calls the instrumented model twice, so steps can't be told apart: compile "
                    "the model itself, or call it once in the function"
                )
            begins = True
            names, *tensors = node.args
            known = [
                (n, placeholders.index(t)) for n, t in zip(names, tensors, strict=True) if t in placeholders
            ]
            input_names = tuple(name for name, _ in known)
            inputs = tuple(index for _, index in known)
        else:
            ends = True
        graph.erase_node(node)
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    (values,) = output.args
    if not isinstance(values, (tuple, list)):
        raise RewriteError(f"the traced graph returns {values!r}, a tuple was expected")
    # Samples would be taken where they are handed over, and all whole values kept until then.
    hands_over = hand_over and sampling is None and _is_on_host(placeholders)
    hands_over = hands_over and early.is_worthwhile(p.kept for p in planned)
    there = [_hand_over(graph, extra)] if hands_over else []
    output.args = ((*values, *extra, *there),)
    # Tokens tell at run time whose values left; to the compiler they would be arguments on another device.
    arguments = []
    for index, placeholder in enumerate(placeholders):
        if index in tokens and not placeholder.users:
            graph.erase_node(placeholder)
        else:
            arguments.append(index)
    graph.lint()
    copy.recompile()
    log.debug("inserted %d captures into a graph of %d nodes", len(planned), len(graph.nodes))
    return Rewritten(
        copy,
        len(values),
        tuple(arguments),
        tuple(planned),
        sampling is not None,
        begins,
        ends,
        input_names,
        inputs,
        hands_over,
    )


def _is_on_host(placeholders: list[fx.Node]) -> bool:
    fakes = (placeholder.meta.get("example_value") for placeholder in placeholders)
    return all(fake.device.type == "cpu" for fake in fakes if isinstance(fake, torch.Tensor))


def _hand_over(graph: fx.Graph, extra: Sequence[fx.Node]) -> fx.Node:
    """Hand over all values behind the last one."""
    with graph.inserting_before(extra[-1].next):
        inserter = _Inserter(graph, extra[-1])
        there = inserter.call(early.hand_over, [fx.Proxy(node, inserter) for node in extra])
        return inserter.call(operator.getitem, there, 0).node


def _copy(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy with its own graph and the same submodules, parameters and what Dynamo noted on graph and nodes."""
    graph, mapping = copy_graph(gm.graph)
    for old, new in mapping.items():
        # Sources name a placeholder's origin in guards; plain graph copies leave these attributes behind.
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    copy = fx.GraphModule(gm, graph, type(gm).__name__)
    copy.meta = gm.meta.copy()
    for name in ("_param_name_to_source", "_backend_id"):
        if hasattr(gm, name):
            setattr(copy, name, getattr(gm, name))
    return copy


def _check_plain(source: fx.Node) -> None:
    value = source.meta["example_value"]
    if type(value) is not FakeTensor or value.layout is not torch.strided:
        raise RewriteError(
            f"a site's value is a {type(value).__name__} of layout {value.layout}; only plain dense tensors can be "
            f"captured: choose other sites"
        )
    check_dtype(value, "a site's value")


class _Inserter(fx.proxy.GraphAppendingTracer):
    """Adds calls at the graph's insertion point, each with the origin of ``like`` and an example value."""

    def __init__(self, graph: fx.Graph, like: fx.Node) -> None:
        super().__init__(graph)
        self._origin = {key: value for key, value in like.meta.items() if key != "example_value"}
        self._fake_mode = like.meta["example_value"].fake_mode

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> fx.Node:
        node = super().create_node(kind, target, args, kwargs, *rest, **more)
        node.meta.update(self._origin)
        fakes, named = fx.node.map_arg((args, kwargs), lambda argument: argument.meta["example_value"])
        with self._fake_mode, torch.no_grad():
            # A node without an example value would keep the AOTAutograd cache from taking the graph.
            method = getattr(fakes[0], target) if kind == "call_method" else None
            node.meta["example_value"] = method(*fakes[1:]) if method is not None else target(*fakes, **named)
        return node

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Proxy:
        return self.create_proxy("call_function", target, args, kwargs)


def _clone(graph: fx.Graph, source: fx.Node) -> fx.Node:
    inserter = _Inserter(graph, source)
    detached = inserter.call(torch.detach, fx.Proxy(source, inserter))
    if _is_row_major(source.meta["example_value"]):
        return inserter.call(torch.clone, detached).node
    # Else it would be copied once more on its way to the file, where no room was made for that.
    return inserter.call(torch.clone, detached, memory_format=torch.contiguous_format).node


def _is_row_major(fake: torch.Tensor) -> bool:
    """Whether a value is known to be contiguous, without a guard on its sizes."""
    expected: int | torch.SymInt = 1
    for size, stride in zip(reversed(fake.shape), reversed(fake.stride()), strict=True):
        if not statically_known_true(stride == expected):
            return False
        expected = expected * size
    return True


def _sample(graph: fx.Graph, source: fx.Node, sampling: Sampling) -> fx.Node:
    """The kept elements, 1-D: positions are computed in the graph, from the (symbolic) size alone."""
    fake = source.meta["example_value"]
    numel: Any = fake.numel()
    inserter = _Inserter(graph, source)
    flat = inserter.call(torch.flatten, inserter.call(torch.detach, fx.Proxy(source, inserter)))
    if isinstance(numel, int) and numel == 0:
        return inserter.call(torch.clone, flat).node
    count: Any
    if isinstance(numel, int):
        count = num_samples(numel, sampling.rate)
    else:
        # As torch specialises on sizes of 1, so on a count of 1: crossing it compiles once more.
        numel = inserter.create_proxy("call_method", "numel", (flat,), {})
        share = inserter.call(operator.mul, sampling.rate, numel)
        count = inserter.call(torch.sym_max, 1, inserter.call(round, share))
    index = inserter.call(torch.arange, count, device=fake.device)
    where = place(index, numel, count, fold_seed(sampling.seed))
    return inserter.call(torch.index_select, flat, 0, where).node
