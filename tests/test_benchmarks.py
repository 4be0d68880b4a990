"""The benchmark's machinery: one round on a toy gives every column, and the rows that it says are kept are kept."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch

from benchmarks import around
from benchmarks.machine import short_name
from benchmarks.overhead import cli, costs, measure, models, report, sections, timeline, variants
from benchmarks.overhead.table import Options, table
from benchmarks.overhead.workloads import KINDS, Bench, Workload

COLUMNS = {
    "time_ratio": float,
    "time_ratio_interval": list,
    "cpu_time_ratio": float,
    "tokens_per_s": float,
    "graphs": int,
    "breaks": int,
    "recompiles": int,
    "kernels": int,
    "rows": int,
    "expected": int,
}


@pytest.fixture(scope="module")
def options() -> Options:
    return Options(dtype=torch.float32, device="cpu", rounds=1, quick=True)


def test_one_round_fills_every_column(tmp_path: Path, options: Options) -> None:
    """A row each for eager, compiled, both hook designs and ours, with all columns; every row expected is kept."""
    model = models.toy(torch.float32, "cpu", depth=1, width=32)
    setup = variants.Setup(model, options={"backend": "eager"})
    chosen = [
        variants.compiled(setup),
        variants.plain(setup),
        *variants.ours(setup),
        variants.hooked(setup, compiled=False),
        *variants.traced_hooks(setup),
    ]
    with torch.no_grad():
        found = table(chosen, Workload("prefill", 2, 8, 2), model, options)
    result = cli.begin(tmp_path / "result.json", False, "2026-01-01", "cpu", "float32")
    result["sections"]["real"] = {"model": "toy", "workloads": {"prefill 2x8": found}}
    cli.write(result, tmp_path / "result.json")
    read: dict[str, Any] = json.loads((tmp_path / "result.json").read_text())
    assert read["schema"] == cli.SCHEMA
    assert (
        read["commands"] and read["versions"]["torch"] == torch.__version__ and read["machine"]["cores"] >= 1
    )
    rows = read["sections"]["real"]["workloads"]["prefill 2x8"]["variants"]
    assert len(rows) == len(chosen)
    for name, row in rows.items():
        for column, kind in COLUMNS.items():
            assert isinstance(row[column], kind), (name, column)
        keeps = "sink" in name or "file" in name
        assert row["expected"] == (2 * 2 * 8 * 2 if keeps else 0), name
        assert row["rows"] == row["expected"], name
        assert row["equal"] in ((None,) if name == variants.BASE else (True, False))
    assert rows["FX, zstd file"]["graphs"] == rows[variants.BASE]["graphs"] == 1
    assert rows["compiled + traced hooks, null sink"]["breaks"] == 0
    assert (tmp_path / "result.md").read_text().startswith("# Overhead, 2026-01-01")
    assert (tmp_path / "result-real-prefill-2x8.png").stat().st_size > 0
    assert {line[1] for line in report.goals(read)} >= set(report.GOALS) - {"FX, 1.0% sampled, zstd file"}
    more = cli.begin(tmp_path / "result.json", True, "2026-01-02", "cpu", "float32")
    assert more["sections"] == read["sections"] and len(more["commands"]) == 2
    with pytest.raises(click.BadParameter, match="figures of another dtype"):
        cli.begin(tmp_path / "result.json", True, "2026-01-02", "cpu", "bfloat16")


@pytest.mark.slow
def test_hooks_break_the_graph_and_keep_every_row(options: Options) -> None:
    """Hooks that hand values to Python break the compiled graph; sampling does not; both keep every row."""
    model = models.toy(torch.float32, "cpu", depth=1, width=32)
    setup = variants.Setup(model, options={"backend": "eager"})
    chosen = [variants.compiled(setup), variants.hooked(setup, compiled=True), variants.sampled(setup, 0.1)]
    with torch.no_grad():
        rows = table(chosen, Workload("prefill", 2, 8, 2), model, options)["variants"]
    assert rows["compiled + hooks, zstd file"]["breaks"] > 0
    assert rows["FX, 10.0% sampled, zstd file"]["breaks"] == 0
    for variant in chosen[1:]:
        assert rows[variant.name]["rows"] == rows[variant.name]["expected"] == 2 * 2 * 8 * 2


@pytest.mark.parametrize("kind", ["decode-static", "decode-dynamic", "generate"])
def test_every_decode_makes_its_tokens(kind: str) -> None:
    """A run makes one token a step, from the same state each time, whatever ran before."""
    model = models.toy(torch.float32, "cpu", depth=1, width=32)
    workload = Workload(kind, 2, 5, 3)
    with torch.no_grad():
        bench = Bench(workload, model)
        first, again = (bench.ready()(model) for _ in range(2))
    assert torch.equal(first, again)
    assert first.shape[:2] == ((2, 8) if kind == "generate" else (2, 3))
    assert workload.rows == (2 * 7 if kind == "generate" else 2 * 3)


def test_a_static_cache_stays_where_it_is() -> None:
    """CUDA graphs are recorded for the addresses of a static cache: a run must not have another one each time."""
    model = models.toy(torch.float32, "cpu", depth=1, width=32)
    seen = []

    def watched(token: torch.Tensor, past_key_values: Any, **kwargs: Any) -> Any:
        seen.append([layer.keys.data_ptr() for layer in past_key_values.layers])
        return model(token, past_key_values=past_key_values, **kwargs)

    with torch.no_grad():
        bench = Bench(Workload("decode-static", 2, 5, 3), model)
        for _ in range(2):
            bench.ready()(watched)
    assert len(seen) == 6 and all(addresses == seen[0] for addresses in seen)


@pytest.mark.parametrize("kind", ["decode-static", "decode-dynamic"])
def test_outputs_that_the_next_call_overwrites(kind: str) -> None:
    """As CUDA graphs do: each step's logits are there all the same."""
    model = models.toy(torch.float32, "cpu", depth=1, width=32)
    memory = torch.empty(2, 1, model.config.vocab_size)

    def replayed(*args: Any, **kwargs: Any) -> Any:
        output = model(*args, **kwargs)
        output.logits = memory.copy_(output.logits)
        return output

    with torch.no_grad():
        bench = Bench(Workload(kind, 2, 5, 3), model)
        assert torch.equal(bench.ready()(replayed), bench.ready()(model))


