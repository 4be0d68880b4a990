"""Values whose module returns them strided are laid out in the graph, where the budget made room for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fx_instrument import HookConfig, InstrumentationConfig, InstrumentationFramework, open_stream
from fx_instrument.capture.session import Session


class Turned(nn.Module):
    """Returns its values transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).transpose(0, 1)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.turned = Turned()
        self.straight = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.straight(self.turned(x).transpose(0, 1)).sum()


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [None, True])
def test_strided_values_arrive_row_major(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str, dynamic: bool | None
) -> None:
    """What is delivered is contiguous already, has the strided value's elements, and sizes stay dynamic."""
    delivered: list[bool] = []
    deliver = Session.deliver

    def looked_at(session: Session, ticket: Any, sites: Any, values: Any, full_shapes: Any) -> None:
        delivered.extend(value.is_contiguous() for value in values)
        deliver(session, ticket, sites, values, full_shapes)

    monkeypatch.setattr(Session, "deliver", looked_at)
    torch._dynamo.reset()
    model = Model()
    framework = InstrumentationFramework(
        InstrumentationConfig(hook_config=HookConfig(target_layers=["turned", "straight"]))
    )
    framework.instrument_model(model, backend=backend, dynamic=dynamic)
    inputs = [torch.randn(5, 8), torch.randn(7, 8)]
    with torch.no_grad(), framework.capture_activations(tmp_path / "o.stream"):
        for x in inputs:
            model(x)
    assert delivered == [True] * 4
    with torch.no_grad(), open_stream(tmp_path / "o.stream") as stream:
        for step, x in enumerate(inputs):
            assert torch.allclose(stream.read("turned", step=step), model.turned.linear(x).t(), atol=1e-6)
