"""To the host: on CPU a hand-over without a copy, from CUDA through a pinned ring, from elsewhere a plain copy."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .pinned import CopyEngine, Landing, PinnedTransfer


class Transfer:
    """Moves the values of graph runs to the host without holding up the thread that runs the model.

    On CPU the graph's output is memory of its own, so it is taken over as it is.

    Args:
        make_engine: the device's side, made when the first value on a device comes.
        claim: counts in the pinned memory once it is needed, and answers how many bytes it may have.
    """

    def __init__(self, make_engine: Callable[[], CopyEngine], claim: Callable[[], int]) -> None:
        self._make_engine = make_engine
        self._claim = claim
        self._pinned: PinnedTransfer | None = None
        self._lock = threading.Lock()
        self._open = True

    @property
    def stalled_ns(self) -> int:
        """How long graph runs on devices waited for earlier ones' values."""
        return self._pinned.stalled_ns if self._pinned is not None else 0

    def admit(
        self, device: torch.device, *, replays: bool, wait: bool, timeout_s: float | None = None
    ) -> bool:
        """Before a graph runs on ``device``: as ``PinnedTransfer.admit``."""
        return self._through_pinned().admit(device, replays=replays, wait=wait, timeout_s=timeout_s)

    def in_order(self, device: torch.device | None) -> AbstractContextManager[Any]:
        """Held around ``start`` and the hand-over of what it answers."""
        return nullcontext() if device is None else self._through_pinned().order

    def start(self, values: Sequence[torch.Tensor], *, replays: bool = False) -> Landing | list[torch.Tensor]:
        """Begin moving ``values``; called on the thread that ran the graph, right after it.

        Returns:
            The values themselves where they are on the host already.

        Raises:
            BufferTooSmallError: as ``PinnedTransfer.start``.
        """
        kinds = {value.device.type for value in values}
        if kinds <= {"cpu"}:
            return list(values)
        if "cuda" not in kinds:
            return [value.cpu() for value in values]
        return self._through_pinned().start(values, replays=replays)

    def shut(self) -> None:
        """Let nothing wait any more: what would make room has failed."""
        with self._lock:
            self._open = False
            if self._pinned is not None:
                self._pinned.shut()

    def _through_pinned(self) -> PinnedTransfer:
        if self._pinned is None:
            with self._lock:
                if self._pinned is None:
                    pinned = PinnedTransfer(self._claim(), self._make_engine())
                    if not self._open:
                        pinned.shut()
                    self._pinned = pinned
        return self._pinned


def device_of(values: Sequence[torch.Tensor]) -> torch.device | None:
    """Where a graph's values come from through pinned memory; None where they don't."""
    return next((value.device for value in values if value.device.type == "cuda"), None)


def copy_of_input(value: torch.Tensor) -> torch.Tensor:
    """A copy of an integer tensor, of its own and contiguous, where it is.

    On the host without a torch operation, which would let go of the interpreter's lock: the drain thread, that the step
    before has woken, holds it for as long as its work takes (0.2 ms in each step of a toy).
    """
    if type(value) is torch.Tensor and value.device.type == "cpu":
        # A function transform's is a wrapper without memory.
        with contextlib.suppress(RuntimeError):
            array = value.numpy()
            copy = np.frombuffer(bytearray(array.tobytes()), array.dtype)
            return torch.from_numpy(copy.reshape(array.shape))
    return value.detach().clone(memory_format=torch.contiguous_format)


class _Memory:
    """A host tensor as NumPy takes it, which keeps it alive."""

    __slots__ = ("__array_interface__", "_tensor")

    def __init__(self, tensor: torch.Tensor, num_bytes: int) -> None:
        self._tensor = tensor
        self.__array_interface__ = {
            "version": 3,
            "typestr": "|u1",
            "shape": (num_bytes,),
            "data": (tensor.data_ptr(), False),
        }


def host_bytes(value: torch.Tensor) -> npt.NDArray[np.uint8]:
    """The bytes of a host tensor in row-major order, 1-D; a view that keeps the tensor's memory alive.

    Of a contiguous tensor without a torch operation: each lets go of the interpreter's lock, which the model's thread
    then takes and has to be waited for, value by value.
    """
    if not value.is_contiguous() or value.is_complex():
        value = torch.view_as_real(value.detach().resolve_conj()) if value.is_complex() else value.detach()
        value = value.contiguous()
    num_bytes = value.nbytes
    if not num_bytes:
        return np.zeros(0, np.uint8)
    try:
        memory = _Memory(value, num_bytes)
    except RuntimeError:
        array: npt.NDArray[np.uint8] = value.detach().view(-1).view(torch.uint8).numpy()
        return array
    return np.asarray(memory)
