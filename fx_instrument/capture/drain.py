"""The drain thread: brings the values that were handed over to the writer, and keeps the first failure."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from .budget import HostBudget
from .handover import Delivery, Handover
from .layout import host_bytes
from .packing import Packer, Part, Plan, join
from .pinned import Arrival, Landing, Room

# What a queued record holds beside its bytes: a tensor, its storage, a numpy view and the row (measured: ~1 KiB).
RECORD_OVERHEAD_BYTES = 1024
SEAL_AFTER_S = 0.5
_TICK_S = SEAL_AFTER_S / 4
_COPIED_BYTES = RECORD_OVERHEAD_BYTES // 2
"""An input of a device that is no larger than this is copied once it is on the host."""
_GROUP_BYTES = 1 << 20
"""The most that graph runs of small values, copied together, may have; a quarter of what packs may take at most."""


class Writer(Protocol):
    """What a capture needs of a stream's writer."""

    memory_bytes: int
    page_bytes: int
    failure: BaseException | None

    @property
    def first_step(self) -> int: ...
    @property
    def stored_bytes(self) -> int: ...
    def add_site(self, name: str, role: str) -> int: ...
    def put(self, meta: Any, data: npt.NDArray[np.uint8], done: Callable[[], None] | None = None) -> None: ...
    def layout(self, dtype: str, records: Any) -> Any: ...
    def put_packed(
        self, layout: Any, step: int, data: npt.NDArray[np.uint8], done: Callable[[], None] | None = None
    ) -> None: ...
    def seal(self, *, older_than_s: float = 0.0) -> None: ...
    def finish(self) -> None: ...
    def capacity(self) -> tuple[float, str] | None: ...
    def close(self, summary: Mapping[str, Any]) -> None: ...
    def abandon(self) -> None: ...
    def forked(self) -> None: ...


