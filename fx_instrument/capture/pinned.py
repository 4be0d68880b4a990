"""From device to host through one pinned ring: copies on a stream of their own, no wait on the model's thread.

    model's thread   graph n     | ready event, copies that fit -> copy stream | graph n+1 ...
    copy stream                  |  copy copy copy  (event each)               |
    drain thread                 |     wait(event) -> record -> writer -> span back -> next copies

What does not fit into the ring stays on the device, held by reference, and the drain thread copies it piece by piece
as spans come back, so values larger than the ring flow through it. How much may wait there is bounded: the next graph
runs once at most one earlier run has values left to copy. Where the next run overwrites its outputs (CUDA graphs), what
can't be copied at once is kept in device memory of its own, and the next run waits for the copies that are under way:
the device does, not the host.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch

from ..errors import BufferTooSmallError
from .ring import Ring, Span

_MAX_WAITING = 1
"""Graph runs with values that still wait for room when the next one begins: with it, device memory holds two."""


class Event(Protocol):
    """A point of a device's stream."""

    def synchronize(self) -> None:
        """Wait until the device has reached it."""


class CopyEngine(Protocol):
    """What a device does for a transfer; ``cuda.py`` has the real one, tests a simulated one."""

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """Page-locked host memory, uint8; called once."""

    def mark(self, device: torch.device) -> Event:
        """Where the stream that runs the model on this thread stands now."""

    def copy(self, host: torch.Tensor, value: torch.Tensor, after: Event) -> Event:
        """Copy ``value`` to ``host`` on the copy stream, once ``after`` is reached; answers when it is there."""

    def keep(self, value: torch.Tensor) -> torch.Tensor:
        """A copy on the device, made by the stream that runs the model on this thread."""

    def hold(self, device: torch.device) -> None:
        """Let the stream that runs the model on this thread wait for every copy so far; the host goes on."""


class PinnedTransfer:
    """The way of all device values of one capture to the host.

    Args:
        capacity_bytes: of the ring; allocated at the first value.
        engine: the device's side.
    """

    def __init__(self, capacity_bytes: int, engine: CopyEngine) -> None:
        self.ring = Ring(capacity_bytes)
        self.order = threading.RLock()
        """Held around ``start`` and what tells the drain thread of it: landings are drained in their order."""
        self.stalled_ns = 0
        self._engine = engine
        self._memory: torch.Tensor | None = None
        self._waiting: deque[Landing] = deque()
        self._changed = threading.Condition(self.order)
        self._open = True

    def admit(
        self, device: torch.device, *, replays: bool, wait: bool, timeout_s: float | None = None
    ) -> bool:
        """Before a graph runs: True once its values may be started, False if they are to be dropped.

        Args:
            device: where it runs.
            replays: its outputs lie in memory that its next run overwrites.
            wait: let the host wait while earlier values wait for room in the ring, at most ``timeout_s`` seconds.
        """
        with self._changed:
            if self._open and len(self._waiting) > _MAX_WAITING and wait:
                started = time.perf_counter_ns()
                self._changed.wait_for(
                    lambda: not self._open or len(self._waiting) <= _MAX_WAITING, timeout_s
                )
                self.stalled_ns += time.perf_counter_ns() - started
            admitted = self._open and len(self._waiting) <= _MAX_WAITING
        if replays:
            # Dropped or not: the run overwrites what earlier copies still read.
            self._engine.hold(device)
        return admitted

    def start(self, values: Sequence[torch.Tensor], *, replays: bool = False) -> Landing:
        """Begin to copy ``values``, on the thread that ran their graph; ``order`` must be held.

        Args:
            replays: as for ``admit``.

        Raises:
            BufferTooSmallError: a value alone is larger than the ring; nothing was begun.
        """
        for value in values:
            if value.nbytes > self.ring.capacity_bytes and value.device.type != "cpu":
                raise BufferTooSmallError(
                    f"a captured tensor of {value.nbytes} bytes is larger than the pinned buffer of "
                    f"{self.ring.capacity_bytes} bytes; raise max_memory_gb, or capture fewer sites or samples"
                )
        if self._memory is None:
            self._memory = self._engine.allocate(self.ring.capacity_bytes)
        landing = Landing(self, values)
        with self._changed:
            landing.marks = self._mark(values)
            if not self._waiting:
                self._copy_what_fits(landing)
            if not landing.is_started:
                if replays:
                    landing.values[landing.num_started :] = [
                        value if value.device.type == "cpu" else self._engine.keep(value)
                        for value in landing.values[landing.num_started :]
                    ]
                    landing.marks = self._mark(values)
                self._waiting.append(landing)
        return landing

    def shut(self) -> None:
        """Let nothing wait any more: what would make room has failed."""
        with self._changed:
            self._open = False
            self._changed.notify_all()
        self.ring.shut()

    def _mark(self, values: Sequence[torch.Tensor]) -> dict[torch.device, Event]:
        return {
            device: self._engine.mark(device) for device in {v.device for v in values} if device.type != "cpu"
        }

    # -- of landings, on the drain thread -------------------------------------------------------------------

    def go_on(self) -> None:
        """Start the copies for which room has come back, the oldest first."""
        with self._changed:
            while self._waiting:
                landing = self._waiting[0]
                self._copy_what_fits(landing)
                if not landing.is_started:
                    return
                self._waiting.popleft()
                self._changed.notify_all()

    def give_up(self, landing: Landing) -> None:
        """Copy nothing more of ``landing``."""
        with self._changed:
            if landing in self._waiting:
                self._waiting.remove(landing)
                self._changed.notify_all()

    def view(self, span: Span) -> torch.Tensor:
        assert self._memory is not None, "a span was taken before the memory was there"
        return self._memory[span.start : span.start + span.num_bytes]

    def _copy_what_fits(self, landing: Landing) -> None:
        while landing.num_started < landing.num_values:
            value = landing.values[landing.num_started]
            if value.device.type == "cpu":
                landing.pieces.append((None, None))
                continue
            span = self.ring.take(value.nbytes)
            if span is None:
                return
            host = self.view(span)
            if value.numel():
                target = host.view(value.dtype).view(value.shape)
                landing.pieces.append((span, self._engine.copy(target, value, landing.marks[value.device])))
            else:
                landing.pieces.append((span, None))


