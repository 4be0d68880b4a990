"""Capturing on a CUDA device (`pytest -m gpu`): CUDA graphs on, pinned ring, copy stream."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hooks import eager_values
from models import make, tokens
from torch._dynamo.utils import counters

from fx_instrument import InstrumentationConfig, InstrumentationFramework, open_stream

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
STEPS = 8


def check_values(path: Path, model: Any, inputs: list[torch.Tensor], atol: float = 1e-4) -> None:
    """Every step of the file against eager hooks on the same input."""
    with open_stream(path) as stream:
        assert stream.num_steps == len(inputs)
        for step, value in enumerate(inputs):
            names = [site.name for site in stream.sites]
            for (name, _, call), seen in eager_values(model, names, lambda m, v=value: m(v)).items():
                torch.testing.assert_close(
                    stream.read(name, step, call), seen.cpu(), atol=atol, rtol=atol, msg=f"{name} {step}"
                )


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_replays_keep_each_steps_values(tmp_path: Path, mode: str) -> None:
    """CUDA graphs stay on, and what a later replay overwrites was saved before."""
    model = make().cuda()
    eager = copy.deepcopy(model)
    framework = InstrumentationFramework()
    framework.instrument_model(model, mode=mode)
    inputs = [tokens(2, 16, seed=seed).cuda() for seed in range(STEPS)]
    path = tmp_path / "g.stream"
    with torch.no_grad():
        for _ in range(3):
            model(inputs[0])
        with framework.capture_activations(None):
            for _ in range(3):
                model(inputs[0])
        counters.clear()
        with framework.capture_activations(path) as capture:
            for value in inputs:
                model(value)
    assert capture.report.records == STEPS * len(framework.sites) and capture.report.dropped_records == 0
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert not counters["stats"]["unique_graphs"], "nothing compiled again"
    check_values(path, eager, inputs)


def test_generate_with_a_static_cache(tmp_path: Path) -> None:
    """The tokens of the uncaptured model, and a row for every token but the last."""
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(
        "llama",
        num_hidden_layers=2,
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().cuda()
    ids = torch.randint(3, 100, (2, 7)).cuda()
    options = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": "static"}
    expected = model.generate(ids, **options)
    framework = InstrumentationFramework()
    framework.instrument_model(model, mode="reduce-overhead")
    path = tmp_path / "g.stream"
    with framework.capture_activations(path):
        found = model.generate(ids, **options)
    assert torch.equal(found, expected)
    with open_stream(path) as stream:
        for site in framework.sites:
            assert stream[site.name].cat().shape[1] == 7 + 12 - 1


def test_a_prefill_larger_than_the_ring(tmp_path: Path) -> None:
    """Its values flow through the pinned memory in pieces."""
    model = make().cuda()
    eager = copy.deepcopy(model)
    framework = InstrumentationFramework(InstrumentationConfig(max_memory_gb=0.008))
    framework.instrument_model(model)
    inputs = [tokens(64, 512, seed=seed).cuda() for seed in range(3)]
    path = tmp_path / "g.stream"
    with torch.no_grad(), framework.capture_activations(path) as capture:
        for value in inputs:
            model(value)
    assert capture.report.peak_buffer_bytes <= 8_000_000 < capture.report.raw_bytes // 3
    check_values(path, eager, inputs)


def test_a_stream_of_the_callers_own(tmp_path: Path) -> None:
    """Copies wait for the stream that the model ran on, not for the default one."""
    model = make().cuda()
    eager = copy.deepcopy(model)
    framework = InstrumentationFramework()
    framework.instrument_model(model)
    inputs = [tokens(2, 16, seed=seed).cuda() for seed in range(STEPS)]
    path = tmp_path / "g.stream"
    torch.cuda.synchronize()
    with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()), framework.capture_activations(path):
        for value in inputs:
            torch.cuda._sleep(10_000_000)  # type: ignore[no-untyped-call]
            model(value)
    check_values(path, eager, inputs)


def test_a_cuda_graph_of_the_callers_own_is_refused() -> None:
    """Its replays would pass the capture by."""
    model = make().cuda()
    framework = InstrumentationFramework()
    framework.instrument_model(model)
    value = tokens(2, 16).cuda()
    with torch.no_grad(), framework.capture_activations(None):
        model(value)
        torch.cuda.synchronize()
        with pytest.raises(Exception, match=r"torch\.cuda\.graph"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            model(value)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_model_on_the_second_device(tmp_path: Path) -> None:
    model = make().to("cuda:1")
    eager = copy.deepcopy(model)
    framework = InstrumentationFramework()
    framework.instrument_model(model)
    inputs = [tokens(2, 16, seed=seed).to("cuda:1") for seed in range(STEPS)]
    path = tmp_path / "g.stream"
    with torch.no_grad(), framework.capture_activations(path):
        for value in inputs:
            model(value)
    check_values(path, eager, inputs)
