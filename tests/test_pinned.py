"""The pinned ring between device and host, on a simulated device."""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Iterator
from unittest import mock

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from simulated_device import DEVICE, SECOND, Device, Memory, Value

from fx_instrument.capture import cuda, layout
from fx_instrument.capture.pinned import Arrival, Landing, PinnedTransfer
from fx_instrument.capture.ring import ALIGNMENT, Ring, Span
from fx_instrument.errors import BufferTooSmallError, CaptureFailedError

CAPACITY = 16 * ALIGNMENT


@given(st.lists(st.tuples(st.integers(0, 400), st.randoms(use_true_random=False)), max_size=60))
def test_spans_in_use_never_overlap(asked: list[tuple[int, random.Random]]) -> None:
    """Whatever the order of taking and releasing; and an empty ring takes anything up to its capacity."""
    ring = Ring(CAPACITY)
    used: list[Span] = []
    for num_bytes, chance in asked:
        while used and chance.random() < 0.4:
            ring.release(used.pop(chance.randrange(len(used))))
        span = ring.take(num_bytes)
        if span is None:
            assert used, "an empty ring has room"
            continue
        assert span.start >= 0 and span.start + num_bytes <= CAPACITY and span.start % ALIGNMENT == 0
        for other in used:
            assert span.start >= other.end or span.end <= other.start
        used.append(span)
        assert sum(s.num_bytes for s in used) <= ring.held_bytes <= ring.peak_bytes <= CAPACITY
    for span in used:
        ring.release(span)
    assert ring.held_bytes == 0
    assert ring.take(CAPACITY) is not None and ring.take(0) is None


DEVICES = st.sampled_from([DEVICE, SECOND])
SIZES = st.tuples(st.integers(0, CAPACITY), DEVICES)
SMALL_SIZES = st.tuples(st.integers(0, 60), DEVICES)


