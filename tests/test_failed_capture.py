"""What a capture says of itself after its drain thread failed: every value is in the file, or counted as dropped."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from simulated_device import DEVICE, Device, Memory, Value

from fx_instrument import CaptureFailedError, open_stream
from fx_instrument.capture.session import Session
from fx_instrument.graph.sites import Site
from fx_instrument.stream.records import RecordMeta
from fx_instrument.stream.writer import StreamWriter

SITES = [Site(name, "mlp") for name in "dacb"]
STEPS = 6
Run = Callable[[Session, Device], None]


class Failing(StreamWriter):
    """A writer for whose records there is no memory any more, once it has been given ``left`` times."""

    left = 0

    def _give(self) -> None:
        if not self.left:
            raise MemoryError("no memory")
        self.left -= 1

    def put(self, *arguments: Any) -> None:
        self._give()
        super().put(*arguments)

    def put_packed(self, *arguments: Any) -> None:
        self._give()
        super().put_packed(*arguments)


def on_host(*shapes: Sequence[int], dtypes: Sequence[torch.dtype] = (torch.float32,) * 4) -> Run:
    def run(session: Session, device: Device) -> None:
        values = [torch.ones(*shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
        ticket = session.reserve(SITES, sum(value.nbytes for value in values))
        session.deliver(ticket, SITES, values, None)

    return run


def on_device(*shapes: Sequence[int], replays: bool) -> Run:
    def run(session: Session, device: Device) -> None:
        memories = [Memory(*shape, dtype=torch.float32) for shape in shapes]
        values: Any = [Value(device, memory, owns=not replays) for memory in memories]
        ticket = session.reserve(SITES, 0, device=DEVICE, replays=replays)
        session.deliver(ticket, SITES, values, None)

    return run


def in_turns(*runs: Run) -> Run:
    turns = itertools.cycle(runs)
    return lambda session, device: next(turns)(session, device)


SMALL, LARGE = (8, 16), (64, 1024)
WAYS = {
    "copied together, two dtypes in turn": in_turns(
        on_host(*[SMALL] * 4), on_host(*[SMALL] * 4, dtypes=[torch.bfloat16] * 4)
    ),
    "copied together": on_host(*[SMALL] * 4),
    "where they lie": on_host(*[LARGE] * 4),
    "one by one": on_host(*[LARGE] * 4, dtypes=[torch.float32, torch.bfloat16] * 2),
    "side by side, from a device": on_device(*[SMALL] * 4, replays=True),
    "larger than the ring, from a device": on_device(*[(600, 1024)] * 4, replays=False),
}


@pytest.mark.parametrize("given", range(0, 20, 3))
@pytest.mark.parametrize("way", WAYS)
def test_the_report_adds_up(tmp_path: Path, way: str, given: int) -> None:
    """Whenever the writer takes no more, what it took are the records, and all else is dropped, by site."""
    path, device = tmp_path / "f.stream", Device()
    writer = Failing(path, metadata={}, codec="none", memory_bytes=3_000_000)
    writer.left = given
    session = Session(
        writer,
        RecordMeta,
        SITES,
        max_memory_bytes=8_000_000,
        drop=False,
        sampling=None,
        target_gbps=1.0,
        progress=False,
        make_engine=lambda: device,
    )
    for _ in range(STEPS):
        session.begin_step({"input_ids": torch.ones(1, 8, dtype=torch.int64)})
        WAYS[way](session, device)
        session.end_step()
    try:
        session.close()
    except CaptureFailedError as error:
        assert isinstance(error.__cause__, MemoryError)
    report = session.report
    assert (report.dropped_records + report.dropped_inputs > 0) is (session.failure is not None)
    with open_stream(path) as stream:
        stored = Counter({site.name: len(stream[site.name]) for site in stream.sites})
        raw_bytes = sum(record.tensor().nbytes for site in SITES for record in stream[site.name])
        num_inputs = sum(bool(stream.inputs(step)) for step in range(stream.num_steps))
    assert num_inputs + report.dropped_inputs == STEPS
    assert stored.total() == report.records and raw_bytes == report.raw_bytes
    assert all(stored[site.name] + report.dropped_by_site.get(site.name, 0) == STEPS for site in SITES)
