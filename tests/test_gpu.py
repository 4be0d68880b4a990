"""Capturing on a CUDA device (`pytest -m gpu`): CUDA graphs on, pinned ring, copy stream."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hooks import eager_values, same_bits
from models import PLAIN, Decoder, make, tokens
from tiny_llm import tiny_llama
from torch import nn
from torch._dynamo.utils import counters

from fx_instrument import (
    BufferTooSmallError,
    HookConfig,
    HookGranularity,
    InstrumentationConfig,
    InstrumentationFramework,
    open_stream,
)
from fx_instrument.capture.cuda import CudaEngine
from fx_instrument.stream.writer import StreamWriter

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


@pytest.fixture
def recordings() -> Iterator[mock.Mock]:
    """How often a CUDA graph was recorded."""
    from torch._inductor import cudagraph_trees

    record = cudagraph_trees.CUDAGraphNode._record
    with mock.patch.object(
        cudagraph_trees.CUDAGraphNode, "_record", autospec=True, side_effect=record
    ) as spy:
        yield spy


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_replays_keep_each_steps_values(tmp_path: Path, mode: str, recordings: mock.Mock) -> None:
    """CUDA graphs stay on, nothing is recorded again, and what a later replay overwrites was saved before."""
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
        assert bool(recordings.call_count) == (mode == "reduce-overhead")
        recordings.reset_mock()
        counters.clear()
        with framework.capture_activations(path) as capture:
            for value in inputs:
                model(value)
    assert not recordings.called
    assert capture.report.records == STEPS * len(framework.sites) and capture.report.dropped_records == 0
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert not counters["stats"]["unique_graphs"], "nothing compiled again"
    check_values(path, eager, inputs)


def test_generate_with_a_static_cache(tmp_path: Path, recordings: mock.Mock) -> None:
    """The tokens of the uncaptured model, under CUDA graphs; each row is the one that eager hooks see."""
    model = tiny_llama(100).cuda()
    eager = copy.deepcopy(model)
    ids = torch.randint(3, 100, (2, 7)).cuda()
    options = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": "static"}
    expected = model.generate(ids, **options)
    framework = InstrumentationFramework()
    framework.instrument_model(model, mode="reduce-overhead")
    path = tmp_path / "g.stream"
    for _ in range(2):
        # Each call of generate has a cache of its own, which graphs are recorded for.
        recordings.reset_mock()
        counters.clear()
        with framework.capture_activations(path) as capture:
            found = model.generate(ids, **options)
        assert torch.equal(found, expected)
        assert recordings.call_count == 1 and counters["inductor"]["cudagraph_skips"] == 0
        assert capture.report.eager_records == len(framework.sites), "of the prefill, which makes the cache"
    assert not counters["stats"]["unique_graphs"]
    names = [site.name for site in framework.sites]
    seen = eager_values(eager, names, lambda m: m(expected[:, :-1], use_cache=False))
    with open_stream(path) as stream:
        for name in names:
            rows = stream[name].cat()
            assert rows.shape[1] == 7 + 12 - 1
            torch.testing.assert_close(rows, seen[name, 0, 0].cpu(), atol=1e-4, rtol=1e-4)


def test_decoding_with_a_cache_of_the_callers_own(tmp_path: Path, recordings: mock.Mock) -> None:
    """One graph for all steps, nothing skipped, and each step's values."""
    transformers = pytest.importorskip("transformers")
    model = tiny_llama(100).cuda()
    eager = copy.deepcopy(model)
    framework = InstrumentationFramework()
    framework.instrument_model(model, mode="reduce-overhead")
    cache = transformers.StaticCache(config=model.config, max_cache_len=32)
    ids = torch.randint(3, 100, (2, 20)).cuda()
    path = tmp_path / "g.stream"

    def decode() -> None:
        for position in range(20):
            positions = torch.full((2, 1), position, device="cuda")
            model(ids[:, position : position + 1], past_key_values=cache, position_ids=positions)

    with torch.no_grad():
        for _ in range(2):
            with framework.capture_activations(None):
                decode()
            cache.reset()
        recordings.reset_mock()
        counters.clear()
        with framework.capture_activations(path) as capture:
            decode()
    assert not recordings.called and not counters["stats"]["unique_graphs"]
    assert counters["inductor"]["cudagraph_skips"] == 0 and not capture.report.eager_records
    names = [site.name for site in framework.sites]
    with torch.no_grad():
        seen = eager_values(eager, names, lambda m: m(ids, use_cache=False))
    with open_stream(path) as stream:
        for name in names:
            torch.testing.assert_close(stream[name].cat(), seen[name, 0, 0].cpu(), atol=1e-4, rtol=1e-4)


