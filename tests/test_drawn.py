"""Drawn models under drawn ways of compiling: what is captured equals what eager hooks see."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo
from hooks import eager_values, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Decoder, Shape, make, tokens
from torch import nn

from fx_instrument import InstrumentationFramework, open_stream


class Breaking(nn.Module):
    """A norm with a graph break before it."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        out: torch.Tensor = self.norm(x)
        return out


@st.composite
def decoders(draw: st.DrawFn) -> Decoder:
    """Shared modules, tuple outputs, in-place changes, mixtures, tied weights, and graph breaks anywhere."""
    shape = Shape(
        depth=draw(st.integers(1, 4)),
        experts=draw(st.sampled_from([0, 0, 2])),
        tied=draw(st.booleans()),
        shared_mlp=draw(st.booleans()),
        in_place=draw(st.booleans()),
        returns_tuple=draw(st.booleans()),
    )
    model = make(shape, seed=draw(st.integers(0, 100)))
    for layer in model.layers:
        for name in ("norm1", "norm2"):
            if draw(st.integers(0, 3)) == 0:
                setattr(layer, name, Breaking(getattr(layer, name)))
    return model


def check(
    folder: pytest.TempPathFactory, model: Decoder, route: str, lengths: list[int], options: dict[str, bool]
) -> None:
    torch._dynamo.reset()
    reference = copy.deepcopy(model)
    inputs = [tokens(2, length, seed=length) for length in lengths]
    framework = InstrumentationFramework()
    framework.instrument_model(
        model,
        backend="aot_eager" if route == "framework" else None,
        **(options if route == "framework" else {}),
    )
    if route == "model":
        model.compile(backend=framework.backend("aot_eager"), **options)
    elif route == "layers":
        for layer in model.layers:
            layer.compile(backend=framework.backend("aot_eager"), **options)
    path = folder.mktemp("drawn") / "o.stream"
    with torch.no_grad():
        model(inputs[0])
        with framework.capture_activations(path) as capture:
            outputs = [model(ids) for ids in inputs]
        for ids, output in zip(inputs, outputs, strict=True):
            assert same_bits(output, reference(ids))
        names = [site.name for site in framework.sites]
        expected = eager_values(reference, names, lambda m: [m(ids) for ids in inputs])
    assert capture.report.steps == len(inputs) and capture.report.silent_sites == ()
    with open_stream(path) as stream:
        assert len(stream) == len(expected) == capture.report.records
        assert all(same_bits(stream.read(*key), value) for key, value in expected.items())


ways = {
    "model": decoders(),
    "route": st.sampled_from(["framework", "model", "layers"]),
    "lengths": st.lists(st.integers(1, 7), min_size=1, max_size=2),
    "options": st.sampled_from([{}, {"dynamic": True}, {"dynamic": False}]),
}


@pytest.mark.slow
@settings(max_examples=30)
@given(**ways)
def test_drawn_models(tmp_path_factory: pytest.TempPathFactory, model, route, lengths, options) -> None:  # type: ignore[no-untyped-def]
    check(tmp_path_factory, model, route, lengths, options)
