"""How the values of a graph's runs lie together on their way from a device to the host."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from .ring import ALIGNMENT

_SMALL_BYTES = 1 << 20
"""Mean size of values up to which a copy on the device costs less than a copy to the host for each."""
_AS_BYTES = 1 << 20
"""Up to so many ``ctypes.string_at`` copies inputs, which keeps the interpreter's lock, and takes a size as a C int."""
_PIECE_BYTES = 32 << 20
"""The most that values copied together have, so that the first is with the writer before the last has arrived."""


@dataclass(frozen=True, slots=True, eq=False)
class Kinds:
    """What the values of all runs of a graph have in common; asking each of hundreds of tensors takes its time."""

    dtypes: list[torch.dtype]
    shapes: list[torch.Size]
    device: torch.device | None
    """As ``device_of``."""
    are_on_host: bool

    @classmethod
    def of(cls, values: Sequence[torch.Tensor]) -> Kinds:
        return cls(
            [value.dtype for value in values],
            [value.shape for value in values],
            device_of(values),
            all(value.is_cpu for value in values),
        )

    def fit(self, values: Sequence[torch.Tensor]) -> bool:
        """Whether they are those of ``values``: a graph's guards may have been left out."""
        first = values[0]
        return (
            [value.shape for value in values] == self.shapes
            and [value.dtype for value in values] == self.dtypes
            and (first.is_cpu if self.device is None else first.device == self.device)
        )


def device_of(values: Sequence[torch.Tensor]) -> torch.device | None:
    """Where a graph's values come from through pinned memory; None where they don't."""
    for value in values:
        if value.is_cuda:
            return value.device
    return None


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Values of a graph run that share a place in the ring, one after the other."""

    device: torch.device | None
    """None for a value that is on the host all along."""
    first: int
    """Which of the run's values is the first."""
    dtypes: list[torch.dtype] = field(default_factory=list)
    shapes: list[torch.Size] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        return self.ends[-1] if self.ends else 0

    def add(self, value: torch.Tensor) -> None:
        # Values of one dtype lie side by side, as the writer takes them.
        start = _aligned(self.num_bytes, value.dtype.itemsize)
        self.dtypes.append(value.dtype)
        self.shapes.append(value.shape)
        self.starts.append(start)
        self.ends.append(start + value.nbytes)

    def values(self, memory: torch.Tensor) -> list[torch.Tensor]:
        """The values as they lie in ``memory``."""
        parts = zip(self.starts, self.ends, self.dtypes, self.shapes, strict=True)
        return [memory[start:end].view(dtype).view(shape) for start, end, dtype, shape in parts]


@dataclass(frozen=True, slots=True, eq=False)
class RunLayout:
    """How the values of a graph's runs go to the host."""

    layouts: list[Layout]
    gathers: bool
    """Whether they are brought together on the device first."""
    num_bytes: int
    largest_bytes: int
    """Of a value on a device."""
    starts: dict[torch.device, list[int]]
    """Device -> where each of its values begins if they are gathered there."""
    begins: list[int]
    """Where each layout begins on its device."""


def lay_out(values: Sequence[torch.Tensor], overwritten: bool, capacity_bytes: int) -> RunLayout:
    """The layouts of ``values``, as ``PinnedTransfer.start`` takes them, on a ring of ``capacity_bytes``."""
    sizes = [value.nbytes for value in values if value.device.type != "cpu"]
    gathers = overwritten or (len(values) > 1 and sum(sizes) <= _SMALL_BYTES * len(sizes))
    limit = min(_PIECE_BYTES, capacity_bytes // 4) if gathers else 0
    layouts: list[Layout] = []
    for index, value in enumerate(values):
        device = None if value.device.type == "cpu" else value.device
        last = layouts[-1] if layouts else None
        if last is None or device is None or last.device != device or last.num_bytes + value.nbytes > limit:
            last = Layout(device, index)
            layouts.append(last)
        last.add(value)
    starts: dict[torch.device, list[int]] = {}
    ends: dict[torch.device, int] = {}
    begins = []
    for layout in layouts:
        begin = 0
        if layout.device is not None:
            begin = _aligned(ends.get(layout.device, 0))
            ends[layout.device] = begin + layout.num_bytes
            starts.setdefault(layout.device, []).extend(begin + start for start in layout.starts)
        begins.append(begin)
    num_bytes = sum(layout.num_bytes for layout in layouts)
    return RunLayout(layouts, gathers, num_bytes, max(sizes, default=0), starts, begins)


class _Memory:
    """A host tensor's memory, for NumPy; whose array keeps the tensor alive.

    Args:
        kind: NumPy's letter and size of an element.
        sizes: of the array, in elements.
        strides: in bytes; None for row-major.
    """

    __slots__ = ("__array_interface__", "_tensor")

    def __init__(
        self, tensor: torch.Tensor, kind: str, sizes: tuple[int, ...], strides: tuple[int, ...] | None = None
    ) -> None:
        self._tensor = tensor
        data = tensor.data_ptr(), False
        self.__array_interface__ = {
            "version": 3,
            "typestr": kind,
            "shape": sizes,
            "strides": strides,
            "data": data,
        }


def host_bytes(value: torch.Tensor) -> npt.NDArray[np.uint8]:
    """The bytes of a host tensor in row-major order, 1-D; a view that keeps the tensor's memory alive.

    Not through views of torch's: each lets go of the interpreter's lock, which this thread then waits for.
    """
    while torch._C._functorch.is_functorch_wrapped_tensor(value):
        # A copy that was made under one of torch.func's transforms.
        value = torch._C._functorch.get_unwrapped(value)
    if not value.is_contiguous() or value.is_neg() or (value.dtype.is_complex and value.is_conj()):
        value = value.detach().resolve_conj().resolve_neg().contiguous()
    if not value.numel():
        return np.zeros(0, np.uint8)
    return np.asarray(_Memory(value, "|u1", (value.nbytes,)))


class Copied(NamedTuple):
    """An integer or boolean tensor's dtype, shape and bytes, in row-major order."""

    dtype: torch.dtype
    shape: torch.Size
    data: bytes

    @classmethod
    def of(cls, value: torch.Tensor) -> Copied:
        """A copy not made by torch: that would be a value of torch.func's transforms, where one is on its way."""
        if not value.is_cpu:
            value = value.cpu()
        if value.nbytes <= _AS_BYTES and value.is_contiguous():
            # A third of the time that NumPy takes, and this is done before each step.
            return cls(value.dtype, value.shape, ctypes.string_at(value.data_ptr(), value.nbytes))
        size = value.element_size()
        strides = tuple(size * stride for stride in value.stride())
        array = np.asarray(_Memory(value, f"=u{size}", tuple(value.shape), strides))
        return cls(value.dtype, value.shape, array.tobytes())


def _aligned(num_bytes: int, alignment: int = ALIGNMENT) -> int:
    return -(-num_bytes // alignment) * alignment
