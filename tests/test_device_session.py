"""From a device's graphs to the file, through the session: on a simulated device, with the real writer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from simulated_device import DEVICE, Device, Memory, Value
from test_capture import A, B, HeldWriter

from fx_instrument import BufferTooSmallError, open_stream
from fx_instrument.capture.session import Session
from fx_instrument.graph.exported import MARK, WHOLE, ExportedOutputs
from fx_instrument.graph.exported_call import ExportedAttachment, ExportedCall
from fx_instrument.graph.sites import Site
from fx_instrument.stream.records import RecordMeta
from fx_instrument.stream.writer import StreamWriter

LIMIT = 8_000_000
SHAPE = (3, 100_000)


def session(
    writer: Any, device: Device, limit: int = LIMIT, drop: bool = False, sites: Sequence[Site] = (A, B)
) -> Session:
    return Session(
        writer,
        RecordMeta,
        sites,
        max_memory_bytes=limit,
        drop=drop,
        sampling=None,
        target_gbps=1.0,
        progress=False,
        make_engine=lambda: device,
    )


def content(step: int, site: int, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    numel = torch.Size(shape).numel()
    return (torch.arange(numel) % 251 + step * 1000 + site * 7).to(torch.float32).view(shape)


def deliver(
    capture: Session,
    device: Device,
    memories: list[Memory],
    contents: list[torch.Tensor],
    *,
    replays: bool = True,
    sites: Sequence[Site] = (A, B),
) -> None:
    """What a graph leaves, as the graph's wrapper does it."""
    ticket = capture.reserve(sites, 0, device=DEVICE, replays=replays)
    for memory, value in zip(memories, contents, strict=True):
        device.compute.append(lambda data=memory.data, value=value: data.copy_(value))
    values: Any = [Value(device, memory, owns=not replays) for memory in memories]
    capture.deliver(ticket, sites, values, None)


def run_graph(
    capture: Session,
    device: Device,
    memories: list[Memory],
    contents: list[torch.Tensor],
    *,
    replays: bool,
) -> None:
    """A step: the host asks, lets the device compute, and hands the outputs on, as the graph's wrapper does."""
    capture.begin_step({})
    deliver(capture, device, memories, contents, replays=replays)
    capture.end_step()


@pytest.mark.parametrize("replays", [True, False], ids=["cuda-graphs", "own-outputs"])
def test_a_long_capture_through_a_small_ring(tmp_path: Path, replays: bool) -> None:
    """96 MB through a ring of a few: every step's values, while each replay overwrites those of the one before."""
    path = tmp_path / "d.stream"
    device = Device()
    capture = session(StreamWriter(path, metadata={}, codec="none", memory_bytes=3_000_000), device)
    static = [Memory(*SHAPE, dtype=torch.float32) for _ in range(2)]
    for step in range(40):
        memories = static if replays else [Memory(*SHAPE, dtype=torch.float32) for _ in range(2)]
        run_graph(capture, device, memories, [content(step, site) for site in range(2)], replays=replays)
        del memories
    capture.close()
    report = capture.report
    assert report.records == 80 and report.dropped_records == 0
    assert (
        report.peak_buffer_bytes <= LIMIT and len(device.allocated) == 1 and device.freed == device.allocated
    )
    with open_stream(path) as stream:
        assert stream.num_steps == 40
        for step in range(40):
            for site, name in enumerate("ab"):
                assert torch.equal(stream.read(name, step), content(step, site))


def test_small_values_come_in_one_piece(tmp_path: Path) -> None:
    """One copy a step, put into the writer as it lies; each site's value has its own name and shape in the file."""
    path = tmp_path / "d.stream"
    device = Device()
    capture = session(StreamWriter(path, metadata={}, codec="zstd", memory_bytes=3_000_000), device)
    shapes = (2, 3), (4,)
    static = [Memory(*shape, dtype=torch.float32) for shape in shapes]
    copies = 0
    for step in range(9):
        before = len(device.copies)
        run_graph(
            capture, device, static, [content(step, site, shapes[site]) for site in range(2)], replays=True
        )
        copies += len(device.copies) - before == 3  # a wait, a copy, an event
        device.run_until(lambda: not device.copies)
    capture.close()
    assert copies == 9 and capture.report.records == 18
    with open_stream(path) as stream:
        for step in range(9):
            for site, name in enumerate("ab"):
                assert torch.equal(stream.read(name, step), content(step, site, shapes[site]))


