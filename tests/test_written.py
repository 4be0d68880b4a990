"""Which arguments a traced graph writes to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_mutation
from torch.utils.checkpoint import checkpoint

from fx_instrument.graph.written import written_arguments


@torch.library.custom_op("written_test::count_up", mutates_args=("counts",))
def _count_up(x: Tensor, counts: Tensor) -> Tensor:
    counts.add_(1)
    return x + 1


_count_up.register_fake(lambda x, counts: torch.empty_like(x))


def changed_in_place(x: Tensor) -> Tensor:
    return x.add_(1)


def changed_through_a_view(x: Tensor) -> Tensor:
    x.view(-1)[1:].mul_(2)
    return x + 1


def assigned_to(x: Tensor) -> Tensor:
    x[0] = 3
    return x + 1


def given_as_out(x: Tensor) -> Tensor:
    return torch.add(x.clone(), 1, out=x)


def changed_by_an_op(x: Tensor) -> Tensor:
    return torch.ops.written_test.count_up(torch.ones(2), x)


def named_to_an_op(x: Tensor) -> Tensor:
    return torch.ops.written_test.count_up.default(torch.ones(2), counts=x)


def changed_in_a_body(x: Tensor) -> Any:
    return checkpoint(lambda y: y.add_(1) * 2, x, use_reentrant=False)


def changed_in_a_list(x: Tensor) -> Tensor:
    torch._foreach_add_([x, torch.ones(2, dtype=torch.int64)], 1)
    return x + 1


def changed_row_by_row(x: Tensor) -> Any:
    return torch.vmap(lambda row: row.add_(1) * 2)(x)


def only_read(x: Tensor) -> Tensor:
    return torch.ops.written_test.count_up(x, torch.zeros(2, dtype=torch.int64)) + x.clone().add_(1)[:, :1]


def read_in_a_body(x: Tensor) -> Any:
    return checkpoint(lambda y: y * 2, x, use_reentrant=False)


def traced(function: Callable[..., Any], *args: Any) -> torch.fx.GraphModule:
    graphs: list[torch.fx.GraphModule] = []

    def keep(gm: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        graphs.append(gm)
        return gm.forward

    torch.compile(function, backend=keep, fullgraph=True)(*args)
    (gm,) = graphs
    return gm


@pytest.mark.parametrize(
    "function",
    [
        changed_in_place,
        changed_through_a_view,
        assigned_to,
        given_as_out,
        changed_by_an_op,
        named_to_an_op,
        changed_in_a_body,
        changed_in_a_list,
        changed_row_by_row,
    ],
)
def test_what_is_written_to_is_found(function: Callable[[Tensor], Any]) -> None:
    """In place, through a view, by an op's schema, inside a nested graph."""
    gm = traced(function, torch.ones(3, 4, dtype=torch.int64))
    assert [node.op for node in written_arguments(gm)] == ["placeholder"]


def read_row_by_row(x: Tensor) -> Any:
    return torch.vmap(lambda row: (row + 1).add_(1) * 2)(x)


@pytest.mark.parametrize("function", [only_read, read_in_a_body, read_row_by_row])
def test_what_is_only_read_is_not(function: Callable[[Tensor], Any]) -> None:
    """An op that writes to another argument, a copy that is written to."""
    assert not written_arguments(traced(function, torch.ones(3, 4, dtype=torch.int64)))


@pytest.mark.parametrize("how", ["positional", "keywords", "packet"])
def test_running_statistics_are_written_to(how: str) -> None:
    """By no schema's word."""

    def normalised(x: Tensor, mean: Tensor, var: Tensor) -> Any:
        if how == "positional":
            return torch.nn.functional.batch_norm(x, mean, var, None, None, True)
        if how == "keywords":
            return torch.nn.functional.batch_norm(x, running_mean=mean, running_var=var, training=True)
        return torch.ops.aten.batch_norm(x, None, None, mean, var, True, 0.1, 1e-5, False)

    gm = traced(normalised, torch.ones(3, 4), torch.zeros(4), torch.ones(4))
    assert written_arguments(gm) == gm.graph.find_nodes(op="placeholder")[1:]


def test_a_kernel_of_the_models_own_may_write_to_all_that_it_takes() -> None:
    """A Triton kernel has no graph to look into."""
    gm = traced(only_read, torch.ones(3, 4, dtype=torch.int64))
    (placeholder,) = gm.graph.find_nodes(op="placeholder")
    with gm.graph.inserting_after(placeholder):
        gm.graph.call_function(triton_kernel_wrapper_mutation, (), {"kwargs": {"x_ptr": placeholder}})
    assert written_arguments(gm) == [placeholder]
