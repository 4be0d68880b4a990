"""A forward call that an exception cuts off is over: files of a server change and end all the same."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from models import PLAIN, compiled_by_user, make, tokens
from waiting import recordings, until

from fx_instrument import InstrumentationConfig, InstrumentationFramework, Recorder, open_stream


@pytest.mark.parametrize("route", ["eager", "torch.compile", "module.compile", "regional"])
def test_a_call_that_was_cut_off_holds_no_file(route: str, tmp_path: Path) -> None:
    """Its thread lives on and calls no more; rotation, retention and the end do not wait for it."""
    model = make(PLAIN)
    framework = InstrumentationFramework(InstrumentationConfig(max_memory_gb=0.05))
    framework.instrument_model(model, backend=None)
    call = compiled_by_user(model, framework.backend("aot_eager"), route)
    ids = tokens(1, 4)
    failed: list[Exception] = []
    gone, may_end = threading.Event(), threading.Event()

    def serve() -> None:
        with torch.no_grad():
            try:
                call(ids + 1_000_000)  # no such token
            except (IndexError, RuntimeError) as error:
                failed.append(error)
        gone.set()
        may_end.wait(60)

    thread = threading.Thread(target=serve)
    recorder = Recorder(framework, tmp_path / "r", min_free_bytes=0)
    recorder.start()
    with torch.no_grad():
        call(ids)
        thread.start()
        assert gone.wait(60) and len(failed) == 1
        recorder.rotate()
        until(lambda: not recorder._files.is_ending)
        call(ids)
    assert recorder.stop(timeout_s=20)
    recorder.close(timeout_s=20)
    may_end.set()
    thread.join(60)
    steps = []
    for path in recordings(tmp_path / "r"):
        with open_stream(path) as stream:
            steps.append(stream.num_steps)
    assert steps == [2, 1] and recorder.report.failures == 0