class Interleavings(RuleBasedStateMachine):
    """Graph runs, copies, arrivals and released records in any order: each record has its own run's bytes.

    Values of a run may lie on two devices, whose streams know nothing of each other.
    """

    @initialize(small=st.sampled_from([0, 200, layout._SMALL_BYTES]))
    def begin(self, small: int) -> None:
        self.patch = mock.patch.object(layout, "_SMALL_BYTES", small)
        self.patch.start()
        self.device = Device()
        self.transfer = PinnedTransfer(CAPACITY, self.device)
        # What a CUDA graph writes at each replay.
        self.static = [(Memory(40), DEVICE), (Memory(300), SECOND), (Memory(700), DEVICE)]
        self.runs = 0
        self.queue: deque[tuple[Landing, list[torch.Tensor]]] = deque()
        self.draining: tuple[Iterator[Arrival], list[torch.Tensor]] | None = None
        self.held: list[tuple[Arrival, list[torch.Tensor]]] = []
        self.started = self.stored = 0

    @rule(
        replays=st.booleans(),
        sizes=st.lists(SIZES, min_size=1, max_size=5) | st.lists(SMALL_SIZES, min_size=1, max_size=3),
        is_told=st.booleans(),
    )
    def run_graph(self, replays: bool, sizes: list[tuple[int, torch.device]], is_told: bool) -> None:
        self.runs += 1
        memories = self.static if replays else [(Memory(size), device) for size, device in sizes]
        num_bytes = sum(len(memory.data) for memory, _ in memories) if is_told else 0
        is_small = 0 < num_bytes <= CAPACITY // 4
        admitted = self.transfer.admit(num_bytes, wait=False)
        has_room = self.transfer.ring.has_room(num_bytes + num_bytes // 64 + 2 * ALIGNMENT)
        assert admitted or len(self.transfer._waiting) > 1 or (is_small and not has_room)
        values = [Value(self.device, memory, owns=not replays, on=device) for memory, device in memories]
        expected = []
        for number, (memory, device) in enumerate(memories):
            content = (torch.arange(len(memory.data)) * 7 + self.runs * 31 + number).to(torch.uint8)
            stream = self.device.computes[device]
            stream.append(lambda data=memory.data, content=content: data.copy_(content))
            expected.append(content)
        if not admitted:
            return  # dropped
        with self.transfer.order:
            nothing_waits = not self.transfer._waiting
            landing = self.transfer.start(values, overwritten=replays)
            self.queue.append((landing, expected))
            if is_small and nothing_waits and landing.layout.gathers and len(landing.pieces) <= 2:
                assert landing.is_started, "it was let in once there was room"
        self.started += len(values)

    @rule(times=st.integers(1, 6), device=DEVICES)
    def compute(self, times: int, device: torch.device) -> None:
        for _ in range(times):
            self.device.advance(self.device.computes[device])

    @rule(times=st.integers(1, 6), device=DEVICES)
    def copy(self, times: int, device: torch.device) -> None:
        for _ in range(times):
            self.device.advance(self.device.copies_of[device])

    @precondition(lambda self: self.draining or self.queue)
    @rule()
    def arrive(self) -> None:
        if self.draining is None:
            landing, expected = self.queue.popleft()
            self.draining = landing.arrivals(self.store_everything), expected
        arrivals, expected = self.draining
        found = next(arrivals, None)
        if found is None:
            assert not expected
            self.draining = None
            return
        self.held.append((found, [expected.pop(0) for _ in found.layout.starts]))

    @precondition(lambda self: self.held)
    @rule(chance=st.randoms(use_true_random=False))
    def store(self, chance: random.Random) -> None:
        self.store_record(chance.randrange(len(self.held)))

    def store_record(self, index: int) -> None:
        """The writer reads a record as late as it gives it back."""
        arrival, expected = self.held.pop(index)
        equal = all(torch.equal(*pair) for pair in zip(arrived(arrival), expected, strict=True))
        give_back(arrival)
        self.stored += len(expected)
        assert equal

    def store_everything(self) -> None:
        while self.held:
            self.store_record(0)

    @invariant()
    def is_bounded(self) -> None:
        assert self.device.allocated in ([], [CAPACITY])
        # One run whose values wait for room, and one that was admitted before it had to.
        assert len(self.transfer._waiting) <= 2
        assert self.transfer.ring.peak_bytes <= CAPACITY

    def teardown(self) -> None:
        self.patch.stop()
        while self.draining or self.queue:
            self.arrive()
        self.store_everything()
        assert self.stored == self.started
        assert self.transfer.ring.held_bytes == 0 and not self.transfer._waiting
        self.transfer.close()
        assert self.device.freed == self.device.allocated


TestInterleavings = Interleavings.TestCase
TestInterleavings.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def arrived(arrival: Arrival) -> list[torch.Tensor]:
    """What arrived, where it lies."""
    layout = arrival.layout
    if arrival.memory is None:
        return arrival.sources
    return layout.values(torch.from_numpy(arrival.memory))


def give_back(arrival: Arrival) -> None:
    assert arrival.room is not None, "it came from the device"
    arrival.room()


def values_of(device: Device, contents: list[torch.Tensor]) -> list[Value]:
    values = []
    for content in contents:
        memory = Memory(len(content))
        device.compute.append(lambda data=memory.data, content=content: data.copy_(content))
        values.append(Value(device, memory, owns=True))
    return values


def test_a_run_larger_than_the_ring_flows_through_it() -> None:
    """Ten rings' worth of values of one graph run arrive whole and in order, in one allocation."""
    device = Device()
    transfer = PinnedTransfer(CAPACITY, device)
    contents = [torch.full((CAPACITY // 4,), number, dtype=torch.uint8) for number in range(40)]
    with transfer.order:
        landing = transfer.start(values_of(device, contents))
    assert landing.num_started == 4
    held: list[Arrival] = []
    seen = []

    def make_room() -> None:
        for arrival in held:
            seen.extend(int(value.unique()) for value in arrived(arrival))
            give_back(arrival)
        held.clear()

    for found in landing.arrivals(make_room):
        held.append(found)
    make_room()
    assert seen == list(range(40))
    assert device.allocated == [CAPACITY] and transfer.ring.held_bytes == 0


def test_a_value_larger_than_the_ring_is_refused() -> None:
    """Before anything of its run is begun, with both sizes."""
    device = Device()
    transfer = PinnedTransfer(CAPACITY, device)
    sizes = [64, CAPACITY + 1]
    with (
        transfer.order,
        pytest.raises(BufferTooSmallError, match=rf"{CAPACITY + 1} bytes .* {CAPACITY} bytes"),
    ):
        transfer.start(values_of(device, [torch.zeros(size, dtype=torch.uint8) for size in sizes]))
    assert not device.copies and transfer.ring.held_bytes == 0


def test_a_replay_does_not_wait_for_the_copies_of_the_one_before() -> None:
    """Host and device go on; what is gathered next waits for them, on the device, and takes the same memory."""
    device = Device()
    transfer = PinnedTransfer(CAPACITY, device)
    output = Memory(64)
    landings = []
    for number in (1, 2):
        assert transfer.admit(0, wait=True)
        device.compute.append(lambda number=number: output.data.fill_(number))
        with transfer.order:
            landings.append(transfer.start([Value(device, output, owns=False)], overwritten=True))
    while device.advance(device.compute):
        pass
    assert output.data.unique() == 2, "the second run wrote while the first one's copy had not begun"
    first = [arrived(a)[0].clone() for landing in landings for a in landing.arrivals(lambda: None)]
    assert [int(value.unique()) for value in first] == [1, 2]


def test_values_of_a_run_leave_in_one_piece() -> None:
    """Small ones and those that are overwritten: one copy to the host for all of them."""
    device = Device()
    transfer = PinnedTransfer(CAPACITY, device)
    with transfer.order:
        landing = transfer.start(
            values_of(device, [torch.full((24,), n, dtype=torch.uint8) for n in range(9)])
        )
    assert len(device.copies) == 3, "a wait, a copy, an event"
    (arrival,) = landing.arrivals(lambda: None)
    values = arrived(arrival)
    assert [int(value.unique()) for value in values] == list(range(9))
    assert values[8].data_ptr() - values[0].data_ptr() == 8 * 24, "side by side"
    give_back(arrival)
    assert transfer.ring.held_bytes == 0


def test_values_of_several_dtypes_and_of_the_host() -> None:
    """Each begins where its dtype may; what was on the host all along passes by; all come in order."""
    device = Device()
    transfer = PinnedTransfer(CAPACITY, device)
    contents = [
        torch.arange(3, dtype=torch.bfloat16),
        torch.arange(5, dtype=torch.float32).view(1, 5),
        torch.arange(2, dtype=torch.int64),
        torch.tensor([True, False, True]),
        torch.zeros(0, 4),
        torch.arange(4, dtype=torch.float64),
    ]
    on_device = []
    for content in contents:
        memory = Memory(*content.shape, dtype=content.dtype)
        device.compute.append(lambda data=memory.data, content=content: data.copy_(content))
        on_device.append(Value(device, memory, owns=True))
    on_host = torch.ones(7)
    with transfer.order:
        landing = transfer.start([*on_device[:2], on_host, *on_device[2:]])
    arrivals = list(landing.arrivals(lambda: None))
    assert [len(arrival.layout.starts) for arrival in arrivals] == [2, 1, 4]
    found = [value for arrival in arrivals for value in arrived(arrival)]
    for value, content in zip(found, [*contents[:2], on_host, *contents[2:]], strict=True):
        assert value.dtype is content.dtype and torch.equal(value, content)
    assert found[2] is on_host and arrivals[1].room is None
    for arrival in arrivals[::2]:
        give_back(arrival)
    assert transfer.ring.held_bytes == 0


def test_a_backlog_holds_up_the_host_until_its_values_are_under_way() -> None:
    """ "stall": with two runs waiting for room the next one waits until the older is under way; "drop": it is told."""
    device = Device()
    transfer = PinnedTransfer(CAPACITY, device)
    contents = [torch.full((CAPACITY // 2,), number, dtype=torch.uint8) for number in range(6)]
    with transfer.order:
        landings = [
            transfer.start(values_of(device, contents[:3])),
            transfer.start(values_of(device, contents[3:])),
        ]
    assert not transfer.admit(0, wait=False)
    admitted = threading.Event()
    thread = threading.Thread(target=lambda: transfer.admit(0, wait=True) and admitted.set(), daemon=True)
    thread.start()
    taken = []
    for landing in landings:
        for arrival in landing.arrivals(lambda: None):
            assert taken or not admitted.is_set()
            taken += [int(value[0]) for value in arrived(arrival)]
            give_back(arrival)
    thread.join(60)
    assert admitted.is_set() and taken == list(range(6)) and transfer.stalled_ns > 0


def test_small_runs_wait_for_room_before_they_run() -> None:
    """Not on the device, where each would be held and copied value by value."""
    device = Device()
    transfer = PinnedTransfer(CAPACITY, device)
    size = CAPACITY // 8
    landings = []
    while transfer.admit(size, wait=False):
        with transfer.order:
            landings.append(transfer.start(values_of(device, [torch.ones(size, dtype=torch.uint8)])))
    assert len(landings) > 4 and all(landing.is_started for landing in landings)
    assert not transfer.admit(size, wait=True, timeout_s=0.01) and transfer.stalled_ns > 0
    admitted = threading.Event()
    thread = threading.Thread(target=lambda: transfer.admit(size, wait=True) and admitted.set(), daemon=True)
    thread.start()
    for landing in landings[:3]:
        for arrival in landing.arrivals(lambda: None):
            give_back(arrival)
    thread.join(60)
    assert admitted.is_set() and not transfer.num_waiting


def test_a_device_without_memory_loses_no_room() -> None:
    """Whoever called learns it; the ring is as it was."""

    class Full(Device):
        def gather(self, *args: object) -> Value:
            raise MemoryError("the device is full")

    transfer = PinnedTransfer(CAPACITY, Full())
    with transfer.order, pytest.raises(MemoryError, match="the device is full"):
        transfer.start(values_of(Device(), [torch.ones(64, dtype=torch.uint8)] * 3))
    assert transfer.ring.held_bytes == 0


def test_after_a_failure_nothing_waits() -> None:
    """A stalled model's thread and the drain thread are let go; spans come back once their copies are done."""
    device = Device()
    transfer = PinnedTransfer(CAPACITY, device)
    with transfer.order:
        landing, other = (
            transfer.start(values_of(device, [torch.ones(CAPACITY, dtype=torch.uint8)] * 3)) for _ in range(2)
        )
    answers = []
    thread = threading.Thread(target=lambda: answers.append(transfer.admit(0, wait=True)), daemon=True)
    thread.start()
    arrivals = landing.arrivals(transfer.shut)
    give_back(next(arrivals))
    assert next(arrivals).room is not None
    assert next(arrivals, None) is None
    other.abandon()
    thread.join(60)
    assert answers == [False]
    assert not transfer._waiting and not landing.pieces


def test_host_memory_is_locked_for_every_device_and_kept_for_the_next_capture() -> None:
    """Each block is unlocked once it is needed no more; what CUDA refuses is said with its size."""
    runtime = mock.Mock(**{"cudaHostRegister.return_value": 0})
    with mock.patch.object(cuda, "_runtime", lambda: runtime):
        pinned = cuda._Pinned()
        first = pinned.take(8192)
        address = first.data_ptr()
        runtime.cudaHostRegister.assert_called_once_with(address, 8192, cuda._FOR_EVERY_DEVICE)
        pinned.give_back(first)
        assert pinned.take(8192) is first and not runtime.cudaHostUnregister.called
        pinned.give_back(first)
        second = pinned.take(4096)
        runtime.cudaHostUnregister.assert_called_once_with(address)
        pinned.give_back(second)
        runtime.cudaHostRegister.return_value = 2
        with pytest.raises(CaptureFailedError, match="can't lock 8192 bytes"):
            pinned.take(8192)
