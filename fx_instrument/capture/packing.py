"""Values of graph runs that the writer takes as one piece of memory instead of hundreds.

Small ones that lie apart are copied together, on the drain thread; what came from a device together lies so already.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from .layout import host_bytes

_SMALL_BYTES = 32 << 10
"""Mean size of values up to which they are copied together; the writer takes larger ones where they lie."""
_MAX_LAYOUTS = 256
_MAX_RECORDS = 4096
"""Of a part; a page takes more."""
_FLOATS = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})

Shape = tuple[tuple[int, ...], "tuple[int, ...] | None"]
MakeLayout = Callable[[str, Iterable[tuple[int, int, Shape]]], Any]


class Plan(NamedTuple):
    """How the values of a graph run are packed."""

    layout: Any
    """The writer's."""
    order: list[int] | None
    """Of the values; None if they stay as they come."""
    num_bytes: int
    dtype: torch.dtype


class Part(NamedTuple):
    """Some of the values that lie side by side, of one graph run."""

    layout: Any
    """The writer's."""
    begin: int
    end: int
    """Their bytes, of all that lie there."""
    num_values: int


class _Asked(NamedTuple):
    site_ids: Sequence[int]
    calls: Sequence[int]
    dtypes: Sequence[torch.dtype]
    shapes: Sequence[torch.Size]
    full_shapes: Sequence[tuple[int, ...]] | None


class Packer:
    """Plans packs, by site, and remembers the layouts of the graphs that it has seen.

    Args:
        make_layout: the writer's ``layout``.
        max_bytes: the most that a pack may have; 0 packs nothing.
        page_bytes: the most that a part may have, of values that lie side by side.
    """

    def __init__(self, make_layout: MakeLayout, max_bytes: int, page_bytes: int = 0) -> None:
        self._make_layout = make_layout
        self.max_bytes = max_bytes
        self._page_bytes = page_bytes
        self._known: dict[Any, Plan] = {}
        self._last: tuple[_Asked, Plan | None] | None = None
        self._known_parts: dict[Any, list[Part]] = {}
        self._last_parts: tuple[_Asked, list[Part]] | None = None

    def plan(
        self,
        site_ids: Sequence[int],
        calls: Sequence[int],
        dtypes: Sequence[torch.dtype],
        shapes: Sequence[torch.Size],
        full_shapes: Sequence[tuple[int, ...]] | None,
    ) -> Plan | None:
        """How the values of these dtypes and shapes are packed; None where they are better taken one by one.

        Steps of one graph differ in their values alone: cheap where all else is as it was last time, and ``site_ids``
        the same object.
        """
        asked = _Asked(site_ids, calls, dtypes, shapes, full_shapes)
        if self._last is None or not _same(self._last[0], asked):
            self._last = asked, self._find(*asked)
        return self._last[1]

    def parts(
        self,
        site_ids: Sequence[int],
        calls: Sequence[int],
        dtypes: Sequence[torch.dtype],
        shapes: Sequence[torch.Size],
        full_shapes: Sequence[tuple[int, ...]] | None,
    ) -> Sequence[Part]:
        """How values that lie side by side go to the writer as they lie, as much at once as a page holds; none where
        they are better taken one by one."""
        asked = _Asked(site_ids, calls, dtypes, shapes, full_shapes)
        if self._last_parts is None or not _same(self._last_parts[0], asked):
            key = (
                tuple(dtypes),
                tuple(site_ids),
                tuple(calls),
                tuple(shapes),
                full_shapes and tuple(full_shapes),
            )
            known = self._known_parts.get(key)
            if known is None:
                if len(self._known_parts) >= _MAX_LAYOUTS:
                    self._known_parts.clear()
                known = self._known_parts[key] = self._divide(asked)
            self._last_parts = asked, known
        return self._last_parts[1]

    def _divide(self, asked: _Asked) -> list[Part]:
        site_ids, calls, dtypes, shapes, full_shapes = asked
        dtype = dtypes[0]
        sizes = [shape.numel() * dtype.itemsize for shape in shapes]
        if (
            len(shapes) < 2
            or dtype not in _FLOATS
            or any(other is not dtype for other in dtypes)
            or not 0 < min(sizes) <= max(sizes) <= self._page_bytes
            or not _ascends(site_ids, calls)
        ):
            return []
        parts: list[Part] = []
        first = begin = end = 0
        for index, size in enumerate([*sizes, self._page_bytes + 1]):
            if end + size - begin > self._page_bytes or index - first == _MAX_RECORDS:
                mine = slice(first, index)
                layout, _ = self._layout(
                    dtype, site_ids[mine], calls[mine], shapes[mine], full_shapes and full_shapes[mine]
                )
                parts.append(Part(layout, begin, end, index - first))
                first, begin = index, end
            end += size
        return parts

    def _find(
        self,
        site_ids: Sequence[int],
        calls: Sequence[int],
        dtypes: Sequence[torch.dtype],
        shapes: Sequence[torch.Size],
        full_shapes: Sequence[tuple[int, ...]] | None,
    ) -> Plan | None:
        if len(shapes) < 2 or dtypes[0] not in _FLOATS or any(dtype is not dtypes[0] for dtype in dtypes):
            return None
        dtype = dtypes[0]
        num_bytes = sum(shape.numel() for shape in shapes) * dtype.itemsize
        if not 0 < num_bytes <= min(self.max_bytes, _SMALL_BYTES * len(shapes)):
            return None
        key = (dtype, tuple(site_ids), tuple(calls), tuple(shapes), full_shapes and tuple(full_shapes))
        known = self._known.get(key)
        if known is None:
            layout, order = self._layout(dtype, site_ids, calls, shapes, full_shapes)
            if len(self._known) >= _MAX_LAYOUTS:
                self._known.clear()
            known = self._known[key] = Plan(layout, order, num_bytes, dtype)
        return known

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


def _ascends(site_ids: Sequence[int], calls: Sequence[int]) -> bool:
    order = list(zip(site_ids, calls, strict=True))
    return order == sorted(order)


def _same(last: _Asked, asked: _Asked) -> bool:
    """Steps of one graph have the same list of sites."""
    return (
        last.site_ids is asked.site_ids
        and last.shapes == asked.shapes
        and last.dtypes == asked.dtypes
        and last.calls == asked.calls
        and last.full_shapes == asked.full_shapes
    )


def join(packs: Sequence[tuple[Plan, Sequence[torch.Tensor]]]) -> list[npt.NDArray[np.uint8]]:
    """The bytes of each pack, all of one dtype, in one piece of memory.

    A single call of torch's, however many packs there are: each lets go of the interpreter's lock, which this thread
    must then get back from the one that runs the model.
    """
    ordered: list[torch.Tensor] = []
    for plan, values in packs:
        ordered += values if plan.order is None else [values[index] for index in plan.order]
    first = ordered[0].shape
    if not first or any(value.shape != first for value in ordered):
        ordered = [value.reshape(-1) for value in ordered]
    with torch.no_grad():
        data = host_bytes(torch.cat(ordered))
    starts = list(itertools.accumulate((plan.num_bytes for plan, _ in packs), initial=0))
    return [data[start:stop] for start, stop in itertools.pairwise(starts)]
