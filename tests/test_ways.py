"""Every way of compiling: what is captured equals what eager hooks see, step by step, or is refused."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.utils.checkpoint
from hooks import eager_values, same_bits
from models import PLAIN, TUPLES, Shape, make, tokens
from torch import nn

from fx_instrument import (
    CaptureReport,
    HookConfig,
    IncompleteCaptureWarning,
    InstrumentationConfig,
    InstrumentationFramework,
    open_stream,
)

IDS = tokens(2, 6)
OTHER = tokens(2, 6, seed=1)


def instrumented(model: nn.Module, backend: Any = "aot_eager", **options: Any) -> InstrumentationFramework:
    framework = InstrumentationFramework()
    framework.instrument_model(model, backend=backend, **options)
    return framework


def forward(model: Any) -> None:
    with torch.no_grad():
        model(IDS)
        model(OTHER)


def check(
    path: Path,
    framework: InstrumentationFramework,
    called: Any,
    reference: nn.Module,
    run: Callable[[Any], Any] = forward,
    *,
    tolerance: float | None = None,
) -> CaptureReport:
    """Capture ``run(called)`` and compare every record with the eager hooks of ``run(reference)``."""
    with warnings.catch_warnings(), framework.capture_activations(path) as capture:
        warnings.simplefilter("error", IncompleteCaptureWarning)
        run(called)
    expected = eager_values(reference, [site.name for site in framework.sites], run)
    assert capture.report.records == len(expected) and expected
    with open_stream(path) as stream:
        assert len(stream) == len(expected)
        for key, value in expected.items():
            if tolerance is None:
                assert same_bits(stream.read(*key), value), key
            else:
                torch.testing.assert_close(stream.read(*key), value, rtol=tolerance, atol=tolerance)
    return capture.report


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "max-autotune-no-cudagraphs", "dynamic": True},
        {"mode": "reduce-overhead", "fullgraph": True},
        {"options": {"epilogue_fusion": False}, "dynamic": False},
    ],
)
def test_inductor_options(tmp_path: Path, options: dict[str, Any]) -> None:
    """Modes and options of torch.compile are accepted on a CPU too, and captures are close to eager."""
    model = make(TUPLES)
    reference = copy.deepcopy(model)
    framework = instrumented(model, "inductor", **options)
    report = check(tmp_path / "o", framework, model, reference, tolerance=1e-5)
    assert report.eager_records == 0


@pytest.mark.slow
def test_max_autotune(tmp_path: Path) -> None:
    model = make(TUPLES)
    reference = copy.deepcopy(model)
    framework = instrumented(model, "inductor", mode="max-autotune")
    check(tmp_path / "o", framework, model, reference, tolerance=1e-5)


@pytest.mark.parametrize("instrument", ["inner", "outer"])
@pytest.mark.parametrize("called_before", [False, True])
def test_a_wrapper_made_before(tmp_path: Path, instrument: str, called_before: bool) -> None:
    """What torch.compile returned before, called before or not, is captured, whichever of the two is instrumented."""
    model = make(TUPLES)
    reference = copy.deepcopy(model)
    wrapper = torch.compile(model, backend="aot_eager")
    if called_before:
        forward(wrapper)
    framework = instrumented(model if instrument == "inner" else wrapper)
    assert check(tmp_path / "o", framework, wrapper, reference).eager_records == 0
    assert check(tmp_path / "o", framework, model, reference).eager_records == 0


def test_a_wrapper_made_after(tmp_path: Path) -> None:
    """torch.compile around an instrumented model runs the model's own graphs, in a block and outside."""
    model = make(TUPLES)
    reference = copy.deepcopy(model)
    framework = instrumented(model)
    wrapper = torch.compile(model, backend="eager")
    with torch.no_grad():
        assert same_bits(wrapper(IDS), reference(IDS))
    assert check(tmp_path / "o", framework, wrapper, reference).eager_records == 0


def test_a_compiled_function_around_the_model_is_refused() -> None:
    """A function that inlines the model would leave no place to count steps: an error that says what to do."""
    model = make(PLAIN)
    framework = instrumented(model)
    around = torch.compile(lambda ids: model(ids) * 2, backend="eager")
    with torch.no_grad():
        around(IDS)
        refused = pytest.raises(Exception, match="outside functions that you compile yourself")
        with framework.capture_activations(None), refused:
            around(IDS)


