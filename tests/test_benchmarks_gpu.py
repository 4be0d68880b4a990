"""The benchmark of CUDA devices: what can be shown of it without one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from benchmarks import handover
from benchmarks.gpu import measure
from benchmarks.gpu.cli import main
from benchmarks.gpu.model import llama
from benchmarks.gpu.planes import split_on_device
from fx_instrument.stream.filters import SIGNED16, Planes


def test_spans_of_a_timeline() -> None:
    """In order; those that overlap, or lie close enough, as one."""
    spans = [(30, 40), (0, 10), (5, 20), (22, 25)]
    assert measure.union(spans) == [(0, 20), (22, 25), (30, 40)]
    assert measure.union(spans, gap_ns=5) == [(0, 40)]


def test_planes_of_a_device_are_the_formats() -> None:
    """What is timed on the device is what the writer does on the host."""
    values = torch.randn(1000).bfloat16()
    page = values.view(torch.uint8).numpy()
    expected = Planes(1 << 20).split(SIGNED16, [page], np.empty(len(page), np.uint8))
    for mine, plane in zip(split_on_device(values).numpy(), expected, strict=True):
        assert np.array_equal(mine, plane)


def test_a_timeline_of_decoding_keeps_the_cache() -> None:
    """Fewer steps on the same cache, which CUDA graphs were recorded for."""
    run = measure.Decode(llama(1, 64, "cpu"), 2, 6, 8)
    run.waits = True
    few = run.shortened(2)
    assert (few.steps, few.tokens, few.waits) == (2, 4, False) and few._cache is run._cache
    assert (run.steps, run.tokens, run.waits) == (6, 12, True)


@pytest.mark.slow
def test_every_section_runs_on_a_cpu(tmp_path: Path) -> None:
    """All variants of a tiny model: ratios to the compiled one, and the records that its sites give."""
    output = tmp_path / "gpu.json"
    options = "--device cpu --layers 1 --hidden 64 --batch 2 --length 16 --steps 3 --cache 8 --rounds 1"
    done = CliRunner().invoke(main, [*options.split(), "--memory-gb", "0.2", "--output", str(output)])
    assert done.exit_code == 0, done.output
    (run,) = json.loads(output.read_text())["runs"]
    assert len(run["workloads"]) == 3
    decode = run["workloads"]["decode 2x8"]["free"]
    assert decode["compiled"]["ratio"] == 1.0
    assert {row["records"] for row in decode.values() if "records" in row} == {2 * 3}


def test_the_hand_over_is_timed_without_a_device(tmp_path: Path) -> None:
    """Every model has figures of both threads, and they are CPU time: a step takes some."""
    output = tmp_path / "handover.json"
    done = CliRunner().invoke(handover.main, ["--steps", "3", "--json", str(output)])
    assert done.exit_code == 0, done.output
    rows = json.loads(output.read_text())["rows"]
    expected = [(sites, where) for sites in (8, 60, 64) for where in ("CPU", "device")]
    assert [(row["sites"], row["where"]) for row in rows] == expected
    assert all(0 < value < 1e5 for row in rows for value in row["microseconds"].values())
