"""What ends a forward call, or a request, in the middle: nothing hangs, nothing is another's, nothing stays open."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from models import PLAIN, make, tokens
from tiny_llm import tiny_causal_lm
from torch import nn
from waiting import recordings

from fx_instrument import InstrumentationConfig, InstrumentationFramework, Recorder, open_stream
from fx_instrument.capture.session import Session
from fx_instrument.serving.tags import Request
from fx_instrument.stream import segment_writer

SITE = "model.layers.0.mlp"


def instrumented(
    model: nn.Module | None = None, *, backend: str | None = "eager", memory_gb: float = 0.05
) -> tuple[Any, InstrumentationFramework]:
    model = make(PLAIN) if model is None else model
    framework = InstrumentationFramework(InstrumentationConfig(max_memory_gb=memory_gb))
    framework.instrument_model(model, backend=backend)
    return model, framework


def test_a_full_buffer_holds_no_call_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a disk that hangs, small calls fill the buffer; then a larger one comes, and is dropped, too."""
    model, framework = instrumented(memory_gb=0.02)
    held, write_all = threading.Event(), segment_writer.write_all
    small, large = tokens(2, 16), tokens(16, 64)

    def hanging(fd: int, views: Any) -> None:
        held.wait(120)
        write_all(fd, views)

    def serve() -> None:
        with torch.no_grad():
            while not recorder.report.dropped_records:
                model(small)
            for _ in range(3):
                model(large)

    recorder = Recorder(framework, tmp_path / "r", min_free_bytes=0)
    with torch.no_grad():
        recorder.start(warm_up=lambda: (model(small), model(large)))
    monkeypatch.setattr(segment_writer, "write_all", hanging)
    server = threading.Thread(target=serve, daemon=True)
    server.start()
    server.join(60)
    hangs = server.is_alive()
    held.set()
    server.join(60)
    recorder.close()
    assert not hangs and recorder.report.failures == 0


class Slow(nn.Module):
    """Waits between two sites, as Python that no graph has."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.go_on = threading.Event(), threading.Event()
        self.self_attn, self.mlp = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.self_attn(x)
        self.inside.set()
        self.go_on.wait(60)
        made: torch.Tensor = self.mlp(x)
        return made


def test_stop_inside_a_call_that_hooks_count(tmp_path: Path) -> None:
    """Of such a call nobody sees the end once the model runs idle; its file ends all the same, and the next begins."""
    model, framework = instrumented(Slow(), backend=None)
    recorder = Recorder(framework, tmp_path / "r", min_free_bytes=0)
    recorder.start()
    call = threading.Thread(target=model, args=(torch.ones(2, 8),))
    call.start()
    assert model.inside.wait(60)
    assert recorder.stop(timeout_s=60)
    model.go_on.set()
    call.join()
    recorder.start()
    model(torch.ones(2, 8))
    recorder.close()
    assert recorder.report.failures == 0 and len(recordings(tmp_path / "r")) == 2


def test_an_interrupt_while_values_wait_for_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C there leaves the file to be ended as any other."""
    model, framework = instrumented()
    reserve = Session.reserve

    def interrupted(session: Session, *arguments: Any, **named: Any) -> Any:
        monkeypatch.setattr(Session, "reserve", reserve)
        raise KeyboardInterrupt

    recorder = Recorder(framework, tmp_path / "r", min_free_bytes=0)
    with torch.no_grad():
        recorder.start(warm_up=lambda: model(tokens(1, 4)))
        monkeypatch.setattr(Session, "reserve", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model(tokens(1, 4))
        model(tokens(1, 4))
    recorder.close(timeout_s=30)
    assert recorder.report.failures == 0


def test_a_task_that_outlives_its_request(tmp_path: Path) -> None:
    """A worker begun inside a request has its context for good; what it does afterwards is not that request's."""
    model, framework = instrumented(tiny_causal_lm("llama"))
    recorder = Recorder(framework, tmp_path / "r", requests_only=True, min_free_bytes=0)

    async def serve() -> None:
        queue: asyncio.Queue[Any] = asyncio.Queue()

        async def work() -> None:
            while True:
                ids, done = await queue.get()
                with torch.no_grad():
                    done.set_result(model(input_ids=ids))

        worker = None
        for name, length in (("asked", 5), (None, 6), (None, 7)):
            with recorder.request(name) if name else contextlib.nullcontext():
                worker = worker or asyncio.create_task(work())
                done = asyncio.get_running_loop().create_future()
                await queue.put((tokens(1, length, vocabulary=30), done))
                await done
        assert worker is not None
        worker.cancel()

    with recorder:
        asyncio.run(serve())
    with open_stream(tmp_path / "r") as stream:
        assert stream.requests == ("asked",) and stream.num_steps == 1
        assert stream.request("asked")[SITE].token_positions.tolist() == [0, 1, 2, 3, 4]


def test_two_calls_of_one_request_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Which of them a later call follows nothing tells: from then on rows have no id, and the log says so."""
    request = Request(("n",), 0.0)
    first = request.runs({"input_ids": torch.ones(1, 5, dtype=torch.int64)})
    assert [(tag and tag.id, position, count) for tag, position, count in first] == [("n", 0, 5)]
    assert request.runs({"input_ids": torch.ones(1, 3, dtype=torch.int64)}) == []
    request.ended()
    assert request.runs({"input_ids": torch.ones(1, 1, dtype=torch.int64)}) == []
    assert caplog.text.count("two forward calls at once") == 1


def test_positions_that_no_token_has(tmp_path: Path) -> None:
    """As ``mask.cumsum(-1) - 1`` gives for padding: nobody's rows, and every request stays readable."""
    model, framework = instrumented(tiny_causal_lm("llama"))
    with torch.no_grad(), Recorder(framework, tmp_path / "r", min_free_bytes=0) as recorder:
        for name, position in (("a", 0), ("b", -1)):
            with recorder.request(name):
                model(
                    input_ids=torch.tensor([[3]]),
                    attention_mask=torch.tensor([[1]]),
                    position_ids=torch.tensor([[position]]),
                )
    with open_stream(tmp_path / "r") as stream:
        assert stream.requests == ("a",) and stream.num_steps == 2


def test_guidance_is_not_of_the_request(tmp_path: Path) -> None:
    """``generate`` runs a second sequence beside the first, and says of the first alone where its tokens are."""
    model, framework = instrumented(tiny_causal_lm("llama"))
    model.generation_config.eos_token_id = None
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    ids = tokens(1, 6, vocabulary=28) + 2
    negative = tokens(1, 9, vocabulary=28, seed=1) + 2
    with (
        torch.no_grad(),
        Recorder(framework, tmp_path / "r", min_free_bytes=0) as recorder,
        recorder.request("a"),
    ):
        answer = model.generate(ids, guidance_scale=1.5, negative_prompt_ids=negative, **options)
    with open_stream(tmp_path / "r") as stream:
        assert stream.request("a").token_ids() == dict(enumerate(answer[0, :-1].tolist()))
        assert stream.request("a")[SITE].token_positions.tolist() == list(range(9))
