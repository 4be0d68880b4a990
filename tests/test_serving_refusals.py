"""What a recorder and the servers' integrations refuse, and say where they give up waiting."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import tokens
from test_serving import Waits, in_flight, instrumented, make
from torch import nn
from waiting import recordings, until

from fx_instrument import InstrumentationError, Recorder, open_stream
from fx_instrument.capture.session import Session
from fx_instrument.integrations.transformers_serve import served_model, tag_requests


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize(
    "bad, says",
    [
        ({"max_total_bytes": 0}, "max_total_bytes must be greater than 0 or None, got 0"),
        ({"rotate_s": 0}, "rotate_s must be greater than 0 or None, got 0"),
        ({"min_free_bytes": -1}, "min_free_bytes must be 0 or more, got -1"),
        ({"max_stall_s": float("nan")}, "max_stall_s must be 0 or more, got nan"),
    ],
)
def test_bad_numbers(tmp_path: Path, bad: dict[str, Any], says: str) -> None:
    """They are refused before a folder is made."""
    with pytest.raises(ValueError, match=says):
        Recorder(instrumented()[1], tmp_path / "r", **bad)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("bad", ["", (), ("", ""), ("a", 3)])
def test_bad_request_ids(tmp_path: Path, bad: Any) -> None:
    recorder = Recorder(instrumented()[1], tmp_path / "r", min_free_bytes=0)
    with (
        pytest.raises(ValueError, match="one or several strings that are not all empty"),
        recorder.request(bad),
    ):
        pass
    recorder.close()


def test_a_folder_of_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "r").mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(
        PermissionError, match=r"belongs to user \d+, this process runs as \d+.*of this user's own"
    ):
        Recorder(instrumented()[1], tmp_path / "r")


def test_a_folder_or_file_that_was_replaced(tmp_path: Path) -> None:
    """Another one under the same name is not written to: it may be anyone's."""
    model, framework = instrumented()
    with Recorder(framework, tmp_path / "r", min_free_bytes=0) as recorder:
        model(tokens(1, 4))
        (tmp_path / "r").rename(tmp_path / "moved")
        (tmp_path / "r").mkdir(mode=0o700)
        until(lambda: not recorder.active)
        assert "was replaced by another" in str(recorder.report.last_failure)
        until(lambda: not recorder._files.is_ending)
        recorder.start()
        model(tokens(1, 4))
        (path,) = recordings(tmp_path / "r")
        path.rename(tmp_path / "old")
        path.write_bytes(b"another's")
        until(lambda: not recorder.active)
        assert "was replaced while it was written" in str(recorder.report.last_failure)
    assert recorder.report.failures == 2
    assert path.read_bytes() == b"another's"
    with open_stream(tmp_path / "old") as stream:
        assert stream.num_steps == 1


def test_a_next_file_that_can_not_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """rotate() raises, and the recorder goes on with the file that it has."""
    model, framework = instrumented()
    with Recorder(framework, tmp_path / "r", min_free_bytes=0) as recorder:
        (taken,) = recordings(tmp_path / "r")
        with monkeypatch.context() as patch:
            patch.setattr(recorder._files._folder, "next_path", lambda: taken)
            with pytest.raises(FileExistsError):
                recorder.rotate()
        assert recorder.active and recorder.report.failures == 0
        model(tokens(1, 4))
    with open_stream(taken) as stream:
        assert stream.num_steps == 1


def test_calls_that_never_pause(tmp_path: Path) -> None:
    """Switching on gives up after its time while a forward call is in flight, and leaves nothing behind."""
    from models import PLAIN

    model = make(PLAIN)
    waits = Waits()
    model.layers[1].norm2 = nn.Sequential(model.layers[1].norm2, waits)
    model, framework = instrumented(model)
    recorder = Recorder(framework, tmp_path / "r", min_free_bytes=0)
    with in_flight(model, waits):
        with pytest.raises(TimeoutError):
            recorder.start(timeout_s=0.0)
        assert not recorder.active
    until(lambda: not recorder._files.is_ending)
    recorder.start()
    model(tokens(1, 4))
    recorder.close()
    assert recorder.report.steps == 1 and len(recordings(tmp_path / "r")) == 1


