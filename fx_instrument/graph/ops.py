"""Attention that is known by its op alone: sites of modules whose own ``forward`` calls it, no module around it.

Such a site is named ``<module>.scaled_dot_product_attention`` (the model's own: without the dot). Its value is the
op's output with the heads side by side, (batch, tokens, heads * head size), as other attention sites have it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn
from torch.nn import functional

ATTENTION_OPS: dict[str, Callable[..., Any]] = {
    "scaled_dot_product_attention": functional.scaled_dot_product_attention
}
# Calls of calls are followed so far from a module's forward: through helpers, not through a whole library.
_DEPTH = 4


def op_of(model: nn.Module, name: str) -> tuple[nn.Module, str | None]:
    """The module that a site belongs to, and the op in it that is the site; None if the module itself is."""
    path, _, last = name.rpartition(".")
    if last in ATTENTION_OPS:
        owner = model.get_submodule(path)
        if not isinstance(getattr(owner, last, None), nn.Module):
            return owner, last
    return model.get_submodule(name), None


def heads_joined(value: Any) -> Any:
    """(..., heads, tokens, size) -> (..., tokens, heads * size); a value without heads as it is."""
    return value if value.dim() < 4 else torch.flatten(torch.transpose(value, -3, -2), -2)


def find_op_sites(model: nn.Module) -> Iterator[str]:
    """Names of the ops that modules of ``model`` call in their own ``forward``, as far as its code shows."""
    for name, module in model.named_modules():
        for op in sorted(_named_in(type(module).forward, type(module), _DEPTH) & ATTENTION_OPS.keys()):
            yield f"{name}.{op}" if name else op


def _named_in(function: Any, owner: type, depth: int) -> frozenset[str]:
    """Every name that the code of ``function`` uses, through its module's functions and its class's methods."""
    function = getattr(function, "__wrapped__", function)
    if not isinstance(function, FunctionType):
        return frozenset()
    names = set(_names(function.__code__))
    if depth:
        for name in tuple(names):
            inner = getattr(owner, name, None) or function.__globals__.get(name)
            if isinstance(inner, FunctionType) and not _is_torchs(inner):
                names |= _named_in(inner, owner, depth - 1)
    return frozenset(names)


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _is_torchs(value: FunctionType) -> bool:
    return str(value.__module__).partition(".")[0] == "torch"
