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
from .layout import Kinds, host_bytes
from .packing import Group, Packer, Part, Plan, Records, join
from .pinned import Arrival, Room

# What a queued record holds beside its bytes: a tensor, its storage, a numpy view and the row (measured: ~1 KiB).
RECORD_OVERHEAD_BYTES = 1024
SEAL_AFTER_S = 0.5
_TICK_S = SEAL_AFTER_S / 4
_COPIED_BYTES = RECORD_OVERHEAD_BYTES // 2
"""A step's inputs from a device that are no larger than this are copied once they are on the host."""
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
        self,
        layout: Any,
        step: int,
        data: npt.NDArray[np.uint8] | Sequence[npt.NDArray[np.uint8]],
        done: Callable[[], None] | None = None,
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
        dropped: told the names of records that are thrown away after a failure, and whether they are inputs.
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
        dropped: Callable[[Sequence[str], bool], None],
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
                self._bring(delivery)
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

    def _bring(self, delivery: Delivery) -> None:
        """To the writer; what a failure leaves of it is thrown away, and room that it did not need is given back."""
        if self.failure is None:
            self._guarded(self._write, delivery)
        if delivery.num_bytes or delivery.num_done < len(delivery.names):
            self._throw_away(delivery)

    def _write(self, delivery: Delivery) -> None:
        site_ids: Sequence[int]
        if delivery.is_input:
            site_ids = [self._input_id(name) for name in delivery.names]
        else:
            site_ids = self._ids_of(delivery.names)
        landing = delivery.landing
        if delivery.copied is not None:
            for site_id, (dtype, shape, data) in zip(site_ids, delivery.copied, strict=True):
                counted = RECORD_OVERHEAD_BYTES + len(data)
                release = _Release(self._budget, counted)
                where = delivery.step, site_id, 0
                self._put_record(*where, dtype, shape, None, np.frombuffer(data, np.uint8), release)
                delivery.done(1, counted)
            return
        if landing is None:
            self._put(delivery, site_ids, delivery.values)
            return
        # Ends early when it is shut: what would have made room has failed.
        for arrival in landing.arrivals(self._make_room):
            self._put_arrival(delivery, site_ids, arrival)

    def _put(self, delivery: Delivery, site_ids: Sequence[int], values: list[torch.Tensor]) -> None:
        """Bring the records of a delivery that was on the host all along to the writer."""
        calls, full_shapes = delivery.calls, delivery.full_shapes
        kinds = delivery.kinds if delivery.kinds is not None else Kinds.of(values)
        records = Records(site_ids, calls, kinds.dtypes, kinds.shapes, full_shapes)
        plan = self._packer.plan(records)
        if plan is not None:
            self._pack(delivery, plan)
            return
        # Records of a site stay in the order of their steps.
        self._store_group()
        groups = self._packer.groups(records)
        if groups:
            self._put_groups(delivery, groups, values)
            return
        values.reverse()
        for index in range(len(values)):
            # Not held here any longer: a value that is not contiguous is copied, and goes then.
            value = values.pop()
            counted = RECORD_OVERHEAD_BYTES + value.nbytes
            data, dtype, shape = host_bytes(value), value.dtype, value.shape
            del value
            full_shape = full_shapes[index] if full_shapes is not None else None
            release = _Release(self._budget, counted)
            self._put_record(
                delivery.step, site_ids[index], calls[index], dtype, shape, full_shape, data, release
            )
            self._count(delivery, 1, len(data), counted)

    def _put_groups(self, delivery: Delivery, groups: Sequence[Group], values: list[torch.Tensor]) -> None:
        """Bring large values to the writer where they lie, as many at once as a page holds."""
        delivery.order = [index for group in groups for index in group.order]
        waiting = dict(enumerate(values))
        values.clear()
        for group in groups:
            # Not held here any longer: a value that is not contiguous is copied, and goes then.
            pieces = [host_bytes(waiting.pop(index)) for index in group.order]
            counted = group.num_bytes + len(pieces) * RECORD_OVERHEAD_BYTES
            self._writer.put_packed(group.layout, delivery.step, pieces, _Release(self._budget, counted))
            self._count(delivery, len(pieces), group.num_bytes, counted)

    def _put_arrival(self, delivery: Delivery, site_ids: Sequence[int], arrival: Arrival) -> None:
        """Bring records that came from a device together to the writer, as they lie.

        Args:
            site_ids: of the whole delivery.
        """
        layout, calls, full_shapes, room = arrival.layout, delivery.calls, delivery.full_shapes, arrival.room
        count = len(layout.starts)
        if count < len(site_ids):
            mine = slice(layout.first, layout.first + count)
            site_ids, calls, full_shapes = site_ids[mine], calls[mine], full_shapes and full_shapes[mine]
        if not delivery.is_input:
            # Records of a site stay in the order of their steps.
            self._store_group()
            if arrival.memory is not None and room is not None:
                records = Records(site_ids, calls, layout.dtypes, layout.shapes, full_shapes)
                parts = self._packer.parts(records)
                if parts:
                    self._put_parts(delivery, parts, arrival.memory, room)
                    return
        values = arrival.data()
        if delivery.is_input and room is not None and layout.num_bytes <= _COPIED_BYTES:
            # They would hold the ring's room until their page is stored, which a step's few tokens fill late.
            values = [data.copy() for data in values]
            room()
            room = None
        if room is not None:
            room.split(count)
        for index, data in enumerate(values):
            full_shape = full_shapes[index] if full_shapes is not None else None
            kind = layout.dtypes[index], layout.shapes[index], full_shape
            # What lies in the ring is counted with it.
            counted = RECORD_OVERHEAD_BYTES + (len(data) if arrival.room is None else 0)
            release = _Release(self._budget, counted, room)
            self._put_record(delivery.step, site_ids[index], calls[index], *kind, data, release)
            self._count(delivery, 1, len(data), counted)

    def _put_parts(
        self, delivery: Delivery, parts: Sequence[Part], memory: npt.NDArray[np.uint8], room: Room
    ) -> None:
        room.split(len(parts))
        for part in parts:
            counted = part.num_values * RECORD_OVERHEAD_BYTES
            release = _Release(self._budget, counted, room)
            self._writer.put_packed(part.layout, delivery.step, memory[part.begin : part.end], release)
            self._count(delivery, part.num_values, part.end - part.begin, counted)

    def _count(self, delivery: Delivery, num_records: int, num_bytes: int, counted: int) -> None:
        """So many of a delivery's records are with the writer; the budget counts ``counted`` bytes for them."""
        delivery.done(num_records, counted)
        if not delivery.is_input:
            self.records += num_records
            self.raw_bytes += num_bytes

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

    def _pack(self, delivery: Delivery, plan: Plan) -> None:
        """Copy the values together with those of other graph runs."""
        limit, group = min(_GROUP_BYTES, self._packer.max_bytes // 4), self._group
        if group and (group[0].plan.dtype is not plan.dtype or self._group_bytes + plan.num_bytes > limit):
            self._store_group()
        self._group.append(_Waiting(delivery, plan, delivery.values, delivery.num_bytes))
        delivery.done(len(delivery.values), delivery.num_bytes)
        self._group_bytes += plan.num_bytes
        if self._group_bytes >= limit:
            self._store_group()

    def _store_group(self) -> None:
        group, self._group, self._group_bytes = self._group, [], 0
        if not group:
            return
        num_stored = given_back = 0
        try:
            if self.failure is None:
                packs = join([(waiting.plan, waiting.values) for waiting in group])
                for waiting, data in zip(group, packs, strict=True):
                    num_values = len(waiting.values)
                    # What remains is one object for all.
                    waiting.values.clear()
                    kept = waiting.plan.num_bytes + RECORD_OVERHEAD_BYTES
                    release = _Release(self._budget, kept)
                    self._writer.put_packed(waiting.plan.layout, waiting.delivery.step, data, release)
                    num_stored += 1
                    given_back += waiting.counted - kept
                    self.records += num_values
                    self.raw_bytes += waiting.plan.num_bytes
        finally:
            for waiting in group[num_stored:]:
                waiting.values.clear()
                given_back += waiting.counted
                self._dropped(waiting.delivery.names, False)
            self._budget.release(given_back)

    def _throw_away(self, delivery: Delivery) -> None:
        """What of it is not with the writer."""
        if delivery.landing is not None:
            delivery.landing.abandon()
        delivery.values.clear()
        left = delivery.left()
        if left:
            self._dropped(left, delivery.is_input)
        self._budget.release(delivery.num_bytes)

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
