"""From graph runs to the drain thread: nothing lost, order kept, small values packed as they would be one by one."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fx_instrument import CaptureFailedError, open_stream
from fx_instrument.capture.handover import Delivery, Handover
from fx_instrument.capture.layout import host_bytes
from fx_instrument.capture.packing import Packer, Records, join
from fx_instrument.capture.session import Session
from fx_instrument.graph.sites import Site
from fx_instrument.stream.records import RecordMeta
from fx_instrument.stream.writer import StreamWriter


def delivery(step: int, num_bytes: int = 10) -> Delivery:
    return Delivery(step, ("a",), (0,), [], None, num_bytes)


def test_deliveries_come_in_order_and_together() -> None:
    """What was put before a take comes with it, in order; then a request to seal, once."""
    handover = Handover()
    for step in range(3):
        handover.put(delivery(step))
    handover.seal()
    taken, seal, ended = handover.take(60)
    assert [one.step for one in taken] == [0, 1, 2] and seal and not ended
    assert handover.take(0.0) == ([], False, False)


def test_many_bytes_wake_at_once() -> None:
    """A small delivery waits for the tick; one that makes it a megabyte does not, and neither does the end."""
    handover = Handover()
    handover.put(delivery(0))
    began = time.monotonic()
    handover.put(delivery(1, 1 << 20))
    assert [one.step for one in handover.take(3600)[0]] == [0, 1]
    handover.put(delivery(2))
    handover.end()
    assert [one.step for one in handover.take(3600)[0]] == [2]
    assert handover.take(3600) == ([], False, True)
    assert time.monotonic() - began < 3600


def test_nothing_is_lost_between_threads() -> None:
    """Four threads put while one takes: every delivery arrives once, each thread's in order."""
    handover = Handover()

    def put(first: int) -> None:
        for number in range(500):
            handover.put(delivery(first + number, 1 << 18))

    threads = [threading.Thread(target=put, args=(1000 * index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    found: list[int] = []
    while len(found) < 2000:
        found += [one.step for one in handover.take(0.05)[0]]
    for thread in threads:
        thread.join()
    assert sorted(found) == [1000 * index + number for index in range(4) for number in range(500)]
    for index in range(4):
        mine = [step for step in found if step // 1000 == index]
        assert mine == sorted(mine)


def open_session(writer: StreamWriter, sites: list[Site]) -> Session:
    return Session(
        writer,
        RecordMeta,
        sites,
        max_memory_bytes=100_000_000,
        drop=False,
        sampling=None,
        target_gbps=1.0,
        progress=False,
    )


def layout(dtype: str, records: Iterable[tuple[int, int, Any]]) -> tuple[str, list[tuple[int, int, Any]]]:
    return dtype, list(records)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.sampled_from([(2, 3), (4, 1, 3), (7,), (), (0, 3)])),
        min_size=2,
        max_size=8,
    ),
    st.booleans(),
)
def test_packed_bytes_are_those_of_the_values(
    sites: list[tuple[int, tuple[int, ...]]], strided: bool
) -> None:
    """Any sites and shapes, contiguous or not: by site and call, each value's bytes in row-major order."""
    packer = Packer(layout, 1 << 20, 0)
    calls: dict[int, int] = {}
    rows, values = [], []
    for number, (site, shape) in enumerate(sites):
        call = calls[site] = calls.get(site, -1) + 1
        value = torch.arange(100 * number, 100 * number + torch.Size(shape).numel(), dtype=torch.float32)
        value = value.view(shape)
        if strided and value.dim() == 2:
            value = value.t().contiguous().t()
        values.append(value)
        rows.append((site, call, shape))
    num_bytes = sum(value.nbytes for value in values)
    for _ in range(2):
        plan = packer.plan(Records([row[0] for row in rows], [row[1] for row in rows], *kinds(values), None))
        if not num_bytes:
            assert plan is None
            return
        assert plan is not None
        order = sorted(range(len(rows)), key=lambda index: rows[index][:2])
        assert plan.layout == ("float32", [(*rows[index][:2], (rows[index][2], None)) for index in order])
        expected = b"".join(host_bytes(values[index]).tobytes() for index in order)
        assert [pack.tobytes() for pack in join([(plan, values)] * 3)] == [expected] * 3


def kinds(values: list[torch.Tensor]) -> tuple[list[torch.dtype], list[torch.Size]]:
    return [value.dtype for value in values], [value.shape for value in values]


@pytest.mark.parametrize(
    "values",
    [
        [torch.ones(3)],
        [torch.ones(3), torch.ones(3, dtype=torch.bfloat16)],
        [torch.ones(3, dtype=torch.int64)] * 2,
        [torch.ones(9000), torch.ones(9000)],
        [torch.ones(8000) for _ in range(40)],
        [torch.ones(3, dtype=torch.float8_e4m3fn)] * 2,
    ],
    ids=["one", "two dtypes", "integers", "large", "more than fits", "float8"],
)
def test_other_values_go_one_by_one(values: list[torch.Tensor]) -> None:
    """A single value, mixed or unusual dtypes, large ones, and more than there is room for are not packed."""
    packer = Packer(layout, 1 << 20, 0)
    count = len(values)
    assert packer.plan(Records(list(range(count)), [0] * count, *kinds(values), None)) is None


def test_sampled_values_keep_their_full_shapes() -> None:
    """Layouts differ by the shape that the values were sampled from."""
    packer = Packer(layout, 1 << 20, 0)
    values = [torch.ones(3), torch.ones(3)]
    for full in ((10, 3), (30,)):
        plan = packer.plan(Records([0, 1], [0, 0], *kinds(values), [full, full]))
        assert plan is not None and plan.layout[1] == [(0, 0, ((3,), full)), (1, 0, ((3,), full))]


@pytest.mark.parametrize("sampled", [False, True], ids=["whole", "sampled"])
@pytest.mark.parametrize("ids", [(0, 1, 2, 3, 4), (4, 2, 2, 0, 1)], ids=["by site", "out of order"])
def test_large_values_go_where_they_lie_a_page_at_a_time(
    ids: tuple[int, ...], sampled: bool, tmp_path: Path
) -> None:
    """In the order of their sites, contiguous or not."""
    sites = [Site(f"s{number}", "mlp") for number in range(5)]
    writer = StreamWriter(tmp_path / "o.stream", metadata={}, codec="zstd", num_workers=1, page_bytes=1 << 20)
    opened = open_session(writer, sites)
    puts: list[int] = []
    put_packed = writer.put_packed

    def counted(layout: Any, step: int, data: Any, *more: Any) -> None:
        assert not isinstance(data, np.ndarray)
        puts.append(len(data))
        put_packed(layout, step, data, *more)

    chosen = [sites[number] for number in ids]
    steps = []
    with mock.patch.object(writer, "put_packed", counted):
        for step, rows in enumerate((100, 100, 100, 300, 600)):
            values = [torch.randn(rows, 1000).bfloat16() * (step + 1) for _ in ids]
            values[1] = values[1].t().contiguous().t()
            steps.append([value.clone() for value in values])
            full = [(rows, 7, 1000)] * 5 if sampled else None
            opened.begin_step({})
            ticket = opened.reserve(chosen, sum(value.nbytes for value in values))
            opened.deliver(ticket, chosen, values, full)
            opened.end_step()
            del values
        opened.close()
    assert puts == [5, 5, 5, 1, 1, 1, 1, 1]
    assert opened.report.records == 25 and opened._budget.held_bytes == 0
    with open_stream(tmp_path / "o.stream") as stream:
        assert stream.verify() == [] and len(stream) == 25
        for step, expected in enumerate(steps):
            calls: dict[int, int] = {}
            for number, value in zip(ids, expected, strict=True):
                call = calls[number] = calls.get(number, -1) + 1
                record = stream.record(f"s{number}", step, call)
                assert torch.equal(record.tensor(), value)
                assert tuple(record.full_shape) == ((len(value), 7, 1000) if sampled else tuple(value.shape))


@pytest.mark.parametrize("width", [8, 1000], ids=["packed", "large"])
def test_runs_that_are_not_alike_after_all(width: int, tmp_path: Path) -> None:
    """A graph without its guards may run with other shapes, in its first value or a later one."""
    sites = [Site("a", "mlp"), Site("b", "mlp")]
    writer = StreamWriter(tmp_path / "o.stream", metadata={}, codec="zstd", num_workers=1)
    opened = open_session(writer, sites)
    steps = []
    for rows in ((4, 100), (4, 100), (4, 50), (2, 100)):
        shapes = ((4, width), (400 // rows[1], rows[1], width), (rows[0], width))
        values = [torch.randn(shapes[0]), torch.randn(shapes[1] if rows[0] == 4 else shapes[2])]
        steps.append([value.clone() for value in values])
        opened.begin_step({})
        ticket = opened.reserve(sites, sum(value.nbytes for value in values), alike="graph")
        opened.deliver(ticket, sites, values, None)
        opened.end_step()
    opened.close()
    with open_stream(tmp_path / "o.stream") as stream:
        for step, expected in enumerate(steps):
            for name, value in zip("ab", expected, strict=True):
                assert torch.equal(stream.read(name, step), value)


def test_more_small_values_than_a_page_takes(tmp_path: Path) -> None:
    writer = StreamWriter(tmp_path / "o.stream", metadata={}, codec="lz4", num_workers=1)
    sites = [Site(f"s{number}", "mlp") for number in range(7)]
    opened = open_session(writer, sites)
    chosen = [sites[3 * number % 7] for number in range(20_000)]
    values = [torch.full((2,), float(number)) for number in range(20_000)]
    opened.begin_step({})
    ticket = opened.reserve(chosen, sum(value.nbytes for value in values))
    opened.deliver(ticket, chosen, values, None)
    opened.end_step()
    opened.close()
    with open_stream(tmp_path / "o.stream") as stream:
        assert len(stream) == 20_000 and stream.verify() == []
        found = stream["s3"].cat().view(-1, 2)[:, 0].tolist()
        assert found == [float(number) for number in range(20_000) if 3 * number % 7 == 3]


def test_values_that_are_not_those_of_their_plan() -> None:
    """Whatever made a graph with fixed shapes run with others: no value gets the shape of another."""
    planned, others = [torch.ones(4, 8)] * 2, [torch.ones(4, 8), torch.ones(5, 8)]
    plan = Packer(layout, 1 << 20, 0).plan(Records([0, 1], [0, 0], *kinds(planned), None))
    assert plan is not None
    with pytest.raises(CaptureFailedError, match="leave 256 bytes of values left 288"):
        join([(plan, others)])
