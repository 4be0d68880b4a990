"""A plan says what a run then records, and leaves no trace of having looked."""

from __future__ import annotations

import gc
import json
import weakref
from typing import Any

import pytest
import torch
import torch._dynamo
from models import PLAIN, TUPLES, Shape, make, tokens
from test_generate import IDS, MASK, build
from torch import nn
from torch._dynamo.utils import counters

from fx_instrument import (
    HookConfig,
    HookGranularity,
    InstrumentationConfig,
    InstrumentationError,
    InstrumentationFramework,
    NoSitesError,
    Plan,
)
from fx_instrument import plan as planning
from fx_instrument.graph.marker import Marker

transformers = pytest.importorskip("transformers")


def recorded(framework: InstrumentationFramework, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    with torch.no_grad(), framework.capture_activations(None) as capture:
        model(*args, **kwargs)
    return capture.report


def t5() -> Any:
    config = transformers.T5Config(
        vocab_size=100, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.T5ForConditionalGeneration(config).eval()


@pytest.mark.parametrize(
    ("architecture", "granularity"),
    [
        ("llama", HookGranularity.SAMPLED_SLICES),
        ("mixtral", HookGranularity.FULL_TENSOR),
        ("t5", HookGranularity.FULL_TENSOR),
    ],
)
def test_bytes_are_those_of_a_run(architecture: str, granularity: HookGranularity) -> None:
    """Before and after instrumenting, the plan names the bytes, records and graphs of the run that follows."""
    more = {"num_local_experts": 4} if architecture == "mixtral" else {}
    model = t5() if architecture == "t5" else build(architecture, **more)
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    if architecture == "t5":
        inputs["decoder_input_ids"] = IDS[:, :3]
    config = InstrumentationConfig(granularity, hook_config=HookConfig(sampling_rate=0.05))
    framework = InstrumentationFramework(config)
    with torch.no_grad():
        before = framework.plan(model, **inputs)
        framework.instrument_model(model, backend="aot_eager")
        after = framework.plan(model, **inputs)
    counters.clear()
    report = recorded(framework, model, **inputs)
    for plan in (before, after):
        assert plan.bytes_per_step == report.raw_bytes
        assert sum(site.calls for site in plan.sites) == report.records
        assert [site.name for site in plan.sites] == [site.name for site in framework.sites]
        assert [site.role for site in plan.sites] == [site.role for site in framework.sites]
        assert plan.num_graphs == counters["stats"]["unique_graphs"]
        num_tokens = sum(value.numel() for name, value in inputs.items() if name.endswith("_ids"))
        assert plan.num_tokens == num_tokens
        assert plan.bytes_per_token * num_tokens == pytest.approx(report.raw_bytes)


def test_shapes_have_names_for_what_changes() -> None:
    """Batch and tokens are symbols with their origin; widths are numbers; equal sizes stay apart."""
    with torch.no_grad():
        plan = InstrumentationFramework().plan(make(PLAIN), tokens(5, 5))
    assert [site.symbolic_shape for site in plan.sites] == [("batch", "tokens", "16")] * 4
    assert plan.sites[0].shape == (5, 5, 16) and plan.sites[0].dtype == "float32"
    assert plan.symbols["tokens"] == "input_ids.shape[1] (5 here)"


def test_a_plan_prints_and_is_json() -> None:
    """One row stands for all layers; what the target needs is said; the dict is plain JSON."""
    config = InstrumentationConfig(target_throughput_gbps=0.5)
    with torch.no_grad():
        plan = InstrumentationFramework(config).plan(make(Shape(depth=12), torch.bfloat16), tokens(2, 9))
    text = str(plan)
    assert isinstance(plan, Plan)
    assert len([line for line in text.splitlines() if line.startswith("layers.*.mlp")]) == 1
    assert "(batch, tokens, 16)" in text and "bfloat16" in text and "1 graph" in text
    # 24 sites of 16 channels of 2 bytes.
    assert plan.bytes_per_token == 768 and plan.tokens_per_second_at_target == pytest.approx(0.5e9 / 768)
    assert plan.disk_mb_per_second_at_target == pytest.approx(500 / plan.compression.ratio)
    assert json.loads(json.dumps(plan.to_dict()))["bytes_per_step"] == plan.bytes_per_step


def test_compression_is_measured_on_the_calls_values() -> None:
    """With enough values the ratio is what the codec made of them, close to what a run then stores."""
    model, ids = make(Shape(width=64), torch.bfloat16), tokens(8, 200)
    framework = InstrumentationFramework(InstrumentationConfig())
    with torch.no_grad():
        plan = framework.plan(model, ids)
    assert plan.compression.source.startswith("measured on")
    assert plan.compression.gb_per_cpu_second is not None and plan.cores_at_target is not None
    framework.instrument_model(model, backend="eager")
    report = recorded(framework, model, ids)
    assert plan.compression.ratio == pytest.approx(report.raw_bytes / report.stored_bytes, rel=0.1)


class Broken(nn.Module):
    """A decoder that looks at its values in the middle, and a layer that Dynamo is kept out of."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = make(PLAIN)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.decoder.embed(input_ids)
        x = self.decoder.layers[0](x)
        if x.sum().item() > 1e9:
            x = x + 1
        return self.outside(x)

    @torch.compiler.disable
    def outside(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder.layers[1](x)


def test_graph_breaks_are_named() -> None:
    """Each break has its reason and line; sites that run outside any graph are marked and counted all the same."""
    model = Broken()
    framework = InstrumentationFramework()
    with torch.no_grad():
        plan = framework.plan(model, tokens(2, 5))
    assert any(
        "item()" in found.reason and "test_plan.py" in (found.location or "") for found in plan.graph_breaks
    )
    assert {site.name: site.eager for site in plan.sites} == {
        "decoder.layers.0.self_attn": False,
        "decoder.layers.0.mlp": False,
        "decoder.layers.1.self_attn": True,
        "decoder.layers.1.mlp": True,
    }
    assert "graph break at" in str(plan) and "(no graph)" in str(plan)
    framework.instrument_model(model, backend="eager")
    counters.clear()
    report = recorded(framework, model, tokens(2, 5))
    assert report.raw_bytes == plan.bytes_per_step
    assert report.eager_records == 2
    assert plan.num_graphs == counters["stats"]["unique_graphs"]


def test_nothing_is_left_behind() -> None:
    """Random state, buffers, arguments, hooks, Dynamo's counts and its notes of lengths are as they were."""
    model = make(TUPLES).train()
    model.layers[0].norm1 = nn.Sequential(nn.LayerNorm(16), nn.Dropout(0.5))
    model.layers.register_buffer("seen", torch.zeros(3))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    torch.manual_seed(11)
    random = torch.get_rng_state()
    torch.compile(make(PLAIN), backend="eager")(tokens(1, 3))
    counted = {name: dict(counter) for name, counter in counters.items()}
    framework = InstrumentationFramework()
    ids = tokens(2, 5)
    framework.plan(model, ids)
    assert torch.equal(torch.get_rng_state(), random)
    assert {name: dict(counter) for name, counter in counters.items()} == counted
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert not any(isinstance(h, Marker) for m in model.modules() for h in m._forward_hooks.values())
    assert not hasattr(ids, "_dynamo_weak_dynamic_indices")
    assert framework.sites == ()


def test_samples_go_with_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo holds on to its backends; copies of a call's values, kept to be compressed, do not stay with them."""
    kept = []

    class Sample(planning._Sample):
        def __init__(self, bytes_per_value: int) -> None:
            super().__init__(bytes_per_value)
            kept.append(weakref.ref(self))

    monkeypatch.setattr(planning, "_Sample", Sample)
    InstrumentationFramework().plan(make(PLAIN), tokens(2, 5))
    gc.collect()
    assert [reference() for reference in kept] == [None]


def test_a_cache_that_was_passed_is_not_filled() -> None:
    """A plan of a decode step works on a copy of the KV cache."""
    model = build("llama")
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(IDS, past_key_values=cache, use_cache=True)
        plan = InstrumentationFramework().plan(model, input_ids=IDS[:, :1], past_key_values=cache)
    assert cache.get_seq_length() == IDS.shape[1]
    assert plan.num_tokens == 2 and all(site.shape == (2, 1, 32) for site in plan.sites)


def test_compiled_code_stays_as_it_was() -> None:
    """A model compiled before, and one captured before, compile nothing again after a plan, nor anything sooner."""
    lengths = []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        lengths.append(any(isinstance(value, (int, torch.SymInt)) for value in inputs))
        return gm.forward

    model = make(PLAIN)
    with torch.no_grad():
        model.compile(backend=backend)
        model(tokens(2, 4))
        framework = InstrumentationFramework()
        for length in (5, 6, 7):
            framework.plan(model, tokens(2, length))
        model(tokens(2, 4))
        assert lengths == [False]
        fresh = make(PLAIN)
        fresh.compile(backend=backend)
        framework.plan(fresh, tokens(2, 9))
        fresh(tokens(2, 4))
        # The length that only the plan saw did not make this a graph of any length.
        assert not any(lengths)
        framework.instrument_model(model, backend="eager")
        for _ in range(2):
            counters.clear()
            recorded(framework, model, tokens(2, 4))
            framework.plan(model, tokens(2, 8))
        assert counters["stats"]["unique_graphs"] == 0


def test_what_can_not_be_planned() -> None:
    """Models without sites, or that can't be copied, are refused with a reason."""
    with pytest.raises(NoSitesError, match="attention"):
        InstrumentationFramework().plan(nn.Linear(3, 3), torch.zeros(1, 3))
    model = make(PLAIN)
    model.lock = __import__("threading").Lock()
    with pytest.raises(InstrumentationError, match="can't be copied"):
        InstrumentationFramework().plan(model, tokens(1, 3))
    torch._dynamo.reset()
