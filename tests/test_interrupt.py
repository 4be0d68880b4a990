"""Leaving a capture block by Ctrl-C."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import make, tokens

from fx_instrument import InstrumentationFramework
from fx_instrument.graph.gate import Gate
from fx_instrument.stream.writer import StreamWriter


@pytest.mark.parametrize(
    ("waiting", "name"),
    [(StreamWriter, "finish"), (Gate, "switch")],
    ids=["the file", "calls of other threads"],
)
def test_an_interrupt_while_something_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waiting: type, name: str
) -> None:
    """The first wait is cut off: nothing stays open, locked or capturing."""
    model = make()
    framework = InstrumentationFramework()
    framework.instrument_model(model, backend="eager")
    attachment = framework._attached("this test")
    path = tmp_path / "a.stream"
    wait = getattr(waiting, name)
    interrupts = [KeyboardInterrupt()]

    def interrupted(self: Any, **kwargs: Any) -> Any:
        if interrupts:
            raise interrupts.pop()
        return wait(self, **kwargs)

    capture = framework.capture_activations(path)
    with torch.no_grad(), pytest.raises(KeyboardInterrupt), capture:
        model(tokens(2, 8))
        monkeypatch.setattr(waiting, name, interrupted)
    assert not interrupts and attachment.marker.sink is None and not attachment.marker.capturing
    with torch.no_grad():
        model(tokens(2, 8))
        assert capture.report.steps == 1
        # Not locked by what is left of the first.
        with framework.capture_activations(path) as again:
            model(tokens(2, 8))
    assert again.report.steps == 1
