"""One open capture: steps, counts, the hand-over to the drain thread, and the first failure."""

from __future__ import annotations

import itertools
import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from ..errors import BufferTooSmallError, CaptureFailedError
from ..sampling import num_samples, positions
from .budget import HostBudget
from .report import CaptureReport
from .transfer import Landing, Transfer, host_bytes

# What a queued record holds beside its bytes: a tensor, its storage, a numpy view and the row (measured: ~1 KiB).
RECORD_OVERHEAD_BYTES = 1024
SEAL_AFTER_S = 0.5


class SiteLike(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def role(self) -> str: ...


class Writer(Protocol):
    """What the session needs of a stream's writer."""

    first_step: int
    memory_bytes: int
    stored_bytes: int
    failure: BaseException | None

    def add_site(self, name: str, role: str) -> int: ...
    def put(self, meta: Any, data: npt.NDArray[np.uint8], done: Callable[[], None] | None = None) -> None: ...
    def seal(self, *, older_than_s: float = 0.0) -> None: ...
    def close(self, summary: Mapping[str, Any]) -> None: ...


class _Step(threading.local):
    """The forward call that this thread is in, or the number reserved for its next one."""

    number: int | None = None
    running: bool = False
    calls: dict[str, int]

    def __init__(self) -> None:
        self.calls = {}


@dataclass(slots=True)
class _Ticket:
    num_bytes: int
    dropped: bool


@dataclass(slots=True)
class _Delivery:
    step: int
    names: Sequence[str]
    calls: Sequence[int]
    landing: Landing
    full_shapes: Sequence[tuple[int, ...]] | None
    num_bytes: int
    is_input: bool = False


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
    ) -> None:
        self._writer = writer
        self._make_record = make_record
        self._max_memory_bytes = max_memory_bytes
        self._drop = drop
        self._sampling = sampling
        self._target_gbps = target_gbps
        self._progress = progress
        self._patience = patience
        self._budget = HostBudget(max(0, max_memory_bytes - writer.memory_bytes))
        self._transfer = Transfer()
        self._site_ids = {site.name: writer.add_site(site.name, site.role) for site in sites}
        self._input_ids: dict[str, int] = {}
        self._step = _Step()
        self._lock = threading.Lock()
        self._numbers = itertools.count(writer.first_step)
        self._end_step_number = writer.first_step
        self._steps = self._records = self._raw_bytes = self._eager_records = 0
        self._dropped: dict[str, int] = {}
        self._dropped_inputs = 0
        self._failure: BaseException | None = None
        self._closed = False
        self._started = time.perf_counter()
        self._duration: float | None = None
        self._queue: queue.SimpleQueue[_Delivery | None] = queue.SimpleQueue()
        self._drainer = threading.Thread(target=self._drain, name="fx_instrument-drain", daemon=True)
        self._drainer.start()

    # -- the model's threads ------------------------------------------------------------------------------------

    def begin_step(self, inputs: Mapping[str, torch.Tensor]) -> None:
        step = self._step
        if step.running or step.number is None:
            self._reserve_number()
        step.running = True
        with self._lock:
            self._steps += 1
        if inputs and not self._closed:
            self._record_inputs(inputs)

    def end_step(self) -> None:
        step = self._step
        step.running = False
        step.number = None
        step.calls = {}

    def reserve(self, sites: Sequence[SiteLike], num_bytes: int) -> _Ticket:
        total = num_bytes + len(sites) * RECORD_OVERHEAD_BYTES
        if total > self._budget.limit_bytes and self._patience is None:
            raise BufferTooSmallError(
                f"one run of a graph captures {num_bytes} bytes in {len(sites)} records ({total} bytes with their "
                f"bookkeeping), but max_memory_gb={self._max_memory_bytes / 1e9:g} leaves the buffer "
                f"{self._budget.limit_bytes} bytes; raise max_memory_gb, or capture fewer sites or samples"
            )
        self._transfer.before_graph()
        return _Ticket(total, dropped=self._closed or not self._acquire(total))

    def cancel(self, ticket: _Ticket) -> None:
        if not ticket.dropped:
            self._budget.release(ticket.num_bytes)

    def deliver(
        self,
        ticket: _Ticket,
        sites: Sequence[SiteLike],
        values: Sequence[torch.Tensor],
        full_shapes: Sequence[tuple[int, ...]] | None,
    ) -> None:
        step = self._step
        if step.number is None:
            self._reserve_number()
        assert step.number is not None
        names = [site.name for site in sites]
        calls = []
        for name in names:
            call = step.calls.get(name, 0)
            step.calls[name] = call + 1
            calls.append(call)
        if ticket.dropped:
            self._count_dropped(names)
            return
        landing = self._transfer.start(values)
        self._queue.put(_Delivery(step.number, names, calls, landing, full_shapes, ticket.num_bytes))

    def record_eager(self, site: SiteLike, value: torch.Tensor) -> None:
        full_shape = tuple(value.shape)
        kept = value.detach()
        if self._sampling is not None:
            rate, seed = self._sampling
            count = num_samples(value.numel(), rate)
            ticket = self.reserve((site,), count * value.element_size())
            if not ticket.dropped and value.numel():
                where = torch.from_numpy(positions(value.numel(), rate, seed)).to(value.device)
                kept = kept.flatten().index_select(0, where)
        else:
            ticket = self.reserve((site,), value.nbytes)
            if not ticket.dropped:
                # What runs next may change the value in place.
                kept = kept.clone(memory_format=torch.contiguous_format)
        if not ticket.dropped:
            with self._lock:
                self._eager_records += 1
        self.deliver(ticket, (site,), (kept,), (full_shape,) if self._sampling is not None else None)

    def _acquire(self, num_bytes: int) -> bool:
        if self._budget.acquire(num_bytes, wait=False):
            return True
        # What fills the buffer may lie in pages that are not full yet: have them stored now.
        self._queue.put(_SEAL)
        if self._drop:
            return False
        timeout_s = self._patience() if self._patience is not None else None
        return self._budget.acquire(num_bytes, wait=True, timeout_s=timeout_s)

    def _reserve_number(self) -> None:
        self._step.calls = {}
        with self._lock:
            self._step.number = next(self._numbers)
            self._end_step_number = self._step.number + 1

    def _record_inputs(self, inputs: Mapping[str, torch.Tensor]) -> None:
        number = self._step.number
        assert number is not None
        total = sum(value.nbytes + RECORD_OVERHEAD_BYTES for value in inputs.values())
        if total > self._budget.limit_bytes and not self._drop and self._patience is None:
            raise BufferTooSmallError(
                f"the integer inputs of a step take {total} bytes with their bookkeeping, but "
                f"max_memory_gb={self._max_memory_bytes / 1e9:g} leaves the buffer {self._budget.limit_bytes} bytes"
            )
        if not self._acquire(total):
            with self._lock:
                self._dropped_inputs += 1
            return
        # The caller may change its inputs while the copies are on their way.
        values = [value.detach().clone(memory_format=torch.contiguous_format) for value in inputs.values()]
        landing = self._transfer.start(values)
        self._queue.put(
            _Delivery(number, list(inputs), [0] * len(inputs), landing, None, total, is_input=True)
        )

    def _count_dropped(self, names: Sequence[str]) -> None:
        with self._lock:
            for name in names:
                self._dropped[name] = self._dropped.get(name, 0) + 1

    # -- the drain thread ---------------------------------------------------------------------------------------

    def _drain(self) -> None:
        last_shown = last_sealed = time.monotonic()
        while True:
            try:
                delivery = self._queue.get(timeout=SEAL_AFTER_S / 2)
            except queue.Empty:
                delivery = _NOTHING
            try:
                if delivery is None:
                    return
                if delivery is _SEAL:
                    self._writer.seal()
                elif delivery is not _NOTHING:
                    self._write(delivery)
                now = time.monotonic()
                if now - last_sealed > SEAL_AFTER_S / 2:
                    last_sealed = now
                    self._writer.seal(older_than_s=SEAL_AFTER_S)
                if self._progress and now - last_shown > 0.5:
                    last_shown = now
                    self._show(end="")
            except BaseException as failure:
                self._fail(failure)

    def _write(self, delivery: _Delivery) -> None:
        values = delivery.landing.wait()
        if self._failure is not None:
            self._budget.release(delivery.num_bytes)
            self._count_dropped([] if delivery.is_input else delivery.names)
            return
        released = 0
        for index, value in enumerate(values):
            name = delivery.names[index]
            share = value.nbytes + RECORD_OVERHEAD_BYTES
            released += share
            full_shapes = delivery.full_shapes
            record = self._make_record(
                site_id=self._input_id(name) if delivery.is_input else self._site_ids[name],
                step=delivery.step,
                call=delivery.calls[index],
                dtype=str(value.dtype).removeprefix("torch."),
                shape=tuple(value.shape),
                full_shape=full_shapes[index] if full_shapes is not None else None,
            )
            self._writer.put(record, host_bytes(value), _Release(self._budget, share))
            if not delivery.is_input:
                self._records += 1
                self._raw_bytes += value.nbytes
        self._budget.release(delivery.num_bytes - released)

    def _input_id(self, name: str) -> int:
        if name not in self._input_ids:
            self._input_ids[name] = self._writer.add_site(name, "input")
        return self._input_ids[name]

    def _fail(self, failure: BaseException) -> None:
        if self._failure is None:
            self._failure = failure
        self._budget.shut()

    # -- the caller ---------------------------------------------------------------------------------------------

    @property
    def dropped_inputs(self) -> int:
        """How many steps' integer inputs found no room so far."""
        return self._dropped_inputs

    @property
    def failure(self) -> BaseException | None:
        """What ended the capture before its time, of the drain thread or the writer; None while all is well."""
        return self._failure if self._failure is not None else self._writer.failure

    @property
    def report(self) -> CaptureReport:
        duration = self._duration if self._duration is not None else time.perf_counter() - self._started
        with self._lock:
            dropped = dict(self._dropped)
        return CaptureReport(
            steps=self._steps,
            records=self._records,
            raw_bytes=self._raw_bytes,
            stored_bytes=self._writer.stored_bytes,
            dropped_records=sum(dropped.values()),
            dropped_inputs=self._dropped_inputs,
            stalled_seconds=self._budget.stalled_ns / 1e9,
            eager_records=self._eager_records,
            achieved_gbps=self._raw_bytes / duration / 1e9 if duration > 0 else 0.0,
            peak_buffer_bytes=self._budget.peak_bytes + self._writer.memory_bytes,
            target_gbps=self._target_gbps,
            duration_s=duration,
            dropped_by_site=dropped,
        )

    def close(self) -> None:
        """Drain, write the index and close the file.

        Raises:
            CaptureFailedError: a thread of the capture failed; the file holds what was written before.
        """
        if self._closed:
            return
        self._closed = True
        self._queue.put(None)
        self._drainer.join()
        report = self.report
        summary = {
            "num_steps": self._end_step_number,
            "steps": report.steps,
            "records": report.records,
            "raw_bytes": report.raw_bytes,
            "dropped_records": dict(report.dropped_by_site),
            "dropped_inputs": report.dropped_inputs,
            "stalled_seconds": report.stalled_seconds,
            "eager_records": report.eager_records,
            "peak_buffer_bytes": report.peak_buffer_bytes,
            "duration_s": report.duration_s,
            "failed": None if self._failure is None else repr(self._failure),
        }
        try:
            self._writer.close(summary)
        finally:
            self._duration = time.perf_counter() - self._started
            self._budget.shut()
            if self._progress:
                self._show(end="\n")
        if self._failure is not None:
            raise CaptureFailedError(
                f"the capture's drain thread failed: {self._failure!r}"
            ) from self._failure

    def _show(self, end: str) -> None:
        report = self.report
        print(
            f"\rcaptured {report.steps} steps, {report.records} records, {report.raw_bytes / 1e6:.1f} MB "
            f"({report.achieved_gbps:.2f} GB/s), buffer {self._budget.held_bytes / 1e6:.1f} MB, "
            f"dropped {report.dropped_records}   ",
            end=end,
            file=sys.stderr,
            flush=True,
        )


class _Release:
    """Gives a record's bytes back once; cheaper to make than a closure."""

    __slots__ = ("_budget", "_num_bytes")

    def __init__(self, budget: HostBudget, num_bytes: int) -> None:
        self._budget = budget
        self._num_bytes = num_bytes

    def __call__(self) -> None:
        self._budget.release(self._num_bytes)


_SEAL = _Delivery(0, (), (), Landing([], None, None), None, 0)
_NOTHING = _Delivery(0, (), (), Landing([], None, None), None, 0)
