"""An engine that batches requests, on a small compiled model: every row comes back under its request and position."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from toy_engine import HIDDEN, SITES, Engine, Model, capture_into

from fx_instrument import InstrumentationConfig, analyze_activations, engine_capture, open_stream
from fx_instrument.capture.session import Session
from fx_instrument.errors import BufferTooSmallError, InstrumentationError, MissingRecordError
from fx_instrument.serving import one_file


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("all_requests", [True, False])
def test_every_row_at_its_request_and_position(tmp_path: Path, compiled: bool, all_requests: bool) -> None:
    """Chunked, mixed, padded and recomputed rows are stored once, under their request and position."""
    engine = Engine(tmp_path / "out.stream", compiled=compiled, all_requests=all_requests)
    wish = None if all_requests else True
    engine.add("a", list(range(10)), wish)
    engine.add("b", list(range(20, 27)), wish)
    engine.add("silent", [1, 2, 3], False if all_requests else None)
    engine.step([("a", 0, 4)])
    engine.step([("silent", 0, 3), ("b", 0, 5), ("a", 4, 1)])
    engine.step([("a", 5, 5), ("b", 5, 2)], padding=0)
    engine.step([("b", 0, 7)])  # preempted and computed again
    engine.capture.close()
    with open_stream(tmp_path / "out.stream") as stream:
        assert stream.requests == ("a", "b")
        assert stream.num_steps == 3
        for name in stream.requests:
            request = stream.request(name)
            assert list(request) == SITES
            assert request.token_ids() == dict(enumerate(engine.prompts[name]))
            for site, expected in engine.expected(name).items():
                rows = request[site]
                assert rows.token_positions.tolist() == list(range(len(engine.prompts[name])))
                assert rows.missing_positions.numel() == 0
                torch.testing.assert_close(rows.tensor(), expected)
        with pytest.raises(MissingRecordError, match="no rows of a request 'silent'"):
            stream.request("silent")
    assert analyze_activations(tmp_path / "out.stream")["sites"]["layers.0.mlp"]["tokens"] == 17


def test_steps_nobody_asked_for_run_the_plain_graph(tmp_path: Path) -> None:
    """With opt-in, a call without a wanted row delivers nothing and gives the same bits."""
    engine = Engine(tmp_path / "out.stream", all_requests=False)
    engine.add("quiet", [1, 2, 3])
    engine.add("asks", [1, 2, 3], "all")
    engine.capture.sink.fired.clear()
    quiet = engine.step([("quiet", 0, 3)])
    asked = engine.step([("asks", 0, 3)])
    assert torch.equal(quiet, asked)
    assert engine.graphs == 1
    engine.capture.close()
    with open_stream(tmp_path / "out.stream") as stream:
        assert stream.requests == ("asks",)


def test_choices(tmp_path: Path) -> None:
    """Each request gets its own layers, roles and positions."""
    engine = Engine(tmp_path / "out.stream")
    tokens = list(range(6))
    engine.add("last", tokens, {"positions": "last", "layers": [1]})
    engine.add("some", tokens, {"positions": [1, 4], "roles": ["mlp"]})
    engine.add("bad", tokens, {"positions": "everywhere"})
    engine.add("worse", tokens, '{"sites": [["layers.0.mlp"]]}')
    engine.step([("some", 0, 3), ("bad", 0, 6), ("last", 0, 6), ("worse", 0, 6)])
    engine.step([("some", 3, 3)])
    assert engine.capture.refused_requests == 2
    engine.capture.close()
    with open_stream(tmp_path / "out.stream") as stream:
        assert set(stream.requests) == {"last", "some"}
        last, some = stream.request("last"), stream.request("some")
        assert list(last) == ["layers.1.self_attn", "layers.1.mlp"]
        assert last["layers.1.mlp"].token_positions.tolist() == [5]
        assert list(some) == ["layers.0.mlp", "layers.1.mlp"]
        assert some["layers.0.mlp"].token_positions.tolist() == [1, 4]
        expected = engine.expected("some")["layers.0.mlp"][[1, 4]]
        torch.testing.assert_close(some["layers.0.mlp"].tensor(), expected)
        with pytest.raises(MissingRecordError, match="not asked for"):
            some["layers.0.self_attn"]


def test_positions_that_a_prefix_hit_spared_are_missing(tmp_path: Path) -> None:
    """Rows start at the position that the engine computed first; what came before is reported, not guessed."""
    engine = Engine(tmp_path / "out.stream")
    engine.add("hit", list(range(8)), cached=4)
    engine.step([("hit", 4, 4)])
    engine.capture.close()
    with open_stream(tmp_path / "out.stream") as stream:
        request = stream.request("hit")
        assert request.num_cached_tokens == 4
        rows = request["layers.0.mlp"]
        assert rows.token_positions.tolist() == [4, 5, 6, 7]
        assert rows.missing_positions.tolist() == [0, 1, 2, 3]
        torch.testing.assert_close(rows.tensor(), engine.expected("hit")["layers.0.mlp"][4:])


def test_an_id_that_a_client_uses_twice(tmp_path: Path) -> None:
    """The second request of one id is found under the engine's own id."""
    engine = Engine(tmp_path / "out.stream")
    engine.add("x", [1, 2])
    engine.prompts["y"] = [3, 4, 5]
    engine.capture.begin_request("y-00", "x", 3, 0, None)
    engine.step([("x", 0, 2), ("y", 0, 3)])
    engine.capture.close()
    with open_stream(tmp_path / "out.stream") as stream:
        assert stream.requests == ("x", "y-00")
        assert len(stream.request("y-00")["layers.0.mlp"]) == 3


