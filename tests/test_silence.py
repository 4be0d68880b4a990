"""Nothing is lost in silence: a block in which the model ran and sites did not deliver says so."""

from __future__ import annotations

import copy
import logging
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from models import PLAIN, Shape, make, tokens
from torch import nn

from fx_instrument import (
    HookConfig,
    IncompleteCaptureWarning,
    InstrumentationConfig,
    InstrumentationError,
    InstrumentationFramework,
    NothingCapturedError,
    RewriteError,
    open_stream,
)

IDS = tokens(2, 5)


def instrumented(
    model: nn.Module, backend: Any = "aot_eager", layers: list[str] | None = None
) -> InstrumentationFramework:
    framework = InstrumentationFramework(InstrumentationConfig(hook_config=HookConfig(target_layers=layers)))
    framework.instrument_model(model, backend=backend)
    return framework


class NoTensor(nn.Module):
    """Returns no tensor, as a module that only fills a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> None:
        self.up(x)


class Chooses(nn.Module):
    """Calls its first MLP alone; the second returns nothing, or is not called."""

    def __init__(self, second: nn.Module, *, calls: bool) -> None:
        super().__init__()
        self.mlp, self.mlp2, self.calls = make(PLAIN).layers[0].mlp, second, calls

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.calls:
            self.mlp2(x)
        out: torch.Tensor = self.mlp(x)
        return out


@pytest.mark.parametrize("backend", ["aot_eager", None])
@pytest.mark.parametrize("calls", [True, False])
def test_some_silent_sites_are_a_warning(backend: str | None, calls: bool, tmp_path: Path) -> None:
    """A module that was not called, or returned no tensor, is named in a warning, the report and the file."""
    model = Chooses(NoTensor(), calls=calls)
    framework = instrumented(model, backend, ["mlp", "mlp2"])
    if backend is None:
        model.compile(backend=framework.backend("eager"))
    with (
        pytest.warns(IncompleteCaptureWarning, match=r"1 of 2 sites delivered no value .*: mlp2\."),
        torch.no_grad(),
        framework.capture_activations(tmp_path / "o.stream") as capture,
    ):
        model(torch.randn(2, 16))
    assert capture.report.silent_sites == ("mlp2",) and capture.report.records == 1
    with open_stream(tmp_path / "o.stream") as stream:
        assert stream.metadata["summary"]["silent_sites"] == ["mlp2"]


def test_only_silent_sites_are_an_error(tmp_path: Path) -> None:
    """A forward call that ended well, and no value: the file would be empty of what it was made for."""
    model = Chooses(NoTensor(), calls=True)
    framework = instrumented(model, layers=["mlp2"])
    refused = pytest.raises(NothingCapturedError, match=r"ran 1 times .* none of its 1 sites")
    with torch.no_grad():
        with refused, framework.capture_activations(tmp_path / "o.stream"):
            model(torch.randn(2, 16))
        # The framework is free again, and a block that is left by the user's exception keeps that one.
        with pytest.raises(KeyError), framework.capture_activations(tmp_path / "o.stream"):
            model(torch.randn(2, 16))
            raise KeyError


def test_calls_that_failed_are_no_silence() -> None:
    """Where every call raised, the caller knows already."""
    model = make(PLAIN)
    framework = instrumented(model)
    with framework.capture_activations(None) as capture, pytest.raises(IndexError):
        model(IDS + 1000)
    assert capture.report.silent_sites == tuple(site.name for site in framework.sites)


def test_a_block_without_a_call_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Copies and exported programs are not the instrumented model; a quiet server's block is no error either."""
    model = make(PLAIN)
    framework = instrumented(model)
    exported = torch.export.export(make(PLAIN), (IDS,)).module()
    with caplog.at_level(logging.WARNING, "fx_instrument"), torch.no_grad():
        with framework.capture_activations(None) as capture:
            copy.deepcopy(model)(IDS)
            exported(IDS)
        assert "nothing was captured" in caplog.text and capture.report.steps == 0


