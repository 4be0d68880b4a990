"""What capturing must not bring into a graph, so that CUDA graphs take it: shown on the graph, without a GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from models import make, tokens
from tiny_llm import tiny_llama
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.utils import get_all_devices, get_first_incompatible_cudagraph_node

from fx_instrument import (
    HookConfig,
    HookGranularity,
    InstrumentationConfig,
    InstrumentationFramework,
    open_stream,
)

ATEN = torch.ops.aten
# What a capture is made of, below AOTAutograd.
CAPTURE = {ATEN.clone.default, ATEN.detach.default, ATEN.alias.default}


class Recorder:
    """A backend below AOTAutograd that keeps the graphs that Inductor would compile."""

    def __init__(self) -> None:
        self.graphs: list[fx.GraphModule] = []
        self.backend = aot_autograd(fw_compiler=self._keep)

    def _keep(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        self.graphs.append(gm)
        return gm.forward

    def take(self) -> fx.GraphModule:
        (gm,), self.graphs = self.graphs, []
        return gm


def calls(gm: fx.GraphModule) -> Counter[Any]:
    return Counter(node.target for node in gm.graph.nodes if node.op == "call_function")


def count(gm: fx.GraphModule, op: str) -> int:
    return sum(1 for node in gm.graph.nodes if node.op == op)


def variants(model: Any, call: Callable[[], Any], path: Path | None, **config: Any) -> list[fx.GraphModule]:
    """The graphs of the uncaptured model and of the capturing one."""
    recorder = Recorder()
    plain = torch.compile(model._call_impl, backend=recorder.backend, fullgraph=True)
    framework = InstrumentationFramework(InstrumentationConfig(**config))
    with torch.no_grad():
        plain(*call())
        graphs = [recorder.take()]
        framework.instrument_model(model, backend=recorder.backend, fullgraph=True)
        with framework.capture_activations(path):
            model(*call())
        graphs.append(recorder.take())
    framework.restore(model)
    return graphs


def check(plain: fx.GraphModule, capturing: fx.GraphModule) -> Counter[Any]:
    """Nothing that a CUDA graph refuses; answers what was added."""
    assert get_first_incompatible_cudagraph_node(capturing) is None
    assert get_all_devices(capturing) == get_all_devices(plain)
    assert count(capturing, "placeholder") == count(plain, "placeholder"), "no argument more, no token left"
    before, after = calls(plain), calls(capturing)
    assert not before - after
    writes = [ATEN.copy_.default, ATEN.copy.default, ATEN.index_put.default, ATEN.index_copy.default]
    for target in writes:
        assert after[target] == before[target], "no mutated input more"
    added = after - before
    for target in added:
        assert isinstance(target, torch._ops.OpOverload) or target.__module__ in (
            "_operator",
            "torch",
            "math",
        )
        if isinstance(target, torch._ops.OpOverload):
            assert target.namespace in ("aten", "prims"), f"{target} is no op of torch's own"
            assert not target._schema.is_mutable, f"{target} writes to its arguments"
    return added


def test_captures_are_clones_alone(tmp_path: Path) -> None:
    """One clone a site, and nothing else: no mutated input, no copy to another device, no Python."""
    model = make()
    graphs = variants(model, lambda: (tokens(2, 5),), tmp_path / "c.stream")
    added = check(*graphs)
    assert set(added) <= CAPTURE and added[ATEN.clone.default] == 4


def test_sampling_stays_in_the_graph(tmp_path: Path) -> None:
    """Positions are computed on the value's device, without random state."""
    config = {
        "granularity": HookGranularity.SAMPLED_SLICES,
        "hook_config": HookConfig(sampling_rate=0.1),
    }
    added = check(*variants(make(), lambda: (tokens(2, 5),), tmp_path / "c.stream", **config))
    assert added[ATEN.index_select.default] == 4
    assert not any("rand" in str(target) for target in added)


def test_decoding_with_a_static_cache(tmp_path: Path) -> None:
    """The cache is written where it was before, and by nothing more."""
    transformers = pytest.importorskip("transformers")
    model = tiny_llama()

    def call() -> tuple[Any, ...]:
        cache = transformers.StaticCache(config=model.config, max_cache_len=16)
        with torch.no_grad():
            model.forward(tokens(2, 5), past_key_values=cache)
        return tokens(2, 1), torch.ones(2, 16, dtype=torch.long), torch.full((2, 1), 5), cache

    added = check(*variants(model, call, tmp_path / "c.stream"))
    assert set(added) <= CAPTURE and added[ATEN.clone.default] == 4


def test_a_call_that_makes_a_static_cache_runs_eagerly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As transformers itself does: made in a CUDA graph, the cache would be overwritten. Nothing of it is lost."""
    model = tiny_llama()
    monkeypatch.setattr("fx_instrument.graph.attach.is_on_cpu", lambda model: False)
    options = {"max_new_tokens": 5, "do_sample": False, "cache_implementation": "static", "pad_token_id": 0}
    ids = tokens(2, 7)
    expected = model.generate(ids, **options)
    lengths: list[int] = []

    def inner(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            lengths.append(next(int(a.shape[1]) for a in args if a.dim() == 2 and a.dtype == torch.long))
            return gm.forward(*args)

        return run

    framework = InstrumentationFramework()
    framework.instrument_model(model, backend=inner)
    path = tmp_path / "c.stream"
    for _ in range(2):
        lengths.clear()
        with framework.capture_activations(path) as capture:
            assert torch.equal(model.generate(ids, **options), expected)
        assert lengths == [1] * 4, "no prefill among the compiled calls"
        assert capture.report.eager_records == len(framework.sites)
        assert capture.report.records == 5 * len(framework.sites)
    model.generate(ids, **options)
    with open_stream(path) as stream:
        for site in framework.sites:
            assert stream[site.name].cat().shape[1] == 7 + 4
