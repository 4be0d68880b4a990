"""The integer inputs of steps: copied when a step begins, handed over then, or once a device has been told to run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from .drain import RECORD_OVERHEAD_BYTES
from .engine import Event
from .handover import Delivery
from .layout import copied_bytes, device_of
from .ticket import Ticket


class _Unsent(NamedTuple):
    """The inputs of a thread's step that are still to be handed over, in memory of their own on a device."""

    ticket: Ticket
    delivery: Delivery
    made: list[Event]


class StepInputs:
    """Those of one capture. Any thread may call any method.

    Args:
        reserve: makes room for inputs of a device, or of none, whose host memory and bookkeeping are so many bytes.
        hand_over: starts a delivery on its way.
        cancel: gives back the room of one that was not handed over.
        marks: where this thread's streams stand on the devices of the values.
    """

    def __init__(
        self,
        *,
        reserve: Callable[[torch.device | None, int], Ticket],
        hand_over: Callable[[Ticket, Delivery], None],
        cancel: Callable[[Ticket], None],
        marks: Callable[[Sequence[torch.Tensor]], list[Event]],
    ) -> None:
        self.num_dropped = 0
        """Steps whose inputs found no room so far."""
        self._reserve = reserve
        self._hand_over = hand_over
        self._cancel = cancel
        self._marks = marks
        self._unsent: dict[int, _Unsent] = {}
        """By thread."""
        self._open = True
        self._lock = threading.Lock()

    def record(self, step: int, inputs: Mapping[str, torch.Tensor], *, later: bool) -> None:
        """Take a copy of a step's inputs, and hand it over; ``later``: in ``send``, if it comes from a device."""
        values = list(inputs.values())
        device = device_of(values)
        num_bytes = len(values) * RECORD_OVERHEAD_BYTES
        num_bytes += sum(value.nbytes for value in values if not value.is_cuda)
        ticket = self._reserve(device, num_bytes)
        if ticket.dropped:
            self._drop()
            return
        delivery = Delivery(step, list(inputs), [0] * len(values), [], None, num_bytes, is_input=True)
        made = None
        try:
            # The model, and then its caller, may change them.
            if device is None:
                delivery.copied = [(value.dtype, value.shape, copied_bytes(value)) for value in values]
            else:
                delivery.values = [
                    value.detach().clone(memory_format=torch.contiguous_format) for value in values
                ]
                made = self._marks(delivery.values) if later else None
        except BaseException:
            self._cancel(ticket)
            raise
        if made is None:
            self._hand_over(ticket, delivery)
        else:
            self._unsent[threading.get_ident()] = _Unsent(ticket, delivery, made)

    def send(self) -> None:
        """Hand over those of the step that began last on this thread, if that was put off."""
        unsent = self._unsent.pop(threading.get_ident(), None)
        if unsent is not None:
            self._send(unsent)

    def send_all(self) -> None:
        """Hand over what any thread has put off: it holds room that this one is about to wait for."""
        self.send()
        for thread in tuple(self._unsent):
            unsent = self._unsent.pop(thread, None)
            if unsent is not None:
                # This thread's stream knows nothing of the one that they were copied on.
                for event in unsent.made:
                    event.synchronize()
                self._send(unsent)

    def close(self) -> None:
        """What is sent from now on is dropped: nobody takes it any more."""
        self._open = False

    def forked(self) -> None:
        """In a forked process: who held the lock is not there."""
        self._lock = threading.Lock()

    def _send(self, unsent: _Unsent) -> None:
        if self._open:
            self._hand_over(unsent.ticket, unsent.delivery)
        else:
            self._cancel(unsent.ticket)
            self._drop()

    def _drop(self) -> None:
        with self._lock:
            self.num_dropped += 1
