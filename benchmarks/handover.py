"""What handing a decode step's values over costs the host: ``python -m benchmarks.handover``.

Microseconds of each thread's CPU time for a step: on the thread that runs the model, and on the drain thread, which
wants the interpreter's lock at the same time. Values are a CPU graph's outputs, or what a CUDA graph left on a device.
That device is simulated: its copies and events do nothing, so what CUDA's own calls take comes on top. What is captured
are zeros, nothing is compressed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import click
import torch

from fx_instrument.capture.drain import Drain
from fx_instrument.capture.engine import Place
from fx_instrument.capture.session import Session
from fx_instrument.graph.sites import Site
from fx_instrument.stream.records import RecordMeta
from fx_instrument.stream.writer import StreamWriter

from .machine import processor, versions

DEVICE = torch.device("cuda:0")
WARM_UP = 50
BETWEEN_S = 5e-4
"""The model's thread lets the drain thread run, as one does that waits for its device."""


class Value:
    """What of a tensor on a device the session looks at."""

    def __init__(self, host: torch.Tensor) -> None:
        self.host = host
        self.is_cuda, self.is_cpu = True, False
        self.device, self.dtype, self.shape, self.nbytes = DEVICE, host.dtype, host.shape, host.nbytes

    def numel(self) -> int:
        return self.host.numel()

    def detach(self) -> Value:
        return self

    def __getitem__(self, part: slice) -> Value:
        return Value(self.host[part])


class Event:
    def synchronize(self) -> None: ...


class Engine:
    """A device whose work is done as soon as it is told to."""

    def __init__(self) -> None:
        self._gathered: dict[Place, Value] = {}

    def allocate(self, num_bytes: int, device: torch.device) -> torch.Tensor:
        return torch.zeros(num_bytes, dtype=torch.uint8)

    def free(self, memory: torch.Tensor) -> None: ...
    def check(self) -> None: ...
    def mark(self, device: torch.device) -> Event:
        return Event()

    def copy(self, host: torch.Tensor, value: Any, after: Any) -> Event:
        return Event()

    def keep(self, value: Any) -> Any:
        return value

    def gather(
        self, place: Place, values: Sequence[Any], starts: Sequence[int], num_bytes: int, after: Any
    ) -> Any:
        gathered = self._gathered.get(place)
        if gathered is None:
            memory = torch.zeros(1 << place[1], dtype=torch.uint8)
            gathered = self._gathered[place] = Value(memory)
        return gathered


def measure(layers: int, batch: int, width: int, steps: int, *, on_device: bool) -> dict[str, float]:
    """CPU microseconds a step of attention and MLP of so many layers, bfloat16, and two integer inputs."""
    parts = ("self_attn", "attention"), ("mlp", "mlp")
    sites = tuple(Site(f"model.layers.{n}.{part}", role) for n in range(layers) for part, role in parts)
    writer = StreamWriter(None, metadata={}, codec="none", memory_bytes=250_000_000)
    session = Session(
        writer,
        RecordMeta,
        sites,
        max_memory_bytes=1_000_000_000,
        drop=False,
        sampling=None,
        target_gbps=1.0,
        progress=False,
        make_engine=Engine,
    )
    place: Any = Value if on_device else torch.clone
    zeros = torch.zeros(batch, 1, width, dtype=torch.bfloat16)
    inputs = {name: place(torch.zeros(batch, 1, dtype=torch.int64)) for name in ("input_ids", "position_ids")}
    num_bytes = len(sites) * zeros.nbytes
    room: dict[str, Any] = {"num_bytes": num_bytes}
    if on_device:
        room = {"num_bytes": 0, "device": DEVICE, "device_bytes": num_bytes, "replays": True}
    alike = object()
    spent = {"begin": 0, "reserve": 0, "deliver": 0, "drain": 0}
    guarded = Drain._guarded

    def timed(drain: Drain, *call: Any) -> None:
        started = time.thread_time_ns()
        guarded(drain, *call)
        spent["drain"] += time.thread_time_ns() - started

    with mock.patch.object(Drain, "_guarded", timed):
        for step in range(WARM_UP + steps):
            if step == WARM_UP:
                spent.update(dict.fromkeys(spent, 0))
            values = [place(zeros) for _ in sites]
            times = [time.thread_time_ns()]
            session.begin_step(inputs)
            times.append(time.thread_time_ns())
            ticket = session.reserve(sites, alike=alike, **room)
            times.append(time.thread_time_ns())
            session.deliver(ticket, sites, values, None)
            session.end_step()
            del values
            times.append(time.thread_time_ns())
            for name, begin, end in zip(spent, times, times[1:], strict=False):
                spent[name] += end - begin
            time.sleep(BETWEEN_S)
        session.close()
    return {name: nanoseconds / steps / 1e3 for name, nanoseconds in spent.items()}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--steps", default=1000, show_default=True)
@click.option("--json", "output", type=click.Path(dir_okay=False, path_type=Path), help="Write figures here.")
def main(steps: int, output: Path | None) -> None:
    """What handing a decode step over costs the host, in CPU microseconds."""
    torch.set_num_threads(1)
    rows = []
    for layers, batch, width in ((4, 4, 256), (30, 4, 576), (32, 8, 4096)):
        for on_device in (False, True):
            found = measure(layers, batch, width, steps, on_device=on_device)
            model, where = (
                f"{layers} layers of width {width}, batch {batch}",
                "device" if on_device else "CPU",
            )
            rows.append({"model": model, "where": where, "sites": 2 * layers, "microseconds": found})
            before, total = found["begin"] + found["reserve"], sum(found.values()) - found["drain"]
            print(
                f"{model}, {where}: {total:.0f} us on the model's thread, {before:.0f} of them before its graph is "
                f"told to run; {found['drain']:.0f} us on the drain thread"
            )
    if output is not None:
        result = {"cpu": processor(), "torch": torch.__version__, **versions(), "steps": steps, "rows": rows}
        output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
