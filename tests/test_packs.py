"""Small values that leave the graph together, as they do on a CUDA device; shown on CPU."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hooks import eager_values, same_bits
from models import PLAIN, TUPLES, Shape, make, tokens
from torch import fx, nn

from fx_instrument import (
    HookConfig,
    HookGranularity,
    InstrumentationConfig,
    InstrumentationFramework,
    open_stream,
)
from fx_instrument.graph.backend import CaptureBackend


@pytest.fixture(autouse=True)
def packed_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CaptureBackend.__init__.__kwdefaults__, "pack_on", ("cpu",))


class Counting:
    """An inner backend that runs the graph as it is and counts its outputs."""

    def __init__(self) -> None:
        self.num_outputs: list[int] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: Any, **kwargs: Any) -> Any:
        (values,) = next(iter(reversed(gm.graph.nodes))).args
        self.num_outputs.append(len(values))
        return gm.forward


@pytest.mark.parametrize(
    "shape", [PLAIN, TUPLES, Shape(experts=3, shared_mlp=True)], ids=["plain", "tuples", "moe"]
)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_packed_values_equal_eager_hooks(tmp_path: Path, shape: Shape, backend: str) -> None:
    """Names, shapes and values of each site, with lengths that change."""
    model = make(shape)
    reference = copy.deepcopy(model)
    framework = InstrumentationFramework()
    framework.instrument_model(model, backend=backend)
    inputs = [tokens(2, length, seed=length) for length in (5, 1, 9, 7)]
    path = tmp_path / "p.stream"
    with torch.no_grad(), framework.capture_activations(path) as capture:
        for ids in inputs:
            model(ids)
    names = [site.name for site in framework.sites]
    expected = eager_values(reference, names, lambda m: [m(ids) for ids in inputs])
    assert capture.report.records == len(expected)
    with open_stream(path) as stream:
        for (name, step, call), value in expected.items():
            stored = stream.read(name, step, call)
            if backend == "aot_eager":
                assert same_bits(stored, value)
            else:
                torch.testing.assert_close(stored, value, atol=1e-5, rtol=1e-4)


def test_one_output_of_each_dtype_more(tmp_path: Path) -> None:
    """Sites of two dtypes, sampled: two outputs more, whatever the number of sites."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.c = nn.Linear(4, 4).bfloat16()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x) + self.b(x) + self.c(x.bfloat16())

    model, inner = Mixed(), Counting()
    config = InstrumentationConfig(
        granularity=HookGranularity.SAMPLED_SLICES,
        hook_config=HookConfig(sampling_rate=0.5, target_layers=["*"]),
    )
    framework = InstrumentationFramework(config)
    framework.instrument_model(model, backend=inner)
    path = tmp_path / "p.stream"
    x = torch.randn(3, 4)
    with torch.no_grad(), framework.capture_activations(path):
        model(x)
    assert inner.num_outputs == [3]
    with open_stream(path) as stream:
        for name in "abc":
            (record,) = stream[name]
            whole = model.get_submodule(name)(x.bfloat16() if name == "c" else x).flatten()
            assert record.full_shape == (3, 4)
            assert same_bits(record.tensor(), whole[record.positions()])


def test_large_runs_are_not_packed() -> None:
    """Their copies are long enough, and packing them would move every byte once more."""
    model, inner = make(), Counting()
    framework = InstrumentationFramework()
    framework.instrument_model(model, backend=inner)
    with torch.no_grad(), framework.capture_activations(None):
        model(tokens(64, 1100))
    assert inner.num_outputs == [1 + len(framework.sites)]
