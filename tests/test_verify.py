"""A certificate says what capturing changes, and can fail."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from models import PLAIN, TUPLES, Decoder, Shape, make, tokens
from test_plan import Broken, t5
from torch import fx, nn
from torch._dynamo.utils import counters

from fx_instrument import (
    HookConfig,
    HookGranularity,
    InstrumentationConfig,
    InstrumentationFramework,
    open_stream,
)
from fx_instrument.graph import backend as backend_room
from fx_instrument.graph.compare import difference


class Checkpointed(Decoder):
    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
        return self.lm_head(x)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: make(PLAIN),
    "in place, bf16": lambda: make(TUPLES, torch.bfloat16),
    "mixture": lambda: make(Shape(experts=4, tied=True)),
    "shared": lambda: make(Shape(shared_mlp=True)),
    "breaks": Broken,
    "checkpointed": lambda: Checkpointed(PLAIN),
}


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("granularity", [HookGranularity.FULL_TENSOR, HookGranularity.SAMPLED_SLICES])
def test_aot_eager_is_certified_bit_for_bit(name: str, granularity: HookGranularity) -> None:
    """Outputs, graphs and every site's values are equal, whole and sampled; the model stays as it was."""
    model = MODELS[name]()
    config = InstrumentationConfig(granularity, hook_config=HookConfig(sampling_rate=0.1))
    framework = InstrumentationFramework(config)
    framework.instrument_model(model, backend="aot_eager")
    found = framework.verify(model, tokens(2, 6))
    assert found.ok, str(found)
    assert found.outputs_bit_equal and found.max_output_difference == 0 and found.idle_bit_equal
    assert [site.name for site in found.sites] == [site.name for site in framework.sites]
    assert all(site.bit_equal and site.max_difference == 0 and site.calls > 0 for site in found.sites)
    assert len(set(found.num_graphs.values())) == 1 and set(found.num_recompiles.values()) == {0}
    assert not counters["stats"]
    assert "certified" in str(found)


@pytest.mark.parametrize("options", [{"dynamic": True}, {"mode": "max-autotune-no-cudagraphs"}])
def test_inductor_is_certified(options: dict[str, Any]) -> None:
    """Under Inductor outputs are bit-equal where values are materialised, and sites close to the eager ones."""
    model = make(PLAIN, torch.bfloat16)
    framework = InstrumentationFramework()
    framework.instrument_model(model, **options)
    with torch.no_grad():
        found = framework.verify(model, tokens(2, 8))
    assert found.ok, str(found)
    assert found.backend == "inductor" and found.outputs_bit_equal
    assert all(site.relative_difference < 0.02 for site in found.sites)


def test_encoder_and_decoder_of_t5() -> None:
    """Both stacks are certified; arguments by keyword."""
    model = t5()
    framework = InstrumentationFramework()
    framework.instrument_model(model, backend="aot_eager")
    with torch.no_grad():
        found = framework.verify(model, input_ids=tokens(2, 6), decoder_input_ids=tokens(2, 3))
    assert found.ok, str(found)
    assert {site.name.split(".")[0] for site in found.sites} == {"encoder", "decoder"}


def test_files_hold_the_certificate(tmp_path: Path) -> None:
    """Streams captured after verify carry it in their metadata; those before, and after restore, don't."""
    model, ids = make(PLAIN), tokens(2, 5)
    framework = InstrumentationFramework()
    framework.instrument_model(model, backend="aot_eager")

    def metadata() -> Any:
        with torch.no_grad(), framework.capture_activations(tmp_path / "o.stream"):
            model(ids)
        with open_stream(tmp_path / "o.stream") as stream:
            return stream.metadata.get("certificate")

    assert metadata() is None
    with torch.no_grad():
        found = framework.verify(model, ids)
    assert metadata() == json.loads(json.dumps(found.to_dict()))
    framework.restore(model)
    framework.instrument_model(model, backend="aot_eager")
    assert metadata() is None


def test_a_model_that_is_not_instrumented() -> None:
    """A plain model is verified as well, and is plain afterwards."""
    model = make(PLAIN)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    random = torch.get_rng_state()
    with torch.no_grad():
        found = InstrumentationFramework().verify(model, tokens(2, 5))
    assert found.ok and found.backend == "inductor"
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert torch.equal(torch.get_rng_state(), random)


def test_a_compiler_that_gives_other_outputs_is_found_out() -> None:
    """An inner backend whose results depend on what is captured is not certified, and the difference is named."""

    def moody(gm: fx.GraphModule, inputs: Any) -> Any:
        captures = len(gm.graph.output_node().args[0]) > 1
        return lambda *args: [value + 0.5 * captures for value in gm.forward(*args)]

    model = make(PLAIN)
    framework = InstrumentationFramework()
    framework.instrument_model(model, backend=moody)
    with torch.no_grad():
        found = framework.verify(model, tokens(2, 5))
    assert not found.ok and not found.outputs_bit_equal
    assert found.max_output_difference == pytest.approx(0.5)
    assert found.graphs_equal and found.idle_bit_equal
    assert any("changes the outputs" in problem for problem in found.problems)
    assert any("far from what eager forward hooks see" in problem for problem in found.problems)
    assert "NOT certified" in str(found)


def test_a_pass_that_changes_the_graph_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rewritten graph with a changed constant, and one that loses a site, are not certified."""
    original = backend_room.insert_captures
    model = make(PLAIN)

    def verified(change: Callable[[Any], Any]) -> Any:
        monkeypatch.setattr(
            backend_room, "insert_captures", lambda *args, **more: change(original(*args, **more))
        )
        framework = InstrumentationFramework()
        framework.instrument_model(model, backend="eager")
        with torch.no_grad():
            found = framework.verify(model, tokens(2, 5))
        framework.restore(model)
        return found

    def scaled(rewritten: Any) -> Any:
        for node in rewritten.gm.graph.nodes if rewritten is not None else ():
            if node.op == "call_function" and 0.5 in node.args:
                node.args = tuple(0.25 if argument == 0.5 else argument for argument in node.args)
        return rewritten

    assert verified(lambda rewritten: rewritten).ok
    found = verified(scaled)
    assert not found.graphs_equal and any("not the original one" in problem for problem in found.problems)


def graph_of(function: Callable[..., Any], *inputs: torch.Tensor) -> fx.GraphModule:
    graphs = []

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(function, backend=backend)(*inputs)
    return graphs[0]


def test_graphs_are_compared_node_by_node() -> None:
    """Captures are seen through; another constant, order, operand or output is a difference, and says where."""
    x = torch.ones(3)
    plain = graph_of(lambda x: ((x.sin() * 2) + x.cos(),), x)
    assert difference(plain, copy.deepcopy(plain)) is None
    captured = graph_of(lambda x: ((s := x.sin() * 2) + x.cos(), s.detach().clone()), x)
    assert len(captured.graph.nodes) == len(plain.graph.nodes) + 2
    assert difference(plain, captured) is None
    for other in (
        lambda x: ((x.sin() * 3) + x.cos(), x.clone()),
        lambda x: ((x.cos() * 2) + x.sin(), x.clone()),
        lambda x: (x.cos() + (x.sin() * 2), x.clone()),
        lambda x: ((x.sin() * 2), x.clone()),
        lambda x: ((x.sin() * 2) + x.cos() + 1, x.clone()),
    ):
        assert difference(plain, graph_of(other, x)) is not None
