"""What a capturing step costs the thread that runs the model, around its graph: ``python -m benchmarks.around``.

Microseconds of that thread's CPU time a call of an instrumented model: from where the call is counted to where its
compiled code is entered, from where its graph's turn comes to where the graph is told to run, and behind both. Left out
are the switch between the two variants, which a call without captures passes as well, and Dynamo's guards. On a device
the host's time before the graph is what a program waits for that waits for each token.

The model is a Llama on random weights, a token for each of four sequences; nothing is compressed.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import click
import torch

from fx_instrument import InstrumentationConfig, InstrumentationFramework
from fx_instrument.graph.backend import CapturedGraph
from fx_instrument.graph.counting import CountedCall

from .machine import processor, versions
from .overhead.models import toy

BATCH = 4
WARM_UP = 20
PARTS = ("before the call", "before the graph", "behind the graph", "behind the call")


class Marks:
    """Where a step is: the thread's CPU time at each of eight places, in the order in which it passes them."""

    def __init__(self) -> None:
        self.now: list[int] = []

    def add(self) -> None:
        self.now.append(time.thread_time_ns())

    def parts(self) -> list[int]:
        """Nanoseconds of each of ``PARTS``."""
        begin, call, turn, graph, graph_end, turn_end, call_end, end = self.now
        return [call - begin, graph - turn, turn_end - graph_end, end - call_end]

    def around(self, call: Any) -> Any:
        def marked(*args: Any, **kwargs: Any) -> Any:
            self.add()
            try:
                return call(*args, **kwargs)
            finally:
                self.add()

        return marked


@contextlib.contextmanager
def marking(marks: Marks) -> Iterator[None]:
    capture, make, run = CountedCall._capture, CapturedGraph.__init__, CapturedGraph.__call__

    def captured(counted: CountedCall, args: Any, kwargs: Any, call: Any) -> Any:
        marks.add()
        result = capture(counted, args, kwargs, marks.around(call))
        marks.add()
        return result

    def made(graph: CapturedGraph, compiled: Any, *rest: Any) -> None:
        make(graph, marks.around(compiled), *rest)

    def ran(graph: CapturedGraph, *args: Any) -> Any:
        marks.add()
        result = run(graph, *args)
        marks.add()
        return result

    with (
        mock.patch.object(CountedCall, "_capture", captured),
        mock.patch.object(CapturedGraph, "__init__", made),
        mock.patch.object(CapturedGraph, "__call__", ran),
    ):
        yield


def measure(layers: int, steps: int, device: str, options: dict[str, Any]) -> dict[str, float]:
    """Median microseconds of each part, of attention and MLP of so many layers."""
    model = toy(torch.bfloat16, device, depth=layers)
    framework = InstrumentationFramework(InstrumentationConfig(compression_algorithm="none"))
    ids = torch.arange(BATCH, device=device)[:, None]
    marks, rows = Marks(), []
    with marking(marks), torch.no_grad():
        framework.instrument_model(model, **options)
        with framework.capture_activations(None):
            for step in range(WARM_UP + steps):
                marks.now.clear()
                model(ids, position_ids=torch.zeros_like(ids))
                if step >= WARM_UP:
                    rows.append(marks.parts())
    return {
        part: statistics.median(row) / 1e3 for part, row in zip(PARTS, zip(*rows, strict=True), strict=True)
    }


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--steps", default=1000, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option(
    "--backend", default="eager", show_default=True, help="What runs the graph: eager, or inductor."
)
@click.option("--mode", help="Inductor's mode, e.g. reduce-overhead.")
@click.option("--json", "output", type=click.Path(dir_okay=False, path_type=Path), help="Write figures here.")
def main(steps: int, device: str, backend: str, mode: str | None, output: Path | None) -> None:
    """What a capturing step costs the model's thread around its graph, in CPU microseconds."""
    torch.set_num_threads(1)
    rows = []
    for layers in (4, 30):
        found = measure(layers, steps, device, {"backend": backend, "mode": mode})
        rows.append({"sites": 2 * layers, "microseconds": found})
        said = ", ".join(f"{value:.0f} {part}" for part, value in found.items())
        print(f"{2 * layers} sites: {sum(found.values()):.0f} us a step: {said}")
    if output is not None:
        where = processor() if device == "cpu" else torch.cuda.get_device_name(device)
        result = {"device": where, "torch": torch.__version__, **versions(), "backend": backend, "mode": mode}
        output.write_text(json.dumps({**result, "steps": steps, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
