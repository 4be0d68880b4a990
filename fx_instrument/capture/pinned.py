"""From device to host through one pinned ring: copies on a stream of their own, no wait on the model's thread.

    model's thread   graph n     | gather, ready event, copies that fit -> copy stream | graph n+1 ...
    copy stream                  |                      copy copy copy  (event each)   |
    drain thread                 |     wait(event) -> record -> writer -> span back -> next copies

What does not fit into the ring stays on the device, held by reference, and the drain thread copies it piece by piece
as spans come back, so values larger than the ring flow through it. How much may wait there is bounded: the next graph
runs once at most one earlier run has values left to copy.

Small values, and values that lie where the next run overwrites them (CUDA graphs), are gathered first: one copy on the
device, by the stream that runs the model, into memory that holds one run's values side by side. From there they leave
in one piece, beside the next run. That memory is used again: the device waits for the copy before it, not the host.
What is overwritten and finds no room in the ring gets device memory of its own.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..errors import BufferTooSmallError
from .engine import CopyEngine, Event, Place
from .layout import Kinds, Layout, RunLayout, host_bytes, lay_out
from .ring import ALIGNMENT, Ring, Span

_MAX_WAITING = 1
"""Graph runs with values that still wait for room when the next one begins: with it, device memory holds two."""
_MAX_LAYOUTS = 256
_NOTHING = np.zeros(0, np.uint8)


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
        self.num_waiting = 0
        """Threads that run the model and wait for room."""
        self._engine = engine
        self._memory: torch.Tensor | None = None
        self._bytes = _NOTHING
        """The same memory."""
        self._waiting: deque[Landing] = deque()
        self._layouts: dict[Any, RunLayout] = {}
        self._gathered: dict[Place, Event] = {}
        """When what was gathered there last has left."""
        self._changed = threading.Condition(self.order)
        self._open = True

    def admit(self, num_bytes: int, *, wait: bool, timeout_s: float | None = None) -> bool:
        """Before a graph runs: True once its values may be started, False if they are to be dropped.

        Values of a quarter of the ring, or less, are let in once the ring has room for them, so that they never wait on
        the device, piece by piece: the ring holds those of three runs before, whose work the device goes on with.

        Args:
            num_bytes: of its values; 0 if unknown, or nothing to speak of.
            wait: let the host wait while earlier values wait for room in the ring, at most ``timeout_s`` seconds.
        """
        self._engine.check()
        needed = 0
        if 0 < num_bytes <= self.ring.capacity_bytes // 4:
            # What lies between values, and between the pieces of two devices, is not known yet.
            needed = num_bytes + num_bytes // 64 + 2 * ALIGNMENT
        with self.order:
            if self._open and self._is_free() and (not needed or self.ring.has_room(needed)):
                return True
            if not wait or not self._open:
                return False
            self.num_waiting += 1
        started = time.monotonic()
        try:
            with self.order:
                self._changed.wait_for(lambda: not self._open or self._is_free(), timeout_s)
                admitted = self._open and self._is_free()
            if admitted and needed:
                left_s = None if timeout_s is None else max(0.0, started + timeout_s - time.monotonic())
                admitted = self.ring.wait_for(needed, left_s)
            return admitted
        finally:
            with self.order:
                self.num_waiting -= 1
                self.stalled_ns += int((time.monotonic() - started) * 1e9)

    def _is_free(self) -> bool:
        return len(self._waiting) <= _MAX_WAITING

    def start(
        self, values: Sequence[torch.Tensor], kinds: Kinds | None = None, *, overwritten: bool = False
    ) -> Landing:
        """Begin to copy ``values``, on the thread that ran their graph; ``order`` must be held.

        Args:
            kinds: what is known of them.
            overwritten: the values lie in memory that is written again while they are on their way.

        Raises:
            BufferTooSmallError: a value alone is larger than the ring; nothing was begun.
        """
        layout = self._layout(values, kinds, overwritten)
        if layout.largest_bytes > self.ring.capacity_bytes:
            raise BufferTooSmallError(
                f"a captured tensor of {layout.largest_bytes} bytes is larger than the pinned buffer of "
                f"{self.ring.capacity_bytes} bytes; raise max_memory_gb, or capture fewer sites or samples"
            )
        if self._memory is None:
            self._memory = self._engine.allocate(self.ring.capacity_bytes, next(iter(layout.starts)))
            self._bytes = self._memory.numpy()
        landing = Landing(self, layout, values)
        with self.order:
            try:
                self._begin(landing, overwritten)
            except BaseException:
                # The device has no memory left, say: the ring's is not lost with it.
                landing.abandon()
                raise
        return landing

    def _begin(self, landing: Landing, overwritten: bool) -> None:
        placed = [] if self._waiting else self._place(landing)
        if landing.layout.gathers:
            self._gather(landing.layout, placed)
        if overwritten:
            for piece in landing.pieces[landing.num_started :]:
                if piece.layout.device is not None:
                    piece.sources = [self._engine.keep(value) for value in piece.sources]
        landing.marks = {device: self._engine.mark(device) for device in landing.layout.starts}
        self._copy(landing, placed)
        if not landing.is_started:
            self._waiting.append(landing)

    def _layout(self, values: Sequence[torch.Tensor], kinds: Kinds | None, overwritten: bool) -> RunLayout:
        """Runs of one graph differ in their values alone, so it is made once for each."""
        key: tuple[Any, ...] = (overwritten, kinds)
        if kinds is None:
            key = (
                overwritten,
                *[value.shape for value in values],
                *[value.dtype for value in values],
                *[value.device for value in values],
            )
        layout = self._layouts.get(key)
        if layout is None:
            if len(self._layouts) >= _MAX_LAYOUTS:
                self._layouts.clear()
            layout = self._layouts[key] = lay_out(values, overwritten, self.ring.capacity_bytes)
        return layout

    def shut(self) -> None:
        """Let nothing wait any more: what would make room has failed."""
        with self.order:
            self._open = False
            self._changed.notify_all()
        self.ring.shut()

    def close(self) -> None:
        """Give the memory back; after the last landing."""
        self.shut()
        if self._memory is not None:
            self._engine.free(self._memory)
            self._memory, self._bytes = None, _NOTHING

    # -- of landings, on the drain thread -------------------------------------------------------------------

    def go_on(self) -> None:
        """Start the copies for which room has come back, the oldest first."""
        with self.order:
            while self._waiting:
                landing = self._waiting[0]
                self._copy(landing, self._place(landing))
                if not landing.is_started:
                    return
                self._waiting.popleft()
                self._changed.notify_all()

    def give_up(self, landing: Landing) -> None:
        """Copy nothing more of ``landing``."""
        with self.order:
            if landing in self._waiting:
                self._waiting.remove(landing)
                self._changed.notify_all()

    def view(self, span: Span) -> torch.Tensor:
        assert self._memory is not None, "a span was taken before the memory was there"
        return self._memory[span.start : span.start + span.num_bytes]

    def bytes_of(self, span: Span) -> npt.NDArray[np.uint8]:
        return self._bytes[span.start : span.start + span.num_bytes]

    def _place(self, landing: Landing) -> list[_Piece]:
        """The next pieces, each with a place in the ring, as many as have one."""
        placed = []
        for piece in landing.pieces[landing.num_started :]:
            if piece.layout.device is not None:
                piece.span = self.ring.take(piece.layout.num_bytes)
                if piece.span is None:
                    break
            placed.append(piece)
        landing.num_started += len(placed)
        return placed

    def _gather(self, layout: RunLayout, placed: Sequence[_Piece]) -> None:
        """Bring the values that have a place in the ring together, on each device."""
        for device, starts in layout.starts.items():
            pieces = [piece for piece in placed if piece.layout.device == device]
            if not pieces:
                continue
            sources = [value for piece in pieces for value in piece.sources]
            end = pieces[-1].begin + pieces[-1].layout.num_bytes
            # Runs of very different sizes, as a step's inputs and values, don't wait for each other.
            place = device, end.bit_length()
            if len(sources) < len(starts):
                starts = starts[: len(sources)]
            memory = self._engine.gather(place, sources, starts, end, self._gathered.get(place))
            for piece in pieces:
                piece.sources = [memory[piece.begin : piece.begin + piece.layout.num_bytes]]
                piece.gathered = place

    def _copy(self, landing: Landing, placed: Sequence[_Piece]) -> None:
        for piece in placed:
            layout = piece.layout
            if piece.span is None or not layout.num_bytes:
                continue
            assert layout.device is not None, "only what a device has takes room in the ring"
            host = self.view(piece.span)
            targets = [host] if piece.gathered else layout.values(host)
            for target, value in zip(targets, piece.sources, strict=True):
                if value.numel():
                    piece.event = self._engine.copy(target, value, landing.marks[layout.device])
            if piece.gathered is not None and piece.event is not None:
                self._gathered[piece.gathered] = piece.event


@dataclass(slots=True)
class _Piece:
    """The values of a layout on their way."""

    layout: Layout
    begin: int
    """Where they are gathered, if they are."""
    sources: list[torch.Tensor]
    """What is copied: the values, or the memory in which they were gathered. Empty once they are on the host."""
    gathered: Place | None = None
    span: Span | None = None
    event: Event | None = None


@dataclass(slots=True)
class Arrival:
    """Values that are in host memory."""

    layout: Layout
    memory: npt.NDArray[np.uint8] | None
    """Where they lie; None of a value that was on the host all along."""
    room: Room | None
    """Gives their place back."""
    sources: list[torch.Tensor]

    def data(self) -> list[npt.NDArray[np.uint8]]:
        """The bytes of each, where they lie. As views of torch's each would take several microseconds."""
        if self.memory is None:
            return [host_bytes(value) for value in self.sources]
        return [
            self.memory[start:end] for start, end in zip(self.layout.starts, self.layout.ends, strict=True)
        ]


