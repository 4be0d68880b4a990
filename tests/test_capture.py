"""The buffer's bound, the session's counting, and failures in its thread."""

from __future__ import annotations

import io
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef

from fx_instrument import BufferTooSmallError, CaptureFailedError, open_stream
from fx_instrument.capture.budget import HostBudget
from fx_instrument.capture.drain import RECORD_OVERHEAD_BYTES
from fx_instrument.capture.layout import Kinds, host_bytes
from fx_instrument.capture.session import Session
from fx_instrument.graph.sites import Site
from fx_instrument.stream.records import RecordMeta
from fx_instrument.stream.writer import StreamWriter

A, B = Site("a", "attention"), Site("b", "mlp")


class HeldWriter:
    """A writer that keeps what it is given until the test lets go of it."""

    def __init__(self, hold: bool = False) -> None:
        self.first_step = self.memory_bytes = self.page_bytes = self.stored_bytes = 0
        self.failure: BaseException | None = None
        self.hold = hold
        self.held: list[Callable[[], None]] = []
        self.rows: list[tuple[RecordMeta, bytes]] = []
        self.sites: list[tuple[str, str]] = []
        self.summary: Mapping[str, Any] = {}
        self.arrived = threading.Semaphore(0)

    def add_site(self, name: str, role: str) -> int:
        if (name, role) not in self.sites:
            self.sites.append((name, role))
        return self.sites.index((name, role))

    def put(self, meta: Any, data: np.ndarray, done: Callable[[], None] | None = None) -> None:
        self.rows.append((meta, data.tobytes()))
        assert done is not None
        if self.hold:
            self.held.append(done)
        else:
            done()
        self.arrived.release()

    def let_go(self) -> None:
        self.hold = False
        while self.held:
            self.held.pop()()

    def seal(self, *, older_than_s: float = 0.0) -> None:
        pass

    def layout(self, dtype: str, records: Any) -> Any:
        raise AssertionError("a buffer this small packs nothing")

    def put_packed(self, layout: Any, step: int, data: Any, done: Any = None) -> None:
        raise AssertionError("a buffer this small packs nothing")

    def finish(self) -> None:
        self.let_go()

    def capacity(self) -> tuple[float, str] | None:
        return None

    def close(self, summary: Mapping[str, Any]) -> None:
        self.summary = summary


def session(writer: Any, limit: int = 1_000_000, drop: bool = False, **more: Any) -> Session:
    return Session(
        writer,
        RecordMeta,
        [A, B],
        max_memory_bytes=limit,
        drop=drop,
        target_gbps=1.0,
        **{"sampling": None, "progress": False, **more},
    )


def run_graph(open_session: Session, *values: torch.Tensor) -> None:
    sites = [A, B][: len(values)]
    ticket = open_session.reserve(sites, sum(value.nbytes for value in values))
    open_session.deliver(ticket, sites, values, None)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 50)), max_size=40), st.integers(1, 100))
def test_budget_never_holds_more_than_its_limit(moves: list[tuple[bool, int]], limit: int) -> None:
    """Whatever the order of acquiring and releasing, the bytes held are the granted ones and stay in the bound."""
    budget = HostBudget(limit)
    granted: list[int] = []
    for acquire, amount in moves:
        if acquire:
            fits = sum(granted) + amount <= limit
            assert budget.acquire(amount, wait=False) is fits
            if fits:
                granted.append(amount)
        elif granted:
            budget.release(granted.pop())
        assert budget.held_bytes == sum(granted) <= limit
    assert budget.peak_bytes <= limit


def test_a_stalled_thread_goes_on_once_there_is_room() -> None:
    """ "stall" waits, and says how long it did."""
    budget = HostBudget(10)
    assert budget.acquire(10, wait=False)
    waiting = threading.Thread(target=lambda: budget.acquire(5, wait=True))
    waiting.start()
    while budget.stalled_ns == 0 and waiting.is_alive():
        with budget._changed:
            asleep = bool(budget._changed._waiters)  # type: ignore[attr-defined]
        if asleep:
            budget.release(10)
            break
    waiting.join(timeout=10)
    assert not waiting.is_alive() and budget.held_bytes == 5 and budget.stalled_ns > 0


