"""One open capture: steps, counts, the hand-over to the drain thread, and the first failure."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch

from ..errors import CaptureFailedError
from ..forks import track
from ..sampling import num_samples, positions
from .admission import Admission
from .budget import HostBudget
from .cuda import CudaEngine
from .drain import RECORD_OVERHEAD_BYTES, Drain, Writer
from .engine import CopyEngine
from .handover import Delivery
from .layout import Copied, Kinds, device_of
from .pinned import Landing
from .progress import ProgressLine
from .report import CaptureReport
from .steps import Join, SiteLike, Steps
from .ticket import Ticket

_T = TypeVar("_T")
_PACKING_FROM_BYTES = 1 << 20
"""A buffer below this packs nothing: a sixteenth of it would take no graph run."""
_MAX_KINDS = 256


class Session:
    """Takes captured values from the threads that run the model and brings them to a writer.

    Args:
        writer: where records go; owned by the session from now on.
        make_record: builds the writer's record from keywords (site_id, step, call, dtype, shape, full_shape).
        sites: every site that may deliver.
        max_memory_bytes: bound on the host memory of values and writer together.
        drop: throw values away when the bound is reached, instead of waiting.
        sampling: (rate, seed) if sites are sampled.
        target_gbps: the rate that the report is held against.
        progress: show a line on standard error.
        patience: asked whenever a call would wait for room, on its thread: how many seconds it may. What is
            larger than the bound is dropped then, too. None waits until there is room, and refuses what is larger.
        make_engine: the device's side of transfers.
    """

    def __init__(
        self,
        writer: Writer,
        make_record: Callable[..., Any],
        sites: Sequence[SiteLike],
        *,
        max_memory_bytes: int,
        drop: bool,
        sampling: tuple[float, int] | None,
        target_gbps: float,
        progress: bool,
        patience: Callable[[], float] | None = None,
        make_engine: Callable[[], CopyEngine] = CudaEngine,
    ) -> None:
        self._writer = writer
        self._sampling = sampling
        self._target_gbps = target_gbps
        self._progress = (
            ProgressLine(lambda: self.report, lambda: self._budget.held_bytes) if progress else None
        )
        room = max(0, max_memory_bytes - writer.memory_bytes)
        # While values are packed they are there twice.
        packed_bytes = min(writer.page_bytes, room // 16) if room >= _PACKING_FROM_BYTES else 0
        self._budget = HostBudget(room - packed_bytes)
        self._own_bytes = writer.memory_bytes + packed_bytes
        self._admission = Admission(
            self._budget,
            make_engine,
            seal=lambda: self._handover.seal(),
            drop=drop,
            patience=patience,
            max_memory_bytes=max_memory_bytes,
        )
        self._transfer = self._admission.transfer
        self._drain = Drain(
            writer,
            make_record,
            {site.name: writer.add_site(site.name, site.role) for site in sites},
            self._budget,
            shut=self._shut,
            waited_for=lambda: self._budget.num_waiting > 0 or self._transfer.is_waited_for,
            packed_bytes=packed_bytes,
            dropped=self._count_dropped,
            tick=self._progress.tick if self._progress is not None else None,
        )
        self._handover = self._drain.handover
        self._steps = Steps(writer.first_step)
        self._lock = threading.Lock()
        self._kinds: dict[object, Kinds] = {}
        self._eager_records = 0
        self._dropped: dict[str, int] = {}
        self._dropped_inputs = 0
        self._closed = self._ended = False
        self.has_delivered = False
        """Some value was delivered or dropped: known at once, while the report's records lag behind its steps."""
        self.silent_sites: Sequence[str] = ()
        """Sites that delivered nothing; whoever closes the session knows."""
        self._started = time.perf_counter()
        self._stored_after: float | None = None
        self._duration: float | None = None
        self._drain.start()
        track(self)

    # -- the model's threads ------------------------------------------------------------------------------------

    def begin_step(self, inputs: Mapping[str, torch.Tensor]) -> Join:
        number, join = self._steps.begin()
        if inputs and not self._closed:
            self._record_inputs(number, inputs)
        return join

    def end_step(self) -> None:
        self._steps.finish()

    def reserve(
        self,
        sites: Sequence[SiteLike],
        num_bytes: int,
        *,
        device: torch.device | None = None,
        device_bytes: int = 0,
        replays: bool = False,
        early: bool = False,
        alike: object = None,
    ) -> Ticket:
        ticket = Ticket(device=device, overwritten=replays, early=early, alike=alike)
        if self._closed:
            return ticket
        return self._admission.of_run(ticket, len(sites), num_bytes, device_bytes)

    def cancel(self, ticket: Ticket) -> None:
        if ticket.num_bytes:
            self._budget.release(ticket.num_bytes)

    def returned(self, ticket: Ticket) -> None:
        held, ticket.held_bytes = ticket.held_bytes, 0
        if held:
            self._budget.let_go(held)

    def deliver(
        self,
        ticket: Ticket,
        sites: Sequence[SiteLike],
        values: Sequence[torch.Tensor],
        full_shapes: Sequence[tuple[int, ...]] | None,
    ) -> None:
        number, names, calls = self._steps.count(sites)
        self.has_delivered = True
        if ticket.early and ticket.num_bytes:
            ticket.held_bytes = ticket.num_bytes
            self._budget.hold(ticket.num_bytes)
        if ticket.dropped or self._closed:
            self._count_dropped(names)
            # The caller of this holds the values for a moment more.
            self.cancel(ticket)
            return
        delivery = Delivery(number, names, calls, list(values), full_shapes, ticket.num_bytes)
        if ticket.alike is not None and values:
            delivery.kinds = self._kinds_of(ticket.alike, values)
        self._hand_over(ticket, delivery)

    def _kinds_of(self, alike: object, values: Sequence[torch.Tensor]) -> Kinds:
        kinds = self._kinds.get(alike)
        if kinds is None or not kinds.fit(values):
            if len(self._kinds) >= _MAX_KINDS:
                self._kinds.clear()
            kinds = self._kinds[alike] = Kinds.of(values)
        return kinds

    def _hand_over(self, ticket: Ticket, delivery: Delivery) -> None:
        """Start the values of ``delivery`` on their way and tell the drain thread."""
        kinds = delivery.kinds
        try:
            if kinds is not None and kinds.are_on_host:
                self._handover.put(delivery)
                return
            with self._transfer.in_order(ticket.device):
                started = self._transfer.start(delivery.values, kinds, overwritten=ticket.overwritten)
                if isinstance(started, Landing):
                    delivery.landing, delivery.values = started, []
                else:
                    delivery.values = started
                self._handover.put(delivery)
        except BaseException:
            self.cancel(ticket)
            raise

    def _copied(self, ticket: Ticket, copy: Callable[[], _T]) -> _T:
        """What ``copy`` returns; if it fails, as there is no memory for it, the ticket's room is given back."""
        try:
            return copy()
        except BaseException:
            self.cancel(ticket)
            raise

    def record_eager(self, site: SiteLike, value: torch.Tensor) -> None:
        full_shape = tuple(value.shape)
        value = value.detach()
        kept = value
        if self._sampling is not None:
            rate, seed = self._sampling
            count = num_samples(value.numel(), rate)
            ticket = self._reserve_for((site,), value, count * value.element_size())
            if not ticket.dropped:
                kept = self._copied(ticket, lambda: _samples(value, rate, seed))
        else:
            ticket = self._reserve_for((site,), value, value.nbytes)
            if not ticket.dropped:
                # What runs next may change the value in place.
                kept = self._copied(ticket, lambda: value.clone(memory_format=torch.contiguous_format))
        if not ticket.dropped:
            with self._lock:
                self._eager_records += 1
        self.deliver(ticket, (site,), (kept,), (full_shape,) if self._sampling is not None else None)

    def _reserve_for(self, sites: Sequence[SiteLike], value: torch.Tensor, num_bytes: int) -> Ticket:
        device = device_of([value])
        return self.reserve(sites, 0 if device is not None else num_bytes, device=device)

    def _record_inputs(self, number: int, inputs: Mapping[str, torch.Tensor]) -> None:
        values = list(inputs.values())
        device = device_of(values)
        total = len(values) * RECORD_OVERHEAD_BYTES
        for value in values:
            if device is None or value.device != device:
                total += value.nbytes
        ticket = self._admission.of_inputs(Ticket(device=device, overwritten=device is not None), total)
        if ticket.dropped:
            self._count_dropped((), are_inputs=True)
            return
        delivery = Delivery(number, list(inputs), [0] * len(values), [], None, total, is_input=True)
        # The caller may change its inputs while the copies are on their way; what a device has is gathered there.
        if device is None:
            delivery.copied = self._copied(ticket, lambda: [Copied.of(value) for value in values])
            self._handover.put(delivery)
            return
        delivery.values = self._copied(
            ticket,
            lambda: [
                value.detach()
                if value.is_cuda
                else value.detach().clone(memory_format=torch.contiguous_format)
                for value in values
            ],
        )
        self._hand_over(ticket, delivery)

    def _count_dropped(self, names: Sequence[str], are_inputs: bool = False) -> None:
        with self._lock:
            if are_inputs:
                self._dropped_inputs += 1
                return
            for name in names:
                self._dropped[name] = self._dropped.get(name, 0) + 1

    def _shut(self) -> None:
        self._budget.shut()
        self._transfer.shut()

    # -- the caller ---------------------------------------------------------------------------------------------

    @property
    def dropped_inputs(self) -> int:
        """How many steps' integer inputs found no room so far."""
        return self._dropped_inputs

    @property
    def failure(self) -> BaseException | None:
        """What ended the capture before its time, of the drain thread or the writer; None while all is well."""
        return self._drain.failure if self._drain.failure is not None else self._writer.failure

    @property
    def report(self) -> CaptureReport:
        duration = self._duration if self._duration is not None else time.perf_counter() - self._started
        with self._lock:
            dropped = dict(self._dropped)
        measured = self._writer.capacity()
        stored_after = self._stored_after if self._stored_after is not None else duration
        return CaptureReport(
            steps=self._steps.begun,
            records=self._drain.records,
            raw_bytes=self._drain.raw_bytes,
            stored_bytes=self._writer.stored_bytes,
            dropped_records=sum(dropped.values()),
            dropped_inputs=self._dropped_inputs,
            stalled_seconds=(self._budget.stalled_ns + self._transfer.stalled_ns) / 1e9,
            eager_records=self._eager_records,
            achieved_gbps=self._drain.raw_bytes / stored_after / 1e9 if stored_after > 0 else 0.0,
            peak_buffer_bytes=self._budget.peak_bytes + self._own_bytes,
            target_gbps=self._target_gbps,
            duration_s=duration,
            dropped_by_site=dropped,
            capacity_gbps=measured[0] / 1e9 if measured is not None else None,
            bottleneck=measured[1] if measured is not None else None,
            silent_sites=self.silent_sites,
        )

    def close(self) -> None:
        """Drain, write the index and close the file; after an interrupt it can be called again.

        Raises:
            CaptureFailedError: a thread of the capture failed; the file holds what was written before.
        """
        if self._ended:
            return
        self._closed = True
        self._drain.end()
        self._writer.finish()
        self._stored_after = time.perf_counter() - self._started
        self._ended = True
        try:
            self._writer.close(self._summary())
        finally:
            self._duration = time.perf_counter() - self._started
            self._budget.shut()
            self._transfer.close()
            if self._progress is not None:
                self._progress.finish()
        if self._drain.failure is not None:
            raise CaptureFailedError(
                f"the capture's drain thread failed: {self._drain.failure!r}"
            ) from self._drain.failure

    def abandon(self) -> None:
        """Stop at once, where ``close`` was interrupted: the file has what was stored so far, and no index."""
        if self._ended:
            return
        self._closed = self._ended = True
        self._shut()
        self._drain.end()
        self._writer.abandon()
        self._transfer.close()

    def forked(self) -> None:
        """In a forked process, where no thread drains: it is over, and its file is the parent's."""
        self._closed = self._ended = True
        self._duration = self._stored_after = time.perf_counter() - self._started
        self._lock = threading.Lock()
        self._steps.forked()
        self._budget.forked()
        self._writer.forked()

    def _summary(self) -> dict[str, Any]:
        """What the file says of its capture."""
        report = self.report.to_dict()
        left_out = ("stored_bytes", "dropped_by_site")
        return {
            **{name: value for name, value in report.items() if name not in left_out},
            "num_steps": self._steps.end,
            "dropped_records": report["dropped_by_site"],
            "failed": None if self._drain.failure is None else repr(self._drain.failure),
        }


def _samples(value: torch.Tensor, rate: float, seed: int) -> torch.Tensor:
    where = torch.from_numpy(positions(value.numel(), rate, seed)).to(value.device)
    return value.flatten().index_select(0, where)