def test_an_id_that_the_engine_uses_again(tmp_path: Path) -> None:
    """Once a request has finished its engine may give its id to the next: a request of its own, in all workers' files.

    The second worker has other sites, which the request that is refused there asks for: it numbers it all the same.
    """
    prompts = [[1, 2, 3, 4, 5], [7, 8, 9], [4, 4]]
    engines = []
    for rank in range(2):
        engine = Engine(tmp_path / "out.stream", place=(rank, 2), first_number=1 << 40)
        for prompt in prompts:
            engine.add("refused", [1], {"layers": [0] if rank == 0 else [7]})
            engine.add("a", prompt)
            # The second worker lost the step that had all of the first request.
            if rank == 0 or prompt is not prompts[0]:
                engine.step([("refused", 0, 1), ("a", 0, len(prompt))])
            # An engine that comes back to a request tells of it again.
            engine.add("refused", [1], {"layers": [0] if rank == 0 else [7]})
            engine.capture.finish_requests(["a-00", "refused-00"])
        engine.capture.close()
        engines.append(engine)
    with open_stream([engine.capture.path for engine in engines]) as stream:
        names = [name for name in stream.requests if name.startswith("a")]
        assert names[:2] == ["a", "a-00"] and names[2].startswith("a-00-") and len(names) == 3
        for name, prompt in zip(names, prompts, strict=True):
            request = stream.request(name)
            assert list(request.token_ids().values()) == prompt
            assert request.num_prompt_tokens == len(prompt) and request.engine_id == "a-00"
            engine.prompts["a"] = prompt
            torch.testing.assert_close(request["layers.1.mlp"].tensor(), engine.expected("a")["layers.1.mlp"])


def test_calls_larger_than_the_buffer_go_in_pieces(tmp_path: Path) -> None:
    """A call whose values are larger than the buffer is stored whole: its sites go one after the other."""
    engine = Engine(tmp_path / "out.stream", config=InstrumentationConfig(max_memory_gb=0.01))
    tokens = [index % 50 for index in range(40_000)]
    engine.add("long", tokens)
    engine.step([("long", 0, len(tokens))])
    assert engine.capture.files is not None and engine.capture.files.report.failures == 0
    engine.capture.close()
    with open_stream(tmp_path / "out.stream") as stream:
        assert stream.raw_bytes == 4 * len(tokens) * HIDDEN * 4
        rows = stream.request("long")["layers.1.mlp"]
        torch.testing.assert_close(rows.tensor(), engine.expected("long")["layers.1.mlp"])


def test_a_step_waits_no_longer_than_it_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All pieces of a step's values share ``max_stall_s``; the next step has all of it again."""
    now_s = 1000.0
    monkeypatch.setattr(engine_capture, "time", SimpleNamespace(monotonic=lambda: now_s))
    left_s: list[float] = []
    open_session = engine_capture.open_session

    def opened(*arguments: Any, patience: Callable[[], float], **options: Any) -> Session:
        session = open_session(*arguments, patience=patience, **options)
        reserve = session.reserve

        def reserve_later(*arguments: Any, **options: Any) -> Any:
            nonlocal now_s
            left_s.append(patience())
            now_s += 0.375
            return reserve(*arguments, **options)

        monkeypatch.setattr(session, "reserve", reserve_later)
        return session

    monkeypatch.setattr(engine_capture, "open_session", opened)
    config = InstrumentationConfig(max_memory_gb=0.01)
    engine = Engine(tmp_path / "out.stream", config=config, max_stall_s=0.5)
    tokens = [index % 50 for index in range(40_000)]
    for name in ("a", "b"):
        engine.add(name, tokens)
        engine.step([(name, 0, len(tokens))])
    engine.capture.close()
    assert left_s == [0.5, 0.125, 0.0, 0.0] * 2


