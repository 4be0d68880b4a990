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

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from ..errors import BufferTooSmallError
from .ring import ALIGNMENT, Ring, Span

_MAX_WAITING = 1
"""Graph runs with values that still wait for room when the next one begins: with it, device memory holds two."""
_SMALL_BYTES = 1 << 20
"""Mean size of values up to which a copy on the device costs less than a copy to the host for each."""
_PIECE_BYTES = 32 << 20
"""The most that values copied together have, so that the first is with the writer before the last has arrived."""


class Event(Protocol):
    """A point of a device's stream."""

    def synchronize(self) -> None:
        """Wait until the device has reached it."""


class CopyEngine(Protocol):
    """What a device does for a transfer; ``cuda.py`` has the real one, tests a simulated one."""

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """Page-locked host memory, uint8; called once."""

    def free(self, memory: torch.Tensor) -> None:
        """Take back what ``allocate`` gave."""

    def check(self, device: torch.device) -> None:
        """Raise if what this thread's stream is told now runs later, or more than once."""

    def mark(self, device: torch.device) -> Event:
        """Where the stream that runs the model on this thread stands now."""

    def copy(self, host: torch.Tensor, value: torch.Tensor, after: Event) -> Event:
        """Copy ``value`` to ``host`` on the copy stream, once ``after`` is reached; answers when it is there."""

    def keep(self, value: torch.Tensor) -> torch.Tensor:
        """A copy on the device, made by the stream that runs the model on this thread."""

    def gather(
        self, values: Sequence[torch.Tensor], starts: Sequence[int], num_bytes: int, after: Event | None
    ) -> torch.Tensor:
        """The values, all of one device, in ``num_bytes`` bytes there, each from its place of ``starts`` on.

        The stream that runs the model on this thread copies them, once ``after`` is reached. The memory is that of the
        call before if it is large enough.
        """


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
        self._gathered: dict[torch.device, Event] = {}
        """Device -> when what was gathered there last has left."""
        self._changed = threading.Condition(self.order)
        self._open = True

    def admit(self, device: torch.device, *, wait: bool, timeout_s: float | None = None) -> bool:
        """Before a graph runs: True once its values may be started, False if they are to be dropped.

        Args:
            device: where it runs.
            wait: let the host wait while earlier values wait for room in the ring, at most ``timeout_s`` seconds.
        """
        self._engine.check(device)
        with self._changed:
            if self._open and len(self._waiting) > _MAX_WAITING and wait:
                started = time.perf_counter_ns()
                self._changed.wait_for(
                    lambda: not self._open or len(self._waiting) <= _MAX_WAITING, timeout_s
                )
                self.stalled_ns += time.perf_counter_ns() - started
            return self._open and len(self._waiting) <= _MAX_WAITING

    def start(self, values: Sequence[torch.Tensor], *, overwritten: bool = False) -> Landing:
        """Begin to copy ``values``, on the thread that ran their graph; ``order`` must be held.

        Args:
            overwritten: the values lie in memory that is written again while they are on their way.

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
        small = len(values) > 1 and sum(value.nbytes for value in values) <= _SMALL_BYTES * len(values)
        landing = Landing(self, values, together=overwritten or small)
        with self._changed:
            if not self._waiting:
                self._place(landing)
            if overwritten or small:
                self._gather(landing)
            if overwritten:
                for piece in landing.pieces[landing.num_placed :]:
                    if piece.device is not None:
                        piece.sources = [self._engine.keep(value) for value in piece.sources]
            landing.marks = {
                device: self._engine.mark(device)
                for device in {piece.device for piece in landing.pieces}
                if device is not None
            }
            self._copy_what_is_placed(landing)
            for device, event in landing.gathered.items():
                assert event is not None, "what was gathered is on its way"
                self._gathered[device] = event
            if not landing.is_started:
                self._waiting.append(landing)
        return landing

    def shut(self) -> None:
        """Let nothing wait any more: what would make room has failed."""
        with self._changed:
            self._open = False
            self._changed.notify_all()
        self.ring.shut()

    def close(self) -> None:
        """Give the memory back; after the last landing."""
        self.shut()
        if self._memory is not None:
            self._engine.free(self._memory)
            self._memory = None

    # -- of landings, on the drain thread -------------------------------------------------------------------

    def go_on(self) -> None:
        """Start the copies for which room has come back, the oldest first."""
        with self._changed:
            while self._waiting:
                landing = self._waiting[0]
                self._place(landing)
                self._copy_what_is_placed(landing)
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

    def _place(self, landing: Landing) -> None:
        """A place in the ring for as many pieces as have one."""
        while landing.num_placed < len(landing.pieces):
            piece = landing.pieces[landing.num_placed]
            if piece.device is not None:
                piece.span = self.ring.take(piece.num_bytes)
                if piece.span is None:
                    return
            landing.num_placed += 1

    def _gather(self, landing: Landing) -> None:
        """Bring the values that have a place in the ring together, on each device."""
        placed = [piece for piece in landing.pieces[: landing.num_placed] if piece.device is not None]
        for device in {piece.device for piece in placed}:
            assert device is not None
            pieces = [piece for piece in placed if piece.device == device]
            begins = [0, *itertools.accumulate(_aligned(piece.num_bytes) for piece in pieces)]
            memory = self._engine.gather(
                [value for piece in pieces for value in piece.sources],
                [
                    begin + start
                    for piece, begin in zip(pieces, begins, strict=False)
                    for start in piece.starts
                ],
                begins[-1],
                self._gathered.get(device),
            )
            for piece, begin in zip(pieces, begins, strict=False):
                piece.sources = [memory[begin : begin + piece.num_bytes]]
                piece.gathered = True

    def _copy_what_is_placed(self, landing: Landing) -> None:
        for piece in landing.pieces[landing.num_started : landing.num_placed]:
            if piece.span is not None and piece.num_bytes:
                assert piece.device is not None
                host = self.view(piece.span)
                targets = [host] if piece.gathered else piece.host_values(host)
                for target, value in zip(targets, piece.sources, strict=True):
                    if value.numel():
                        piece.event = self._engine.copy(target, value, landing.marks[piece.device])
                if piece.gathered:
                    landing.gathered[piece.device] = piece.event
            landing.num_started += 1


@dataclass(slots=True)
class _Piece:
    """Values of a graph run that share a place in the ring, one after the other."""

    device: torch.device | None
    """None for a value that is on the host all along."""
    layouts: list[tuple[torch.dtype, torch.Size, int]] = field(default_factory=list)
    """Of each value: its dtype, shape, bytes."""
    starts: list[int] = field(default_factory=list)
    num_bytes: int = 0
    sources: list[torch.Tensor] = field(default_factory=list)
    """What is copied: the values, or the memory in which they were gathered. Empty once they are on the host."""
    gathered: bool = False
    span: Span | None = None
    event: Event | None = None

    def add(self, value: torch.Tensor) -> None:
        # Values of one dtype lie side by side, as the writer takes them.
        start = _aligned(self.num_bytes, value.dtype.itemsize)
        self.layouts.append((value.dtype, value.shape, value.nbytes))
        self.starts.append(start)
        self.num_bytes = start + value.nbytes
        self.sources.append(value)

    def host_values(self, memory: torch.Tensor) -> list[torch.Tensor]:
        """The values as they lie in ``memory``."""
        return [
            memory[start : start + num_bytes].view(dtype).view(shape)
            for start, (dtype, shape, num_bytes) in zip(self.starts, self.layouts, strict=True)
        ]


class Landing:
    """The values of one graph run on their way to the host; holds them on the device until they are there.

    Args:
        together: values follow one another in larger pieces, each of one device.
    """

    __slots__ = ("_transfer", "gathered", "marks", "num_placed", "num_started", "pieces")

    def __init__(self, transfer: PinnedTransfer, values: Sequence[torch.Tensor], *, together: bool) -> None:
        self._transfer = transfer
        limit = min(_PIECE_BYTES, transfer.ring.capacity_bytes // 4) if together else 0
        self.pieces: list[_Piece] = []
        for value in values:
            device = None if value.device.type == "cpu" else value.device
            last = self.pieces[-1] if self.pieces else None
            if (
                last is None
                or device is None
                or last.device != device
                or last.num_bytes + value.nbytes > limit
            ):
                last = _Piece(device)
                self.pieces.append(last)
            last.add(value)
        self.marks: dict[torch.device, Event] = {}
        self.gathered: dict[torch.device, Event | None] = {}
        """Device -> when what was gathered there has left."""
        self.num_placed = 0
        self.num_started = 0

    @property
    def num_bytes(self) -> int:
        return sum(piece.num_bytes for piece in self.pieces)

    @property
    def is_started(self) -> bool:
        """Whether every value has its place in the ring."""
        return self.num_started == len(self.pieces)

    def arrivals(self, make_room: Callable[[], None]) -> Iterator[tuple[list[torch.Tensor], Room | None]]:
        """The values in order, in host memory, once they are there, and what gives their room back.

        Several at once where they were copied together. Of a value that was on the host all along: the value itself,
        and None. Ends early if the transfer is shut.

        Args:
            make_room: called before this thread waits for room: have what fills the ring stored.
        """
        transfer = self._transfer
        try:
            for index, piece in enumerate(self.pieces):
                transfer.go_on()
                while index >= self.num_started:
                    make_room()
                    if not transfer.ring.wait_for(piece.num_bytes):
                        return
                    transfer.go_on()
                if piece.span is None:
                    yield piece.sources, None
                    continue
                if piece.event is not None:
                    piece.event.synchronize()
                values = piece.host_values(transfer.view(piece.span))
                room = Room(transfer.ring, piece.span)
                # The copy is done: the device's memory may be used again.
                piece.sources, piece.span, piece.event = [], None, None
                yield values, room
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
        self.num_placed = self.num_started = 0


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


def _aligned(num_bytes: int, alignment: int = ALIGNMENT) -> int:
    return -(-num_bytes // alignment) * alignment
