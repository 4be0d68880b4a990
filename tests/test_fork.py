"""A process that is forked while a capture is open: it has no part in it, and the parent goes on."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from models import PLAIN, make, tokens
from torch.utils.data import DataLoader
from waiting import recordings, until

from fx_instrument import (
    InstrumentationConfig,
    InstrumentationError,
    InstrumentationFramework,
    Recorder,
    open_stream,
)
from fx_instrument.capture.session import Session
from fx_instrument.capture_block import open_session
from fx_instrument.forks import track
from fx_instrument.graph.attach import Attachment
from fx_instrument.harvest import Harvest, collect
from fx_instrument.serving.one_file import OneFile
from fx_instrument.stream.writer import StreamWriter

IDS = tokens(4, 60)

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX only"),
    # Newer Pythons warn of every fork of a process with threads: that is what is tested here.
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def in_inference() -> Iterator[None]:
    with torch.no_grad():
        yield


def in_child(body: Callable[[], object], *, timeout_s: float = 60.0) -> None:
    """Run ``body`` in a forked process; fails if it raises there, or hangs."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            body()
            code = 0
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
        finally:
            os._exit(code)
    until_s = time.monotonic() + timeout_s
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            assert os.waitstatus_to_exitcode(status) == 0
            return
        if time.monotonic() > until_s:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise AssertionError("the forked process hangs")
        threading.Event().wait(0.01)


def instrumented(
    model: torch.nn.Module, backend: str | None = "aot_eager", gb: float = 0.006
) -> InstrumentationFramework:
    framework = InstrumentationFramework(InstrumentationConfig(max_memory_gb=gb))
    framework.instrument_model(model, backend=backend)
    return framework


def is_locked(path: Path) -> bool:
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def test_one_that_fails_in_the_child_keeps_nothing_from_the_others() -> None:
    class Told:
        told = False

        def forked(self) -> None:
            self.told = True

    class Failing(Told):
        def forked(self) -> None:
            raise ValueError("in the child")

    some = [Told() if number % 2 else Failing() for number in range(16)]  # told in any order
    for one in some:
        track(one)

    def child() -> None:
        assert all(one.told or isinstance(one, Failing) for one in some)

    in_child(child)


@pytest.mark.parametrize("backend", ["aot_eager", None])
def test_a_child_calls_the_model_and_leaves_the_block(backend: str | None, tmp_path: Path) -> None:
    """More calls than the buffer holds, more values than the parent's file is to have."""
    framework = instrumented(model := make(PLAIN), backend)
    path = tmp_path / "a.stream"
    capture = framework.capture_activations(path)

    def child() -> None:
        for _ in range(30):
            model(IDS)
        assert capture.report.steps == 1
        capture.__exit__(None, None, None)
        model(IDS)

    with capture:
        model(IDS)
        in_child(child)
        assert is_locked(path)
        for _ in range(3):
            model(IDS)
    assert not is_locked(path)
    with open_stream(path) as stream:
        assert (stream.num_steps, stream.damage, stream.metadata["summary"]["steps"]) == (4, [], 4)
        assert {record.step for record in stream} == set(range(4))
        assert not list(stream.verify())


def test_a_child_captures_into_a_file_of_its_own(tmp_path: Path) -> None:
    """The framework is free in the child, while the parent's block is open."""
    framework = instrumented(model := make(PLAIN))

    def child() -> None:
        with framework.capture_activations(tmp_path / "child.stream"):
            model(IDS)
            model(IDS)

    with framework.capture_activations(tmp_path / "a.stream"):
        model(IDS)
        in_child(child)
    for name, num_steps in (("child", 2), ("a", 1)):
        with open_stream(tmp_path / f"{name}.stream") as stream:
            assert stream.num_steps == num_steps and len(stream)


def test_locks_of_threads_that_a_child_lacks(tmp_path: Path) -> None:
    """Whatever another thread of the parent held when it forked, the child waits for none of it."""
    framework = instrumented(model := make(PLAIN))
    capture = framework.capture_activations(tmp_path / "a.stream")

    def child() -> None:
        threading.Thread(target=model, args=(IDS,)).start()
        model(IDS)
        assert capture.report.steps == 1
        capture.__exit__(None, None, None)
        with framework.capture_activations(None):
            model(IDS)

    with capture:
        model(IDS)
        session, attachment = capture._session, framework._attachment
        assert isinstance(session, Session) and isinstance(attachment, Attachment)
        writer = session._writer
        assert isinstance(writer, StreamWriter)
        held = [session._lock, session._steps._lock, session._budget._changed, attachment.gate._changed]
        held_now, forked = threading.Event(), threading.Event()

        def hold() -> None:
            with held[0], held[1], held[2], held[3], writer.tiers._lock:
                held_now.set()
                assert forked.wait(100)

        holder = threading.Thread(target=hold)
        holder.start()
        assert held_now.wait(60)
        try:
            in_child(child)
        finally:
            forked.set()
            holder.join(60)
        model(IDS)
    with open_stream(tmp_path / "a.stream") as stream:
        assert stream.num_steps == 2