def test_a_device_has_columns_of_its_own(tmp_path: Path, options: Options) -> None:
    model = models.toy(torch.float32, "cpu", depth=1, width=32)
    with torch.no_grad():
        found = table(
            [variants.compiled(variants.Setup(model))], Workload("prefill", 1, 4, 1), model, options
        )
    row = found["variants"]["compiled"]
    result = {"machine": {"device": "cpu"}, "sections": {"real": {"model": "toy", "workloads": {"w": found}}}}
    ((_, header, (cells,)),) = report.tables(result)
    assert len(header) == len(cells) == 1 + len(report.COLUMNS)
    row.update(peak_device_mb=12.0, cudagraph_skips=3)
    result["machine"]["device"] = "NVIDIA H100 80GB HBM3"
    ((_, header, (cells,)),) = report.tables(result)
    assert dict(zip(header, cells, strict=True))["peak device MB"] == "12"
    assert dict(zip(header, cells, strict=True))["CUDA graphs skipped"] == "3"


@pytest.mark.parametrize(
    ("name", "short"), [("NVIDIA H200", "h200"), ("NVIDIA H100 80GB HBM3", "h100-80gb-hbm3")]
)
def test_results_are_named_by_the_device(monkeypatch: pytest.MonkeyPatch, name: str, short: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert short_name("cuda:0") == short
    assert short_name("cpu") == "cpu"


def test_the_timeline_sees_every_lane(tmp_path: Path) -> None:
    """What is watched for the timeline is there: forward, hand-over, drain, compression and writing."""
    model = models.toy(torch.float32, "cpu", depth=1, width=32)
    variant = variants.ours(variants.Setup(model, options={"backend": "eager"}))[2]
    with torch.no_grad():
        spans = timeline.record(variant, Bench(Workload("prefill", 1, 4, 2), model), tmp_path)
    assert {span["lane"] for span in spans} == set(timeline.LANES)
    assert all(0 <= span["start_s"] <= span["end_s"] for span in spans)


def test_the_fit_finds_the_costs_it_was_given() -> None:
    """Points made from known coefficients give them back, and none comes out negative."""
    points = [
        costs.Point("", num_bytes, sites, 1e-2, num_bytes * 2e-9 + sites * 3e-6 + 5e-5)
        for num_bytes in (1e4, 1e5, 1e6)
        for sites in (8, 64, 256)
    ]
    found = costs.fit(points)
    assert np.allclose(
        [found.seconds_per_byte, found.seconds_per_site, found.seconds_per_step], [2e-9, 3e-6, 5e-5]
    )
    free = costs.fit([costs.Point("", n, 8, 1.0, -n * 1e-9) for n in (1e4, 1e5, 1e6, 1e7)])
    assert min(free.seconds_per_byte, free.seconds_per_site, free.seconds_per_step) == 0.0


def test_intervals_hold_the_median() -> None:
    values = np.array([1.0, 1.1, 0.9, 1.05, 1.02, 0.97, 1.3])
    median, low, high = measure.interval(values)
    assert low <= median == float(np.median(values)) <= high


def test_a_run_whose_time_is_up_keeps_whole_rounds() -> None:
    """The first round is measured in any case, and no variant has one more than another."""
    model = models.toy(torch.float32, "cpu", depth=1, width=32)
    setup = variants.Setup(model, options={"backend": "eager"})
    over = Options(dtype=torch.float32, device="cpu", rounds=5, quick=True, ends=0.0)
    with torch.no_grad():
        found = table(
            [variants.compiled(setup), variants.plain(setup)], Workload("prefill", 2, 8, 1), model, over
        )
    assert found["rounds"] == 1 and all("time_ratio" in row for row in found["variants"].values())


@pytest.mark.parametrize("name", ["real", "toy"])
def test_blocks_are_as_long_as_asked(options: Options, name: str) -> None:
    """Of every kind of workload, whatever a block would have by itself."""
    asked = dataclasses.replace(options, kinds=KINDS, steps=7)
    assert [(w.kind, w.steps) for w in sections.main_workloads(name, asked)] == [(kind, 7) for kind in KINDS]
    usual = sections.main_workloads(name, dataclasses.replace(asked, steps=None))
    assert all(workload.steps not in (0, 7) for workload in usual)


def test_a_block_that_compiles_says_so(tmp_path: Path) -> None:
    """What is compiled while a block is timed is counted: such a figure is not that of the compiled model."""
    model = models.toy(torch.float32, "cpu", depth=1, width=32)
    variant = variants.compiled(variants.Setup(model, options={"backend": "eager"}))
    bench = Bench(Workload("prefill", 2, 8, 1), model)
    with torch.no_grad():
        first, again = (measure.clock(variant, bench, tmp_path) for _ in range(2))
    assert (first.graphs, again.graphs) == (1, 0)


def test_options_reach_another_process() -> None:
    """All but who is told comes back from JSON as it was."""
    chosen = Options(
        torch.bfloat16, "cpu", 3, False, compile_options={"mode": "default"}, variants=("nnsight",), say=print
    )
    found = Options.from_json(chosen.to_json())
    assert found == Options(
        torch.bfloat16, "cpu", 3, False, compile_options={"mode": "default"}, variants=("nnsight",)
    )


def test_what_stands_around_the_graph_is_timed() -> None:
    """A step passes all marks, in order, so that each part of it took some time."""
    found = around.measure(2, 3, "cpu", {"backend": "eager"})
    assert tuple(found) == around.PARTS and all(value > 0 for value in found.values())