class Drain:
    """Takes deliveries on a thread of its own.

    Args:
        writer: where records go.
        make_record: builds the writer's record from keywords (site_id, step, call, dtype, shape, full_shape).
        site_ids: the writer's id of each site, by name.
        budget: gets the bytes of a value back once it is stored.
        shut: called at the first failure: nothing that waits for room may go on waiting.
        waited_for: whether a thread that runs the model waits for room.
        packed_bytes: the most that small values may take while they are packed.
        dropped: told the names of records that are thrown away after a failure.
        tick: called a few times a second.
    """

    def __init__(
        self,
        writer: Writer,
        make_record: Callable[..., Any],
        site_ids: Mapping[str, int],
        budget: HostBudget,
        *,
        shut: Callable[[], None],
        waited_for: Callable[[], bool],
        packed_bytes: int,
        dropped: Callable[[Sequence[str]], None],
        tick: Callable[[], None] | None,
    ) -> None:
        self.handover = Handover()
        self.records = 0
        self.raw_bytes = 0
        self.failure: BaseException | None = None
        self._writer = writer
        self._make_record = make_record
        self._site_ids = dict(site_ids)
        self._input_ids: dict[str, int] = {}
        self._budget = budget
        self._packer = Packer(writer.layout, packed_bytes, writer.page_bytes)
        self._group: list[_Waiting] = []
        self._group_bytes = 0
        self._last_names: Sequence[str] = ()
        self._last_ids: Sequence[int] = ()
        self._shut = shut
        self._waited_for = waited_for
        self._dropped = dropped
        self._tick = tick
        self._thread = threading.Thread(target=self._run, name="fx_instrument-drain", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        """Wait until all that was handed over is with the writer; after an interrupt it can be called again."""
        self.handover.end()
        self._thread.join()

    def _run(self) -> None:
        last_sealed = time.monotonic()
        ended = False
        while not ended:
            deliveries, seal, ended = self.handover.take(_TICK_S)
            for delivery in deliveries:
                self._guarded(self._write, delivery)
            deliveries.clear()
            self._guarded(self._store_group)
            if seal:
                self._guarded(self._writer.seal)
            now = time.monotonic()
            if now - last_sealed >= _TICK_S:
                last_sealed = now
                self._guarded(self._seal_old)
            if self._tick is not None:
                self._guarded(self._tick)

    def _guarded(self, call: Callable[..., None], *arguments: Any) -> None:
        try:
            call(*arguments)
        except BaseException as failure:
            self._fail(failure)

    def _seal_old(self) -> None:
        # Who waits for room may wait for a page that is not full.
        self._writer.seal(older_than_s=0.0 if self._waited_for() else SEAL_AFTER_S)

    def _write(self, delivery: Delivery) -> None:
        if self.failure is not None:
            self._throw_away(delivery)
            return
        if delivery.landing is not None:
            self._put_landing(delivery, delivery.landing)
        elif delivery.names:
            self._put(delivery, self._ids_of(delivery.names), delivery.values)
        inputs = delivery.inputs
        if inputs is not None and inputs.values:
            values, inputs.values = inputs.values, []
            for name, value in zip(inputs.names, values, strict=True):
                release = _Release(self._budget, RECORD_OVERHEAD_BYTES + value.nbytes)
                self._put_input(delivery.step, name, value.dtype, value.shape, host_bytes(value), release)

    def _put_landing(self, delivery: Delivery, landing: Landing) -> None:
        """Bring the records of a delivery to the writer as they come from a device, and its inputs after them."""
        site_ids, inputs = self._ids_of(delivery.names), delivery.inputs
        names = inputs.names if inputs is not None and not inputs.values else ()
        left, done = delivery.num_bytes, 0
        if names:
            assert inputs is not None
            left += inputs.num_bytes
        for arrival in landing.arrivals(self._make_room):
            layout, room = arrival.layout, arrival.room
            count = max(0, min(len(layout.starts), len(site_ids) - done))
            further = arrival.data(slice(count, None))
            # A step's few tokens are copied, as part of their bookkeeping: they would hold the ring's room for long.
            rooms = [None if len(data) <= _COPIED_BYTES else room for data in further]
            further = [data.copy() if len(data) <= _COPIED_BYTES else data for data in further]
            in_room = sum(held is not None for held in rooms)
            if count:
                counted = count * RECORD_OVERHEAD_BYTES
                if room is None:
                    counted += layout.num_bytes
                left -= counted
                self._put_arrival(delivery, site_ids, arrival, count, counted, in_room)
            elif room is not None:
                if in_room:
                    room.split(in_room)
                else:
                    room()
            for index, (data, held) in enumerate(zip(further, rooms, strict=True), count):
                share = RECORD_OVERHEAD_BYTES + (len(data) if room is None else 0)
                left -= share
                name = names[done + index - len(site_ids)]
                release = _Release(self._budget, share, held)
                self._put_input(
                    delivery.step, name, layout.dtypes[index], layout.shapes[index], data, release
                )
            done += len(layout.starts)
        if left:
            self._budget.release(left)
        if done < len(site_ids):
            # Shut in the middle: what would have made room has failed.
            self._dropped(delivery.names[done:])

    def _put(self, delivery: Delivery, site_ids: Sequence[int], values: list[torch.Tensor]) -> None:
        """Bring the records of a delivery that was on the host all along to the writer."""
        counted, calls, full_shapes = delivery.num_bytes, delivery.calls, delivery.full_shapes
        dtypes, shapes = [value.dtype for value in values], [value.shape for value in values]
        plan = self._packer.plan(site_ids, calls, dtypes, shapes, full_shapes)
        if plan is not None:
            self._pack(_Waiting(delivery, plan, values, counted))
            return
        # Records of a site stay in the order of their steps.
        self._store_group()
        self.records += len(values)
        self.raw_bytes += sum(value.nbytes for value in values)
        values.reverse()
        for index, (dtype, shape) in enumerate(zip(dtypes, shapes, strict=True)):
            # Not held here any longer: a value that is not contiguous is copied, and goes then.
            value = values.pop()
            share = RECORD_OVERHEAD_BYTES + value.nbytes
            counted -= share
            data, release = host_bytes(value), _Release(self._budget, share)
            del value
            full_shape = full_shapes[index] if full_shapes is not None else None
            self._put_record(
                delivery.step, site_ids[index], calls[index], dtype, shape, full_shape, data, release
            )
        if counted:
            self._budget.release(counted)

    def _put_arrival(
        self,
        delivery: Delivery,
        site_ids: Sequence[int],
        arrival: Arrival,
        count: int,
        counted: int,
        further: int,
    ) -> None:
        """Bring records that came from a device together to the writer, as they lie.

        Args:
            site_ids: of the whole delivery.
            count: how many of the values are records; inputs follow.
            counted: bytes that the budget counts for them.
            further: how many others hold the arrival's room, too.
        """
        layout, calls, full_shapes, room = arrival.layout, delivery.calls, delivery.full_shapes, arrival.room
        dtypes, shapes = layout.dtypes, layout.shapes
        if count < len(layout.starts):
            dtypes, shapes = dtypes[:count], shapes[:count]
        if count < len(site_ids):
            mine = slice(layout.first, layout.first + count)
            site_ids, calls, full_shapes = site_ids[mine], calls[mine], full_shapes and full_shapes[mine]
        # Records of a site stay in the order of their steps.
        self._store_group()
        self.records += count
        self.raw_bytes += sum(layout.ends[:count]) - sum(layout.starts[:count])
        parts: Sequence[Part] = ()
        if arrival.memory is not None:
            parts = self._packer.parts(site_ids, calls, dtypes, shapes, full_shapes)
        if not parts:
            if room is not None:
                room.split(count + further)
            for index, data in enumerate(arrival.data(slice(count))):
                release = _Release(self._budget, counted // count, room)
                full_shape = full_shapes[index] if full_shapes is not None else None
                kind = dtypes[index], shapes[index], full_shape
                self._put_record(delivery.step, site_ids[index], calls[index], *kind, data, release)
            return
        assert arrival.memory is not None and room is not None
        room.split(len(parts) + further)
        for part in parts:
            release = _Release(self._budget, part.num_values * RECORD_OVERHEAD_BYTES, room)
            self._writer.put_packed(
                part.layout, delivery.step, arrival.memory[part.begin : part.end], release
            )

    def _put_input(
        self,
        step: int,
        name: str,
        dtype: torch.dtype,
        shape: torch.Size,
        data: npt.NDArray[np.uint8],
        release: _Release,
    ) -> None:
        self._put_record(step, self._input_id(name), 0, dtype, shape, None, data, release)

    def _put_record(
        self,
        step: int,
        site_id: int,
        call: int,
        dtype: torch.dtype,
        shape: torch.Size,
        full_shape: tuple[int, ...] | None,
        data: npt.NDArray[np.uint8],
        release: _Release,
    ) -> None:
        record = self._make_record(
            site_id=site_id,
            step=step,
            call=call,
            dtype=str(dtype).removeprefix("torch."),
            shape=tuple(shape),
            full_shape=full_shape,
        )
        self._writer.put(record, data, release)

    def _pack(self, waiting: _Waiting) -> None:
        """Copy the values together with those of other graph runs."""
        limit, plan = min(_GROUP_BYTES, self._packer.max_bytes // 4), waiting.plan
        group = self._group
        if group and (group[0].plan.dtype is not plan.dtype or self._group_bytes + plan.num_bytes > limit):
            self._store_group()
        self._group.append(waiting)
        self._group_bytes += plan.num_bytes
        if self._group_bytes >= limit:
            self._store_group()

    def _store_group(self) -> None:
        group, self._group, self._group_bytes = self._group, [], 0
        if not group:
            return
        if self.failure is not None:
            for waiting in group:
                waiting.values.clear()
                self._budget.release(waiting.counted)
                self._dropped(waiting.delivery.names)
            return
        packs = join([(waiting.plan, waiting.values) for waiting in group])
        given_back = 0
        for waiting, data in zip(group, packs, strict=True):
            self.records += len(waiting.values)
            self.raw_bytes += waiting.plan.num_bytes
            # What remains is one object for all.
            waiting.values.clear()
            kept = waiting.plan.num_bytes + RECORD_OVERHEAD_BYTES
            given_back += waiting.counted - kept
            release = _Release(self._budget, kept)
            self._writer.put_packed(waiting.plan.layout, waiting.delivery.step, data, release)
        self._budget.release(given_back)

    def _throw_away(self, delivery: Delivery) -> None:
        if delivery.landing is not None:
            delivery.landing.abandon()
        delivery.values.clear()
        inputs = delivery.inputs
        self._budget.release(delivery.num_bytes + (inputs.num_bytes if inputs is not None else 0))
        self._dropped(delivery.names)

    def _make_room(self) -> None:
        # What fills the ring may lie in pages that are not full yet.
        self._store_group()
        self._writer.seal()

    def _ids_of(self, names: Sequence[str]) -> Sequence[int]:
        """The writer's ids; the same list for the same names, as a graph's runs have them."""
        if names is not self._last_names:
            self._last_names, self._last_ids = names, [self._site_ids[name] for name in names]
        return self._last_ids

    def _input_id(self, name: str) -> int:
        if name not in self._input_ids:
            self._input_ids[name] = self._writer.add_site(name, "input")
        return self._input_ids[name]

    def _fail(self, failure: BaseException) -> None:
        if self.failure is None:
            self.failure = failure
        self._shut()


@dataclass(slots=True)
class _Waiting:
    """A graph run's small values, until they are copied together with others'."""

    delivery: Delivery
    plan: Plan
    values: list[torch.Tensor]
    counted: int
    """Bytes that the budget counts for them."""


class _Release:
    """Gives a record's bytes back once; cheaper to make than a closure."""

    __slots__ = ("_budget", "_num_bytes", "_room")

    def __init__(self, budget: HostBudget, num_bytes: int, room: Room | None = None) -> None:
        self._budget = budget
        self._num_bytes = num_bytes
        self._room = room

    def __call__(self) -> None:
        if self._room is not None:
            self._room()
        self._budget.release(self._num_bytes)
