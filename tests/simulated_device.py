"""Devices with streams and events that do nothing until they are told to, or waited for."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch

from fx_instrument.capture.engine import Place

DEVICE = torch.device("cuda:0")
SECOND = torch.device("cuda:1")


class Memory:
    """Device memory that an allocator hands out again, with other content, as soon as nobody holds it."""

    def __init__(self, *shape: int, dtype: torch.dtype = torch.uint8) -> None:
        self.data = torch.zeros(shape, dtype=dtype)


class Value:
    """A tensor on the simulated device; owns its memory, or looks at that of a CUDA graph."""

    def __init__(self, device: Device, memory: Memory, owns: bool, on: torch.device = DEVICE) -> None:
        self.device, self.dtype = on, memory.data.dtype
        self.is_cuda, self.is_cpu = True, False
        self.memory = memory
        self.nbytes, self.shape = memory.data.nbytes, memory.data.shape
        self._owns = owns
        self._simulated = device
        self._whole: Value | None = None

    def numel(self) -> int:
        return self.shape.numel()

    def detach(self) -> Value:
        return self

    def __getitem__(self, part: slice) -> Value:
        """A view: what it looks at lives as long as it."""
        memory = Memory(0)
        memory.data = self.memory.data[part]
        view = Value(self._simulated, memory, owns=False, on=self.device)
        view._whole = self
        return view

    def __del__(self) -> None:
        if self._owns:
            # The allocator orders reuse behind the stream that runs the model, not behind the copies.
            data = self.memory.data
            self._simulated.computes[self.device].append(lambda: data.fill_(0x6E))


class Event:
    def __init__(self, device: Device) -> None:
        self._device = device
        self.reached = False

    def reach(self) -> None:
        self.reached = True

    def synchronize(self) -> None:
        self._device.run_until(lambda: self.reached)


class Wait:
    def __init__(self, event: Event) -> None:
        self.event = event


Stream: TypeAlias = "deque[Callable[[], object] | Wait]"


class Device:
    """The engine of a transfer, and the two streams behind it; there is a second device with two more."""

    def __init__(self) -> None:
        self.computes: dict[torch.device, Stream] = {DEVICE: deque(), SECOND: deque()}
        self.copies_of: dict[torch.device, Stream] = {DEVICE: deque(), SECOND: deque()}
        self.compute, self.copies = self.computes[DEVICE], self.copies_of[DEVICE]
        self.allocated: list[int] = []
        self.freed: list[int] = []
        self._gathered: dict[Place, Value] = {}
        self._lock = threading.RLock()

    # -- what the transfer asks of it

    def allocate(self, num_bytes: int, device: torch.device) -> torch.Tensor:
        self.allocated.append(num_bytes)
        return torch.zeros(num_bytes, dtype=torch.uint8)

    def free(self, memory: torch.Tensor) -> None:
        self.freed.append(memory.nbytes)

    def check(self) -> None:
        pass

    def mark(self, device: torch.device) -> Event:
        event = Event(self)
        self.computes[device].append(event.reach)
        return event

    def copy(self, host: torch.Tensor, value: Value, after: Event) -> Event:
        source, event = value.memory.data, Event(self)
        with self._lock:
            self.copies_of[value.device].extend([Wait(after), lambda: host.copy_(source), event.reach])
        return event

    def keep(self, value: Value) -> Value:
        kept = Value(self, Memory(*value.shape, dtype=value.dtype), owns=True, on=value.device)
        source, target = value.memory.data, kept.memory.data
        self.computes[value.device].append(lambda: target.copy_(source))
        return kept

    def gather(
        self,
        place: Place,
        values: Sequence[Value],
        starts: Sequence[int],
        num_bytes: int,
        after: Event | None,
    ) -> Value:
        device, _ = place
        compute = self.computes[device]
        if after is not None:
            compute.append(Wait(after))
        gathered = self._gathered.get(place)
        if gathered is None or gathered.nbytes < num_bytes:
            gathered = self._gathered[place] = Value(self, Memory(num_bytes), owns=True, on=device)
        for value, start in zip(values, starts, strict=True):
            assert value.device == device, "a value is gathered on the device that it is on"
            source = value.memory.data
            part = gathered.memory.data[start : start + value.nbytes].view(value.dtype).view(value.shape)
            compute.append(lambda source=source, part=part: part.copy_(source))
        return gathered

    # -- what the test makes of it

    def advance(self, stream: Stream) -> bool:
        """Do the next thing on a stream; False if it is idle or waits for another one."""
        with self._lock:
            return self._advance(stream)

    def _advance(self, stream: Stream) -> bool:
        if not stream:
            return False
        operation = stream[0]
        if isinstance(operation, Wait):
            if not operation.event.reached:
                return False
            stream.popleft()
        else:
            stream.popleft()
            operation()
        return True

    def run_until(self, done: Callable[[], bool]) -> None:
        while not done():
            with self._lock:
                progressed = any(map(self.advance, (*self.copies_of.values(), *self.computes.values())))
                assert progressed or done(), "the device's streams wait for each other"
