"""Attention known by its op alone: found in the code of forward calls, captured in the graph."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hooks import same_bits
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from fx_instrument import (
    AlreadyInstrumentedError,
    HookConfig,
    HookGranularity,
    InstrumentationConfig,
    InstrumentationFramework,
    NoSitesError,
    NothingCapturedError,
    open_stream,
)

WIDTH, HEADS = 16, 2
X = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0))


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    query, key, value = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (query, key, value))
    return (
        functional.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(2)
    )


class Layer(nn.Module):
    """Its attention is a function, called from ``mix`` ``times`` times."""

    def __init__(self, times: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3 * WIDTH, WIDTH) * 0.2)
        self.times = times

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.times):
            x = self.mix(x)
        return x

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        return x + attend(*functional.linear(x, self.weight).chunk(3, dim=-1))


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Layer()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


class Bare(nn.Module):
    def __init__(self, depth: int = 2, times: int = 1, checkpointed: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(times) for _ in range(depth))
        self.checkpointed = checkpointed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x)
        return x


def make(depth: int = 2, **more: int | bool) -> Bare:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Bare(depth, **more)


def expected(model: Bare, x: torch.Tensor = X) -> dict[tuple[str, int], torch.Tensor]:
    """(site, call) -> what the op returns, by the same arithmetic outside the model."""
    values = {}
    with torch.no_grad():
        for index, layer in enumerate(model.layers):
            for call in range(layer.times):
                value = attend(*functional.linear(x, layer.weight).chunk(3, dim=-1))
                values[f"layers.{index}.scaled_dot_product_attention", call] = value
                x = x + value
    return values


def capture(
    path: Path, model: nn.Module, config: InstrumentationConfig | None = None
) -> InstrumentationFramework:
    framework = InstrumentationFramework(config or InstrumentationConfig())
    framework.instrument_model(model, backend="aot_eager")
    with framework.capture_activations(path):
        model(X)
    return framework


@pytest.mark.parametrize(("times", "checkpointed"), [(1, False), (2, False), (1, True)])
def test_captured_by_op(tmp_path: Path, times: int, checkpointed: bool) -> None:
    """Without an attention module the op is the site, found through helpers and methods; every call, nested too."""
    model = make(times=times, checkpointed=checkpointed)
    reference = copy.deepcopy(model)
    framework = capture(tmp_path / "o.stream", model)
    values = expected(reference)
    names = [f"layers.{i}.scaled_dot_product_attention" for i in range(2)]
    assert [(site.name, site.role) for site in framework.sites] == [(name, "attention") for name in names]
    with open_stream(tmp_path / "o.stream") as stream:
        assert len(stream) == len(values)
        for (name, call), value in values.items():
            assert same_bits(stream.read(name, 0, call), value)


def test_layers_compiled_one_by_one(tmp_path: Path) -> None:
    """Equal layers share a graph, and each value goes to its own site."""
    model = nn.Sequential(*(Around() for _ in range(4)))
    reference = copy.deepcopy(model)
    framework = InstrumentationFramework(
        InstrumentationConfig(
            hook_config=HookConfig(target_layers=["[1-3].inner.scaled_dot_product_attention"])
        )
    )
    framework.instrument_model(model, backend=None)
    for layer in model:
        layer.compile(backend=framework.backend("aot_eager"))
    with torch.no_grad(), framework.capture_activations(tmp_path / "o.stream"):
        model(X)
    x = X
    with torch.no_grad(), open_stream(tmp_path / "o.stream") as stream:
        assert len(stream) == 3
        for index, layer in enumerate(reference):
            value = attend(*functional.linear(x, layer.inner.weight).chunk(3, dim=-1))
            x = x + value
            if index:
                assert same_bits(stream.read(f"{index}.inner.scaled_dot_product_attention", 0), value)


def test_of_the_model_itself(tmp_path: Path) -> None:
    """A model whose own forward calls the op, as one of bare functions does."""
    model = Layer(times=2)
    reference = Bare(depth=1, times=2)
    reference.layers[0].load_state_dict(model.state_dict())
    framework = capture(tmp_path / "o.stream", model)
    assert [site.name for site in framework.sites] == ["scaled_dot_product_attention"]
    with open_stream(tmp_path / "o.stream") as stream:
        assert len(stream) == 2
        for (_, call), value in expected(reference).items():
            assert same_bits(stream.read("scaled_dot_product_attention", 0, call), value)


def test_where_no_mark_can_stand(tmp_path: Path) -> None:
    """Of a module that the user compiles by itself the hooks run outside the graph: an error, nothing silent."""
    model = make()
    framework = InstrumentationFramework()
    framework.instrument_model(model, backend=None)
    for layer in model.layers:
        layer.compile(backend=framework.backend("aot_eager"))
    with pytest.raises(NothingCapturedError, match=r"layers\.0\.scaled"), framework.capture_activations(None):
        model(X)


def test_beside_a_module_site(tmp_path: Path) -> None:
    """A layer and the op inside it are two sites."""
    model = make()
    globs = ["layers.0", "layers.0.scaled_dot_product_attention"]
    config = InstrumentationConfig(
        HookGranularity.SAMPLED_SLICES, hook_config=HookConfig(target_layers=globs, sampling_rate=1.0)
    )
    framework = capture(tmp_path / "o.stream", model, config)
    assert [site.name for site in framework.sites] == globs
    with open_stream(tmp_path / "o.stream") as stream:
        assert {name: len(stream[name]) for name in globs} == dict.fromkeys(globs, 1)
        assert stream[globs[1]][0].full_shape == (2, 5, WIDTH)


def test_errors_and_restoring() -> None:
    """Names that lead nowhere are errors; restoring takes the marks back; a copy is a plain model."""
    model = make()
    for glob, message in [
        ("layer.0.scaled_dot_product_attention", "no such module"),
        ("layers.*.x.scaled_dot_product_attention", "no module's own forward"),
    ]:
        config = InstrumentationConfig(hook_config=HookConfig(target_layers=[glob]))
        with pytest.raises(NoSitesError, match=message):
            InstrumentationFramework(config).instrument_model(model, backend="aot_eager")
    framework = InstrumentationFramework()
    framework.instrument_model(model, backend="aot_eager")
    with pytest.raises(AlreadyInstrumentedError):
        InstrumentationFramework().instrument_model(model, backend="aot_eager")
    InstrumentationFramework().instrument_model(copy.deepcopy(model), backend="aot_eager")
    framework.restore(model)
    assert not model.layers[0]._forward_hooks
    assert not [name for name in vars(model.layers[0]) if name.startswith("_fx")]


def test_plan_and_verify() -> None:
    """plan shows the op's sites with their shapes, verify compares them with the eager op."""
    framework = InstrumentationFramework()
    model = make().eval()
    plan = framework.plan(model, X)
    assert [(site.name, site.role, site.shape) for site in plan.sites] == [
        (f"layers.{i}.scaled_dot_product_attention", "attention", (2, 5, WIDTH)) for i in range(2)
    ]
    framework.instrument_model(model, backend="aot_eager")
    certificate = framework.verify(model, X)
    assert certificate.ok, certificate
    assert all(site.calls == 1 and site.bit_equal for site in certificate.sites)
