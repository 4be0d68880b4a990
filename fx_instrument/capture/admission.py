"""Room for what comes, before it exists: granted, waited for, refused, or denied so that it is dropped."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

import torch

from ..errors import BufferTooSmallError
from .budget import HostBudget
from .drain import RECORD_OVERHEAD_BYTES
from .engine import CopyEngine
from .ticket import Ticket
from .transfer import Transfer

_PINNED_SHARE = 7 / 8
"""Of the buffer, once values come from a device: the rest counts the bookkeeping of records, and inputs."""


class Admission:
    """Makes room in the budget, and on the way from devices.

    Args:
        budget: of host memory.
        make_engine: the device's side of transfers.
        seal: has pages that are not full stored: they may be what is waited for.
        drop: deny at once what has no room, instead of waiting.
        patience: as ``Session``'s.
        max_memory_bytes: what the user allowed; errors name it.
    """

    def __init__(
        self,
        budget: HostBudget,
        make_engine: Callable[[], CopyEngine],
        *,
        seal: Callable[[], None],
        drop: bool,
        patience: Callable[[], float] | None,
        max_memory_bytes: int,
    ) -> None:
        self.transfer = Transfer(make_engine, self._claim_pinned)
        self._budget = budget
        self._seal = seal
        self._drop = drop
        self._patience = patience
        self._max_memory_bytes = max_memory_bytes
        self._largest_run_bytes = 0
        self._lock = threading.Lock()
        self._ring_bytes = int(budget.limit_bytes * _PINNED_SHARE)

    def of_run(self, ticket: Ticket, num_records: int, num_bytes: int, device_bytes: int) -> Ticket:
        """The ticket of a graph run, which says of which device, with room if there is any.

        Args:
            num_bytes: of values on the host.
            device_bytes: of values on the device; 0 if unknown.

        Raises:
            BufferTooSmallError: it is larger than the buffer.
        """
        total = num_bytes + num_records * RECORD_OVERHEAD_BYTES
        on_host = ticket.device is None
        # First what nearly always is: this is done in each step, before its graph runs.
        if on_host and not self._drop and self._budget.acquire(total, wait=False):
            ticket.grant(total)
            return ticket
        needed = 2 * total if self._drop and on_host else total
        is_larger = needed > self._most(ticket.device)
        if is_larger and self._patience is None:
            twice = "; on_full='drop' takes room for two, as a run that is dropped is computed all the same"
            raise self._too_small(
                f"one run of a graph captures {num_bytes} bytes in {num_records} records ({total} bytes with their "
                f"bookkeeping{twice if needed > total else ''})",
                ticket.device,
            )
        leave = 0
        if self._drop and on_host and not is_larger:
            # The graph computes its values, dropped or not. So room for another run of the largest that there was is
            # left free, and a run that is dropped takes it until it is over.
            with self._lock:
                leave = self._largest_run_bytes = max(self._largest_run_bytes, total)
        if (on_host or self._admit(device_bytes)) and self._acquire(total, leave):
            ticket.grant(total)
        elif leave and self._budget.acquire(total, wait=True, timeout_s=self._wait_s()):
            # Not within the time that a server's call may wait: then it goes beyond the bound.
            ticket.num_bytes = total
        return ticket

    def of_inputs(self, ticket: Ticket, num_bytes: int) -> Ticket:
        """The same of a step's inputs, which take so many bytes on the host, bookkeeping included."""
        on_host = ticket.device is None
        leave = self._largest_run_bytes if on_host else 0
        # First what nearly always is, as above.
        if on_host and self._budget.acquire(num_bytes, wait=False, leave_bytes=leave):
            ticket.grant(num_bytes)
            return ticket
        if num_bytes > self._most(ticket.device) and not self._drop and self._patience is None:
            raise self._too_small(
                f"the integer inputs of a step take {num_bytes} bytes with their bookkeeping", ticket.device
            )
        if (on_host or self._admit(0)) and self._acquire(num_bytes, leave):
            ticket.grant(num_bytes)
        return ticket

    def _most(self, device: torch.device | None) -> int:
        """The most bytes that anything may hold in the budget: more would be waited for in vain."""
        if device is None and not self.transfer.has_ring:
            return self._budget.limit_bytes
        return self._budget.limit_bytes - self._ring_bytes

    def _too_small(self, what: str, device: torch.device | None) -> BufferTooSmallError:
        most = self._most(device)
        beside = ", beside the pinned part of it," if most < self._budget.limit_bytes else ""
        return BufferTooSmallError(
            f"{what}, but max_memory_gb={self._max_memory_bytes / 1e9:g} leaves the buffer{beside} "
            f"{most} bytes; raise max_memory_gb, or capture fewer sites or samples"
        )

    def _admit(self, device_bytes: int) -> bool:
        """Whether a graph may leave so much on a device, from where it goes into the ring piece by piece."""
        return self._found(partial(self.transfer.admit, device_bytes))

    def _acquire(self, num_bytes: int, leave_bytes: int) -> bool:
        return self._found(partial(self._budget.acquire, num_bytes, leave_bytes=leave_bytes))

    def _found(self, attempt: Callable[..., bool]) -> bool:
        """Whether there is room: at once, or once pages that are not full are stored, where that is waited for."""
        if attempt(wait=False):
            return True
        self._seal()
        if self._drop:
            return False
        return attempt(wait=True, timeout_s=self._wait_s())

    def _wait_s(self) -> float | None:
        """How many seconds this call may wait for room; None: as long as it takes."""
        return None if self._patience is None else self._patience()

    def _claim_pinned(self) -> int:
        """Count in the pinned ring, all at once; answers its size."""
        self._budget.acquire(self._ring_bytes, wait=True)
        return self._ring_bytes
