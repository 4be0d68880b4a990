"""What eager forward hooks see: the reference that captures are compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

Key = tuple[str, int, int]


def first_tensor(output: Any) -> torch.Tensor:
    """The first tensor of a module's output, depth first; written anew so that it can disagree."""
    while not isinstance(output, torch.Tensor):
        values = list(output.values()) if hasattr(output, "values") else list(output)
        output = next(value for value in values if value is not None)
    return output


def eager_values(
    model: nn.Module, names: Iterable[str], run: Callable[[nn.Module], Any]
) -> dict[Key, torch.Tensor]:
    """(site, step, call) -> value, of an eager run of ``run(model)``; a step is a forward call of ``model``."""
    values: dict[Key, torch.Tensor] = {}
    calls: dict[str, int] = {}
    step = -1

    def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal step
        step += 1
        calls.clear()

    def hook_of(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            call = calls.get(name, 0)
            calls[name] = call + 1
            values[name, step, call] = first_tensor(output).detach().clone()

        return hook

    handles = [model.register_forward_pre_hook(begin, with_kwargs=True)]
    handles += [model.get_submodule(name).register_forward_hook(hook_of(name)) for name in names]
    try:
        run(model)
    finally:
        for handle in handles:
            handle.remove()
    return values


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal shape, dtype and bytes (NaNs with equal bits are equal)."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    return torch.equal(
        left.contiguous().view(-1).view(torch.uint8), right.contiguous().view(-1).view(torch.uint8)
    )
