"""The device's side of a transfer on CUDA: pinned memory, a copy stream a device, events."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Sequence
from typing import Any

import torch

from ..errors import CaptureFailedError
from .engine import Event, Place

_FOR_EVERY_DEVICE = 1
"""``cudaHostRegisterPortable``: of memory that is registered, not allocated, CUDA promises only with it that devices
other than the current one find it page-locked too."""


class CudaEngine:
    """Copies on one stream a device, beside the streams that run the model.

    Sources are held by reference until their copy's event is done; ``record_stream`` would keep the allocator from
    using their memory again for longer than that. No method waits for the device.
    """

    def __init__(self) -> None:
        self._copy_streams: dict[torch.device, Any] = {}
        self._streams: dict[tuple[int, int], Any] = {}
        """By device and address: torch makes an object of a stream anew whenever it is asked."""
        self._gathered: dict[Place, _Gathered] = {}
        self._lock = threading.Lock()

    def allocate(self, num_bytes: int, device: torch.device) -> torch.Tensor:
        # The device that is current here may be another one, which would make a context only for this.
        with torch.cuda.device(device):
            return _PINNED.take(num_bytes)

    def free(self, memory: torch.Tensor) -> None:
        _PINNED.give_back(memory)

    def check(self) -> None:
        if torch.cuda.is_current_stream_capturing():
            raise CaptureFailedError(
                "the model runs inside torch.cuda.graph of your own while a capture is open: its replays would pass "
                "the capture by; leave the capture block first, or use mode='reduce-overhead' for CUDA graphs"
            )

    def mark(self, device: torch.device) -> Event:
        event: Event = self._stream(device).record_event()
        return event

    def copy(self, host: torch.Tensor, value: torch.Tensor, after: Event) -> Event:
        device = value.device
        copy_stream = self._copy_stream(device)
        copy_stream.wait_event(after)
        # Both ways do the same; the shorter one would leave another device current, where that one is.
        if device.index == torch.cuda.current_device():
            before = self._stream(device)
            torch.cuda.set_stream(copy_stream)
            try:
                host.copy_(value, non_blocking=True)
            finally:
                torch.cuda.set_stream(before)
        else:
            with torch.cuda.stream(copy_stream):
                host.copy_(value, non_blocking=True)
        # Whoever waits for it sleeps: by default it would keep a core busy.
        event: Event = copy_stream.record_event(torch.cuda.Event(blocking=True))  # type: ignore[no-untyped-call]
        return event

    def keep(self, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    def gather(
        self,
        place: Place,
        values: Sequence[torch.Tensor],
        starts: Sequence[int],
        num_bytes: int,
        after: Event | None,
    ) -> torch.Tensor:
        device, _ = place
        if after is not None:
            self._stream(device).wait_event(after)
        # Whatever mode the model runs in: what was made in inference mode may only be written in it.
        with torch.inference_mode():
            gathered = self._gathered.get(place)
            if gathered is None or gathered.memory.nbytes < num_bytes:
                memory = torch.empty(num_bytes, dtype=torch.uint8, device=device)
                gathered = self._gathered[place] = _Gathered(memory)
            gathered.fill(values, starts)
        return gathered.memory

    def _stream(self, device: torch.device) -> Any:
        """The one that runs the model on this thread."""
        key = device.index, torch._C._cuda_getCurrentRawStream(device.index)
        stream = self._streams.get(key)
        if stream is None:
            stream = self._streams[key] = torch.cuda.current_stream(device)
        return stream

    def _copy_stream(self, device: torch.device) -> Any:
        with self._lock:
            if device not in self._copy_streams:
                self._copy_streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            return self._copy_streams[device]


class _Gathered:
    """Device memory for the values of one run."""

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory
        self._starts: Sequence[int] | None = None
        self._places: list[tuple[list[int], list[torch.Tensor]]] = []
        """Of each dtype, since one call copies values of one: which values, and where to."""

    def fill(self, values: Sequence[torch.Tensor], starts: Sequence[int]) -> None:
        if starts is not self._starts:
            # The same list for runs of one graph, which differ in their values alone.
            self._starts, self._places = starts, self._find(values, starts)
        for which, places in self._places:
            torch._foreach_copy_(places, [values[index] for index in which])

    def _find(
        self, values: Sequence[torch.Tensor], starts: Sequence[int]
    ) -> list[tuple[list[int], list[torch.Tensor]]]:
        by_dtype: dict[torch.dtype, tuple[list[int], list[torch.Tensor]]] = {}
        for index, (value, start) in enumerate(zip(values, starts, strict=True)):
            if value.numel():
                which, places = by_dtype.setdefault(value.dtype, ([], []))
                which.append(index)
                place = self.memory[start : start + value.nbytes].view(value.dtype).view(value.shape)
                places.append(place)
        return list(by_dtype.values())


class _Pinned:
    """Page-locked memory of exactly the bytes asked for; the last block that was given back is kept for the next.

    torch's own allocator rounds up to a power of two, so up to twice what was set aside would be held.
    """

    def __init__(self) -> None:
        self._idle: torch.Tensor | None = None
        self._lock = threading.Lock()

    def take(self, num_bytes: int) -> torch.Tensor:
        with self._lock:
            idle, self._idle = self._idle, None
        if idle is not None:
            if idle.nbytes == num_bytes:
                return idle
            self._unlock(idle)
        return self._lock_pages(num_bytes)

    def give_back(self, memory: torch.Tensor) -> None:
        with self._lock:
            idle, self._idle = self._idle, memory
        if idle is not None:
            self._unlock(idle)

    def _lock_pages(self, num_bytes: int) -> torch.Tensor:
        pages = mmap.mmap(-1, max(1, num_bytes))
        if hasattr(mmap, "MADV_HUGEPAGE"):
            # Fewer pages to lock, one by one.
            pages.madvise(mmap.MADV_HUGEPAGE)
        with torch.inference_mode(False):
            memory = torch.frombuffer(pages, dtype=torch.uint8)
        status = _runtime().cudaHostRegister(memory.data_ptr(), memory.nbytes, _FOR_EVERY_DEVICE)
        if int(status):
            raise CaptureFailedError(
                f"CUDA can't lock {num_bytes} bytes of host memory for captured values ({status}); lower "
                f"max_memory_gb, or raise the limit on locked memory"
            )
        return memory

    def _unlock(self, memory: torch.Tensor) -> None:
        _runtime().cudaHostUnregister(memory.data_ptr())


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


_PINNED = _Pinned()
