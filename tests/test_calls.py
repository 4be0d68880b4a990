"""Which step a value belongs to: calls of a model inside its own forward, threads that work for a call."""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from models import compiled_by_user
from torch import nn
from waiting import recordings

from fx_instrument import (
    HookConfig,
    IncompleteCaptureWarning,
    InstrumentationConfig,
    InstrumentationFramework,
    Recorder,
    open_stream,
)

X = torch.arange(6.0).reshape(2, 3)


class Recursive(nn.Module):
    """Calls itself between its two sites; ``breaks``: behind a graph break, where an inner call may fail."""

    def __init__(self, breaks: bool) -> None:
        super().__init__()
        self.breaks = breaks
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor, depth: int = 1) -> torch.Tensor:
        x = self.first(x)
        if depth:
            x = self.behind(x, depth - 1) if self.breaks else self(x, depth - 1)
        return self.last(x)

    @torch.compiler.disable
    def behind(self, x: torch.Tensor, depth: int) -> torch.Tensor:
        x = self(x, depth)
        try:
            self(x[:, :2], 0)  # first refuses two columns
        except RuntimeError:
            return x
        raise AssertionError("not refused")


class Threaded(nn.Module):
    """Two of its sites run in threads of their own; ``before`` and ``after`` them a test does what it likes."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.last = (nn.Linear(3, 3) for _ in range(3))
        self.pool = ThreadPoolExecutor(2)
        self.before: Callable[[], object] = lambda: None
        self.after: Callable[[], object] = lambda: None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value = self.last(self.branches(x))
        assert isinstance(value, torch.Tensor)
        return value

    @torch.compiler.disable
    def branches(self, x: torch.Tensor) -> torch.Tensor:
        self.before()
        left, right = (self.pool.submit(site, x) for site in (self.left, self.right))
        both = left.result() + right.result()
        self.after()
        assert isinstance(both, torch.Tensor)
        return both


@pytest.fixture(autouse=True)
def in_inference() -> Iterator[None]:
    with torch.no_grad():
        yield


def instrumented(model: nn.Module, backend: Any, sites: list[str]) -> InstrumentationFramework:
    framework = InstrumentationFramework(InstrumentationConfig(hook_config=HookConfig(target_layers=sites)))
    framework.instrument_model(model, backend=backend)
    return framework


def places(path: Path) -> dict[str, list[tuple[int, int]]]:
    """Step and call of each value, by site."""
    with open_stream(path) as stream:
        return {site.name: [(one.step, one.call) for one in stream[site.name]] for site in stream.sites}


@pytest.mark.parametrize(
    ("route", "breaks"),
    [("framework", False), ("eager", False)]
    + [(route, True) for route in ("framework", "eager", "torch.compile", "module.compile")],
)
def test_a_model_inside_its_own_forward_is_in_one_step(route: str, breaks: bool, tmp_path: Path) -> None:
    """An inner call, also one that fails, neither begins a step nor ends the outer one."""
    model: nn.Module = Recursive(breaks)
    framework = instrumented(model, "aot_eager" if route == "framework" else None, ["first", "last"])
    call = model if route == "framework" else compiled_by_user(model, framework.backend("aot_eager"), route)
    path = tmp_path / "a.stream"
    with framework.capture_activations(path) as capture:
        for _ in range(2):
            call(X)
    assert capture.report.steps == 2
    expected = [(step, number) for step in range(2) for number in range(2)]
    assert places(path) == {"first": expected, "last": expected}
    with open_stream(path) as stream:
        assert stream.num_steps == 2


def test_a_call_that_ended_unseen_is_over(tmp_path: Path) -> None:
    """After Ctrl-C no hook runs: the next call is a step of its own, not one inside the first."""
    model = Threaded()
    framework = instrumented(model, None, ["last"])
    path = tmp_path / "a.stream"

    def interrupted(*of_the_hook: object) -> None:
        raise KeyboardInterrupt

    with framework.capture_activations(path) as capture:
        handle = model.last.register_forward_hook(interrupted)
        with pytest.raises(KeyboardInterrupt):
            model(X)
        handle.remove()
        model(X)
        model(X)
    assert capture.report.steps == 3
    assert places(path) == {"last": [(0, 0), (1, 0), (2, 0)]}


@pytest.mark.parametrize("backend", ["aot_eager", None])
def test_sites_in_threads_belong_to_the_call_that_runs(backend: str | None, tmp_path: Path) -> None:
    """While one thread calls the model, others that capture work for it."""
    framework = instrumented(model := Threaded(), backend, ["left", "right", "last"])
    path = tmp_path / "a.stream"
    with framework.capture_activations(path) as capture:
        for _ in range(3):
            model(X)
    assert capture.report.steps == 3
    steps = [(step, 0) for step in range(3)]
    assert places(path) == {"left": steps, "right": steps, "last": steps}


def test_a_recorder_s_threads_belong_to_the_call_that_runs(tmp_path: Path) -> None:
    """So in a server, which records requests only: the context of the request is not the thread's."""
    framework = instrumented(model := Threaded(), "aot_eager", ["left", "right", "last"])
    with Recorder(framework, tmp_path / "r", min_free_bytes=0, requests_only=True) as recorder:
        for name in ("one", "two"):
            with recorder.request(name):
                model(X)
            model(X)
    (path,) = recordings(tmp_path / "r")
    steps = [(0, 0), (1, 0)]
    assert places(path) == {"left": steps, "right": steps, "last": steps}


def test_threads_of_several_calls_are_left_out(tmp_path: Path) -> None:
    """Whose values they are can't be told: they are nowhere, and a warning says so."""
    model = Threaded()
    framework = instrumented(model, "eager", ["left", "right", "last"])
    path = tmp_path / "a.stream"
    model.before = model.after = functools.partial(threading.Barrier(2).wait, 60)
    with (
        ThreadPoolExecutor(2) as callers,
        pytest.warns(IncompleteCaptureWarning, match="whose they are can't be told"),
        framework.capture_activations(path) as capture,
    ):
        for call in [callers.submit(model, X) for _ in range(2)]:
            call.result()
    assert capture.report.steps == 2
    assert places(path) == {"left": [], "right": [], "last": [(0, 0), (1, 0)]}


def test_a_thread_that_prepares_a_call_of_its_own(tmp_path: Path) -> None:
    """What it captures before its first one is taken for the call that runs, and warned of; later ones are its own."""
    model = Threaded()
    framework = instrumented(model, "eager", ["left", "last"])
    path = tmp_path / "a.stream"
    with ThreadPoolExecutor(1) as other, framework.capture_activations(path):

        def prepare() -> None:
            model.before = lambda: None
            other.submit(model.left, X).result()

        model.before = prepare
        model(X)
        with pytest.warns(IncompleteCaptureWarning, match="call of its own"):
            other.submit(model, X).result()
        model.before = prepare
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(X)
            other.submit(model, X).result()
    found = places(path)
    assert sorted(found["left"]) == [(0, 0), (0, 1), (1, 0), (2, 0), (3, 0), (3, 1)]
    assert found["last"] == [(0, 0), (1, 0), (2, 0), (3, 0)]
