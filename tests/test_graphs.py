"""The rewrite in the compiler's own counts: graphs, breaks, recompiles, caches, kernels, and what stands inside."""

from __future__ import annotations

import contextlib
import copy
import re
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.utils.checkpoint
from hooks import eager_values
from models import PLAIN, Shape, compiled_by_user, make, tokens
from torch import fx, nn
from torch._dynamo.utils import counters

from fx_instrument import (
    HookConfig,
    HookGranularity,
    InstrumentationConfig,
    InstrumentationError,
    InstrumentationFramework,
    RewriteError,
    open_stream,
)
from fx_instrument.capture.session import Session
from fx_instrument.graph import marker
from fx_instrument.graph.marker import step_begin, step_end, tap
from fx_instrument.stream.records import DTYPES


class Recording:
    """An inner backend that keeps the graphs that it is given and runs them as they are."""

    def __init__(self) -> None:
        self.graphs: list[fx.GraphModule] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        self.graphs.append(gm)
        return gm.forward


def targets(gm: fx.GraphModule) -> list[Any]:
    return [node.target for node in gm.graph.nodes if node.op == "call_function"]


def instrumented(
    model: nn.Module, config: InstrumentationConfig | None = None, **options: Any
) -> InstrumentationFramework:
    framework = InstrumentationFramework(config or InstrumentationConfig())
    framework.instrument_model(model, **options)
    return framework


def test_capture_ops_stand_behind_their_values_and_no_mark_survives() -> None:
    """The capturing graph has one detach and one clone a site and nothing else new; the idle one is the plain one."""
    inner = Recording()
    model, ids = make(PLAIN), tokens(2, 5)
    framework = instrumented(model, backend=inner)
    with torch.no_grad():
        model(ids)
        with framework.capture_activations(None):
            model(ids)
    plain = Recording()
    with torch.no_grad():
        torch._dynamo.reset()
        torch.compile(make(PLAIN), backend=plain)(ids)
    idle, capturing = inner.graphs
    (uncaptured,) = plain.graphs
    assert targets(idle) == targets(uncaptured)
    without = [target for target in targets(capturing) if target not in (torch.detach, torch.clone)]
    assert without == targets(uncaptured)
    assert targets(capturing).count(torch.clone) == len(framework.sites) == 4
    assert not {tap, step_begin, step_end} & set(targets(capturing))
    (outputs,) = capturing.graph.output_node().args
    (plain_outputs,) = uncaptured.graph.output_node().args
    assert len(outputs) == len(plain_outputs) + 4
    assert all(node.target is torch.clone for node in outputs[len(plain_outputs) :])


def test_sampling_leaves_only_samples() -> None:
    """With SAMPLED_SLICES the extra outputs are the sampled elements, chosen inside the graph."""
    inner = Recording()
    model, ids = make(PLAIN), tokens(2, 5)
    config = InstrumentationConfig(HookGranularity.SAMPLED_SLICES, hook_config=HookConfig(sampling_rate=0.1))
    framework = instrumented(model, config, backend=inner)
    with torch.no_grad(), framework.capture_activations(None):
        model(ids)
    (outputs,) = inner.graphs[0].graph.output_node().args
    assert [tuple(node.meta["example_value"].shape) for node in outputs[1:]] == [(16,)] * 4