def test_no_synchronisation_on_the_models_thread(tmp_path: Path) -> None:
    """torch tells of every call that makes the host wait for the device."""
    model = make().cuda()
    framework = InstrumentationFramework()
    framework.instrument_model(model, mode="reduce-overhead")
    value = tokens(2, 16).cuda()
    with torch.no_grad(), framework.capture_activations(tmp_path / "g.stream"):
        for _ in range(3):
            model(value)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(STEPS):
                model(value)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("on_full", ["stall", "drop"])
def test_a_backlog_of_the_writer(tmp_path: Path, mode: str, on_full: Any) -> None:
    """The writer is much slower than the model: "stall" keeps all, "drop" counts what is lost; no value is wrong."""
    model = make().cuda()
    eager = copy.deepcopy(model)
    framework = InstrumentationFramework(InstrumentationConfig(max_memory_gb=0.008))
    framework.instrument_model(model, mode=mode)
    inputs = [tokens(16, 256, seed=seed).cuda() for seed in range(24)]
    path = tmp_path / "g.stream"
    put = StreamWriter.put
    slow = threading.Event()

    def slowly(self: StreamWriter, *args: Any, **kwargs: Any) -> None:
        slow.wait(0.01)
        put(self, *args, **kwargs)

    with torch.no_grad():
        for _ in range(3):
            with framework.capture_activations(None):
                model(inputs[0])
        with (
            mock.patch.object(StreamWriter, "put", slowly),
            framework.capture_activations(path, on_full=on_full) as capture,
        ):
            for value in inputs:
                model(value)
            slow.set()
    report = capture.report
    assert report.records + report.dropped_records == len(inputs) * len(framework.sites)
    assert bool(report.dropped_records) == (on_full == "drop")
    assert on_full == "drop" or report.stalled_seconds > 0
    names = [site.name for site in framework.sites]
    with open_stream(path) as stream:
        for step, value in enumerate(inputs):
            seen = eager_values(eager, names, lambda m, v=value: m(v))
            for name in names:
                for record in stream[name]:
                    if record.step == step:
                        torch.testing.assert_close(
                            record.tensor(), seen[name, 0, 0].cpu(), atol=1e-4, rtol=1e-4
                        )


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_sampled_values_and_inference_mode(tmp_path: Path, mode: str) -> None:
    """Blocks in and out of inference mode share what the capture keeps on the device and on the host."""
    model = make().cuda()
    eager = copy.deepcopy(model)
    config = InstrumentationConfig(
        granularity=HookGranularity.SAMPLED_SLICES, hook_config=HookConfig(sampling_rate=0.05)
    )
    framework = InstrumentationFramework(config)
    framework.instrument_model(model, mode=mode)
    value = tokens(3, 16).cuda()
    names = [site.name for site in framework.sites]
    with torch.no_grad():
        seen = eager_values(eager, names, lambda m: m(value))
    path = tmp_path / "g.stream"
    with framework.capture_activations(path):
        for context in (torch.inference_mode, torch.no_grad, torch.inference_mode, torch.no_grad):
            with context():
                for _ in range(3):
                    model(value)
    with open_stream(path) as stream:
        assert stream.num_steps == 12
        for name in names:
            whole = seen[name, 0, 0].cpu().flatten()
            for record in stream[name]:
                torch.testing.assert_close(record.tensor(), whole[record.positions()], atol=1e-4, rtol=1e-4)


def test_inputs_are_those_of_their_step(tmp_path: Path) -> None:
    """The caller writes its token buffer again as soon as the call has returned."""
    model = make().cuda()
    framework = InstrumentationFramework()
    framework.instrument_model(model, mode="reduce-overhead")
    inputs = [tokens(2, 16, seed=seed) for seed in range(STEPS)]
    buffer = inputs[0].cuda()
    path = tmp_path / "g.stream"
    with torch.no_grad(), framework.capture_activations(path):
        for value in inputs:
            buffer.copy_(value)
            model(buffer)
    with open_stream(path) as stream:
        for step, value in enumerate(inputs):
            assert torch.equal(stream.inputs(step)["input_ids"], value)


def test_a_model_on_the_host_and_on_a_device(tmp_path: Path) -> None:
    """Values of one step from both: each comes by its own way."""

    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8).cuda()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.second(self.first(x).cuda())
            return out

    model = Split().eval()
    eager = copy.deepcopy(model)
    config = InstrumentationConfig(hook_config=HookConfig(target_layers=["first", "second"]))
    framework = InstrumentationFramework(config)
    framework.instrument_model(model, backend="aot_eager")
    inputs = [torch.randn(4, 8) for _ in range(STEPS)]
    path = tmp_path / "g.stream"
    with torch.no_grad(), framework.capture_activations(path):
        for value in inputs:
            model(value)
    check_values(path, eager, inputs)


