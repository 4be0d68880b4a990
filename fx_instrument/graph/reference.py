"""What eager forward hooks see of the sites, and how far captured values are from it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..sampling import positions
from .marker import first_tensor
from .ops import op_of
from .rewrite import Sampling
from .roles import Role
from .scope import seen_ops
from .sink import Onlooker
from .sites import Site

TOLERANCES = {"float64": 1e-6, "float32": 1e-3, "float16": 3e-2, "bfloat16": 1e-1}
"""How far a captured value may be from the eager one, relative to the eager one's largest element: what fused
arithmetic was seen to differ by in deep models, with room. Other dtypes must be equal."""


@dataclass(frozen=True, slots=True)
class SiteDifference:
    """How far the captured values of a site are from what an eager forward hook sees."""

    name: str
    role: Role
    calls: int
    bit_equal: bool
    max_difference: float
    """The largest absolute difference of an element."""
    relative_difference: float
    """The same, relative to the largest element of the eager value."""


@contextlib.contextmanager
def eager_values(twin: nn.Module, sites: Sequence[Site]) -> Iterator[dict[tuple[str, int], torch.Tensor]]:
    """(site, call) -> what forward hooks see while the block runs the twin."""
    values: dict[tuple[str, int], torch.Tensor] = {}

    def hook_of(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            value = first_tensor(output)
            if value is not None:
                call = sum(1 for site, _ in values if site == name)
                values[name, call] = value.detach().clone()

        return hook

    owners: dict[str, nn.Module] = {}
    for site in sites:
        module, op = op_of(twin, site.name)
        if op is None:
            module.register_forward_hook(hook_of(site.name))
        else:
            owners[site.name] = module
    if not owners:
        yield values
        return
    with seen_ops(owners, lambda name, value: hook_of(name)(twin, (), value)):
        yield values


class ComparingSink(Onlooker):
    """Compares each captured value with the eager one as it comes, and lets both go."""

    def __init__(self, expected: dict[tuple[str, int], torch.Tensor], sampling: Sampling | None) -> None:
        self.paused = False
        self.unexpected: list[str] = []
        self._expected = expected
        self._sampling = sampling
        self._found: dict[str, list[tuple[bool, float, float, str]]] = {}

    def reserve(self, sites: Sequence[Site], num_bytes: int, **of_a_device: Any) -> None: ...

    def deliver(
        self,
        ticket: Any,
        sites: Sequence[Site],
        values: Sequence[torch.Tensor],
        full_shapes: Sequence[tuple[int, ...]] | None,
    ) -> None:
        for site, value in zip(sites, values, strict=True):
            self._compare(site, value)

    def record_eager(self, site: Site, value: torch.Tensor) -> None:
        value = value.detach()
        self._compare(site, value if self._sampling is None else self._sampled(value))

    def _sampled(self, value: torch.Tensor) -> torch.Tensor:
        assert self._sampling is not None
        if not value.numel():
            return value
        where = positions(value.numel(), self._sampling.rate, self._sampling.seed)
        return value.flatten()[torch.from_numpy(where).to(value.device)]

    def _compare(self, site: Site, value: torch.Tensor) -> None:
        if self.paused:
            return
        calls = self._found.setdefault(site.name, [])
        expected = self._expected.pop((site.name, len(calls)), None)
        if expected is None:
            self.unexpected.append(site.name)
            return
        if self._sampling is not None:
            expected = self._sampled(expected)
        if expected.shape != value.shape or expected.dtype != value.dtype:
            calls.append((False, math.inf, math.inf, str(value.dtype)))
            return
        off = largest_difference(value, expected)
        largest = float(expected.abs().max()) if expected.numel() else 0.0
        relative = off / largest if largest else (0.0 if off == 0 else math.inf)
        dtype = str(value.dtype).removeprefix("torch.")
        calls.append((same_bits(value, expected), off, relative, dtype))

    @property
    def missing(self) -> list[str]:
        """Sites that a hook saw and the capture did not."""
        return sorted({name for name, _ in self._expected})

    def differences(self, sites: Sequence[Site]) -> tuple[SiteDifference, ...]:
        found = []
        for site in sites:
            calls = self._found.get(site.name, [])
            found.append(
                SiteDifference(
                    site.name,
                    site.role,
                    len(calls),
                    all(equal for equal, *_ in calls),
                    max((off for _, off, _, _ in calls), default=0.0),
                    max((relative for _, _, relative, _ in calls), default=0.0),
                )
            )
        return tuple(found)

    def too_far(self) -> Iterator[str]:
        for name, calls in self._found.items():
            for _, _, relative, dtype in calls:
                # NaN is too far as well.
                if not relative <= TOLERANCES.get(dtype, 0.0):
                    yield name
                    break


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    if left.numel() == 0:
        return True
    a, b = (value.contiguous().view(-1).view(torch.uint8) for value in (left, right))
    return torch.equal(a, b)


def largest_difference(left: torch.Tensor, right: torch.Tensor) -> float:
    """The largest absolute difference; infinite where shapes, or places of NaN and infinity, differ."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return math.inf
    if left.numel() == 0 or same_bits(left, right):
        return 0.0
    wide = torch.complex128 if left.is_complex() else torch.float64
    a, b = left.to(wide), right.to(wide)
    off = (a - b).abs()
    off[(a == b) | (a.isnan() & b.isnan())] = 0
    return float(torch.nan_to_num(off, nan=math.inf).max())
