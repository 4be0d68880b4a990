"""When the file of a server is taken for one that nothing is delivered to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_capture import HeldWriter, run_graph, session

from fx_instrument import InstrumentationError
from fx_instrument.capture.drain import Drain
from fx_instrument.serving.lane import Lane


def test_only_a_model_that_delivers_nothing_runs_past(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Values count from when they are delivered: the drain thread may not have come to them yet."""
    monkeypatch.setattr(Drain, "records", property(lambda self: 0, lambda self, count: None), raising=False)
    path = tmp_path / "o.stream"
    path.touch()
    silent, speaking = (Lane(path, number, session(HeldWriter())) for number in range(2))
    for _ in range(101):
        for lane in (silent, speaking):
            lane.session.begin_step({})
            if lane is speaking:
                run_graph(lane.session, torch.ones(2))
            lane.session.end_step()
    speaking.check()
    with pytest.raises(InstrumentationError, match="101 forward calls have delivered no value"):
        silent.check()
    for lane in (silent, speaking):
        lane.session.close()