def test_a_full_ring_drops_and_counts() -> None:
    """ "drop": with the writer stuck, what finds no room is counted by site; what was stored is right."""
    device, writer = Device(), HeldWriter(hold=True)
    capture = session(writer, device, limit=1_000_000, drop=True)
    static = [Memory(25_000, dtype=torch.float32) for _ in range(2)]
    for step in range(30):
        run_graph(
            capture, device, static, [content(step, site, (25_000,)) for site in range(2)], replays=True
        )
    writer.let_go()
    capture.close()
    report = capture.report
    assert report.dropped_records > 0 and report.records + report.dropped_records == 60
    assert report.dropped_by_site["a"] == report.dropped_by_site["b"] == report.dropped_records // 2
    for meta, data in writer.rows:
        expected = content(meta.step, meta.site_id, (25_000,))
        assert data == expected.numpy().tobytes()


def test_a_value_larger_than_the_ring_is_refused() -> None:
    """Before anything of its run is recorded, and the room that was counted for it comes back."""
    device, writer = Device(), HeldWriter()
    capture = session(writer, device, limit=100_000)
    memories = [Memory(10, dtype=torch.float32), Memory(30_000, dtype=torch.float32)]
    with pytest.raises(BufferTooSmallError, match=r"120000 bytes .* larger than the pinned buffer"):
        run_graph(capture, device, memories, [memory.data.clone() for memory in memories], replays=True)
    capture.close()
    assert not writer.rows


def test_a_failure_lets_go_of_everything() -> None:
    """The writer fails: a model that waits for the ring goes on, and leaving reports the failure."""

    class Failing(HeldWriter):
        def put(self, meta: Any, data: Any, done: Any = None) -> None:
            raise OSError("no room")

    device = Device()
    capture = session(Failing(), device, limit=1_000_000)
    static = [Memory(25_000, dtype=torch.float32) for _ in range(2)]
    for step in range(30):
        run_graph(
            capture, device, static, [content(step, site, (25_000,)) for site in range(2)], replays=True
        )
    with pytest.raises(Exception, match="no room"):
        capture.close()


IDS = torch.arange(6).view(2, 3)


def ids_of(device: Device, step: int) -> Any:
    memory = Memory(*IDS.shape, dtype=torch.int64)
    device.compute.append(lambda: memory.data.copy_(IDS + 100 * step))
    return Value(device, memory, owns=False)


def test_inputs_of_a_long_prompt_stay_in_the_ring(tmp_path: Path) -> None:
    """Half as large as the bound: they are counted with the pinned memory, not a second time beside it."""
    path = tmp_path / "d.stream"
    device = Device()
    capture = session(StreamWriter(path, metadata={}, codec="none", memory_bytes=1), device, limit=4_000_000)
    static = [Memory(4, dtype=torch.float32) for _ in range(2)]
    for step in range(5):
        memory = Memory(125_000, dtype=torch.int64)
        memory.data.fill_(step)
        ids: Any = Value(device, memory, owns=False)
        capture.begin_step({"ids": ids})
        deliver(capture, device, static, [content(step, site, (4,)) for site in range(2)])
        capture.end_step()
    capture.close()
    report = capture.report
    assert report.records == 10 and report.dropped_inputs == 0 and report.peak_buffer_bytes <= 4_000_000
    with open_stream(path) as stream:
        for step in range(5):
            assert stream.inputs(step)["ids"].tolist() == [step] * 125_000
            for site, name in enumerate("ab"):
                assert torch.equal(stream.read(name, step), content(step, site, (4,)))


def test_a_steps_few_tokens_hold_no_room(tmp_path: Path) -> None:
    """They wait long for their page to fill: copied, and right, though the caller writes its buffer again at once."""
    path = tmp_path / "d.stream"
    device = Device()
    capture = session(StreamWriter(path, metadata={}, codec="zstd", memory_bytes=3_000_000), device)
    static = [Memory(4, dtype=torch.float32) for _ in range(2)]
    for step in range(9):
        ids = ids_of(device, step)
        capture.begin_step({"ids": ids, "mask": torch.tensor([step, 1])})
        device.compute.append(lambda data=ids.memory.data: data.fill_(-1))
        deliver(capture, device, static, [content(step, site, (4,)) for site in range(2)])
        capture.end_step()
    capture.close()
    assert capture.report.dropped_inputs == 0
    with open_stream(path) as stream:
        for step in range(9):
            found = stream.inputs(step)
            assert torch.equal(found["ids"], IDS + 100 * step)
            assert found["mask"].tolist() == [step, 1]
            for site, name in enumerate("ab"):
                assert torch.equal(stream.read(name, step), content(step, site, (4,)))


