"""A recorder goes on for as long as a server runs: files rotate, failures stay out of responses, nothing grows."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from models import PLAIN, make, tokens
from torch import nn
from waiting import recordings, until

from fx_instrument import (
    CaptureActiveError,
    InstrumentationConfig,
    InstrumentationError,
    InstrumentationFramework,
    NotInstrumentedError,
    Recorder,
    open_stream,
)
from fx_instrument.capture.session import Session
from fx_instrument.requests import NO_REQUEST, ROWS_INPUT
from fx_instrument.serving.folder import RecordingFolder
from fx_instrument.serving.limits import FileLimits
from fx_instrument.serving.tags import Request, ran, tagged
from fx_instrument.stream import segment_writer

SITES = 2 * PLAIN.depth


def instrumented(model: nn.Module | None = None, **config: Any) -> tuple[nn.Module, InstrumentationFramework]:
    model = model if model is not None else make(PLAIN)
    framework = InstrumentationFramework(InstrumentationConfig(**{"max_memory_gb": 0.05, **config}))
    framework.instrument_model(model, backend="eager")
    return model, framework


def steps_in(folder: Path) -> int:
    total = 0
    for path in recordings(folder):
        with open_stream(path) as stream:
            assert len(stream) == SITES * stream.num_steps, path
            total += stream.num_steps
    return total


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def test_files_rotate_by_size_under_concurrent_calls(tmp_path: Path) -> None:
    """Four threads' calls all lie in some file, each step whole, with values that are right; all private."""
    model, framework = instrumented()
    ids = [tokens(1, 3 + number, seed=number) for number in range(4)]
    expected = [model(one) for one in ids]
    folder = tmp_path / "recordings"
    with Recorder(framework, folder, rotate_bytes=200_000, min_free_bytes=0) as recorder:
        wrong: list[int] = []

        def serve(number: int) -> None:
            with torch.no_grad():
                for _ in range(200):
                    if not torch.equal(model(ids[number]), expected[number]):
                        wrong.append(number)

        threads = [threading.Thread(target=serve, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        recorder.rotate()
        for one in ids:
            model(one)
    assert not wrong
    report = recorder.report
    assert (report.steps, report.records, report.dropped_records) == (804, 804 * SITES, 0)
    assert len(recordings(folder)) == report.files >= 2 and not report.active and report.failures == 0
    assert steps_in(folder) == 804
    assert report.stored_bytes == sum(path.stat().st_size for path in recordings(folder))
    assert folder.stat().st_mode & 0o777 == 0o700
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in recordings(folder))
    with open_stream(recordings(folder)[-1]) as stream:
        for step, one in enumerate(ids):
            assert torch.equal(stream.inputs(step)["input_ids"], one)
            assert stream.read("layers.0.mlp", step).shape == (1, one.shape[1], PLAIN.width)


def test_files_rotate_by_time_if_they_hold_something(tmp_path: Path) -> None:
    """A file that is old is ended once it has records; an idle server makes no empty files."""
    model, framework = instrumented()
    with Recorder(framework, tmp_path / "r", rotate_s=1e-3, min_free_bytes=0) as recorder:
        model(tokens(1, 4))
        until(lambda: recorder.report.files == 2)
        first = recordings(tmp_path / "r")[0]
        until(lambda: recorder.report.path != str(first) and not recorder._files.is_ending)
        for _ in range(5):
            recorder._files.look()
        assert recorder.report.files == 2
    assert recordings(tmp_path / "r") == [first]


class Waits(nn.Module):
    """Holds a forward call up in its middle."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.go_on = threading.Event(), threading.Event()

    @torch.compiler.disable
    def wait(self) -> None:
        self.inside.set()
        assert self.go_on.wait(60)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.wait()
        return x + 1


@contextlib.contextmanager
def in_flight(model: nn.Module, waits: Waits) -> Iterator[None]:
    """A forward call of another thread has come to ``waits``, and goes on when the block is left."""

    def call() -> None:
        with torch.no_grad():
            model(tokens(1, 4))

    thread = threading.Thread(target=call)
    thread.start()
    assert waits.inside.wait(60)
    yield
    waits.go_on.set()
    thread.join(60)


def test_a_call_in_flight_stays_in_its_file(tmp_path: Path) -> None:
    """Rotating does not wait for a forward call; what it delivers later lies whole in the file it began with."""
    model, waits = make(PLAIN), Waits()
    model.layers[1].norm2 = nn.Sequential(model.layers[1].norm2, waits)
    model, framework = instrumented(model)
    with Recorder(framework, tmp_path / "r", min_free_bytes=0) as recorder:
        with in_flight(model, waits):
            recorder.rotate()
        model(tokens(1, 4))
        model(tokens(1, 4))
    with open_stream(recordings(tmp_path / "r")[0]) as old, open_stream(recordings(tmp_path / "r")[1]) as new:
        assert (old.num_steps, len(old), new.num_steps, len(new)) == (1, SITES, 2, 2 * SITES)


def test_memory_threads_and_files_stay_flat(tmp_path: Path) -> None:
    """Many rotations leave no thread, no open file and no memory behind."""
    model, framework = instrumented()
    process = psutil.Process()
    ids = tokens(2, 16)
    with Recorder(framework, tmp_path / "r", max_files=3, min_free_bytes=0) as recorder:

        def turn() -> None:
            model(ids)
            recorder.rotate()
            until(lambda: not recorder._files.is_ending)

        for _ in range(40):
            turn()
        before = process.memory_info().rss, process.num_threads(), process.num_fds()
        for _ in range(160):
            turn()
        after = process.memory_info().rss, process.num_threads(), process.num_fds()
    assert after[0] - before[0] < 4 << 20, (before, after)
    assert after[1:] == before[1:]
    assert recorder.report.steps == 200 and recorder.report.files == 201
    # The last one held nothing; two and it were the three.
    assert len(recordings(tmp_path / "r")) == 2


@pytest.mark.slow
def test_memory_stays_flat_over_requests(tmp_path: Path) -> None:
    """Thousands of requests with ids of their own, over files that rotate and go: no more memory than at the start.

    That is once the C library's heap has settled, which takes it some 16 000 of them.
    """
    model, framework = instrumented()
    prompts = [tokens(1, 8, seed=seed) for seed in range(500)]
    step = tokens(1, 1)
    process = psutil.Process()
    folder, sizes = tmp_path / "r", []
    with Recorder(
        framework, folder, rotate_s=0.3, max_files=3, max_stall_s=1.0, min_free_bytes=0
    ) as recorder:

        def serve(thread: int) -> None:
            with torch.no_grad():
                for number in range(500):
                    with recorder.request(f"request-{thread}-{len(sizes)}-{number}"):
                        model(prompts[number])
                        model(step)

        for _ in range(24):
            threads = [threading.Thread(target=serve, args=(number,)) for number in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(300)
            until(lambda: not recorder._files.is_ending)
            sizes.append((process.memory_info().rss, process.num_threads(), process.num_fds()))
    report = recorder.report
    assert report.steps == 48_000 and report.failures == 0 and report.files > 10
    assert report.records + report.dropped_records == 48_000 * SITES
    assert len(recordings(folder)) <= 3
    start, end = sizes[-7], sizes[-1]
    assert end[0] - start[0] < 4 << 20, sizes
    assert end[1:] == start[1:], sizes


def test_switching_compiles_nothing(tmp_path: Path) -> None:
    """The two variants are compiled by the warm-up; later calls, starts and stops from any thread find them."""
    compiled = []

    def counting(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        compiled.append(gm)
        return gm.forward

    model = make(PLAIN)
    framework = InstrumentationFramework(InstrumentationConfig(max_memory_gb=0.05))
    framework.instrument_model(model, backend=counting)
    recorder = Recorder(framework, tmp_path / "r", min_free_bytes=0)
    recorder.start(warm_up=lambda: model(tokens(1, 4)))
    assert len(compiled) == 2 and recorder.report.steps == 0

    def turn() -> None:
        with torch.no_grad():
            assert recorder.stop() and not recorder.active
            model(tokens(1, 4))
            recorder.start()
            model(tokens(1, 4))

    for _ in range(3):
        thread = threading.Thread(target=turn)
        thread.start()
        thread.join(60)
    recorder.close()
    assert len(compiled) == 2
    assert recorder.report.steps == steps_in(tmp_path / "r") == 3
    # No file is left of what recorded nothing.
    assert len(recordings(tmp_path / "r")) == 3 and recorder.report.files == 4


def fill_disk(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    def full(fd: int, views: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(segment_writer, "write_all", full)


def remove_folder(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    shutil.rmtree(folder)


def remove_file(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    recordings(folder)[0].unlink()


def break_session(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    def broken(*arguments: Any, **named: Any) -> None:
        raise RuntimeError("a bug in the capture")

    for name in ("reserve", "begin_step", "end_step"):
        monkeypatch.setattr(Session, name, broken)


@pytest.mark.parametrize(
    "damage, says",
    [
        (fill_disk, "No space left on device"),
        (remove_folder, "is gone"),
        (remove_file, "was deleted while"),
        (break_session, "a bug in the capture"),
    ],
)
def test_a_failure_switches_off_and_reaches_no_response(
    damage: Callable[[pytest.MonkeyPatch, Path], None],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One line in the log, one more on the counter, the same responses; and it can be switched on again."""
    model, framework = instrumented()
    ids = tokens(1, 4)
    expected = model(ids)
    recorder = Recorder(framework, tmp_path / "r", min_free_bytes=0)
    recorder.start()
    assert torch.equal(model(ids), expected)
    with caplog.at_level(logging.WARNING), monkeypatch.context() as patch:
        damage(patch, tmp_path / "r")
        until(lambda: torch.equal(model(ids), expected) and not recorder.active)
        until(lambda: not recorder._files.is_ending and not recorder._is_capturing)
        assert torch.equal(model(ids), expected)
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("fx_instrument")]
    assert len(lines) == 1 and "switched off, responses are not affected" in lines[0] and says in lines[0]
    report = recorder.report
    assert report.failures == 1 and says in str(report.last_failure) and not report.active
    recorder.start()
    before = recorder.report.steps
    assert torch.equal(model(ids), expected)
    recorder.close()
    assert recorder.report.steps == before + 1 and recorder.report.failures == 1
    with open_stream(recordings(tmp_path / "r")[-1]) as stream:
        assert len(stream) == SITES


