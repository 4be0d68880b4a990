"""A device is told to run a step's graph before the step's inputs are on their way: shown without a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from models import compiled_by_user, make, tokens
from torch import fx, nn
from torch._dynamo import lookup_backend

from fx_instrument import BufferTooSmallError, InstrumentationConfig, InstrumentationFramework
from fx_instrument.graph.sink import Onlooker


class Asked(Onlooker):
    """A sink without room that notes what it is asked."""

    def __init__(self, order: list[str], fails: bool) -> None:
        self._order, self._fails = order, fails

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("_"):
            return super().__getattribute__(name)
        order, fails = self._order, self._fails

        def noted(*args: Any, **named: Any) -> Any:
            order.append(f"{name}, later" if named.get("later") else name)
            if name == "reserve":
                if fails:
                    raise BufferTooSmallError("no room")
                return "a ticket"
            return None

        return noted


def asked(model: nn.Module, route: str | None, *, no_room: bool = False, broken: bool = False) -> list[str]:
    """What a call asks of the capture, and "run" where its graph runs."""
    order: list[str] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        run = lookup_backend("eager")(gm, inputs)

        def noted(*args: Any) -> Any:
            order.append("run")
            if broken:
                raise RuntimeError("the device failed")
            return run(*args)

        return noted

    framework = InstrumentationFramework(InstrumentationConfig())
    framework.instrument_model(model, backend=None if route else backend)
    call: Callable[[torch.Tensor], Any] = model
    if route == "inside a function":
        call = torch.compile(lambda ids: model(ids) * 2, backend=framework.backend(backend))
    elif route:
        call = compiled_by_user(model, framework.backend(backend), route)
    with torch.no_grad(), framework.capture_activations(None):
        framework._attached("this test").marker.sink = Asked(order, no_room)
        if no_room or broken:
            with pytest.raises((BufferTooSmallError, RuntimeError)):
                call(tokens(2, 5))
        else:
            call(tokens(2, 5))
    return order


@pytest.mark.parametrize("route", [None, "torch.compile", "regional", "inside a function"])
def test_inputs_may_come_after_the_graph(route: str | None) -> None:
    """Room for inputs, room for values, the graph, values: inputs go before these."""
    order = asked(make(), route)
    assert order[:4] == ["begin_step, later", "reserve", "run", "deliver"] and order[-1] == "end_step"


@pytest.mark.parametrize("route", [None, "torch.compile", "inside a function"])
@pytest.mark.parametrize("what", ["no_room", "broken"])
def test_inputs_of_a_call_that_fails(route: str | None, what: str) -> None:
    """They go with the step's end; where no frame sees that, with the next step, or the capture's end."""
    order = asked(make(), route, no_room=what == "no_room", broken=what == "broken")
    assert order[0] == "begin_step, later" and "deliver" not in order
    assert order[-1] == "end_step" or (route == "inside a function" and what == "no_room")