def test_a_site_that_never_runs_is_an_error_at_start(tmp_path: Path) -> None:
    """A planned site that delivers nothing while the engine warms up is refused, by name."""
    capture = capture_into(tmp_path / "out.stream")
    model = Model()
    capture.attach(model, 0, 1)
    model.layers[0](torch.zeros(2, HIDDEN))
    with pytest.raises(InstrumentationError, match=r"2 of 4 planned sites.*layers\.1\.self_attn"):
        capture.check_fired(64)
    capture.close()


def test_a_buffer_too_small_for_a_full_call_is_an_error_at_start(tmp_path: Path) -> None:
    """The engine's largest call must fit, site by site; the message names both sizes."""
    engine = Engine(tmp_path / "out.stream", config=InstrumentationConfig(max_memory_gb=0.01))
    with pytest.raises(BufferTooSmallError, match=r"64000000 bytes.*max_memory_gb=0\.01"):
        engine.capture.check_fired(1_000_000)
    engine.capture.close()


def test_a_failure_switches_off_and_the_engine_goes_on(tmp_path: Path) -> None:
    """After a failure calls run on, nothing more is captured, and the report says why."""
    engine = Engine(tmp_path / "out.stream")
    engine.add("a", [1, 2, 3])
    assert engine.capture.arm([("a-00", 0, 3)])
    engine.capture.store([("a-00", 0, 3)], None)  # no values: no forward call was made
    assert not engine.capture.is_capturing
    engine.step([("a", 0, 3)])
    assert not engine.capture.switch(True)
    report = engine.capture.report()
    assert report is not None and report["records"] == 0 and report["failures"] == 1
    assert "delivered nothing" in report["last_failure"] and not report["active"]
    engine.capture.close()
    assert open_stream(tmp_path / "out.stream").requests == ()


def test_switched_off_and_on(tmp_path: Path) -> None:
    """While it is off nothing is stored; then rows go on at their positions, and what passed is missing."""
    engine = Engine(tmp_path / "a.stream")
    engine.add("a", [1, 2, 3, 4, 5, 6])
    engine.step([("a", 0, 2)])
    assert not engine.capture.switch(False)
    engine.add("b", [7, 8, 9])
    engine.step([("a", 2, 2), ("b", 0, 1)])
    assert engine.capture.switch(True)
    engine.step([("b", 1, 2), ("a", 4, 2)])
    engine.capture.close()
    with open_stream(tmp_path / "a.stream") as stream:
        assert stream.num_steps == 2
        for name, kept, passed in (("a", [0, 1, 4, 5], [2, 3]), ("b", [1, 2], [0])):
            for site, expected in engine.expected(name).items():
                rows = stream.request(name)[site]
                assert rows.token_positions.tolist() == kept and rows.missing_positions.tolist() == passed
                torch.testing.assert_close(rows.tensor(), expected[kept])


@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_that_vanished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, replaced: bool
) -> None:
    """A removed folder, or another file in its place: one line in the log, and the engine answers as before."""
    monkeypatch.setattr(one_file, "_LOOK_S", 0.0)
    (tmp_path / "r").mkdir()
    path = tmp_path / "r" / "a.stream"
    engine = Engine(path)
    engine.add("a", [1, 2, 3])
    before = engine.step([("a", 0, 3)])
    shutil.rmtree(tmp_path / "r")
    if replaced:
        (tmp_path / "r").mkdir()
        path.write_bytes(b"another's")
    for name in ("b", "c"):
        engine.add(name, [1, 2, 3])
        assert torch.equal(engine.step([(name, 0, 3)]), before)
    says = "was replaced while" if replaced else "was deleted while"
    assert not engine.capture.is_capturing and not engine.capture.is_following
    assert engine.capture.files is not None and says in str(engine.capture.files.report.last_failure)
    lines = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(lines) == 1 and "switched off, responses are not affected" in lines[0] and says in lines[0]
    engine.capture.close()
    assert path.read_bytes() == b"another's" if replaced else not path.exists()


def test_the_file_is_private(tmp_path: Path) -> None:
    """Activations reveal prompts: only the user may read the file."""
    engine = Engine(tmp_path / "out.stream")
    engine.capture.close()
    assert (tmp_path / "out.stream").stat().st_mode & 0o077 == 0


def test_a_site_that_a_cuda_graph_replays_without_its_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hook that ran while the engine recorded a CUDA graph is silent in its replays: refused at start, by name."""

    class OnDevice(torch.Tensor):
        is_cuda = True

    engine = Engine(tmp_path / "out.stream")
    sink = engine.capture.sink
    site = engine.capture.sites[0]
    value = torch.ones(2, HIDDEN).as_subclass(OnDevice)
    for recording in (False, True):
        sink.starting = True
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda recording=recording: recording)
        sink.record_eager(site, value)
        if not recording:
            engine.capture.check_fired(64)
    with pytest.raises(InstrumentationError, match=rf"{site.name} runs inside an operator that CUDA graphs"):
        engine.capture.check_fired(64)
    engine.capture.close()
