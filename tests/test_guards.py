"""Dynamo's guards on this package's hooks are left out of its variants, and only those; users' filters work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hooks import eager_values, same_bits
from models import PLAIN, make, tokens
from torch import nn
from torch._dynamo.utils import counters

from fx_instrument import InstrumentationFramework, open_stream
from fx_instrument.graph import guards

IDS = tokens(2, 5)


class Scale:
    """A user's hook, with a number that Dynamo guards on."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output * self.factor


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def test_only_our_guards_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of both variants: of guards on our hooks only their switch is kept, and nothing dropped is another's."""
    seen: list[tuple[Sequence[Any], list[bool]]] = []
    original = guards.GuardFilter.__call__

    def spy(self: guards.GuardFilter, entries: Sequence[Any]) -> list[bool]:
        seen.append((entries, original(self, entries)))
        return seen[-1][1]

    monkeypatch.setattr(guards.GuardFilter, "__call__", spy)
    model = make(PLAIN)
    # Before ours on one module, behind ours on another.
    model.layers[0].mlp.register_forward_hook(Scale(2.0))
    framework = InstrumentationFramework()
    framework.instrument_model(model, backend="eager")
    model.layers[1].mlp.register_forward_hook(Scale(3.0))
    with torch.no_grad():
        model(IDS)
        with framework.capture_activations(None) as capture:
            model(IDS)
    assert capture.report.records == 4 and len(seen) == 2
    for entries, keep in seen:
        kept = [entry for entry, keeps in zip(entries, keep, strict=True) if keeps]
        dropped = [entry for entry, keeps in zip(entries, keep, strict=True) if not keeps]
        assert dropped and not [entry.name for entry in kept if "fx_instrument" in entry.name]
        # Dynamo's choice of entries is not apart for threads that call both variants in turn.
        assert [entry.value for entry in kept if entry.name.endswith(".capturing")]
        # Both of the user's hooks are guarded on still, and so is how many hooks a module has.
        assert {e.value for e in kept if e.name.endswith(".factor")} == {2.0, 3.0}
        sites = [module for layer in model.layers for module in (layer.self_attn, layer.mlp)]
        counted = [e.value for e in kept if e.guard_type == "SEQUENCE_LENGTH"]
        assert all(any(hooks is site._forward_hooks for hooks in counted) for site in sites)
        marker = framework._attachment.marker  # type: ignore[union-attr]
        for entry in dropped:
            ours = (
                entry.value is marker or "_fx_instrument" in entry.name or "fx_instrument_dot" in entry.name
            )
            assert ours or "_forward_hooks" in entry.name, entry.name
        assert not any(isinstance(entry.value, Scale) for entry in dropped)


def test_a_users_hook_is_noticed() -> None:
    """What a user's hook beside ours reads, and hooks that come later, take effect, idle and capturing."""
    model, reference = make(PLAIN), make(PLAIN)
    scale = Scale(2.0)
    for each in (model, reference):
        each.layers[1].mlp.register_forward_hook(scale)
    framework = InstrumentationFramework()
    framework.instrument_model(model, backend="eager")

    def check() -> None:
        expected = reference(IDS)
        assert same_bits(model(IDS), expected)
        with framework.capture_activations(None) as capture:
            assert same_bits(model(IDS), expected)
        assert capture.report.records == 4 and capture.report.eager_records == 0

    with torch.no_grad():
        check()
        before = graphs()
        check()
        assert graphs() == before
        scale.factor = 3.0
        check()
        for each in (model, reference):
            each.layers[0].self_attn.register_forward_hook(Scale(0.5))
        check()
    assert graphs() == 3 * before


def test_models_of_one_class_run_their_own_graphs(tmp_path: Path) -> None:
    """Two instrumented ones and a compiled one, in turn: Dynamo may keep all their code in one place."""
    models = [make(PLAIN, seed=seed) for seed in range(2)]
    references = [make(PLAIN, seed=seed) for seed in range(2)]
    plain = torch.compile(make(PLAIN, seed=2), backend="eager")
    frameworks = [InstrumentationFramework() for _ in models]
    for model, framework in zip(models, frameworks, strict=True):
        framework.instrument_model(model, backend="eager")

    def each_in_turn() -> None:
        assert same_bits(plain(IDS), make(PLAIN, seed=2)(IDS))
        for model, reference in zip(models, references, strict=True):
            assert same_bits(model(IDS), reference(IDS))

    paths = [tmp_path / "0.stream", tmp_path / "1.stream"]
    with torch.no_grad():
        each_in_turn()
        with frameworks[0].capture_activations(paths[0]):
            each_in_turn()
            with frameworks[1].capture_activations(paths[1]):
                each_in_turn()
        before = graphs()
        assert before == 5
        each_in_turn()
        assert graphs() == before
        for path, reference, framework, num_steps in zip(paths, references, frameworks, (2, 1), strict=True):
            names = [site.name for site in framework.sites]
            expected = eager_values(reference, names, lambda module: module(IDS))
            with open_stream(path) as stream:
                assert stream.num_steps == num_steps and len(stream) == num_steps * len(names)
                for step in range(num_steps):
                    for (name, _, call), value in expected.items():
                        assert same_bits(stream.read(name, step, call), value)


@pytest.mark.parametrize("options", [{}, {"mode": "reduce-overhead"}])
def test_a_users_filter(options: dict[str, Any]) -> None:
    """guard_filter_fn of torch.compile's options reaches torch.compile, not Inductor; verify takes it too."""
    asked: list[int] = []

    def keep_all_but_in_place(entries: Sequence[Any]) -> list[bool]:
        asked.append(len(entries))
        return ["in_place" not in entry.name for entry in entries]

    model = make(PLAIN)
    framework = InstrumentationFramework()
    framework.instrument_model(model, options={"guard_filter_fn": keep_all_but_in_place}, **options)
    with torch.no_grad():
        model(IDS)
        with framework.capture_activations(None) as capture:
            model(IDS)
        assert len(asked) == 2 and capture.report.records == 4
        before = graphs()
        model.layers[0].in_place = True
        model(IDS)
        assert graphs() == before
        model.layers[0].in_place = False
        assert framework.verify(model, IDS).ok
    assert len(asked) == 5


def test_where_a_filter_does_not_belong() -> None:
    framework = InstrumentationFramework()
    framework.instrument_model(make(PLAIN), backend=None)
    with pytest.raises(TypeError, match=r"give it to torch\.compile"):
        framework.backend("eager", options={"guard_filter_fn": lambda entries: []})