def test_a_whole_block_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    model = make(Shape(depth=3, shared_mlp=True))
    framework = instrumented(model)
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING, "fx_instrument"), torch.no_grad():
        warnings.simplefilter("error", IncompleteCaptureWarning)
        with framework.capture_activations(None) as capture:
            model(IDS)
    assert capture.report.silent_sites == () and caplog.text == ""


def test_values_outside_any_step_are_a_warning() -> None:
    """``model.forward`` runs past the compiled call: the values are there, the steps can't be told apart."""
    model = make(PLAIN)
    framework = instrumented(model)
    with (
        pytest.warns(IncompleteCaptureWarning, match="outside any forward call"),
        torch.no_grad(),
        framework.capture_activations(None) as capture,
    ):
        model.forward(IDS)
    assert capture.report.eager_records == 4


@pytest.mark.parametrize("kind", ["compile", "wrapper"])
def test_parts_compiled_before_by_another_backend_are_refused(kind: str) -> None:
    """With backend=None, layers that were compiled before see no marker; compiled again they do."""
    model = make(PLAIN)
    for index, layer in enumerate(model.layers):
        if kind == "compile":
            layer.compile(backend="eager")
        else:
            model.layers[index] = torch.compile(layer, backend="eager")
    with torch.no_grad():
        model(IDS)
        framework = instrumented(model, None)
        refused = pytest.raises(InstrumentationError, match=r"layers\.0 was compiled before")
        with refused, framework.capture_activations(None):
            pass
        if kind == "wrapper":
            return
        for layer in model.layers:
            layer.compile(backend=framework.backend("eager"))
        with framework.capture_activations(None) as capture:
            model(IDS)
    assert capture.report.records == 4 and capture.report.eager_records == 0


def test_an_inner_backend_that_changes_outputs_is_refused() -> None:
    """A graph that returns fewer values than planned is an error, not a shorter file."""

    def cuts(gm: Any, example_inputs: Any) -> Any:
        return lambda *args: gm.forward(*args)[:2]

    model = make(PLAIN)
    framework = instrumented(model, cuts)
    with (
        torch.no_grad(),
        framework.capture_activations(None),
        pytest.raises(RewriteError, match="4 planned captures returned 1"),
    ):
        model(IDS)


def test_vmap_is_refused() -> None:
    """Under vmap a value stands for many calls; functional_call and grad see the model's own values."""
    model = make(PLAIN)
    framework = instrumented(model)
    with torch.no_grad(), framework.capture_activations(None), pytest.raises(RewriteError, match="vmap"):
        torch.vmap(model)(torch.stack([IDS, IDS]))


def test_framework_backend_of_a_compiled_model_is_refused() -> None:
    """Two compiled calls would count each step twice, or never."""
    framework = instrumented(make(PLAIN))
    with pytest.raises(InstrumentationError, match="backend=None"):
        framework.backend("eager")


def test_threads_that_meet_where_torch_mixes_them_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.11 and 2.12 may run one thread's idle graph for another: a block in which that can be warns, once."""
    monkeypatch.setattr("fx_instrument.graph.attach.isolation", dict)
    model = make()
    framework = instrumented(model, "eager")
    gate = model.__dict__["_compiled_call_impl"]._gate
    is_in, may_leave = threading.Event(), threading.Event()

    def stay() -> None:
        gate.enter()
        is_in.set()
        may_leave.wait(60)
        gate.leave()

    with torch.no_grad(), framework.capture_activations(None):
        model(tokens(2, 3))
        thread = threading.Thread(target=stay)
        thread.start()
        is_in.wait(60)
        with pytest.warns(IncompleteCaptureWarning, match="several threads run this model at once"):
            model(tokens(2, 3))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(tokens(2, 3))
        may_leave.set()
        thread.join(60)
