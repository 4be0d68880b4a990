"""Values of graph runs that the writer takes as one piece of memory instead of hundreds.

Small ones that lie apart are copied together, on the drain thread; what came from a device together lies so already.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from ..errors import CaptureFailedError
from .layout import host_bytes

_SMALL_BYTES = 32 << 10
"""Mean size of values up to which they are copied together; the writer takes larger ones where they lie."""
_MAX_LAYOUTS = 256
_MAX_RECORDS = 4096
"""Of a part; a page takes more."""
_FLOATS = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})

_Found = TypeVar("_Found")
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
    shape: torch.Size | None
    """Of each value; None if they differ."""


class Part(NamedTuple):
    """Some of the values that lie side by side, of one graph run."""

    layout: Any
    """The writer's."""
    begin: int
    end: int
    """Their bytes, of all that lie there."""
    num_values: int


class Group(NamedTuple):
    """Some of the values that lie apart, of one graph run."""

    layout: Any
    """The writer's."""
    order: Sequence[int]
    """Which of the run's values they are."""
    num_bytes: int


class Records(NamedTuple):
    """What the values of a graph run are; steps of one graph have the same list of sites."""

    site_ids: Sequence[int]
    calls: Sequence[int]
    dtypes: Sequence[torch.dtype]
    shapes: Sequence[torch.Size]
    full_shapes: Sequence[tuple[int, ...]] | None

    def is_like(self, other: Records) -> bool:
        return self.site_ids is other.site_ids and self[1:] == other[1:]

    def some(self, which: slice) -> Records:
        full_shapes = None if self.full_shapes is None else self.full_shapes[which]
        return Records(
            self.site_ids[which], self.calls[which], self.dtypes[which], self.shapes[which], full_shapes
        )


class _Remembered(Generic[_Found]):
    """What ``find`` found for the records of the graphs that were seen: cheap for those of the step before."""

    def __init__(self, find: Callable[[Records], _Found]) -> None:
        self._find = find
        self._known: dict[Any, _Found] = {}
        self._last: tuple[Records, _Found] | None = None

    def of(self, records: Records) -> _Found:
        if self._last is None or not self._last[0].is_like(records):
            key = tuple(None if part is None else tuple(part) for part in records)
            if key not in self._known:
                if len(self._known) >= _MAX_LAYOUTS:
                    self._known.clear()
                self._known[key] = self._find(records)
            self._last = records, self._known[key]
        return self._last[1]


class Packer:
    """Plans packs, by site, and remembers the layouts of the graphs that it has seen.

    Args:
        make_layout: the writer's ``layout``.
        max_bytes: the most that a pack may have; 0 packs nothing.
        page_bytes: the most that a part may have, of values that lie side by side.
    """

    def __init__(self, make_layout: MakeLayout, max_bytes: int, page_bytes: int) -> None:
        self._make_layout = make_layout
        self.max_bytes = max_bytes
        self._page_bytes = page_bytes
        self._plans = _Remembered(self._plan)
        self._parts = _Remembered(self._divide)
        self._groups = _Remembered(self._group)

    def plan(self, records: Records) -> Plan | None:
        """How values that lie apart are packed; None where they are better taken one by one."""
        return self._plans.of(records)

    def parts(self, records: Records) -> Sequence[Part]:
        """How values that lie side by side go to the writer as they lie, as much at once as a page holds; none where
        they are better taken one by one."""
        return self._parts.of(records)

    def groups(self, records: Records) -> Sequence[Group]:
        """How values that lie apart, and are not packed, go to the writer where they lie, as many at once as a page
        holds; none where they are better taken one by one."""
        return self._groups.of(records)

    def _plan(self, records: Records) -> Plan | None:
        num_values, dtype = len(records.shapes), _float_of_all(records)
        if not 2 <= num_values <= _MAX_RECORDS or dtype is None:
            return None
        num_bytes = sum(shape.numel() for shape in records.shapes) * dtype.itemsize
        if not 0 < num_bytes <= min(self.max_bytes, _SMALL_BYTES * num_values):
            return None
        layout, order = self._layout(records)
        first = records.shapes[0]
        return Plan(
            layout, order, num_bytes, dtype, first if records.shapes.count(first) == num_values else None
        )

    def _divide(self, records: Records) -> Sequence[Part]:
        parts = []
        for first, after, begin, end in self._pages_of(records):
            layout, order = self._layout(records.some(slice(first, after)))
            if order is not None:
                return []
            parts.append(Part(layout, begin, end, after - first))
        return parts

    def _group(self, records: Records) -> Sequence[Group]:
        groups = []
        for first, after, begin, end in self._pages_of(records):
            layout, order = self._layout(records.some(slice(first, after)))
            indices = range(after - first) if order is None else order
            groups.append(Group(layout, [first + index for index in indices], end - begin))
        return groups

    def _pages_of(self, records: Records) -> Iterator[tuple[int, int, int, int]]:
        """``(first value, one behind the last, first byte, one behind the last)`` of each page's worth of values in
        their order; nothing where a page can't take them so."""
        dtype = _float_of_all(records)
        if len(records.shapes) < 2 or dtype is None:
            return
        sizes = [shape.numel() * dtype.itemsize for shape in records.shapes]
        if not 0 < min(sizes) <= max(sizes) <= self._page_bytes:
            return
        first = begin = end = 0
        for index, size in enumerate([*sizes, self._page_bytes + 1]):
            if end + size - begin > self._page_bytes or index - first == _MAX_RECORDS:
                yield first, index, begin, end
                first, begin = index, end
            end += size

    def _layout(self, records: Records) -> tuple[Any, list[int] | None]:
        site_ids, calls, dtypes, shapes, full_shapes = records
        order = sorted(range(len(site_ids)), key=lambda index: (site_ids[index], calls[index]))
        rows = [
            (
                site_ids[index],
                calls[index],
                (tuple(shapes[index]), tuple(full_shapes[index]) if full_shapes is not None else None),
            )
            for index in order
        ]
        layout = self._make_layout(str(dtypes[0]).removeprefix("torch."), rows)
        return layout, order if order != list(range(len(order))) else None


def _float_of_all(records: Records) -> torch.dtype | None:
    """The dtype of all values, if it is one, and of floats."""
    dtypes = set(records.dtypes)
    return next(iter(dtypes)) if len(dtypes) == 1 and dtypes <= _FLOATS else None


def join(packs: Sequence[tuple[Plan, Sequence[torch.Tensor]]]) -> list[npt.NDArray[np.uint8]]:
    """The bytes of each pack, all of one dtype, in one piece of memory.

    A single call of torch's, however many packs there are: each lets go of the interpreter's lock, which this thread
    must then get back from the one that runs the model.
    """
    ordered: list[torch.Tensor] = []
    for plan, values in packs:
        ordered += values if plan.order is None else [values[index] for index in plan.order]
    shape = packs[0][0].shape
    if not shape or any(plan.shape != shape for plan, _ in packs):
        ordered = [value.reshape(-1) for value in ordered]
    with torch.no_grad():
        data = host_bytes(torch.cat(ordered))
    starts = list(itertools.accumulate((plan.num_bytes for plan, _ in packs), initial=0))
    if len(data) != starts[-1]:
        raise CaptureFailedError(f"graph runs that leave {starts[-1]} bytes of values left {len(data)}")
    return [data[start:stop] for start, stop in itertools.pairwise(starts)]