@pytest.mark.parametrize("granularity", [HookGranularity.FULL_TENSOR, HookGranularity.SAMPLED_SLICES])
@pytest.mark.parametrize("options", [{}, {"dynamic": True}, {"dynamic": False}])
def test_as_many_graphs_as_without(options: dict[str, Any], granularity: HookGranularity) -> None:
    """In each state as many graphs, breaks and recompiles as the plain model, over dynamic lengths and switches."""
    inputs = [tokens(2, length) for length in (4, 4, 6, 7, 9)]

    def graphs_of(run: Callable[[], None]) -> tuple[int, int]:
        counters.clear()
        run()
        return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())

    def call(model: nn.Module) -> None:
        with torch.no_grad():
            for ids in inputs:
                model(ids)

    plain = torch.compile(make(PLAIN), backend="aot_eager", **options)
    without = graphs_of(lambda: call(plain))
    torch._dynamo.reset()
    model = make(PLAIN)
    config = InstrumentationConfig(granularity, hook_config=HookConfig(sampling_rate=0.1))
    framework = instrumented(model, config, backend="aot_eager", **options)

    def capture() -> None:
        with framework.capture_activations(None):
            call(model)

    assert graphs_of(capture) == without
    # The lengths are known to vary now, so the idle variant may need fewer graphs, never more.
    assert graphs_of(lambda: call(model)) <= without
    assert graphs_of(capture) == (0, 0)
    assert graphs_of(lambda: call(model)) == (0, 0)


def test_caches_hit() -> None:
    """FX-graph and AOTAutograd caches take both variants and give them back, without mixing them up."""
    model, ids = make(PLAIN), tokens(2, 5)
    reference = copy.deepcopy(model)

    def both() -> dict[str, int]:
        torch._dynamo.reset()
        counters.clear()
        fresh = copy.deepcopy(reference)
        framework = instrumented(fresh)
        with torch.no_grad():
            fresh(ids)
            with framework.capture_activations(None) as capture:
                fresh(ids)
        assert capture.report.records == 4
        return {**counters["aot_autograd"], **counters["inductor"]}

    with torch._inductor.utils.fresh_cache():
        first = both()
        second = both()
        with torch._functorch.config.patch(enable_autograd_cache=False):
            third = both()
    assert first.get("fxgraph_cache_miss") == 2 and not first.get("fxgraph_cache_bypass")
    assert third.get("fxgraph_cache_hit") == 2 and not third.get("fxgraph_cache_miss")
    assert first.get("autograd_cache_miss") == 2 and not first.get("autograd_cache_bypass")
    assert second.get("autograd_cache_hit") == 2 and not second.get("autograd_cache_miss")
    del model


def test_kernels_do_not_rise() -> None:
    """Capturing attention and MLP outputs adds no kernel to what Inductor generates: the clones are elided."""
    from torch._inductor.utils import run_and_get_code

    model, ids = make(PLAIN), tokens(2, 8)
    framework = instrumented(model)

    def kernels() -> int:
        with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
            _, code = run_and_get_code(model, ids)
        return sum(len(re.findall(r"^\s*cpp_fused\w*\(", text, re.M)) for text in code)

    idle = kernels()
    with framework.capture_activations(None):
        capturing = kernels()
    assert 0 < capturing <= idle


def test_fullgraph_and_modes_pass_through() -> None:
    """torch.compile's options reach it, and wrong ones are refused by name."""
    model, ids = make(PLAIN), tokens(2, 5)
    framework = instrumented(model, backend="inductor", fullgraph=True, mode="reduce-overhead")
    with torch.no_grad(), framework.capture_activations(None) as capture:
        model(ids)
    assert capture.report.records == 4
    with pytest.raises(TypeError, match="fullgraf"):
        InstrumentationFramework().instrument_model(make(PLAIN), fullgraf=True)
    with pytest.raises(ValueError, match="exclude each other"):
        InstrumentationFramework().instrument_model(
            make(PLAIN), mode="default", options={"max_autotune": False}
        )


class Broken(nn.Module):
    """An attention with a graph break in its middle."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        x = self.q(x)
        torch._dynamo.graph_break()
        return self.o(x), None


class Breaking(nn.Module):
    """A norm's place with a graph break, so that Dynamo compiles each layer's frame by itself."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return x


