"""From the threads that run the model to the drain thread: many values for each time that it is woken."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .layout import Copied, Kinds
from .pinned import Landing

_WAKE_BYTES = 1 << 20
"""So much waits at most for the drain thread's next tick: a quarter of the page that it goes into anyway."""
_WAKE_DEVICE_BYTES = 4 << 20
"""The same of what comes from a device, whose values have not arrived yet when they are handed over."""


@dataclass(slots=True)
class Delivery:
    """The values of one graph run, or the integer inputs of a step."""

    step: int
    names: Sequence[str]
    calls: Sequence[int]
    values: list[torch.Tensor]
    """On the host; empty where ``landing`` brings them, and of inputs that were ``copied``."""
    full_shapes: Sequence[tuple[int, ...]] | None
    num_bytes: int
    """Counted in for what is not with the writer yet: its bytes where it is on the host, and its bookkeeping."""
    is_input: bool = False
    landing: Landing | None = None
    kinds: Kinds | None = None
    """What is known of the values."""
    copied: list[Copied] | None = None
    """Inputs that were on the host."""
    order: Sequence[int] | None = None
    """In which the values go to the writer, if not as they come."""
    num_done: int = 0
    """How many are with the writer, or wait to be copied together with others."""

    def done(self, num_records: int, num_bytes: int) -> None:
        """So many more are, for which so many bytes were counted in."""
        self.num_done += num_records
        self.num_bytes -= num_bytes

    def left(self) -> Sequence[str]:
        """The names of those that are not."""
        order = range(len(self.names)) if self.order is None else self.order
        return [self.names[index] for index in order[self.num_done :]]


class Handover:
    """Deliveries in the order in which they came.

    Waking a thread for every graph run would cost the model more than the hand-over itself: both then want the
    interpreter's lock at the same time. So deliveries wait until they are many or a tick has passed.
    """

    def __init__(self) -> None:
        self._deliveries: deque[Delivery] = deque()
        self._waiting_bytes = 0
        self._wake = threading.Event()
        self._seal = False
        self._ended = False

    def put(self, delivery: Delivery) -> None:
        landing = delivery.landing
        num_bytes = delivery.num_bytes + (landing.num_bytes if landing is not None else 0)
        self._deliveries.append(delivery)
        # Not locked: where threads race, the drain thread comes one tick later.
        self._waiting_bytes += num_bytes
        enough = _WAKE_BYTES if landing is None else _WAKE_DEVICE_BYTES
        if (landing is not None and not landing.is_started) or (
            self._waiting_bytes >= enough and not delivery.is_input
        ):
            # After inputs the graph is still to be launched: the drain thread, once awake, would hold that up.
            self._wake.set()

    def seal(self) -> None:
        """Have pages that are not full yet stored at once: the buffer is full, and they may be what fills it."""
        self._seal = True
        self._wake.set()

    def end(self) -> None:
        """Nothing more comes."""
        self._ended = True
        self._wake.set()

    def take(self, timeout_s: float) -> tuple[list[Delivery], bool, bool]:
        """``(deliveries, whether pages are to be sealed after them, whether they were the last)``."""
        self._wake.wait(timeout_s)
        if not self._ended:
            self._wake.clear()
        ended, seal = self._ended, self._seal
        self._seal = False
        self._waiting_bytes = 0
        taken = []
        while self._deliveries:
            taken.append(self._deliveries.popleft())
        return taken, seal, ended