def test_a_nearly_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recording ends before it takes the room that others need."""
    model, framework = instrumented()
    free = [10_000]
    monkeypatch.setattr(RecordingFolder, "free_bytes", lambda _: free[0])
    with (
        pytest.raises(OSError, match="min_free_bytes is 20000"),
        Recorder(framework, tmp_path / "a", min_free_bytes=20_000),
    ):
        pass
    with Recorder(framework, tmp_path / "b", min_free_bytes=5_000) as recorder:
        model(tokens(1, 4))
        free[0] = 4_000
        until(lambda: not recorder.active)
        assert "4000 bytes are free" in str(recorder.report.last_failure)
    assert steps_in(tmp_path / "b") == 1


def small_disk(monkeypatch: pytest.MonkeyPatch, folder: Path, room: int) -> None:
    """A disk with so much room beside the files that are there now."""
    total = room + sum(path.stat().st_size for path in folder.iterdir())
    monkeypatch.setattr(
        RecordingFolder,
        "free_bytes",
        lambda self: total - sum(path.stat().st_size for path in self.path.iterdir()),
    )


def record_files(framework: InstrumentationFramework, model: nn.Module, folder: Path, count: int) -> None:
    with Recorder(framework, folder, min_free_bytes=0) as recorder:
        for _ in range(count):
            model(tokens(4, 64))
            recorder.rotate()
            until(lambda: not recorder._files.is_ending)


@pytest.mark.parametrize("limits", [{"max_files": 1}, {"max_total_bytes": 60_000}])
def test_a_start_deletes_old_files_before_it_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limits: dict[str, int]
) -> None:
    """A disk that old recordings fill has room again once those beyond the limits are gone; nothing else goes."""
    model, framework = instrumented()
    folder = tmp_path / "r"
    record_files(framework, model, folder, 4)
    notes = folder / "notes.stream"
    notes.write_text("not a recording")
    size = recordings(folder)[0].stat().st_size
    assert 30_000 < size < 60_000
    small_disk(monkeypatch, folder, 1_000)
    with (
        pytest.raises(OSError, match="min_free_bytes is 100000"),
        Recorder(framework, folder, min_free_bytes=100_000),
    ):
        pass
    assert len(recordings(folder)) == 5
    with Recorder(framework, folder, min_free_bytes=100_000, **limits) as recorder:
        assert [path.name[:6] for path in recordings(folder)] == ["000003", "000004", "notes."]
        model(tokens(1, 4))
        until(lambda: recorder.report.records == SITES)
    assert recorder.report.failures == 0 and notes.exists()


def test_a_disk_that_fills_up_costs_old_files_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a file is written, and others fill the disk, what is beyond the limits goes before recording ends."""
    model, framework = instrumented()
    folder = tmp_path / "r"
    record_files(framework, model, folder, 3)
    kept = [path.name for path in recordings(folder)]
    full = threading.Event()
    monkeypatch.setattr(
        RecordingFolder,
        "free_bytes",
        lambda _: 1000 if full.is_set() and len(recordings(folder)) > 3 else 1_000_000,
    )
    with Recorder(framework, folder, min_free_bytes=200_000, max_files=3) as recorder:
        model(tokens(4, 64))
        assert [path.name for path in recordings(folder)[:3]] == kept
        full.set()
        until(lambda: len(recordings(folder)) == 3)
        model(tokens(4, 64))
        assert recorder.active
        assert [path.name for path in recordings(folder)[:2]] == kept[1:]