class Disabled(nn.Module):
    """An attention that Dynamo leaves alone."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(16, 16), nn.Linear(16, 16)

    @torch.compiler.disable
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self.o(self.q(x)), None


@pytest.mark.parametrize("kind", [Broken, Disabled])
def test_graph_breaks_inside_a_site(kind: type[nn.Module], tmp_path: Any) -> None:
    """With a break inside attention, graphs that Dynamo shares between layers still name each layer rightly."""
    from fx_instrument import open_stream

    model = make(Shape(depth=3))
    for layer in model.layers:
        layer.self_attn = kind()
    reference = copy.deepcopy(model)
    inputs = [tokens(2, length) for length in (4, 6)]
    plain = torch.compile(copy.deepcopy(model), backend="aot_eager")
    with torch.no_grad():
        for ids in inputs:
            plain(ids)
    without = counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    counters.clear()
    framework = instrumented(model, backend="aot_eager")
    with torch.no_grad():
        with framework.capture_activations(tmp_path / "o.stream"):
            for ids in inputs:
                model(ids)
        assert counters["stats"]["unique_graphs"] == without
        names = [site.name for site in framework.sites]
        expected = eager_values(reference, names, lambda m: [m(ids) for ids in inputs])
    with open_stream(tmp_path / "o.stream") as stream:
        assert len(stream) == len(expected) == 12
        for key, value in expected.items():
            assert torch.equal(stream.read(*key), value), key


@pytest.mark.parametrize("route", ["torch.compile", "module.compile", "regional"])
def test_the_user_compiles(route: str, tmp_path: Any) -> None:
    """backend=None plants markers and counts steps; whichever way the user compiles then, names and steps are right."""
    from fx_instrument import open_stream

    model = make(Shape(depth=12))
    reference = copy.deepcopy(model)
    framework = instrumented(model, backend=None)
    call = compiled_by_user(model, framework.backend("aot_eager"), route)
    inputs = [tokens(2, 5, seed=seed) for seed in range(3)]
    with torch.no_grad():
        with framework.capture_activations(tmp_path / "o.stream") as capture:
            for ids in inputs:
                call(ids)
        names = [site.name for site in framework.sites]
        expected = eager_values(reference, names, lambda m: [m(ids) for ids in inputs])
    assert counters["stats"]["unique_graphs"] == 1
    assert capture.report.steps == 3 and capture.report.eager_records == 0
    with open_stream(tmp_path / "o.stream") as stream:
        assert len(stream) == len(expected) == 72
        assert all(torch.equal(stream.read(*key), value) for key, value in expected.items())
        assert all(torch.equal(stream.inputs(step)["input_ids"], ids) for step, ids in enumerate(inputs))


@pytest.mark.parametrize("chosen", [0, 2])
@pytest.mark.parametrize("route", ["regional", "broken"])
def test_one_layer_of_many_that_share_a_graph(route: str, chosen: int, tmp_path: Any) -> None:
    """Of layers that share one graph, a chosen one is captured whichever layer Dynamo compiled it for."""
    from fx_instrument import open_stream

    model = make(Shape(depth=4))
    if route == "broken":
        for layer in model.layers:
            layer.norm1 = Breaking()
    reference = copy.deepcopy(model)
    config = InstrumentationConfig(hook_config=HookConfig(target_layers=[f"layers.{chosen}.mlp"]))
    framework = instrumented(model, config, backend=None if route == "regional" else "aot_eager")
    if route == "regional":
        for layer in model.layers:
            layer.compile(backend=framework.backend("aot_eager"))
    ids = tokens(2, 5)
    with torch.no_grad():
        with framework.capture_activations(tmp_path / "o.stream") as capture:
            model(ids)
            model(ids)
        expected = eager_values(reference, [f"layers.{chosen}.mlp"], lambda m: [m(ids), m(ids)])
    assert capture.report.records == 2
    with open_stream(tmp_path / "o.stream") as stream:
        assert [site.name for site in stream.sites] == [f"layers.{chosen}.mlp"]
        assert all(torch.equal(stream.read(*key), value) for key, value in expected.items())


def test_siblings_cost_nothing_in_a_whole_graph() -> None:
    """One chosen layer of many adds one output to the graph of a whole model."""
    inner = Recording()
    config = InstrumentationConfig(hook_config=HookConfig(target_layers=["layers.1.mlp"]))
    model = make(Shape(depth=4))
    framework = instrumented(model, config, backend=inner)
    with torch.no_grad(), framework.capture_activations(None) as capture:
        model(tokens(2, 5))
    assert targets(inner.graphs[0]).count(torch.clone) == 1 == capture.report.records


def test_another_backend_is_refused() -> None:
    """A model that is traced for a backend that does not know the marks is an error, never a silent loss."""
    model, ids = make(PLAIN), tokens(2, 5)
    framework = instrumented(model, backend=None)
    foreign = torch.compile(model, backend="aot_eager")
    refused = pytest.raises(Exception, match="other than the framework's")
    with torch.no_grad(), framework.capture_activations(None), refused:
        foreign(ids)


class Nested(nn.Module):
    """A decoder whose layers run inside nested graphs."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.decoder = make(Shape(depth=3, in_place=True))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.decoder.embed(input_ids)
        for layer in self.decoder.layers:
            if self.kind == "checkpoint":
                x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
            else:
                x = region(layer, x)
        logits: torch.Tensor = self.decoder.lm_head(x)
        return logits


