"""An engine's capture that goes on for weeks: files rotate, failures and operators switch it off, and it goes on."""

from __future__ import annotations

import errno
import logging
import shutil
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_engine import HIDDEN, SITES, Engine
from waiting import recordings, until

from fx_instrument import InstrumentationConfig, open_stream
from fx_instrument.serving.folder import RecordingFolder
from fx_instrument.serving.limits import FileLimits
from fx_instrument.serving.rotation import RotatingFiles
from fx_instrument.stream import segment_writer


def rotating(folder: Path, *, config: Any = None, **limits: Any) -> Engine:
    limits = {"rotate_bytes": 1 << 40, "min_free_bytes": 0, **limits}
    return Engine(folder, config=config, drop=True, limits=FileLimits(**limits))


def files_of(engine: Engine) -> RotatingFiles:
    assert isinstance(engine.capture.files, RotatingFiles)
    return engine.capture.files


def check(engine: Engine, stream: Any, name: str, kept: list[int], *, found_as: str | None = None) -> None:
    """The request has these positions, each with its token and the value that an eager hook sees."""
    request = stream.request(found_as or name)
    tokens = engine.prompts[name]
    assert request.token_ids() == {position: tokens[position] for position in kept}
    assert list(request) == SITES
    for site, expected in engine.expected(name).items():
        assert request[site].token_positions.tolist() == kept
        torch.testing.assert_close(request[site].tensor(), expected[kept])


def test_a_request_goes_on_in_the_next_file(tmp_path: Path) -> None:
    """Requests in the middle of which files rotate are read over the files, each of which knows them by itself."""
    engine = rotating(tmp_path / "r")
    engine.add("a", list(range(10)))
    engine.add("b", list(range(20, 27)))
    engine.step([("a", 0, 4)])
    files_of(engine).rotate()
    engine.step([("b", 0, 5), ("a", 4, 3)])
    engine.step([("b", 5, 1), ("a", 7, 1)])
    files_of(engine).rotate()
    engine.step([("a", 8, 2), ("b", 6, 1)])
    engine.capture.close()
    report = engine.capture.report()
    assert report is not None and report["failures"] == 0 and report["files"] == 3
    assert (report["steps"], report["records"]) == (4, 4 * len(SITES))
    with open_stream(tmp_path / "r") as stream:
        assert stream.requests == ("a", "b") and stream.num_steps == 4
        for name in stream.requests:
            check(engine, stream, name, list(range(len(engine.prompts[name]))))
            assert not len(stream.request(name)["layers.0.mlp"].missing_positions)
    for path, kept in zip(recordings(tmp_path / "r"), ([0, 1, 2, 3], [4, 5, 6, 7], [8, 9]), strict=True):
        assert path.stat().st_mode & 0o077 == 0
        with open_stream(path) as stream:
            check(engine, stream, "a", kept)
            assert stream.request("a").num_prompt_tokens == 10


def test_files_rotate_by_size(tmp_path: Path) -> None:
    """A file that has grown past ``rotate_bytes`` is followed by the next, while calls go on."""
    engine = rotating(tmp_path / "r", rotate_bytes=20_000)
    turn = 0
    # Until the fourth file holds something, too: an empty one is deleted.
    while len(rotated := recordings(tmp_path / "r")) < 4 or rotated[-1].stat().st_size < 20_000:
        assert turn < 20_000
        engine.add(f"request-{turn}", [(turn + i) % 50 for i in range(40)])
        engine.step([(f"request-{turn}", 0, 40)])
        turn += 1
    engine.capture.close()
    report = files_of(engine).report
    assert report.steps == turn and report.failures == report.dropped_records == 0
    assert report.stored_bytes == sum(path.stat().st_size for path in recordings(tmp_path / "r"))
    assert all(path.stat().st_size >= 20_000 for path in recordings(tmp_path / "r")[:-1])
    with open_stream(tmp_path / "r") as stream:
        assert len(stream.requests) == turn
        check(engine, stream, f"request-{turn - 1}", list(range(40)))