def test_a_file_that_calls_are_still_in_is_never_deleted(tmp_path: Path) -> None:
    """A file that was ended late, behind ones begun after it, stays whole, whatever the limits say."""
    model, framework = instrumented()
    folder = tmp_path / "r"
    with Recorder(framework, folder, min_free_bytes=0, max_files=1) as recorder:
        model(tokens(1, 4))
        lane = recorder._files.enter()
        assert lane is not None
        try:
            for _ in range(2):
                recorder.rotate()
                model(tokens(1, 4))
            recorder.rotate()
            until(lambda: len(recorder._files._ending) == 1)
            assert lane.path.exists()
        finally:
            recorder._files.leave(lane)
        until(lambda: not recorder._files.is_ending)
    assert recorder.report.failures == 0


@pytest.mark.parametrize("max_stall_s", [0.0, 0.01])
def test_a_full_buffer_drops(max_stall_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a disk that hangs, calls go on, lost values are counted, and what is written later is whole."""
    model, framework = instrumented(max_memory_gb=0.01)
    ids = tokens(16, 64)
    expected = model(ids)
    held, write_all = threading.Event(), segment_writer.write_all

    def hanging(fd: int, views: Any) -> None:
        assert held.wait(60)
        write_all(fd, views)

    with Recorder(framework, tmp_path / "r", max_stall_s=max_stall_s, min_free_bytes=0) as recorder:
        monkeypatch.setattr(segment_writer, "write_all", hanging)
        with recorder.request("one"):
            for _ in range(40):
                assert torch.equal(model(ids), expected)
        report = recorder.report
        assert report.dropped_records > 0 and report.failures == 0
        # All 40 calls are one response: together they may wait as long as one.
        assert (report.stalled_seconds > 0) == (max_stall_s > 0) and report.stalled_seconds < 1
        held.set()
    report = recorder.report
    assert report.records + report.dropped_records == 40 * SITES
    with open_stream(recordings(tmp_path / "r")[0]) as stream:
        assert len(stream) == report.records


def test_a_step_larger_than_the_buffer_is_dropped(tmp_path: Path) -> None:
    """What capture_activations refuses with an error costs a server its record, not its response."""
    model, framework = instrumented(max_memory_gb=0.01)
    with Recorder(framework, tmp_path / "r", min_free_bytes=0) as recorder:
        model(tokens(512, 64))
        model(tokens(1, 4))
    assert (recorder.report.records, recorder.report.dropped_records) == (SITES, SITES)
    assert recorder.report.failures == 0


def test_only_the_requests_that_ask(tmp_path: Path) -> None:
    """With requests_only a file holds the steps made inside ``request``, also from the threads of an event loop."""
    model, framework = instrumented()
    with Recorder(framework, tmp_path / "r", requests_only=True, min_free_bytes=0) as recorder:

        def respond(length: int) -> None:
            with torch.no_grad():
                for _ in range(3):
                    model(tokens(1, length))

        async def handle(length: int, asked: bool) -> None:
            if asked:
                with recorder.request(f"request-{length}"):
                    await asyncio.to_thread(respond, length)
            else:
                await asyncio.to_thread(respond, length)

        async def main() -> None:
            await asyncio.gather(*(handle(length, asked=length % 2 == 1) for length in range(3, 9)))

        asyncio.run(main())
        with pytest.raises(ValueError, match="not all empty"), recorder.request(""):
            pass
    with open_stream(recordings(tmp_path / "r")[0]) as stream:
        lengths = [stream.inputs(step)["input_ids"].shape[1] for step in range(stream.num_steps)]
    assert sorted(lengths) == [3, 3, 3, 5, 5, 5, 7, 7, 7]
    assert recorder.report.steps == 9


def test_the_oldest_files_go(tmp_path: Path) -> None:
    """Files of earlier runs are numbered on from and count; other files in the folder are never touched."""
    model, framework = instrumented()
    folder = tmp_path / "r"
    for _ in range(2):
        with Recorder(framework, folder, min_free_bytes=0):
            model(tokens(1, 4))
    (folder / "notes.stream").write_text("not a recording")
    assert [path.name[:7] for path in recordings(folder)[:2]] == ["000000-", "000001-"]
    size = recordings(folder)[0].stat().st_size
    with Recorder(framework, folder, max_total_bytes=4 * size - 1, min_free_bytes=0) as recorder:
        for _ in range(4):
            model(tokens(1, 4))
            recorder.rotate()
            until(lambda: not recorder._files.is_ending)
    assert [path.name[:6] for path in recordings(folder)] == ["000003", "000004", "000005", "notes."]


def test_no_file_takes_all_the_bytes_that_are_kept(tmp_path: Path) -> None:
    """A file ends when it has half of ``max_total_bytes``, however large files may be otherwise."""
    model, framework = instrumented()
    folder = tmp_path / "r"

    def goes_on_in_a_third_file() -> bool:
        model(tokens(4, 64))
        return recorder.report.files == 3

    limits = FileLimits(max_total_bytes=200_000)
    assert limits.is_full(100_000) and not limits.is_full(99_999)
    with Recorder(
        framework, folder, rotate_bytes=None, rotate_s=None, max_total_bytes=200_000, min_free_bytes=0
    ) as recorder:
        until(goes_on_in_a_third_file)


def test_folders_that_are_refused(tmp_path: Path) -> None:
    """A folder that others can read, a link and a folder with an owner are refused with what to do."""
    _, framework = instrumented()
    (tmp_path / "open").mkdir(mode=0o755)
    (tmp_path / "open").chmod(0o755)
    with pytest.raises(PermissionError, match=r"mode 755.*chmod 700"):
        Recorder(framework, tmp_path / "open")
    (tmp_path / "private").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "private")
    with pytest.raises(PermissionError, match="link"):
        Recorder(framework, tmp_path / "link")
    with pytest.raises(FileNotFoundError):
        Recorder(framework, tmp_path / "none" / "deeper")
    recorder = Recorder(framework, tmp_path / "private")
    with pytest.raises(BlockingIOError, match="another recorder"):
        Recorder(framework, tmp_path / "private")
    recorder.close()
    Recorder(framework, tmp_path / "private").close()


def test_a_forked_process_does_not_keep_the_folder(tmp_path: Path) -> None:
    """A process forked while a recorder was open has its descriptors, and not its folder."""
    folder = RecordingFolder(tmp_path / "r")
    end, begin = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(begin)
        os.read(end, 1)  # until the test lets go of the other end
        os._exit(0)
    try:
        folder.close()
        RecordingFolder(tmp_path / "r").close()
    finally:
        os.close(begin)
        os.waitpid(child, 0)
        os.close(end)


def test_wrong_turns(tmp_path: Path) -> None:
    """Bad numbers, no model, a second capture and a closed recorder are errors that say so."""
    model, framework = instrumented()
    for bad in ({"rotate_bytes": 0}, {"rotate_s": -1.0}, {"max_files": 0}, {"max_stall_s": -0.1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Recorder(framework, tmp_path / "r", **bad)  # type: ignore[arg-type]
    with pytest.raises(NotInstrumentedError):
        Recorder(InstrumentationFramework(), tmp_path / "r").start()
    recorder = Recorder(framework, tmp_path / "s", min_free_bytes=0)
    with pytest.raises(InstrumentationError, match="off"):
        recorder.rotate()
    with framework.capture_activations(None), pytest.raises(CaptureActiveError):
        recorder.start()
    recorder.start()
    recorder.start()
    with pytest.raises(CaptureActiveError), framework.capture_activations(None):
        pass
    with pytest.raises(CaptureActiveError):
        framework.restore(model)
    recorder.close()
    recorder.close()
    with pytest.raises(InstrumentationError, match="closed"):
        recorder.start()
    with framework.capture_activations(None):
        model(tokens(1, 4))
    framework.restore(model)
    assert not list((tmp_path / "s").iterdir())


def test_prometheus_counts_over_files(tmp_path: Path) -> None:
    """Every count of the report is a counter that goes on over rotations, stops and failures."""
    prometheus_client = pytest.importorskip("prometheus_client")
    from fx_instrument.integrations import prometheus

    model, framework = instrumented()
    registry = prometheus_client.CollectorRegistry()
    recorder = Recorder(framework, tmp_path / "r", min_free_bytes=0)
    collector = prometheus.register(recorder, registry, model="tiny")

    def value(name: str) -> float | None:
        found: float | None = registry.get_sample_value(name, {"model": "tiny"})
        return found

    assert (value("fx_instrument_recording"), value("fx_instrument_records_total")) == (0, 0)
    recorder.start()
    for _ in range(3):
        model(tokens(1, 4))
        recorder.rotate()
    assert value("fx_instrument_recording") == 1
    until(lambda: value("fx_instrument_records_total") == 3 * SITES)
    recordings(tmp_path / "r")[-1].unlink()
    until(lambda: value("fx_instrument_failures_total") == 1)
    recorder.close()
    report = recorder.report
    for name in (
        "steps",
        "records",
        "raw_bytes",
        "stored_bytes",
        "dropped_records",
        "stalled_seconds",
        "files",
    ):
        assert value(f"fx_instrument_{name}_total") == getattr(report, name)
    assert value("fx_instrument_recording") == 0
    text = prometheus_client.generate_latest(registry).decode()
    assert f'fx_instrument_records_total{{model="tiny"}} {3 * SITES}.0' in text
    registry.unregister(collector)


def test_rows_by_request(tmp_path: Path) -> None:
    """Steps know their request and token positions: concurrent ones, prefill and decode, over rotations."""
    model, framework = instrumented()
    prompts = {f"request-{number}": tokens(1, 3 + number, seed=number) for number in range(3)}
    with Recorder(framework, tmp_path / "r", min_free_bytes=0) as recorder:

        def serve(name: str) -> None:
            with torch.no_grad(), recorder.request(name):
                model(prompts[name])
                recorder.rotate()
                for step in range(2):
                    model(tokens(1, 1, seed=step))

        threads = [threading.Thread(target=serve, args=(name,)) for name in prompts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        model(tokens(1, 4))
        with recorder.request("request-0"):
            model(tokens(1, 2))
    seen: list[torch.Tensor] = []
    plain = make(PLAIN)
    plain.layers[1].mlp.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    with open_stream(tmp_path / "r") as stream:
        again = next(name for name in stream.requests if name not in prompts)
        assert set(stream.requests) == {*prompts, again} and again.startswith("request-0-")
        for name, prompt in prompts.items():
            plain(prompt)
            for step in range(2):
                plain(tokens(1, 1, seed=step))
            expected = torch.cat(seen)
            seen.clear()
            request = stream.request(name)
            rows = request["layers.1.mlp"]
            assert torch.equal(rows.token_positions, torch.arange(prompt.shape[1] + 2))
            assert not len(rows.missing_positions) and request.num_prompt_tokens == prompt.shape[1]
            assert torch.equal(rows.tensor(), expected)
            generated = [int(tokens(1, 1, seed=step)) for step in range(2)]
            assert request.token_ids() == dict(enumerate(prompt[0].tolist() + generated))
        assert len(stream.request(again)["layers.0.self_attn"]) == 2
    # Of the last file alone, too: how long the prompt was is known where only generated tokens lie.
    number = 0
    for path in recordings(tmp_path / "r")[1:]:
        with open_stream(path) as stream:
            for name in set(stream.requests) & set(prompts):
                assert stream.request(name).num_prompt_tokens == prompts[name].shape[1]
                number += min(stream.request(name)["layers.0.mlp"].token_positions) >= prompts[name].shape[1]
    assert number


@pytest.mark.parametrize("name", ["\ud800", "a\0b", "日本\n"])
def test_ids_of_any_characters(tmp_path: Path, name: str) -> None:
    """An id comes back as the client sent it, half a surrogate pair too, and what prints of it does not fail."""
    model, framework = instrumented()
    with Recorder(framework, tmp_path / "r", min_free_bytes=0) as recorder:
        with recorder.request(name):
            model(tokens(1, 4))
        with recorder.request(name):
            model(tokens(1, 2))
        assert recorder.active, recorder.report.last_failure
    assert recorder.report.failures == 0
    with open_stream(tmp_path / "r") as stream:
        first, second = stream.requests
        assert first == name and second.startswith(f"{name}-")
        assert len(stream.request(name)["layers.1.mlp"]) == 4
        repr(stream.request(name)).encode()


def test_rows_of_a_padded_batch() -> None:
    """Each row of a batch is its id's; padding on either side belongs to none; positions come from the inputs."""
    request = Request(("a", "b"), 0.0)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    ids = torch.ones(2, 5, dtype=torch.int64)
    first = request.runs({"input_ids": ids, "attention_mask": mask})
    assert [(tag and tag.id, position, count) for tag, position, count in first] == [
        (None, 0, 2),
        ("a", 0, 3),
        ("b", 0, 4),
        (None, 0, 1),
    ]
    ran(first)
    request.ended()
    longer = torch.cat([mask, torch.ones(2, 1, dtype=torch.int64)], 1)
    places = torch.tensor([[3], [4]])
    second = request.runs({"input_ids": ids[:, :1], "attention_mask": longer, "position_ids": places})
    assert [(tag and tag.id, position, count) for tag, position, count in second] == [
        ("a", 3, 1),
        ("b", 4, 1),
    ]
    request.ended()
    assert [tag.id for tag, _, _ in request.runs({"input_ids": torch.ones(4, 1)}) if tag] == [
        "a#0",
        "a#1",
        "b#0",
        "b#1",
    ]
    request.ended()
    assert request.runs({"input_ids": torch.ones(3, 1)}) == [] == request.runs({"attention_mask": mask})
    filled = Request(("c", ""), 0.0)
    assert [
        (tag and tag.id, position, count)
        for tag, position, count in filled.runs({"input_ids": ids, "attention_mask": mask})
    ] == [(None, 0, 2), ("c", 0, 3), (None, 0, 5)]
    filled.ended()
    assert [tag and tag.id for tag, _, _ in filled.runs({"input_ids": torch.ones(4, 1)})] == [
        "c#0",
        "c#1",
        None,
        None,
    ]
    noted, told = tagged({}, first, set())
    assert len(told) == 2
    assert noted[ROWS_INPUT][:, 0].tolist()[0] == NO_REQUEST and noted[ROWS_INPUT].shape == (4, 3)


def test_an_engine_says_whose_rows(tmp_path: Path) -> None:
    """A batching engine's calls mix requests; its row source tells them apart."""
    model, framework = instrumented()
    with Recorder(framework, tmp_path / "r", min_free_bytes=0) as recorder:
        batches = iter([[("x", 0, 3), ("y", 0, 2)], [("y", 2, 1), ("x", 3, 1), ("", 0, 2)], None])
        recorder.set_row_source(lambda: next(batches))
        for length in (5, 4, 2):
            model(tokens(1, length, seed=length))
    with open_stream(tmp_path / "r") as stream:
        assert stream.requests == ("x", "y")
        x, y = (stream.request(name)["layers.0.mlp"] for name in ("x", "y"))
        first, second = (stream.read("layers.0.mlp", step)[0] for step in range(2))
        assert torch.equal(x.tensor(), torch.cat([first[:3], second[1:2]]))
        assert torch.equal(y.tensor(), torch.cat([first[3:5], second[:1]]))
        # Such engines cut prompts, so how long they were is not known.
        assert stream.request("x").num_prompt_tokens is None


def test_nothing_captured_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward calls that deliver nothing switch the recorder off instead of leaving an empty file in silence."""
    model, framework = instrumented()
    monkeypatch.setattr(Session, "deliver", lambda self, ticket, *_: self.cancel(ticket))
    with Recorder(framework, tmp_path / "r", min_free_bytes=0) as recorder:
        for _ in range(101):
            model(tokens(1, 4))
        until(lambda: not recorder.active)
        assert "delivered no value" in str(recorder.report.last_failure)
