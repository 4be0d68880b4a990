"""The integer inputs of steps: copied when a step begins, handed over then, or once a device has been told to run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from .drain import RECORD_OVERHEAD_BYTES
from .engine import Event
from .handover import Delivery
from .ticket import Ticket
from .transfer import device_of


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
        device = device_of(list(inputs.values()))
        num_bytes = sum(
            (value.nbytes if value.device != device else 0) + RECORD_OVERHEAD_BYTES
            for value in inputs.values()
        )
        ticket = self._reserve(device, num_bytes)
        if ticket.dropped:
            self._drop()
            return
        try:
            # The model, and then its caller, may change them.
            values = [
                value.detach().clone(memory_format=torch.contiguous_format) for value in inputs.values()
            ]
            made = self._marks(values) if later and device is not None else None
        except BaseException:
            self._cancel(ticket)
            raise
        delivery = Delivery(step, list(inputs), [0] * len(inputs), values, None, num_bytes, is_input=True)
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