def test_files_rotate_by_time_if_they_hold_something(tmp_path: Path) -> None:
    """An engine that rests ends what it has recorded, and then makes no empty files."""
    engine = rotating(tmp_path / "r", rotate_s=1e-3)
    engine.add("a", [1, 2, 3])
    engine.step([("a", 0, 2)])
    files = files_of(engine)
    until(lambda: files.report.files == 2 and not files.is_ending)
    (first, _) = recordings(tmp_path / "r")
    with open_stream(first) as stream:
        check(engine, stream, "a", [0, 1])
    for _ in range(5):
        files.look()
    assert files.report.files == 2
    engine.capture.close()
    assert recordings(tmp_path / "r") == [first]


def fill_disk(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    def full(fd: int, views: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(segment_writer, "write_all", full)


def nearly_fill_disk(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(RecordingFolder, "free_bytes", lambda _: -1)


def remove_folder(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    shutil.rmtree(folder)


def remove_file(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    recordings(folder)[0].unlink()


@pytest.mark.parametrize(
    "damage, says",
    [
        (fill_disk, "No space left on device"),
        (nearly_fill_disk, "min_free_bytes is 0"),
        (remove_folder, "is gone"),
        (remove_file, "was deleted while"),
    ],
)
def test_a_failure_switches_off_and_a_switch_on_again(
    damage: Callable[[pytest.MonkeyPatch, Path], None],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One line in the log, one more on the counter, and the engine answers as before; then a new file goes on."""
    engine = rotating(tmp_path / "r")
    engine.add("a", [1, 2, 3, 4, 5, 6])
    before = engine.step([("a", 0, 2)])
    number = 0
    with caplog.at_level(logging.WARNING), monkeypatch.context() as patch:
        damage(patch, tmp_path / "r")
        while files_of(engine).lane is not None:
            engine.add(f"n{number}", [1, 2])
            assert torch.equal(engine.step([(f"n{number}", 0, 2)]), before)
            number += 1
        until(lambda: not files_of(engine).is_ending)
        engine.step([("a", 2, 2)])
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("fx_instrument")]
    assert len(lines) == 1 and "switched off, responses are not affected" in lines[0] and says in lines[0]
    report = engine.capture.report()
    assert report is not None and report["failures"] == 1 and says in report["last_failure"]
    assert not report["active"] and not report["paused"] and engine.capture.is_following
    assert engine.capture.switch(True)
    engine.step([("a", 4, 2)])
    engine.capture.close()
    assert files_of(engine).report.failures == 1
    with open_stream(recordings(tmp_path / "r")[-1]) as stream:
        # Of a request that had begun before, what came while it was off is missing.
        check(engine, stream, "a", [4, 5])
        assert stream.request("a")["layers.0.mlp"].missing_positions.tolist() == [0, 1, 2, 3]


def test_a_switch_that_can_not_be_obeyed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Switching on while the disk is full says no, counts it, and the engine goes on."""
    engine = rotating(tmp_path / "r")
    engine.capture.switch(False)
    with monkeypatch.context() as patch:
        nearly_fill_disk(patch, tmp_path / "r")
        assert not engine.capture.switch(True)
        assert "can't be switched on" in caplog.text and "-1 bytes are free" in caplog.text
        engine.add("a", [1, 2, 3])
        engine.step([("a", 0, 1)])
        assert files_of(engine).report.failures == 1
    assert engine.capture.switch(True)
    engine.step([("a", 1, 2)])
    engine.capture.close()
    with open_stream(tmp_path / "r") as stream:
        check(engine, stream, "a", [1, 2])


def test_switching_off_ends_the_file(tmp_path: Path) -> None:
    """While it is off every file is whole; on begins the next one, in the middle of requests."""
    engine = rotating(tmp_path / "r")
    engine.add("a", [1, 2, 3, 4, 5, 6])
    engine.step([("a", 0, 2)])
    assert not engine.capture.switch(False)
    files_of(engine).wait_ended(60)
    with open_stream(tmp_path / "r") as stream:
        check(engine, stream, "a", [0, 1])
    engine.step([("a", 2, 2)])
    assert engine.capture.switch(True) and engine.capture.switch(True)
    engine.step([("a", 4, 2)])
    engine.capture.close()
    assert not engine.capture.switch(True) and len(recordings(tmp_path / "r")) == 2
    with open_stream(tmp_path / "r") as stream:
        check(engine, stream, "a", [0, 1, 4, 5])


def test_a_file_in_the_folder_switches(tmp_path: Path) -> None:
    """While "off" lies in the folder nothing is recorded, whatever else asks for it; once it is gone it goes on."""
    engine = rotating(tmp_path / "r")
    engine.add("a", [1, 2, 3, 4, 5, 6])
    engine.step([("a", 0, 2)])
    (tmp_path / "r" / "off").touch()
    until(lambda: files_of(engine).lane is None)
    engine.step([("a", 2, 1)])
    until(lambda: not engine.capture.switch(True))
    engine.step([("a", 3, 1)])
    (tmp_path / "r" / "off").unlink()
    until(lambda: engine.capture.is_capturing)
    engine.step([("a", 4, 2)])
    engine.capture.close()
    with open_stream(tmp_path / "r") as stream:
        check(engine, stream, "a", [0, 1, 4, 5])
    (tmp_path / "r" / "off").touch()
    # An engine that starts with the file in place records nothing.
    engine = rotating(tmp_path / "r")
    until(lambda: files_of(engine).lane is None)
    engine.add("b", [1, 2])
    engine.step([("b", 0, 2)])
    engine.capture.close()
    assert files_of(engine).report.steps == 0 and len(recordings(tmp_path / "r")) == 2


def test_an_engine_starts_again_in_its_folder(tmp_path: Path) -> None:
    """Files are numbered on, and a request of the second run is never taken for one of the first."""
    for turn in range(2):
        engine = rotating(tmp_path / "r")
        engine.add("0", [turn, 1, 2])
        engine.prompts["again"] = [3, 4, turn]
        engine.capture.begin_request(f"0-{turn}", "0", 3, 0, None)
        scheduled = [("0-00", 0, 3)] if turn == 0 else [(f"0-{turn}", 0, 3)]
        assert engine.capture.arm(scheduled)
        ids = torch.tensor(engine.prompts["0" if turn == 0 else "again"])
        with torch.no_grad():
            engine.run(ids)
        engine.capture.store(scheduled, ids)
        engine.capture.close()
    assert [path.name[:7] for path in recordings(tmp_path / "r")] == ["000000-", "000001-"]
    with open_stream(tmp_path / "r") as stream:
        assert stream.requests == ("0", "0-1")
        assert stream.request("0").token_ids() == {0: 0, 1: 1, 2: 2}
        check(engine, stream, "again", [0, 1, 2], found_as="0-1")


def test_the_oldest_files_go(tmp_path: Path) -> None:
    """Of ``max_files`` the latest stay, of an earlier run or this one; the last, which was empty, was the third."""
    for _ in range(2):
        engine = rotating(tmp_path / "r", max_files=3)
        for turn in range(3):
            engine.add(f"n{turn}", [1, 2])
            engine.step([(f"n{turn}", 0, 2)])
            files_of(engine).rotate()
            files_of(engine).wait_ended(60)
        engine.capture.close()
    assert [path.name[:6] for path in recordings(tmp_path / "r")] == ["000004", "000005"]
    with open_stream(tmp_path / "r") as stream:
        assert "n2" in stream.requests


def test_workers_have_a_folder_each(tmp_path: Path) -> None:
    """Ranks write beside each other; their folders read as one, a request's rows from all of them."""
    engines = []
    for rank in range(2):
        engine = Engine(
            tmp_path / "r",
            place=(rank, 2),
            first_number=40,
            drop=True,
            limits=FileLimits(rotate_bytes=1 << 40, min_free_bytes=0),
        )
        assert engine.capture.path == tmp_path / f"r.rank{rank}"
        engine.add("a", [1, 2, 3, 4])
        engine.step([("a", 0, 2)])
        files_of(engine).rotate()
        engine.step([("a", 2, 2)])
        engines.append(engine)
    for engine in engines:
        engine.capture.close()
    with open_stream([tmp_path / "r.rank0", tmp_path / "r.rank1"]) as stream:
        assert stream.ranks == (0, 1) and len(stream) == 2 * 2 * len(SITES)
        check(engines[0], stream, "a", [0, 1, 2, 3])


def test_one_owner_a_folder(tmp_path: Path) -> None:
    """A second engine does not start into a folder that one writes to."""
    engine = rotating(tmp_path / "r")
    with pytest.raises(BlockingIOError, match="give each process one of its own"):
        rotating(tmp_path / "r")
    engine.capture.close()
    rotating(tmp_path / "r").capture.close()


def test_a_value_larger_than_the_buffer_is_dropped(tmp_path: Path) -> None:
    """One call that is too large costs its rows, not the recording."""
    engine = rotating(tmp_path / "r", config=InstrumentationConfig(max_memory_gb=0.02))
    engine.add("large", [index % 50 for index in range(200_000)])
    assert 200_000 * HIDDEN * 4 > 0.01e9
    engine.step([("large", 0, 200_000)])
    engine.add("small", [1, 2])
    engine.step([("small", 0, 2)])
    engine.capture.close()
    report = files_of(engine).report
    assert report.failures == 0 and report.dropped_records == len(SITES)
    with open_stream(tmp_path / "r") as stream:
        check(engine, stream, "small", [0, 1])


def test_metrics_over_http(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counters of the capture and nothing else, over rotations and failures; a port that is taken is an error."""
    pytest.importorskip("prometheus_client")
    from fx_instrument.integrations import prometheus

    engine = rotating(tmp_path / "r")
    port = prometheus.serve(files_of(engine), 0, rank="0")

    def scraped() -> dict[str, float]:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as response:
            lines = response.read().decode().splitlines()
        return {
            line.partition("{")[0]: float(line.rpartition(" ")[2])
            for line in lines
            if not line.startswith("#")
        }

    assert scraped()["fx_instrument_recording"] == 1
    for turn in range(2):
        engine.add(f"n{turn}", [1, 2])
        engine.step([(f"n{turn}", 0, 2)])
        files_of(engine).rotate()
        files_of(engine).wait_ended(60)
    counts = scraped()
    assert all(name.startswith("fx_instrument_") for name in counts)
    assert counts["fx_instrument_steps_total"] == 2 and counts["fx_instrument_files_total"] == 3
    assert counts["fx_instrument_records_total"] == 2 * len(SITES)
    recordings(tmp_path / "r")[-1].unlink()
    until(lambda: scraped()["fx_instrument_failures_total"] == 1)
    assert scraped()["fx_instrument_recording"] == 0
    with pytest.raises(OSError, match=rf"can't be served at 127\.0\.0\.1:{port} .*another metrics_port"):
        prometheus.serve(files_of(engine), port)
    engine.capture.close()


def test_metrics_of_a_single_file(tmp_path: Path) -> None:
    """One file's capture reports as files that rotate do."""
    engine = Engine(tmp_path / "a.stream")
    engine.add("a", [1, 2])
    engine.step([("a", 0, 2)])
    assert engine.capture.files is not None
    engine.capture.close()
    report = engine.capture.files.report
    assert (report.files, report.failures, report.steps, report.records) == (1, 0, 1, len(SITES))
    assert not report.active and report.stored_bytes == (tmp_path / "a.stream").stat().st_size