def test_threads_with_streams_of_their_own(tmp_path: Path) -> None:
    """Two threads run one model: no value of one is taken for the other's."""
    model = make().cuda()
    eager = copy.deepcopy(model)
    framework = InstrumentationFramework()
    framework.instrument_model(model)
    inputs = [[tokens(2, 16, seed=10 * thread + n).cuda() for n in range(STEPS)] for thread in range(2)]
    with torch.no_grad():
        with framework.capture_activations(None):
            model(inputs[0][0])
        torch.cuda.synchronize()
        path = tmp_path / "g.stream"

        def work(values: list[torch.Tensor]) -> None:
            with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
                for value in values:
                    model(value)

        with framework.capture_activations(path):
            threads = [threading.Thread(target=work, args=(values,)) for values in inputs]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    names = [site.name for site in framework.sites]
    with open_stream(path) as stream:
        for step in range(2 * STEPS):
            given = stream.inputs(step)["input_ids"].cuda()
            for (name, _, call), seen in eager_values(eager, names, lambda m, v=given: m(v)).items():
                torch.testing.assert_close(stream.read(name, step, call), seen.cpu(), atol=1e-4, rtol=1e-4)


def test_pinned_memory_is_what_was_asked_for() -> None:
    """To the page, page-locked for CUDA, and the same for the next capture of that size."""
    engine = CudaEngine()
    size = 33_000_000
    memory = engine.allocate(size, torch.device("cuda:0"))
    assert memory.nbytes == size and memory.is_pinned()
    engine.free(memory)
    again = engine.allocate(size, torch.device("cuda:0"))
    assert again.data_ptr() == memory.data_ptr()
    other = engine.allocate(size, torch.device("cuda:0"))
    assert other.data_ptr() != again.data_ptr()
    value = torch.randint(0, 255, (size,), dtype=torch.uint8, device="cuda")
    engine.copy(other, value, engine.mark(value.device)).synchronize()
    assert same_bits(other, value.cpu())
    engine.free(again)
    engine.free(other)


def test_a_value_larger_than_the_pinned_buffer_is_refused() -> None:
    """With both sizes; the model's result stands, and the next block captures."""
    model = make().cuda()
    framework = InstrumentationFramework(InstrumentationConfig(max_memory_gb=0.008))
    framework.instrument_model(model)
    with torch.no_grad():
        with (
            pytest.raises(BufferTooSmallError, match="larger than the pinned buffer"),
            framework.capture_activations(None),
        ):
            model(tokens(256, 1024).cuda())
        with framework.capture_activations(None) as capture:
            model(tokens(2, 16).cuda())
    assert capture.report.records == len(framework.sites)


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


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_blocks_strictly(tmp_path: Path, mode: str) -> None:
    """Capturing blocks changes bfloat16 kernels; strict, the outputs keep the bits of the plain compiled model."""
    model = make(dtype=torch.bfloat16).cuda()
    plain = copy.deepcopy(model)
    plain.compile(mode=mode)
    config = InstrumentationConfig(strict_numerics=True, hook_config=HookConfig(target_layers=["layers.*"]))
    framework = InstrumentationFramework(config)
    framework.instrument_model(model, mode=mode)
    value = tokens(2, 16).cuda()
    path = tmp_path / "g.stream"
    with torch.no_grad():
        for _ in range(4):
            expected = plain(value).clone()
        with framework.capture_activations(path) as capture:
            for _ in range(4):
                assert same_bits(model(value).cpu(), expected.cpu())
    assert capture.report.records == 4 * len(framework.sites)
    with open_stream(path) as stream:
        for site in framework.sites:
            first, *others = (record.tensor() for record in stream[site.name])
            assert all(same_bits(first, other) for other in others)


@pytest.mark.parametrize("strict", [False, True])
def test_verify_says_what_capturing_changes(strict: bool) -> None:
    """Last bits of the outputs may change where a value is captured; strict, they stay."""
    model = make().cuda()
    framework = InstrumentationFramework(InstrumentationConfig(strict_numerics=strict))
    framework.instrument_model(model)
    found = framework.verify(model, tokens(2, 16).cuda())
    assert found.idle_bit_equal and found.graphs_equal and len(found.sites) == len(framework.sites), str(
        found
    )
    assert found.max_output_difference < 1e-5, str(found)
    assert found.ok or not strict, str(found)