@pytest.mark.parametrize("order", ["before", "after"])
def test_layers_compiled_by_the_user(tmp_path: Path, order: str) -> None:
    """Layers that the user compiles, before or after instrument_model, are inlined and captured."""
    model = make(Shape(depth=3))
    reference = copy.deepcopy(model)
    if order == "before":
        for layer in model.layers:
            layer.compile(backend="aot_eager")
        forward(model)
    framework = instrumented(model)
    if order == "after":
        forward(model)
        for layer in model.layers:
            layer.compile(backend="aot_eager")
    assert check(tmp_path / "o", framework, model, reference).eager_records == 0


class Autocast(nn.Module):
    """Casts inside its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = make(TUPLES)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits: torch.Tensor = self.decoder(input_ids)
        return logits


@pytest.mark.parametrize("where", ["inside", "around"])
def test_autocast(tmp_path: Path, where: str) -> None:
    """Under autocast values are captured in the dtype that the module returned, bf16."""
    model: nn.Module = Autocast() if where == "inside" else make(TUPLES)
    reference = copy.deepcopy(model)

    def run(model: Any) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=where == "around"):
            forward(model)

    framework = instrumented(model)
    assert check(tmp_path / "o", framework, model, reference, run).eager_records == 0
    with open_stream(tmp_path / "o") as stream:
        assert {record.dtype for record in stream} == {torch.bfloat16}


class Checkpointed(nn.Module):
    """Recomputes each layer in the backward pass."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.decoder, self.use_reentrant = make(Shape(in_place=True)), use_reentrant

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.decoder.embed(input_ids)
        for layer in self.decoder.layers:
            x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=self.use_reentrant)
        logits: torch.Tensor = self.decoder.lm_head(x)
        return logits