def test_a_child_that_is_forked_inside_a_forward_call(tmp_path: Path) -> None:
    """The call goes on in the child, which captures nothing of the rest."""
    model = make(PLAIN)
    framework = instrumented(model, None)
    path = tmp_path / "a.stream"
    forks: list[Callable[[], None]] = []

    def fork(*of_the_hook: object) -> None:
        if forks:
            forks.pop()()

    model.layers[1].register_forward_pre_hook(fork)
    expected = model(IDS)
    children: list[int] = []
    with framework.capture_activations(path):
        forks.append(lambda: children.append(os.fork()))
        found = model(IDS)
        (child,) = children
        if not child:
            os._exit(0 if torch.equal(expected, found) else 1)
        assert torch.equal(expected, found)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        model(IDS)
    with open_stream(path) as stream:
        assert stream.num_steps == 2
        assert all(len(stream[site.name]) == 2 for site in stream.sites if site.role != "input")


def test_loaders_fork_their_workers_in_a_block(tmp_path: Path) -> None:
    """The workers of a DataLoader end as ever, and the file is whole."""
    framework = instrumented(model := make(PLAIN))
    path = tmp_path / "a.stream"
    loader = DataLoader(list(IDS), batch_size=2, num_workers=1, multiprocessing_context="fork", timeout=60)  # type: ignore[arg-type]
    with framework.capture_activations(path):
        for batch in loader:
            model(batch)
    with open_stream(path) as stream:
        assert (stream.num_steps, stream.damage) == (2, [])


def test_a_child_of_a_recording_server(tmp_path: Path) -> None:
    """It can't stop, rotate or unlock what the parent records, and its calls are not recorded."""
    framework = instrumented(model := make(PLAIN), gb=0.05)
    folder = tmp_path / "r"
    recorder = Recorder(framework, folder, min_free_bytes=0)

    def child() -> None:
        assert not recorder.active and recorder.report.failures == 0
        with recorder.request("a"):
            model(IDS)
        assert recorder.stop(timeout_s=5)
        recorder.close(timeout_s=5)
        with pytest.raises(InstrumentationError, match="make a new one"):
            recorder.start()
        with Recorder(framework, tmp_path / "of the child", min_free_bytes=0):
            model(IDS)

    with recorder:
        model(IDS)
        in_child(child)
        assert is_locked(folder) and recorder.active
        model(IDS)
        recorder.rotate()
        model(IDS)
    steps = []
    for path in recordings(folder):
        with open_stream(path) as stream:
            steps.append(stream.num_steps)
    assert steps == [2, 1] and not is_locked(folder)
    (path,) = recordings(tmp_path / "of the child")
    with open_stream(path) as stream:
        assert stream.num_steps == 1


def test_a_child_of_an_engine(tmp_path: Path) -> None:
    """What it runs when it exits ends nothing."""
    framework = instrumented(make(PLAIN))
    path = tmp_path / "a.stream"
    file = OneFile(path, open_session(framework, path, mode="x", on_full="stall"))

    def child() -> None:
        assert file.closed and file.lane is None
        file.close()

    in_child(child)
    assert is_locked(path) and file.lane is not None
    file.close()
    with open_stream(path) as stream:
        assert stream.num_steps == 0


def test_a_child_of_a_harvest(tmp_path: Path) -> None:
    """It notes nothing, whatever blocks it leaves, and unlocks nothing."""
    framework = instrumented(model := make(PLAIN))
    harvest = Harvest(framework, tmp_path)
    notes = harvest.path.with_suffix(".jsonl")

    def child(batch: contextlib.AbstractContextManager[None]) -> None:
        model(IDS)
        batch.__exit__(None, None, None)
        with harvest.batch(["b"]):
            model(IDS)
        harvest.__exit__(None, None, None)

    with harvest:
        batch = harvest.batch(list("abcd"))
        batch.__enter__()
        model(IDS)
        in_child(functools.partial(child, batch))
        batch.__exit__(None, None, None)
        assert is_locked(notes) and is_locked(harvest.path)
    (found,) = collect(tmp_path, timeout_s=0)
    assert (found.ids, found.steps) == (tuple("abcd"), 1)


def test_a_descriptor_that_another_process_has_holds_no_harvest_up(tmp_path: Path) -> None:
    """One that was forked past Python keeps the notes open after the harvest has ended: they are not locked."""
    framework = instrumented(model := make(PLAIN))
    with Harvest(framework, tmp_path) as harvest:
        with harvest.batch(list("abcd")):
            model(IDS)
        assert harvest._notes_fd is not None
        kept = os.dup(harvest._notes_fd)
    try:
        (found,) = collect(tmp_path, timeout_s=0)
    finally:
        os.close(kept)
    assert found.ids == tuple("abcd")


def test_the_locks_of_a_killed_parent_go_with_it(tmp_path: Path) -> None:
    """A child that lives on keeps the file of its dead parent open no longer."""
    framework = instrumented(model := make(PLAIN))
    path = tmp_path / "a.stream"
    reading, writing = os.pipe()
    parent = os.fork()
    if not parent:
        os.close(reading)
        with framework.capture_activations(path):
            model(IDS)
            child = os.fork()
            if not child:
                time.sleep(60)
            os.write(writing, b"%d\n" % child)
            os._exit(0)
    os.close(writing)
    try:
        with os.fdopen(reading) as said:
            child = int(said.readline())
            os.waitpid(parent, 0)
            until(lambda: not is_locked(path))
    finally:
        os.kill(child, signal.SIGKILL)