@torch.compiler.nested_compile_region
def region(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = layer(x)
    return out


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("kind", ["checkpoint", "region"])
def test_nested_graphs(kind: str, backend: str, tmp_path: Any) -> None:
    """Sites inside checkpointed layers and nested regions are captured, by name, and gradients stay as they are."""
    from fx_instrument import open_stream

    ids = tokens(2, 5)
    gradients = []
    for captured in (False, True):
        torch._dynamo.reset()
        model = Nested(kind).train()
        reference = copy.deepcopy(model)
        framework = instrumented(model, backend=backend)
        with framework.capture_activations(tmp_path / "o.stream") if captured else contextlib.nullcontext():
            model(ids).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(plain, kept) for plain, kept in zip(*gradients, strict=True))
    names = [site.name for site in framework.sites]
    assert len(names) == 6
    expected = eager_values(reference, names, lambda m: m(ids))
    with open_stream(tmp_path / "o.stream") as stream:
        assert len(stream) == len(expected) == 6
        for key, value in expected.items():
            if backend == "aot_eager":
                assert torch.equal(stream.read(*key), value), key
            else:
                torch.testing.assert_close(stream.read(*key), value)


def test_marks_in_branches_are_refused() -> None:
    """A site that runs in one branch of a cond is refused with the reason."""

    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = make(PLAIN).layers[0].mlp

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = torch.cond(x.sum() > 0, lambda x: self.mlp(x), lambda x: x.clone(), (x,))
            return out

    model = Branching()
    framework = instrumented(model, InstrumentationConfig(HookGranularity.MLP_ONLY), backend="aot_eager")
    with (
        torch.no_grad(),
        framework.capture_activations(None),
        pytest.raises(RewriteError, match="nested graph"),
    ):
        model(torch.randn(1, 3, 16))


def test_a_module_called_twice_is_told_apart(tmp_path: Any) -> None:
    """The calls of a shared module within a step are numbered in order."""
    from fx_instrument import open_stream

    model = make(Shape(depth=3, shared_mlp=True))
    framework = instrumented(model, backend="aot_eager")
    with torch.no_grad(), framework.capture_activations(tmp_path / "o.stream"):
        model(tokens(1, 4))
        model(tokens(1, 4))
    with open_stream(tmp_path / "o.stream") as stream:
        mlp = next(site.name for site in stream.sites if site.role == "mlp")
        assert [(record.step, record.call) for record in stream[mlp]] == [
            (s, c) for s in range(2) for c in range(3)
        ]


