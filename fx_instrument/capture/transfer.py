"""Device to host: on CPU a hand-over without a copy; from an accelerator through pinned memory on a copy stream."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch


class Transfer:
    """Moves the values of graph runs to the host without holding up the thread that runs the model.

    On CPU the graph's output is memory of its own, so it is taken over as it is. On CUDA the copies go to pinned
    memory (torch's caching host allocator, so the ``cudaHostAlloc`` of about 3 ms is paid once a size) on one copy
    stream a device; the sources are held until the event behind them is done, since the allocator may reuse what
    the graph has dropped. The CUDA path has not been run on a GPU yet.
    """

    def __init__(self) -> None:
        self._copy_streams: dict[torch.device, Any] = {}
        self._lock = threading.Lock()

    def start(self, values: Sequence[torch.Tensor]) -> Landing:
        """Begin moving ``values``; called on the thread that ran the graph, right after it."""
        device = next((value.device for value in values if value.device.type != "cpu"), None)
        if device is None:
            return Landing(list(values), None, None)
        if device.type != "cuda":
            return Landing([value.cpu() for value in values], None, None)
        copy_stream = self._copy_stream(device)
        copy_stream.wait_stream(torch.cuda.current_stream(device))
        host = []
        with torch.cuda.stream(copy_stream):
            for value in values:
                slot = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
                slot.copy_(value, non_blocking=True)
                host.append(slot)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(copy_stream)
        return Landing(host, done, list(values))

    def before_graph(self) -> None:
        """Make devices, not the host, wait for earlier copies: a CUDA graph's next replay overwrites their sources."""
        for device, copy_stream in self._copy_streams.items():
            torch.cuda.current_stream(device).wait_stream(copy_stream)

    def _copy_stream(self, device: torch.device) -> Any:
        with self._lock:
            if device not in self._copy_streams:
                self._copy_streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            return self._copy_streams[device]


class Landing:
    """Values on their way to the host."""

    __slots__ = ("_done", "_host", "_sources")

    def __init__(self, host: list[torch.Tensor], done: Any, sources: list[torch.Tensor] | None) -> None:
        self._host = host
        self._done = done
        self._sources = sources

    def wait(self) -> list[torch.Tensor]:
        """The values in host memory; the device's memory is let go."""
        if self._done is not None:
            self._done.synchronize()
            self._sources = None
        return self._host


def host_bytes(value: torch.Tensor) -> npt.NDArray[np.uint8]:
    """The bytes of a host tensor in row-major order, 1-D; a view that keeps the tensor's memory alive."""
    flat = value.detach().contiguous().view(-1)
    if flat.numel() == 0:
        return np.zeros(0, np.uint8)
    array: npt.NDArray[np.uint8] = flat.view(torch.uint8).numpy()
    return array