class Landing:
    """The values of one graph run on their way to the host; holds them on the device until they are there."""

    __slots__ = ("_transfer", "layout", "marks", "num_started", "pieces")

    def __init__(self, transfer: PinnedTransfer, layout: RunLayout, values: Sequence[torch.Tensor]) -> None:
        self._transfer = transfer
        self.layout = layout
        self.pieces = [
            _Piece(part, begin, list(values[part.first : part.first + len(part.starts)]))
            for part, begin in zip(layout.layouts, layout.begins, strict=True)
        ]
        self.marks: dict[torch.device, Event] = {}
        self.num_started = 0

    @property
    def num_bytes(self) -> int:
        return self.layout.num_bytes

    @property
    def is_started(self) -> bool:
        """Whether every value has its place in the ring."""
        return self.num_started == len(self.pieces)

    def arrivals(self, make_room: Callable[[], None]) -> Iterator[Arrival]:
        """The values in order once they are there, several at once where they were copied together.

        Ends early if the transfer is shut.

        Args:
            make_room: called before this thread waits for room: have what fills the ring stored.
        """
        transfer = self._transfer
        try:
            for index, piece in enumerate(self.pieces):
                transfer.go_on()
                while index >= self.num_started:
                    make_room()
                    if not transfer.ring.wait_for(piece.layout.num_bytes):
                        return
                    transfer.go_on()
                if piece.span is None:
                    yield Arrival(piece.layout, None, None, piece.sources)
                    continue
                if piece.event is not None:
                    piece.event.synchronize()
                memory, room = transfer.bytes_of(piece.span), Room(transfer.ring, piece.span)
                # The copy is done: the device's memory may be used again.
                piece.sources, piece.span, piece.event = [], None, None
                yield Arrival(piece.layout, memory, room, [])
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Give back what is left, once the device writes to it no more."""
        self._transfer.give_up(self)
        for piece in self.pieces:
            if piece.event is not None:
                piece.event.synchronize()
            if piece.span is not None:
                self._transfer.ring.release(piece.span)
        self.pieces = []
        self.num_started = 0


class Room:
    """A place in the ring; call it to give the place back."""

    __slots__ = ("_ring", "_span")

    def __init__(self, ring: Ring, span: Span) -> None:
        self._ring = ring
        self._span = span

    def split(self, count: int) -> None:
        """Expect ``count`` calls, before the first: one for each record there."""
        self._span.users = count

    def __call__(self) -> None:
        self._ring.release(self._span)