def test_steps_and_calls_are_counted() -> None:
    """Steps are numbered by forward call, calls within a step by site."""
    writer = HeldWriter()
    opened = session(writer)
    for _ in range(2):
        opened.begin_step({"input_ids": torch.tensor([[1, 2]])})
        run_graph(opened, torch.ones(2), torch.ones(3))
        run_graph(opened, torch.ones(4))
        opened.end_step()
    opened.close()
    rows = [(m.site_id, m.step, m.call, m.shape) for m, _ in writer.rows if m.site_id < 2]
    assert rows == [
        (0, 0, 0, (2,)),
        (1, 0, 0, (3,)),
        (0, 0, 1, (4,)),
        (0, 1, 0, (2,)),
        (1, 1, 0, (3,)),
        (0, 1, 1, (4,)),
    ]
    assert writer.sites[2] == ("input_ids", "input")
    assert (opened.report.steps, opened.report.records, opened.report.raw_bytes) == (2, 6, 72)
    assert writer.summary["num_steps"] == 2


def test_eager_values_outside_a_step_belong_to_the_next() -> None:
    """What runs before a forward call (an encoder in generate) counts to that call, what runs inside to it."""
    writer = HeldWriter()
    opened = session(writer)
    value = torch.ones(2)
    opened.record_eager(A, value)
    value.zero_()
    opened.begin_step({})
    opened.record_eager(A, torch.ones(2))
    opened.end_step()
    opened.record_eager(B, torch.ones(2))
    opened.close()
    assert [(m.site_id, m.step, m.call) for m, _ in writer.rows] == [(0, 0, 0), (0, 0, 1), (1, 1, 0)]
    assert np.frombuffer(writer.rows[0][1], np.float32).tolist() == [1, 1]
    assert opened.report.eager_records == 3 and opened.report.steps == 1
    assert writer.summary["num_steps"] == 2


def test_a_full_buffer_drops_and_counts() -> None:
    """on_full="drop": what finds no room is counted by site, and nothing waits."""
    writer = HeldWriter(hold=True)
    opened = session(writer, limit=4 * (100 + RECORD_OVERHEAD_BYTES), drop=True)
    values = torch.ones(25), torch.ones(25)
    for _ in range(3):
        opened.begin_step({})
        run_graph(opened, *values)
        opened.end_step()
    opened.close()
    assert opened.report.dropped_by_site == {"a": 2, "b": 2}
    assert opened.report.dropped_records == 4 and opened.report.records == 2
    assert writer.summary["dropped_records"] == {"a": 2, "b": 2}


def test_inputs_that_find_no_room_are_counted() -> None:
    """Under "drop" steps without their inputs are counted; under "stall" inputs larger than the bound are refused."""
    inputs = {"input_ids": torch.zeros(1, 1000, dtype=torch.int64)}
    opened = session(HeldWriter(), limit=5000, drop=True)
    opened.begin_step(inputs)
    opened.end_step()
    opened.close()
    assert opened.report.dropped_inputs == 1 and opened.report.dropped_records == 0
    opened = session(HeldWriter(), limit=5000)
    with pytest.raises(BufferTooSmallError, match="integer inputs"):
        opened.begin_step(inputs)
    opened.close()


def test_a_full_buffer_stalls_and_loses_nothing() -> None:
    """on_full="stall": the forward call waits until the writer has let go."""
    writer = HeldWriter(hold=True)
    opened = session(writer, limit=2 * (100 + RECORD_OVERHEAD_BYTES))

    def forward() -> None:
        for _ in range(3):
            opened.begin_step({})
            run_graph(opened, torch.ones(25), torch.ones(25))
            opened.end_step()

    model = threading.Thread(target=forward)
    model.start()
    for _ in range(2):
        assert writer.arrived.acquire(timeout=10)
    assert len(writer.rows) == 2  # the second step waits for room
    writer.let_go()
    model.join(timeout=10)
    opened.close()
    assert not model.is_alive()
    assert opened.report.records == 6 and opened.report.dropped_records == 0
    assert opened.report.peak_buffer_bytes <= 2 * (100 + RECORD_OVERHEAD_BYTES)


def test_a_step_larger_than_the_bound_is_refused() -> None:
    """The error names both sizes, before anything is recorded."""
    writer = HeldWriter()
    opened = session(writer, limit=5000)
    opened.begin_step({})
    with pytest.raises(BufferTooSmallError, match=r"captures 8000 bytes.*max_memory_gb=5e-06.*5000 bytes"):
        opened.reserve([A], 8000)
    opened.close()
    assert writer.rows == [] and opened.report.records == 0


