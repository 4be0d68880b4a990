"""The device's side of a transfer on CUDA: pinned memory, a copy stream a device, events."""

from __future__ import annotations

import threading
from typing import Any

import torch

from ..errors import CaptureFailedError
from .pinned import Event


class CudaEngine:
    """Copies on one stream a device, beside the streams that run the model.

    Sources are held by reference until their copy's event is done; ``record_stream`` would keep the allocator from
    using their memory again for longer than that. No method waits for the device.
    """

    def __init__(self) -> None:
        self._copy_streams: dict[torch.device, Any] = {}
        self._lock = threading.Lock()

    def allocate(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def mark(self, device: torch.device) -> Event:
        if torch.cuda.is_current_stream_capturing():
            raise CaptureFailedError(
                "the model runs inside torch.cuda.graph of your own while a capture is open: its replays would pass "
                "the capture by; leave the capture block first, or use mode='reduce-overhead' for CUDA graphs"
            )
        event: Event = torch.cuda.current_stream(device).record_event()
        return event

    def copy(self, host: torch.Tensor, value: torch.Tensor, after: Event) -> Event:
        copy_stream = self._copy_stream(value.device)
        copy_stream.wait_event(after)
        with torch.cuda.stream(copy_stream):
            host.copy_(value, non_blocking=True)
            event: Event = copy_stream.record_event()
        return event

    def keep(self, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    def hold(self, device: torch.device) -> None:
        copy_stream = self._copy_streams.get(device)
        if copy_stream is not None:
            torch.cuda.current_stream(device).wait_stream(copy_stream)

    def _copy_stream(self, device: torch.device) -> Any:
        with self._lock:
            if device not in self._copy_streams:
                self._copy_streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            return self._copy_streams[device]