class Landing:
    """The values of one graph run on their way to the host; holds them on the device until they are there."""

    __slots__ = ("_transfer", "marks", "num_bytes", "num_values", "pieces", "values")

    def __init__(self, transfer: PinnedTransfer, values: Sequence[torch.Tensor]) -> None:
        self._transfer = transfer
        self.values = list(values)
        self.num_values = len(values)
        self.num_bytes = sum(value.nbytes for value in values)
        self.marks: dict[torch.device, Event] = {}
        self.pieces: list[tuple[Span | None, Event | None]] = []

    @property
    def num_started(self) -> int:
        return len(self.pieces)

    @property
    def is_started(self) -> bool:
        """Whether every value has its place in the ring."""
        return len(self.pieces) == self.num_values

    def arrivals(self, make_room: Callable[[], None]) -> Iterator[tuple[torch.Tensor, Room | None]]:
        """Each value in order, in host memory, once it is there, and what gives its room back.

        Of a value that was on the host all along: the value itself, and None. Ends early if the transfer is shut.

        Args:
            make_room: called before this thread waits for room: have what fills the ring stored.
        """
        transfer = self._transfer
        try:
            for index in range(self.num_values):
                transfer.go_on()
                while index >= self.num_started:
                    make_room()
                    if not transfer.ring.wait_for(self.values[index].nbytes):
                        return
                    transfer.go_on()
                span, event = self.pieces[index]
                if span is None:
                    yield self.values[index], None
                    continue
                if event is not None:
                    event.synchronize()
                value = self.values[index]
                host = transfer.view(span).view(value.dtype).view(value.shape)
                # The copy is done: the device's memory may be used again.
                self.values[index] = _GONE
                self.pieces[index] = (None, None)
                del value
                yield host, Room(transfer.ring, span)
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Give back what is left, once the device writes to it no more."""
        self._transfer.give_up(self)
        for span, event in self.pieces:
            if event is not None:
                event.synchronize()
            if span is not None:
                self._transfer.ring.release(span)
        self.pieces = [(None, None)] * self.num_values
        self.values = []


class Room:
    """A value's place in the ring; call it to give the place back."""

    __slots__ = ("_ring", "_span")

    def __init__(self, ring: Ring, span: Span) -> None:
        self._ring = ring
        self._span = span

    def split(self, count: int) -> None:
        """Expect ``count`` calls, before the first: one for each record in the value."""
        self._span.users = count

    def __call__(self) -> None:
        self._ring.release(self._span)


_GONE = torch.empty(0)