def test_a_disk_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that can't be ended holds up neither start() nor close() longer than they were told to wait."""
    model, framework = instrumented()
    recorder = Recorder(framework, tmp_path / "r", min_free_bytes=0)
    recorder.start()
    model(tokens(1, 4))
    held, close = threading.Event(), Session.close

    def hanging(session: Session, *arguments: Any) -> None:
        assert held.wait(60)
        close(session, *arguments)

    monkeypatch.setattr(Session, "close", hanging)
    assert not recorder.stop(timeout_s=0.05)
    with pytest.raises(
        TimeoutError, match=r"the file before was not ended within 0\.05 s: its disk may hang"
    ):
        recorder.start(timeout_s=0.05)
    with pytest.raises(TimeoutError, match=r"recover=True"):
        recorder.close(timeout_s=0.05)
    held.set()
    recorder._files._thread.join(60)
    with open_stream(recordings(tmp_path / "r")[0]) as stream:
        assert stream.num_steps == 1


@pytest.mark.parametrize("warm_up_call", [1, 2])
@pytest.mark.parametrize("ending", ["stop", "close"])
def test_a_start_that_is_overtaken(tmp_path: Path, ending: str, warm_up_call: int) -> None:
    """``stop`` and ``close`` wait no longer than told for a start that warms up, and it records nothing."""
    model, framework = instrumented()
    recorder = Recorder(framework, tmp_path / "r", min_free_bytes=0)
    warming, held = threading.Event(), threading.Event()
    failures: list[BaseException] = []
    calls = itertools.count(1)

    def warm_up() -> None:
        model(tokens(1, 4))
        if next(calls) == warm_up_call:
            warming.set()
            assert held.wait(60)

    def start() -> None:
        try:
            recorder.start(warm_up=warm_up)
        except InstrumentationError as error:
            failures.append(error)

    starter = threading.Thread(target=start)
    starter.start()
    assert warming.wait(60)
    if ending == "stop":
        assert not recorder.stop(timeout_s=0.05)
    else:
        with pytest.raises(
            TimeoutError, match=r"start\(\) was not done within 0\.05 s: it ends without recording"
        ):
            recorder.close(timeout_s=0.05)
    held.set()
    starter.join(60)
    assert len(failures) == 1 and "nothing is recorded" in str(failures[0])
    assert not recorder.active
    until(lambda: not recorder._is_capturing and not recorder._files.is_ending)
    assert recordings(tmp_path / "r") == []
    if ending == "stop":
        assert recorder.stop(timeout_s=60)
        recorder.start()
        model(tokens(1, 4))
        recorder.close()
        assert recorder.report.steps == 1 and recorder.report.failures == 0
    else:
        until(lambda: not recorder._files._thread.is_alive())


def test_a_stop_while_the_next_file_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that hangs in the creation of a file holds up no ``stop``, and that file is not recorded into."""
    model, framework = instrumented()
    recorder = Recorder(framework, tmp_path / "r", min_free_bytes=0)
    recorder.start()
    model(tokens(1, 4))
    beginning, held, open_session = threading.Event(), threading.Event(), recorder._files._open_session

    def hanging(path: Path) -> Session:
        beginning.set()
        assert held.wait(60)
        return open_session(path)

    monkeypatch.setattr(recorder._files, "_open_session", hanging)
    rotating = threading.Thread(target=recorder.rotate)
    rotating.start()
    assert beginning.wait(60)
    recorder.stop(timeout_s=0.05)
    assert not recorder.active
    held.set()
    rotating.join(60)
    assert recorder.stop(timeout_s=60) and not recorder.active
    assert len(recordings(tmp_path / "r")) == 1
    recorder.close()
    assert recorder.report.steps == 1 and recorder.report.failures == 0


def test_a_transformers_server_that_is_another(tmp_path: Path) -> None:
    """None or several models, and a release that names its parts otherwise, are refused with what to do."""

    def serving(*models: object) -> Any:
        loaded = {str(number): SimpleNamespace(model=one) for number, one in enumerate(models)}
        return SimpleNamespace(_model_manager=SimpleNamespace(loaded_models=loaded))

    model = object()
    assert served_model(serving(model)) is model
    for others in ((), (model, model)):
        with pytest.raises(InstrumentationError, match=rf"has loaded {len(others)} models: .*force_model"):
            served_model(serving(*others))
    with pytest.raises(InstrumentationError, match=r"has no _model_manager: .*another release than 5\.23"):
        served_model(SimpleNamespace())
    recorder = Recorder(instrumented()[1], tmp_path / "r")
    for server, missing in (
        (SimpleNamespace(), "_generation_state"),
        (SimpleNamespace(_generation_state=SimpleNamespace()), "get_manager"),
        (SimpleNamespace(_generation_state=SimpleNamespace(get_manager=print)), "_cb_manager"),
    ):
        with pytest.raises(InstrumentationError, match=f"has no {missing}: .*without request ids"):
            tag_requests(server, recorder)
    recorder.close()