@pytest.mark.parametrize("way", ["compiled", "layers", "eager"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(tmp_path: Path, use_reentrant: bool, way: str) -> None:
    """What is recomputed in the backward pass is not captured twice, and gradients stay as they are."""
    model = Checkpointed(use_reentrant).train()
    reference, plain = copy.deepcopy(model), copy.deepcopy(model)
    framework = instrumented(model, None if way == "layers" else "aot_eager")
    if way == "layers":
        for layer in model.decoder.layers:
            layer.compile(backend=framework.backend("aot_eager"))
    stance = "force_eager" if way == "eager" else "default"

    def train(model: nn.Module) -> None:
        for _ in range(2):
            model(IDS).square().sum().backward()

    with torch.compiler.set_stance(stance), framework.capture_activations(tmp_path / "o") as capture:
        train(model)
    train(plain)
    with torch.no_grad():
        names = [site.name for site in framework.sites]
        expected = eager_values(reference, names, lambda m: [m(IDS), m(IDS)])
    assert capture.report.steps == 2 and capture.report.records == len(expected) == 8
    with open_stream(tmp_path / "o") as stream:
        assert all(same_bits(stream.read(*key), value) for key, value in expected.items())
    for left, right in zip(model.parameters(), plain.parameters(), strict=True):
        assert left.grad is not None and right.grad is not None
        assert same_bits(left.grad, right.grad)


def test_compiled_autograd() -> None:
    """A compiled backward pass gives the same gradients with a capture."""
    gradients = []
    for captured in (False, True):
        torch._dynamo.reset()
        model = make(TUPLES).train()
        framework = instrumented(model)
        with torch._dynamo.config.patch(compiled_autograd=True):
            if captured:
                with framework.capture_activations(None) as capture:
                    model(IDS).square().sum().backward()
                assert capture.report.records == 4
            else:
                model(IDS).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("route", ["framework", "user"])
def test_the_recompile_limit(tmp_path: Path, route: str) -> None:
    """Beyond the limit Dynamo runs the model as Python: its sites are captured there, and counted."""
    model = make(TUPLES)
    reference = copy.deepcopy(model)
    framework = instrumented(
        model,
        "aot_eager" if route == "framework" else None,
        **({"dynamic": False} if route == "framework" else {}),
    )
    if route == "user":
        model.compile(backend=framework.backend("aot_eager"), dynamic=False)

    def run(model: Any) -> None:
        with torch.no_grad():
            for length in range(2, 7):
                model(tokens(1, length))

    with torch._dynamo.config.patch(recompile_limit=2):
        report = check(tmp_path / "o", framework, model, reference, run)
    assert report.eager_records == 4 * 3


@pytest.mark.parametrize("way", ["stance", "config"])
def test_dynamo_switched_off(tmp_path: Path, way: str) -> None:
    """With Dynamo off (TORCHDYNAMO_DISABLE, a stance) everything is captured as Python and counted."""
    model = make(TUPLES)
    reference = copy.deepcopy(model)
    framework = instrumented(model)
    off: Any = (
        torch.compiler.set_stance("force_eager")
        if way == "stance"
        else torch._dynamo.config.patch(disable=True)
    )
    with off:
        report = check(tmp_path / "o", framework, model, reference)
    assert report.eager_records == report.records


def test_stances_and_resets_in_between(tmp_path: Path) -> None:
    """After both variants exist no stance compiles; after a reset everything compiles again, inside a block too."""
    model = make(TUPLES)
    reference = copy.deepcopy(model)
    framework = instrumented(model)
    forward(model)
    check(tmp_path / "o", framework, model, reference)
    forward(model)
    with torch.compiler.set_stance("fail_on_recompile"):
        check(tmp_path / "o", framework, model, reference)
        forward(model)
    with torch.compiler.set_stance("default", skip_guard_eval_unsafe=True):
        check(tmp_path / "o", framework, model, reference)
        forward(model)

    def resets(model: Any) -> None:
        forward(model)
        torch._dynamo.reset()
        forward(model)

    check(tmp_path / "o", framework, model, reference, resets)


def test_a_new_dtype(tmp_path: Path) -> None:
    """model.to(dtype) after instrumenting, and between blocks."""
    model = make(TUPLES)
    reference = copy.deepcopy(model)
    framework = instrumented(model)
    check(tmp_path / "o", framework, model, reference)
    model.to(torch.bfloat16)
    check(tmp_path / "o", framework, model, reference.to(torch.bfloat16))


def test_state_goes_in_and_out(tmp_path: Path) -> None:
    """state_dict has no trace of the framework, and load_state_dict is seen by the next block."""
    model, other = make(TUPLES), make(TUPLES, seed=1)
    framework = instrumented(model)
    forward(model)
    assert list(model.state_dict()) == list(other.state_dict())
    model.load_state_dict(other.state_dict())
    check(tmp_path / "o", framework, model, other)


@pytest.mark.parametrize("transform", ["functional_call", "grad"])
def test_functional_transforms(tmp_path: Path, transform: str) -> None:
    """torch.func's functional_call and grad: the values of the parameters that were passed."""
    model, other = make(TUPLES), make(TUPLES, seed=1)
    framework = instrumented(model)
    parameters = {name: value.detach() for name, value in other.named_parameters()}

    def run(called: Any) -> None:
        if called is not model:
            called(IDS)
        elif transform == "functional_call":
            torch.func.functional_call(model, parameters, (IDS,))
        else:
            torch.func.grad(lambda p: torch.func.functional_call(model, p, (IDS,)).sum())(parameters)

    check(tmp_path / "o", framework, model, other, run)


def test_exporting_is_no_forward_call() -> None:
    """torch.export of an instrumented model, in a block or not, gives the plain program and records nothing."""
    model = make(TUPLES)
    framework = instrumented(model)
    with framework.capture_activations(None) as capture:
        inside = [torch.export.export(model, (IDS,), strict=strict) for strict in (False, True)]
    outside = torch.export.export(model, (IDS,))
    assert capture.report.records == capture.report.steps == 0
    targets = [
        [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        for program in (*inside, outside)
    ]
    assert targets[0] == targets[2] and not any("tap" in name for names in targets for name in names)


def test_a_hook_that_changes_the_output(tmp_path: Path) -> None:
    """As with eager hooks, the capture sees the output as it is when its turn comes: after hooks that came before."""
    for order, factor in (("before", 3), ("after", 1)):
        torch._dynamo.reset()
        model, reference = make(PLAIN), make(PLAIN)
        framework = InstrumentationFramework(
            InstrumentationConfig(hook_config=HookConfig(target_layers=["layers.0.mlp"]))
        )
        if order == "before":
            model.layers[0].mlp.register_forward_hook(lambda module, args, output: output * 3)
        framework.instrument_model(model, backend="aot_eager")
        if order == "after":
            model.layers[0].mlp.register_forward_hook(lambda module, args, output: output * 3)
        with torch.no_grad():
            with framework.capture_activations(tmp_path / "o"):
                model(IDS)
            expected = eager_values(reference, ["layers.0.mlp"], lambda m: m(IDS))["layers.0.mlp", 0, 0]
        with open_stream(tmp_path / "o") as stream:
            assert same_bits(stream.read("layers.0.mlp", 0), expected * factor)


def test_idle_holds_no_value() -> None:
    """After a block nothing keeps a captured tensor alive: not the graph, not the model, not the framework."""
    for backend in ("eager", "aot_eager"):
        torch._dynamo.reset()
        model = make(PLAIN)
        framework = instrumented(model, backend)
        with torch.no_grad(), framework.capture_activations(None):
            model(IDS)
            model(IDS)
        width = model.shape.width
        gc.collect()
        alive = [o for o in gc.get_objects() if type(o) is torch.Tensor and o.shape == (*IDS.shape, width)]
        assert alive == []