def break_layers(model: nn.Module) -> None:
    """A graph break in each layer: Dynamo then compiles layers by themselves, and equal ones share a graph."""
    for layer in model.layers:  # type: ignore[union-attr]
        layer.norm1 = Breaking()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_modules_without_parameters_in_shared_graphs(backend: str, tmp_path: Any) -> None:
    """Activations without weights are told apart too, where layers share a graph."""
    from fx_instrument import open_stream

    model = make(Shape(depth=3))
    for layer in model.layers:
        layer.norm2 = nn.ReLU()
    break_layers(model)
    reference, ids = copy.deepcopy(model), tokens(2, 5)
    config = InstrumentationConfig(hook_config=HookConfig(target_layers=["layers.*.norm2"]))
    framework = instrumented(model, config, backend=backend)
    with torch.no_grad():
        with framework.capture_activations(tmp_path / "o.stream"):
            model(ids)
        expected = eager_values(reference, [f"layers.{i}.norm2" for i in range(3)], lambda m: m(ids))
    with open_stream(tmp_path / "o.stream") as stream:
        assert len(stream) == len(expected) == 3
        assert all(torch.equal(stream.read(*key), value) for key, value in expected.items())


def test_tied_weights_in_shared_graphs(tmp_path: Any) -> None:
    """Layers that share a graph and their first weight keep their own names."""
    from fx_instrument import open_stream

    model = make(Shape(depth=4))
    break_layers(model)
    for layer in model.layers[1:]:
        layer.mlp.up.weight = model.layers[0].mlp.up.weight
    framework = instrumented(model, InstrumentationConfig(HookGranularity.MLP_ONLY), backend="aot_eager")
    with torch.no_grad(), framework.capture_activations(tmp_path / "o.stream"):
        model(tokens(2, 5))
    with open_stream(tmp_path / "o.stream") as stream:
        assert [(record.site, record.call) for record in stream] == [(f"layers.{i}.mlp", 0) for i in range(4)]


def test_parameters_replaced_inside_the_block() -> None:
    """functional_call and new parameters are no change of the modules: every record is there."""
    model, ids = make(PLAIN), tokens(2, 5)
    framework = instrumented(model, backend="aot_eager")
    with torch.no_grad(), framework.capture_activations(None) as capture:
        other = {name: nn.Parameter(value * 2) for name, value in model.named_parameters()}
        torch.func.functional_call(model, other, (ids,))
        model(ids)
        model.layers[0].mlp.up.weight = nn.Parameter(model.layers[0].mlp.up.weight * 2)
        model(ids)
    assert capture.report.records == 12 and capture.report.dropped_records == 0


def test_a_module_replaced_inside_the_block_is_an_error() -> None:
    model, ids = make(PLAIN), tokens(2, 5)
    framework = instrumented(model, backend="aot_eager")
    refused = pytest.raises(InstrumentationError, match=r"layers\.0\.mlp \(replaced\)")
    with refused, torch.no_grad(), framework.capture_activations(None):
        model.layers[0].mlp = make(PLAIN).layers[0].mlp
        model(ids)


def test_two_calls_in_one_function_are_refused() -> None:
    """Steps could not be told apart, so it is an error and not a wrong number."""
    model = make(PLAIN)
    framework = instrumented(model, backend=None)
    both = torch.compile(lambda a, b: model(a) - model(b), backend=framework.backend("aot_eager"))
    refused = pytest.raises(Exception, match="calls the instrumented model twice")
    with torch.no_grad(), framework.capture_activations(None), refused:
        both(tokens(1, 3), tokens(1, 3))


def test_values_that_are_no_plain_tensors_are_refused() -> None:
    """A nested tensor is refused with the reason."""
    model = make(PLAIN).layers[0].mlp
    framework = InstrumentationFramework(InstrumentationConfig(hook_config=HookConfig(target_layers=["up"])))
    framework.instrument_model(model, backend="aot_eager")
    nested = torch.nested.nested_tensor([torch.randn(2, 16), torch.randn(3, 16)], layout=torch.jagged)
    with (
        torch.no_grad(),
        framework.capture_activations(None),
        pytest.raises(RewriteError, match="NestedTensor"),
    ):
        model(nested)