@pytest.mark.parametrize("num_values", [8, 200], ids=["a page's part", "more than a page"])
def test_large_values_that_came_together_are_packed_as_they_lie(tmp_path: Path, num_values: int) -> None:
    """Of 64 KB each: one piece for as many as a page holds."""
    path = tmp_path / "d.stream"
    device = Device()
    writer = StreamWriter(path, metadata={}, codec="zstd", memory_bytes=16 << 20, page_bytes=1 << 20)
    sites = [Site(f"s{number}", "mlp") for number in range(num_values)]
    capture = session(writer, device, limit=200_000_000, sites=sites)
    memories = [Memory(16384, dtype=torch.float32) for _ in sites]
    pieces = 0
    put_packed = writer.put_packed

    def counted(*args: Any) -> None:
        nonlocal pieces
        pieces += 1
        put_packed(*args)

    with mock.patch.object(writer, "put_packed", counted):
        for step in range(3):
            capture.begin_step({})
            contents = [content(step, number, (16384,)) for number in range(num_values)]
            deliver(capture, device, memories, contents, sites=sites)
            capture.end_step()
        capture.close()
    assert pieces == 3 * -(-num_values // 16)
    with open_stream(path) as stream:
        for step in range(3):
            for number, site in enumerate(sites):
                assert torch.equal(stream.read(site.name, step), content(step, number, (16384,)))


def test_an_exported_program_on_a_device_fills_the_ring(tmp_path: Path) -> None:
    """More than half of the bound a run: it is counted with the ring, and no run waits for itself."""
    path = tmp_path / "d.stream"
    device = Device()
    capture = session(StreamWriter(path, metadata={}, codec="none", memory_bytes=3_000_000), device)
    shape = (3, 200_000)

    def call(ids: torch.Tensor) -> Any:
        step, values = int(ids[0, 0]), {}
        for site, name in enumerate("ab"):
            memory = Memory(*shape, dtype=torch.float32)
            device.compute.append(lambda m=memory, s=step, i=site: m.data.copy_(content(s, i, shape)))
            values[name] = Value(device, memory, owns=True)
        return ids, {MARK: {WHOLE: values}}

    attachment = ExportedAttachment(torch.nn.Identity())
    program = ExportedCall(call, ExportedOutputs(((A, 0), (B, 0)), None), attachment, ("input_ids",))
    attachment.open(capture)
    for step in range(6):
        program(torch.tensor([[step]]))
    attachment.close()
    capture.close()
    assert capture.report.records == 12
    with open_stream(path) as stream:
        for step in range(6):
            assert stream.inputs(step)["input_ids"].tolist() == [[step]]
            for site, name in enumerate("ab"):
                assert torch.equal(stream.read(name, step), content(step, site, shape))


def test_what_the_ring_leaves_no_room_for_is_refused(tmp_path: Path) -> None:
    """Bookkeeping of more records, or more inputs of the host, than an eighth of the bound: none waits in vain."""
    device = Device()
    writer = StreamWriter(None, metadata={}, codec="none", memory_bytes=1)
    # An eighth of it counts two records, 1024 bytes for each.
    capture = session(writer, device, limit=writer.memory_bytes + 20_000)
    static = [Memory(4, dtype=torch.float32) for _ in range(2)]
    run_graph(capture, device, static, [content(0, site, (4,)) for site in range(2)], replays=True)
    with pytest.raises(BufferTooSmallError, match="beside the pinned part"):
        capture.reserve((A, B, A), 0, device=DEVICE)
    with pytest.raises(BufferTooSmallError, match="beside the pinned part"):
        capture.reserve((A,), 2000)
    with pytest.raises(BufferTooSmallError, match="beside the pinned part"):
        capture.begin_step({"mask": torch.ones(200, dtype=torch.int64)})
    capture.close()
