"""Small values of a graph run, copied together on the drain thread: one piece of memory instead of hundreds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .transfer import host_bytes

_SMALL_BYTES = 32 << 10
"""Mean size of values up to which they are copied together; the writer takes larger ones where they lie."""
_MAX_LAYOUTS = 256
_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})

Shape = tuple[tuple[int, ...], "tuple[int, ...] | None"]
MakeLayout = Callable[[str, Iterable[tuple[int, int, Shape]]], Any]


class Packer:
    """Packs values by site, and remembers the layouts of the graphs that it has seen.

    Args:
        make_layout: the writer's ``layout``.
        max_bytes: the most that a pack may have; 0 packs nothing.
    """

    def __init__(self, make_layout: MakeLayout, max_bytes: int) -> None:
        self._make_layout = make_layout
        self._max_bytes = max_bytes
        self._known: dict[Any, tuple[Any, list[int] | None]] = {}

    def pack(
        self,
        site_ids: Sequence[int],
        calls: Sequence[int],
        values: Sequence[torch.Tensor],
        full_shapes: Sequence[tuple[int, ...]] | None,
        num_bytes: int,
    ) -> tuple[Any, npt.NDArray[np.uint8]] | None:
        """``(layout, bytes)`` of the values; None where they are better taken one by one."""
        if len(values) < 2 or not 0 < num_bytes <= min(self._max_bytes, _SMALL_BYTES * len(values)):
            return None
        dtype = values[0].dtype
        shapes = [value.shape for value in values]
        if dtype not in _DTYPES or any(value.dtype is not dtype for value in values):
            return None
        key = (dtype, tuple(site_ids), tuple(calls), tuple(shapes), full_shapes and tuple(full_shapes))
        known = self._known.get(key)
        if known is None:
            known = self._layout(dtype, site_ids, calls, shapes, full_shapes)
            if len(self._known) >= _MAX_LAYOUTS:
                self._known.clear()
            self._known[key] = known
        layout, order = known
        if order is not None:
            values = [values[index] for index in order]
        return layout, _joined(values, shapes)

    def _layout(
        self,
        dtype: torch.dtype,
        site_ids: Sequence[int],
        calls: Sequence[int],
        shapes: Sequence[torch.Size],
        full_shapes: Sequence[tuple[int, ...]] | None,
    ) -> tuple[Any, list[int] | None]:
        order = sorted(range(len(site_ids)), key=lambda index: (site_ids[index], calls[index]))
        records = [
            (
                site_ids[index],
                calls[index],
                (tuple(shapes[index]), tuple(full_shapes[index]) if full_shapes is not None else None),
            )
            for index in order
        ]
        layout = self._make_layout(str(dtype).removeprefix("torch."), records)
        return layout, order if order != list(range(len(order))) else None


def _joined(values: Sequence[torch.Tensor], shapes: Sequence[torch.Size]) -> npt.NDArray[np.uint8]:
    """The values' bytes one after another: a call of torch's, which lets go of the interpreter's lock."""
    first = shapes[0]
    with torch.no_grad():
        if first and all(shape == first for shape in shapes):
            return host_bytes(torch.cat(list(values)))
        return host_bytes(torch.cat([value.reshape(-1) for value in values]))
