"""A model that costs next to nothing and says a lot, and what each of its values must be."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from fx_instrument import HookConfig, InstrumentationConfig, InstrumentationFramework

_POOL_ELEMENTS = 1 << 21


class Site(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        # A parameter each: by its identity captured values find their site.
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


class Loud(nn.Module):
    """Each of its sites returns the input times a power of two: exact, so that the values are known."""

    def __init__(self, num_sites: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Site(2.0**number) for number in range(num_sites))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            layer(x)
        return x.new_zeros(())


@functools.cache
def _pool() -> torch.Tensor:
    return torch.randn(_POOL_ELEMENTS, generator=torch.Generator().manual_seed(0))


def step_input(step: int, shape: tuple[int, ...]) -> torch.Tensor:
    """The input of a step: noise, and the step's number as its first element."""
    elements = torch.Size(shape).numel()
    start = step * 7919 % (_POOL_ELEMENTS - elements)
    value = _pool()[start : start + elements].clone()
    value[0] = step
    return value.view(shape)


def instrumented(num_sites: int, **config: Any) -> tuple[Loud, InstrumentationFramework]:
    model = Loud(num_sites).requires_grad_(False)
    framework = InstrumentationFramework(
        InstrumentationConfig(hook_config=HookConfig(target_layers=["layers.*"]), **config)
    )
    framework.instrument_model(model, backend="eager")
    return model, framework