def test_a_failing_thread_reaches_the_caller() -> None:
    """An exception in the drain thread is raised at the end, with its cause, and never blocks the model."""

    class Failing(HeldWriter):
        def put(self, meta: Any, data: np.ndarray, done: Callable[[], None] | None = None) -> None:
            raise RuntimeError("no")

    opened = session(Failing(), limit=3 * (100 + RECORD_OVERHEAD_BYTES))
    for _ in range(5):
        opened.begin_step({})
        run_graph(opened, torch.ones(25))
        opened.end_step()
    with pytest.raises(CaptureFailedError) as raised:
        opened.close()
    assert isinstance(raised.value.__cause__, RuntimeError)


@pytest.mark.parametrize("sampling", [None, (0.5, 0)], ids=["whole", "sampled"])
def test_a_copy_that_fails_gives_its_room_back(
    sampling: tuple[float, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no memory is left for the copy of a value or of an input, later calls find the buffer as it was."""

    def fail(*args: Any, **kwargs: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("no memory")

    opened = session(HeldWriter(), limit=2 * (400 + RECORD_OVERHEAD_BYTES), sampling=sampling)
    with monkeypatch.context() as patched:
        for method in ("clone", "index_select", "is_contiguous"):
            patched.setattr(torch.Tensor, method, fail)
        with pytest.raises(torch.OutOfMemoryError):
            opened.record_eager(A, torch.ones(100))
        with pytest.raises(torch.OutOfMemoryError):
            opened.begin_step({"input_ids": torch.zeros(1, 50, dtype=torch.int64)})
        assert opened._budget.held_bytes == 0
    opened.end_step()
    opened.begin_step({})
    opened.record_eager(A, torch.ones(100))
    opened.end_step()
    opened.close()
    assert opened.report.records == 1 and opened.report.dropped_records == 0


@pytest.mark.parametrize("error", [BrokenPipeError("gone"), ValueError("I/O operation on closed file")])
def test_progress_that_can_not_be_shown_ends_no_capture(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A standard error that nobody reads any more is written to once, and values go on to the file."""

    class Gone(io.StringIO):
        num_writes = 0

        def write(self, text: str) -> int:
            Gone.num_writes += 1
            raise error

    monkeypatch.setattr(sys, "stderr", Gone())
    writer = HeldWriter()
    opened = session(writer, progress=True)
    assert opened._progress is not None
    opened._progress._last_shown = -1.0  # the line is due at once
    deadline = time.monotonic() + 20
    while Gone.num_writes == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    opened._progress._last_shown = -1.0
    opened.begin_step({})
    run_graph(opened, torch.ones(25))
    opened.end_step()
    opened.close()
    assert Gone.num_writes == 1
    assert opened.report.records == len(writer.rows) == 1 and opened.report.dropped_records == 0


def test_threads_have_steps_of_their_own() -> None:
    """Forward calls from several threads never share a step, and every record has the step of its thread."""
    writer = HeldWriter()
    opened = session(writer)
    start = threading.Barrier(4)

    def forward(number: int) -> None:
        start.wait()
        for _ in range(20):
            opened.begin_step({})
            run_graph(opened, torch.full((2,), float(number)), torch.full((2,), float(number)))
            opened.end_step()

    threads = [threading.Thread(target=forward, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    opened.close()
    by_step: dict[int, set[bytes]] = {}
    for meta, data in writer.rows:
        by_step.setdefault(meta.step, set()).add(data)
    assert sorted(by_step) == list(range(80))
    assert all(len(values) == 1 for values in by_step.values())
    assert len(writer.rows) == 160


@pytest.mark.parametrize(
    "value",
    [
        torch.arange(6.0).view(2, 3).t(),
        torch.tensor(3.0),
        torch.zeros(0, 4),
        torch.ones(3, dtype=torch.bfloat16),
        torch.tensor([True, False]),
        torch.ones(2, dtype=torch.complex64),
        torch.tensor([1 + 2j, 3 - 4j]).conj(),
        torch.tensor([1 + 2j]).conj().imag,
        torch.ones(4, dtype=torch.float8_e4m3fn),
        torch.nn.Parameter(torch.ones(5)),
    ],
)
def test_host_bytes_are_row_major(value: torch.Tensor) -> None:
    """Strided, scalar, empty and unusual dtypes: the bytes of the contiguous tensor."""
    data = host_bytes(value)
    assert data.dtype == np.uint8 and data.ndim == 1 and len(data) == value.nbytes
    if value.numel():
        whole = torch.empty(value.shape, dtype=value.dtype).copy_(value.detach())
        assert data.tobytes() == bytes(whole.view(-1).view(torch.uint8).tolist())


def test_host_bytes_keep_their_memory() -> None:
    """It lives as long as an array looks at it, and no longer."""
    value = torch.ones(1000)
    memory = StorageWeakRef(value.untyped_storage())
    data = host_bytes(value)[:4]
    del value
    assert not memory.expired() and data.tobytes() == b"\0\0\x80\x3f"
    del data
    assert memory.expired()


@pytest.mark.parametrize(
    "value",
    [
        torch.arange(12).view(3, 4).t(),
        torch.tensor(5, dtype=torch.int32),
        torch.empty(0, 3, dtype=torch.int16),
        torch.tensor([True, False]),
        torch.arange(5, dtype=torch.uint8).expand(2, 5),
        torch.arange((1 << 17) + 1),
    ],
)
def test_inputs_are_copied_as_they_are(value: torch.Tensor) -> None:
    """Row-major, with memory of their own: what the caller writes into them later is not seen."""
    expected = value.clone(memory_format=torch.contiguous_format)
    writer = HeldWriter()
    capture = session(writer, limit=4_000_000)
    capture.begin_step({"x": value})
    value.untyped_storage().fill_(0)
    capture.end_step()
    capture.close()
    ((meta, kept),) = writer.rows
    assert meta.shape == tuple(expected.shape) and kept == host_bytes(expected).tobytes()


def test_a_wait_for_room_ends_in_time() -> None:
    """With a timeout an acquire that finds no room answers False, and its wait is counted as a stall."""
    budget = HostBudget(100)
    assert budget.acquire(80, wait=True, timeout_s=0.0)
    assert not budget.acquire(40, wait=True, timeout_s=0.01)
    assert budget.stalled_ns > 0 and budget.held_bytes == 80
    budget.release(80)
    assert budget.acquire(40, wait=True, timeout_s=0.01)


def test_patience() -> None:
    """A session that has run out of patience drops and counts, and asks anew each time."""
    writer, asked = HeldWriter(hold=True), []

    def patience() -> float:
        asked.append(1)
        return 0.0

    capture = session(writer, limit=RECORD_OVERHEAD_BYTES + 64, patience=patience)
    capture.begin_step({})
    for _ in range(3):
        capture.deliver(capture.reserve([A], 64), [A], [torch.zeros(16)], None)
    capture.end_step()
    capture.close()
    assert (capture.report.records, capture.report.dropped_records, len(asked)) == (1, 2, 2)


def test_a_dropped_run_stays_within_the_bound() -> None:
    """on_full="drop": what a dropped run computes is counted while it runs, and room for it is kept free."""
    writer = HeldWriter(hold=True)
    share = 100 + RECORD_OVERHEAD_BYTES
    opened = session(writer, limit=5 * share, drop=True)
    value = torch.ones(25)
    kept = (
        opened.reserve([A], 100),
        opened.reserve([A], 100),
        opened.reserve([A], 100),
        opened.reserve([A], 100),
    )
    assert [ticket.dropped for ticket in kept] == [False] * 4
    lost = opened.reserve([A], 100)
    assert lost.dropped and opened.report.peak_buffer_bytes == 5 * share
    opened.deliver(lost, [A], [value], None)
    for ticket in kept:
        opened.deliver(ticket, [A], [value], None)
    cancelled = opened.reserve([A], 100)
    assert cancelled.dropped
    opened.cancel(cancelled)
    opened.close()
    assert opened.report.dropped_by_site == {"a": 1} and opened.report.records == 4
    assert opened.report.stalled_seconds == 0 and opened._budget.held_bytes == 0


def test_dropping_takes_room_for_two_runs() -> None:
    """on_full="drop": a graph run of more than half the buffer is refused, naming both sizes."""
    opened = session(HeldWriter(), limit=15_000, drop=True)
    with pytest.raises(BufferTooSmallError, match=r"captures 8000 bytes.*on_full='drop'.*15000 bytes"):
        opened.reserve([A], 8000)
    assert not opened.reserve([A], 6000).dropped
    opened.close()


def test_who_waits_is_not_kept_waiting_by_an_open_page(tmp_path: Path) -> None:
    """on_full="stall": values in a page that is not full yet are written as soon as a call waits for room."""
    writer = StreamWriter(tmp_path / "o.stream", metadata={}, codec="none", num_workers=1, memory_bytes=1)
    limit = writer.memory_bytes + 3 * (4000 + RECORD_OVERHEAD_BYTES)
    opened = session(writer, limit=limit)
    for _ in range(30):
        opened.begin_step({})
        run_graph(opened, torch.ones(1000))
        opened.end_step()
    opened.close()
    assert opened.report.records == 30 and opened.report.dropped_records == 0
    assert opened.report.peak_buffer_bytes <= limit


def test_values_of_many_runs_are_packed(tmp_path: Path) -> None:
    """Small values go through packs, in any number of runs, large ones by themselves; each reads back."""
    writer = StreamWriter(tmp_path / "o.stream", metadata={}, codec="zstd", num_workers=1)
    opened = session(writer, limit=100_000_000)
    for step in range(20):
        opened.begin_step({"input_ids": torch.tensor([[step]])})
        run_graph(opened, torch.full((2, 8), float(step)), torch.full((2, 8), -float(step)))
        run_graph(opened, torch.full((100_000,), float(step)), torch.ones(1))
        opened.end_step()
    opened.close()
    assert opened.report.records == 80 and opened._budget.held_bytes == 0
    with open_stream(tmp_path / "o.stream") as stream:
        for step in range(20):
            assert torch.equal(stream.read("a", step=step, call=0), torch.full((2, 8), float(step)))
            assert torch.equal(stream.read("b", step=step, call=0), torch.full((2, 8), -float(step)))
            assert torch.equal(stream.read("a", step=step, call=1), torch.full((100_000,), float(step)))


def test_runs_that_are_alike_are_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes and dtypes of the first run stand for all; each graph has its own, steps of others in between."""
    looked: list[int] = []
    of = Kinds.of

    def counted(values: Sequence[torch.Tensor]) -> Kinds:
        looked.append(len(values))
        return of(values)

    monkeypatch.setattr(Kinds, "of", counted)
    writer = StreamWriter(tmp_path / "o.stream", metadata={}, codec="none", num_workers=1)
    opened = session(writer, limit=100_000_000)
    small, large = object(), object()
    for step in range(8):
        opened.begin_step({})
        for alike, shape in ((small, (2, 8)), (large, (70_000,))):
            values = [torch.full(shape, float(step)), torch.full(shape, -float(step))]
            ticket = opened.reserve((A, B), sum(value.nbytes for value in values), alike=alike)
            opened.deliver(ticket, (A, B), values, None)
        opened.end_step()
    opened.close()
    assert looked == [2, 2]
    with open_stream(tmp_path / "o.stream") as stream:
        for step in range(8):
            assert torch.equal(stream.read("b", step=step, call=0), torch.full((2, 8), -float(step)))
            assert torch.equal(stream.read("a", step=step, call=1), torch.full((70_000,), float(step)))


def test_runs_whose_first_value_differs_are_looked_at_again(tmp_path: Path) -> None:
    """As where a graph's guards were left out and the model was moved: each value is stored as what it is."""
    writer = StreamWriter(tmp_path / "o.stream", metadata={}, codec="none", num_workers=1)
    opened = session(writer, limit=100_000_000)
    alike = object()
    kinds = [((2, 8), torch.float16), ((2, 8), torch.bfloat16), ((3, 8), torch.bfloat16)]
    for shape, dtype in kinds:
        values = [torch.ones(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)]
        opened.begin_step({})
        ticket = opened.reserve((A, B), sum(value.nbytes for value in values), alike=alike)
        opened.deliver(ticket, (A, B), values, None)
        opened.end_step()
    opened.close()
    with open_stream(tmp_path / "o.stream") as stream:
        for step, (shape, dtype) in enumerate(kinds):
            found = stream.read("a", step)
            assert found.dtype is dtype and torch.equal(found, torch.ones(shape, dtype=dtype))