class Narrow(nn.Module):
    """Returns what no stream can hold: a quantised tensor, or elements of less than a byte."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.dtype is torch.qint8:
            return torch.quantize_per_tensor(x, 0.1, 0, self.dtype)
        return torch.zeros(3, 4, dtype=torch.uint8).view(self.dtype)


class Narrowing(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.narrow, self.mlp = Narrow(dtype), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, quantised: torch.Tensor | None = None, narrow: bool = False) -> Any:
        if narrow:
            self.narrow(x)
        return self.mlp(x if quantised is None else x + quantised.dequantize())


def test_streams_hold_the_dtypes_that_are_let_through() -> None:
    assert {str(dtype).removeprefix("torch.") for dtype in marker._DTYPES} == set(DTYPES)


@pytest.mark.filterwarnings("ignore")  # torch's own, of quantised tensors and of graph breaks
@pytest.mark.parametrize("dtype", [torch.qint8, torch.float4_e2m1fn_x2], ids=str)
def test_a_site_of_a_dtype_that_no_stream_holds_is_refused(dtype: torch.dtype) -> None:
    """The call that computes it is refused; the capture goes on, and stores what it can."""
    model, x = Narrowing(dtype), torch.randn(3, 4)
    config = InstrumentationConfig(hook_config=HookConfig(target_layers=["narrow", "mlp"]))
    framework = instrumented(model, config, backend="aot_eager")
    with torch.no_grad(), framework.capture_activations(None) as capture:
        model(x)
        with pytest.raises(RewriteError, match=f"dtype {dtype}, which no stream can hold"):
            model(x, narrow=True)
        model(x)
    assert capture.report.records == 2 and capture.report.dropped_records == 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("route", ["instrumented", "the user compiles"])
def test_an_input_of_a_dtype_that_no_stream_holds_is_left_out(route: str, tmp_path: Any) -> None:
    """A quantised tensor is no integer input; the call is captured without it."""
    model, x = Narrowing(torch.qint8), torch.randn(3, 4)
    config = InstrumentationConfig(hook_config=HookConfig(target_layers=["mlp"]))
    framework = instrumented(model, config, backend=None if route == "the user compiles" else "aot_eager")
    call: Any = model
    if route == "the user compiles":
        call = torch.compile(model, backend=framework.backend("aot_eager"))
    with torch.no_grad(), framework.capture_activations(tmp_path / "o.stream") as capture:
        call(x, torch.quantize_per_tensor(x, 0.1, 0, torch.qint8))
        call(x)
    assert capture.report.records == 2
    with open_stream(tmp_path / "o.stream") as stream:
        assert [stream.inputs(step) for step in range(2)] == [{}, {}]


@pytest.mark.skipif(
    torch.__version__.startswith("2.11."),
    reason="torch 2.11 crashes where threads call a compiled model at once, plain ones too",
)
def test_switching_while_other_threads_run_the_model() -> None:
    """Blocks that open and close while other threads call the model: no call fails, none is half in a block."""
    model, ids = make(Shape(depth=1)), tokens(1, 4)
    framework = instrumented(model, backend="aot_eager")
    stop, failures = threading.Event(), []

    def forward() -> None:
        try:
            with torch.no_grad():
                while not stop.is_set():
                    model(ids)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=forward) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        with torch.no_grad(), framework.capture_activations(None) as capture:
            model(ids)
        assert capture.report.records == 2 * capture.report.steps
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.parametrize("dynamic", [False, True])
def test_whether_runs_are_alike_is_known(dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph of fixed shapes says so of its runs, and no other graph says the same."""
    said: list[object] = []
    reserve = Session.reserve

    def noting(session: Session, *args: Any, alike: object = None, **named: Any) -> Any:
        said.append(alike)
        return reserve(session, *args, alike=alike, **named)

    monkeypatch.setattr(Session, "reserve", noting)
    model = make(PLAIN)
    framework = instrumented(model, backend="aot_eager", dynamic=dynamic)
    with torch.no_grad(), framework.capture_activations(None):
        for length in (4, 4, 6, 4):
            model(tokens(2, length))
    if dynamic:
        assert said == [None] * 4
    else:
        assert said[0] is said[1] is said[3] and None not in said and said[2] is not said[0]