def test_training(tmp_path: Path) -> None:
    """Gradients are those without a capture, and what is captured is the forward pass's."""
    model = make().cuda()
    plain = copy.deepcopy(model)
    plain.compile()
    framework = InstrumentationFramework()
    framework.instrument_model(model)
    path = tmp_path / "g.stream"
    inputs = [tokens(2, 16, seed=seed).cuda() for seed in range(3)]
    for value in inputs:
        plain(value).square().mean().backward()
    with framework.capture_activations(path):
        for value in inputs:
            model(value).square().mean().backward()
    for left, right in zip(model.parameters(), plain.parameters(), strict=True):
        assert left.grad is not None and right.grad is not None
        torch.testing.assert_close(left.grad, right.grad, atol=1e-6, rtol=1e-5)
    check_values(path, plain, inputs)


def test_an_exported_program(tmp_path: Path) -> None:
    model = make().cuda()
    framework = InstrumentationFramework()
    value = tokens(2, 16).cuda()
    program = framework.instrument_exported(torch.export.export(model, (value,)))
    module = program.module()
    path = tmp_path / "g.stream"
    with torch.no_grad(), framework.capture_activations(path):
        for _ in range(3):
            module(value)
    check_values(path, model, [value] * 3)


two_devices = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


def keep_busy() -> None:
    """What runs next on either device begins late: whoever does not wait for it reads what was there before."""
    for device in range(2):
        with torch.cuda.device(device):
            torch.cuda._sleep(10_000_000)  # type: ignore[no-untyped-call]


@two_devices
def test_a_model_on_the_second_device(tmp_path: Path) -> None:
    """Its copies don't go through the first one, which gets no memory of ours."""
    model = make().to("cuda:1")
    eager = copy.deepcopy(model)
    framework = InstrumentationFramework()
    framework.instrument_model(model)
    inputs = [tokens(2, 16, seed=seed).to("cuda:1") for seed in range(STEPS)]
    path = tmp_path / "g.stream"
    allocated = torch.cuda.memory_allocated(0)
    with torch.no_grad(), framework.capture_activations(path):
        for value in inputs:
            keep_busy()
            model(value)
    assert torch.cuda.memory_allocated(0) == allocated
    check_values(path, eager, inputs)


class Split(Decoder):
    """Each layer computes where its weights are."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x.to(layer.mlp.up.weight.device))
        logits: torch.Tensor = self.lm_head(x.to(self.lm_head.weight.device))
        return logits


@two_devices
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("max_memory_gb", [1.0, 0.004], ids=["roomy", "piece by piece"])
def test_a_model_split_over_two_devices(tmp_path: Path, mode: str, max_memory_gb: float) -> None:
    """One graph whose values come from both: all of them right, in the order of the sites."""
    model = Split(PLAIN).eval().to("cuda:0")
    model.layers[1].to("cuda:1")
    eager = copy.deepcopy(model)
    framework = InstrumentationFramework(InstrumentationConfig(max_memory_gb=max_memory_gb))
    framework.instrument_model(model, mode=mode)
    inputs = [tokens(8, 1024, seed=seed).to("cuda:0") for seed in range(STEPS)]
    path = tmp_path / "g.stream"
    with torch.no_grad(), framework.capture_activations(path):
        for value in inputs:
            keep_busy()
            model(value)
    check_values(path, eager, inputs)


@two_devices
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_model_that_accelerate_splits(tmp_path: Path, mode: str) -> None:
    """``device_map``: its hooks end a graph at each layer, and move what the next one takes."""
    accelerate: Any = pytest.importorskip("accelerate")
    model = tiny_llama(100)
    eager = copy.deepcopy(model).cuda()
    parts = dict.fromkeys(["model.embed_tokens", "model.rotary_emb", "model.layers.0"], 0)
    parts |= dict.fromkeys(["model.layers.1", "model.norm", "lm_head"], 1)
    accelerate.dispatch_model(model, parts)
    assert {parameter.device.index for parameter in model.parameters()} == {0, 1}
    framework = InstrumentationFramework()
    framework.instrument_model(model, mode=mode)
    inputs = [tokens(2, 7, seed=seed) for seed in range(STEPS)]
    path = tmp_path / "g.stream"
    with torch.no_grad(), framework.capture_activations(path):
        for ids in inputs:
            keep_busy()
            model(ids.cuda(), use_cache=False)
    names = [site.name for site in framework.sites]
    with torch.no_grad(), open_stream(path) as stream:
        assert stream.num_steps == STEPS
        for step, ids in enumerate(inputs):
            seen = eager_values(eager, names, lambda m, ids=ids: m(ids.cuda(), use_cache=False))
            for (name, _, call), value in seen.items():
                torch.testing.assert_close(stream.read(name, step, call), value.cpu(), atol=1e-4, rtol=1e-4)
