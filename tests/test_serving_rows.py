"""Whose rows a recorded forward call computes, and at which token positions: missing where unknown, never misplaced."""

from __future__ import annotations

import contextvars
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import PLAIN, make, tokens
from tiny_llm import tiny_llama
from waiting import until

from fx_instrument import InstrumentationConfig, InstrumentationFramework, Recorder, open_stream
from fx_instrument.serving.tags import Request

SITE = "model.layers.0.mlp"


def instrumented(model: Any) -> tuple[Any, InstrumentationFramework]:
    framework = InstrumentationFramework(InstrumentationConfig(max_memory_gb=0.05))
    framework.instrument_model(model, backend="eager")
    return model, framework


def llm() -> tuple[Any, InstrumentationFramework]:
    model = tiny_llama()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return instrumented(model)


def prompt(batch: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(1, 37, (batch, length), generator=generator)


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("num_padding", [0, 3])
def test_rows_with_either_cache(cache: str | None, num_padding: int, tmp_path: Path) -> None:
    """A static cache's mask has the columns of slots that are still empty: rows are told apart all the same."""
    model, framework = llm()
    ids, mask = prompt(2, 7), torch.ones(2, 7, dtype=torch.int64)
    mask[0, :num_padding] = 0
    with Recorder(framework, tmp_path / "r", min_free_bytes=0) as recorder, recorder.request(["a", "b"]):
        model.generate(
            ids, attention_mask=mask, max_new_tokens=5, do_sample=False, cache_implementation=cache
        )
    with open_stream(tmp_path / "r") as stream:
        for row, name, num_prompt in ((0, "a", 7 - num_padding), (1, "b", 7)):
            request = stream.request(name)
            rows = request[SITE]
            assert rows.token_positions.tolist() == list(range(num_prompt + 4))
            assert request.num_prompt_tokens == num_prompt
            steps = [stream.read(SITE, step)[row] for step in range(5)]
            assert torch.equal(rows.tensor(), torch.cat([steps[0][7 - num_prompt :], *steps[1:]]))


def test_a_sliding_window_is_no_padding() -> None:
    """Where a row of a 4-D mask hides the call's first token from all, nothing is known of padding."""
    mask = torch.zeros(2, 8, dtype=torch.int8)
    mask[:, 3:6] = True
    runs = Request(("a", "b"), 0.0).runs({"input_ids": prompt(2, 6), "attention_mask": mask})
    assert [(tag and tag.id, position, count) for tag, position, count in runs] == [("a", 0, 6), ("b", 0, 6)]


def test_what_was_not_seen_is_missing(tmp_path: Path) -> None:
    """Calls while the recorder is off leave the positions behind them unknown, where no input tells them."""
    model, framework = instrumented(make(PLAIN))
    recorder = Recorder(framework, tmp_path / "r", min_free_bytes=0)
    with recorder.request("early"):
        model(tokens(1, 5))
        recorder.start()
        model(tokens(1, 1))
    with recorder.request("cut"):
        model(tokens(1, 5))
        model(tokens(1, 1))
        recorder.rotate()
        model(tokens(1, 1))
        recorder.stop()
        model(tokens(1, 1))
        recorder.start()
        model(tokens(1, 1))
    with recorder.request(["odd", "odder"]):
        model(tokens(3, 5))
        model(tokens(2, 1))
    with recorder.request("whole"):
        model(tokens(1, 4))
        model(tokens(1, 1))
    recorder.close()
    with open_stream(tmp_path / "r") as stream:
        assert stream.requests == ("cut", "whole")
        for name, num_tokens, num_prompt in (("cut", 7, 5), ("whole", 5, 4)):
            request = stream.request(name)
            assert request["layers.0.mlp"].token_positions.tolist() == list(range(num_tokens))
            assert request.num_prompt_tokens == num_prompt


def test_positions_that_the_inputs_tell(tmp_path: Path) -> None:
    """A request that is seen from its middle on has the positions of its inputs, and a prompt of unknown length."""
    model, framework = llm()
    recorder = Recorder(framework, tmp_path / "r", min_free_bytes=0)
    cache_of = pytest.importorskip("transformers").DynamicCache
    ids = prompt(1, 12)
    cache = cache_of(config=model.config)
    with recorder.request("late"):
        model(ids[:, :8], past_key_values=cache)
        recorder.start()
        model.generate(ids, past_key_values=cache, max_new_tokens=3, do_sample=False)
    cache = cache_of(config=model.config)
    model(ids[:, :8], past_key_values=cache)
    with recorder.request("prefix"):
        model.generate(ids, past_key_values=cache, max_new_tokens=3, do_sample=False)
    recorder.close()
    with open_stream(tmp_path / "r") as stream:
        for name in ("late", "prefix"):
            request = stream.request(name)
            assert request[SITE].token_positions.tolist() == list(range(8, 14))
            assert request[SITE].missing_positions.tolist() == list(range(8))
            assert request.num_prompt_tokens is None


class Fails(torch.nn.Module):
    """Raises where the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.times = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.times:
            self.times -= 1
            raise RuntimeError("out of memory")
        return x


def test_a_call_that_is_tried_again(tmp_path: Path) -> None:
    """A forward call that failed moved nothing on, and one that runs while the caller handles the failure does."""
    model = make(PLAIN)
    fails = Fails()
    model.layers[1].norm1 = torch.nn.Sequential(model.layers[1].norm1, fails)
    model, framework = instrumented(model)
    with Recorder(framework, tmp_path / "r", min_free_bytes=0) as recorder, recorder.request("again"):
        fails.times = 1
        try:
            model(tokens(1, 4))
        except RuntimeError:
            model(tokens(1, 4))
        model(tokens(1, 1))
    with open_stream(tmp_path / "r") as stream:
        request = stream.request("again")
        assert request.num_prompt_tokens == 4
        for site in ("layers.0.mlp", "layers.1.mlp"):
            rows = request[site]
            assert rows.token_positions.tolist() == [0, 1, 2, 3, 4]
            steps = [stream.read(site, step)[0] for step in (1, 2)]
            assert torch.equal(rows.tensor(), torch.cat(steps))


def test_an_id_that_comes_again(tmp_path: Path) -> None:
    """Two sequences of one id are two requests: rows of a batch, calls in one block, and what a row source says."""
    model, framework = llm()
    with Recorder(framework, tmp_path / "r", min_free_bytes=0) as recorder:
        with recorder.request("two"):
            answers = [
                model.generate(prompt(1, length), max_new_tokens=3, do_sample=False) for length in (8, 4)
            ]
        with recorder.request(["x", "x"]):
            both = prompt(2, 5)
            model(both)
        with recorder.request("uncached"):
            answers.append(model.generate(prompt(1, 6), max_new_tokens=3, do_sample=False, use_cache=False))
        lengths = (5, 1, 3, 1, 5)
        runs = iter([("s", 0, 5), ("s", 5, 1), ("s", 0, 3), ("s", 3, 1), ("s", 0, 5)])
        recorder.set_row_source(lambda: [next(runs)])
        for length in lengths:
            model(prompt(1, length), use_cache=False)
    with open_stream(tmp_path / "r") as stream:
        by_id: dict[str, list[list[int]]] = {}
        for name in stream.requests:
            request = stream.request(name)
            assert request[SITE].token_positions.tolist() == list(range(request.num_tokens))
            by_id.setdefault(name.split("-")[0], []).append(list(request.token_ids().values()))
        assert by_id["two"] == [answer[0, :-1].tolist() for answer in answers[:2]]
        assert by_id["x"] == both.tolist()
        assert by_id["uncached"] == [answers[2][0, :-1].tolist()]
        # The last run has all tokens so far and one more: its engine computed them again.
        assert [len(ids) for ids in by_id["s"]] == [6, 5]


@pytest.mark.parametrize(("length", "chunk"), [(9, 4), (5, 4), (8, 4)])
def test_a_prompt_that_generate_runs_in_pieces(length: int, chunk: int, tmp_path: Path) -> None:
    """The length of a piece is never given as that of the prompt, even where the second piece is a single token."""
    model, framework = llm()
    with Recorder(framework, tmp_path / "r", min_free_bytes=0) as recorder:
        for name, size in (("pieces", chunk), ("whole", None)):
            with recorder.request(name):
                model.generate(prompt(1, length), max_new_tokens=3, do_sample=False, prefill_chunk_size=size)
    with open_stream(tmp_path / "r") as stream:
        assert stream.request("pieces").num_prompt_tokens is None
        assert stream.request("whole").num_prompt_tokens == length
        for request in map(stream.request, stream.requests):
            assert request[SITE].token_positions.tolist() == list(range(length + 2))


def test_a_prompt_that_the_caller_runs_in_pieces(tmp_path: Path) -> None:
    """A second piece takes back what was said of the first one, in the same file and in the next; later calls don't."""
    model, framework = llm()
    with Recorder(framework, tmp_path / "r", min_free_bytes=0) as recorder:
        for name, lengths, rotates_before in (
            ("pieces", (4, 3, 1), 9),
            ("over files", (4, 3, 1), 1),
            ("chat", (4, 1, 3), 1),
        ):
            with recorder.request(name):
                for turn, length in enumerate(lengths):
                    if turn == rotates_before:
                        recorder.rotate()
                    model(tokens(1, length))
        with recorder.request("not seen"):
            model(tokens(1, 4))
            recorder.stop()
            model(tokens(1, 3))
            recorder.start()
            model(tokens(1, 1), position_ids=torch.tensor([[7]]))
    with open_stream(tmp_path / "r") as stream:
        known = {name: stream.request(name).num_prompt_tokens for name in stream.requests}
        assert known == {"pieces": None, "over files": None, "chat": 4, "not seen": None}


def test_a_row_source_that_tells_requests_apart(tmp_path: Path) -> None:
    """What an engine computes again in pieces is the same request's, and a hit in its cache is not the one before."""
    model, framework = instrumented(make(PLAIN))
    calls = [
        ("s", 0, 4, 6, 0),
        ("s", 4, 2, 6, 0),
        ("s", 6, 1, 6, 0),
        ("s", 0, 3, 6, 0),  # given up and computed again
        ("s", 3, 5, 6, 0),
        ("s", 2, 2, 4, 1),  # another one, whose first two tokens were cached
        ("s", 4, 1, 4, 1),
    ]
    with Recorder(framework, tmp_path / "r", min_free_bytes=0) as recorder:
        runs = iter(calls)
        recorder.set_row_source(lambda: [next(runs)])
        for _, _, count, _, _ in calls:
            model(tokens(1, count, seed=count))
    with open_stream(tmp_path / "r") as stream:
        first, second = map(stream.request, stream.requests)
        assert (first.num_prompt_tokens, second.num_prompt_tokens) == (6, 4)
        rows = first["layers.0.mlp"]
        assert rows.token_positions.tolist() == list(range(8))
        again = torch.cat([stream.read("layers.0.mlp", step)[0] for step in (3, 4)])
        assert torch.equal(rows.tensor(), again)
        assert second["layers.0.mlp"].token_positions.tolist() == [2, 3, 4]


@pytest.mark.parametrize(
    ("run", "says"),
    [
        ((17, 0, 4), "as strings, got 17"),
        (("s", -1, 4), "from 0 to"),
        (("s", 1 << 62, 4), "from 0 to"),
        (("s", 0, (1 << 31) + 1), "from 0 to"),
        (("s", 0.0, 4), "cannot be interpreted as an integer"),
        (("s", 0, 4, -1), "from 0 to"),
    ],
)
def test_a_row_source_that_no_file_could_hold(run: tuple[Any, ...], says: str, tmp_path: Path) -> None:
    """It ends the recording with the reason, and what was recorded before it can be read."""
    model, framework = instrumented(make(PLAIN))
    recorder = Recorder(framework, tmp_path / "r", min_free_bytes=0)
    recorder.start()
    runs = iter([("good", 0, 4), run])
    recorder.set_row_source(lambda: [next(runs)])
    for _ in range(2):
        model(tokens(1, 4))
    until(lambda: says in str(recorder.report.last_failure))
    recorder.close()
    with open_stream(tmp_path / "r") as stream:
        assert stream.requests == ("good",)


def test_a_row_source_with_a_request_that_waits(tmp_path: Path) -> None:
    """A run of no rows is nothing to note; NumPy's integers are integers."""
    model, framework = instrumented(make(PLAIN))
    with Recorder(framework, tmp_path / "r", min_free_bytes=0) as recorder:
        recorder.set_row_source(lambda: [("waits", 3, 0), ("runs", np.int64(2), np.int32(4), np.int64(6))])
        model(tokens(1, 4))
        assert recorder.report.failures == 0
    with open_stream(tmp_path / "r") as stream:
        assert stream.requests == ("runs",)
        assert stream.request("runs")["layers.0.mlp"].token_positions.tolist() == [2, 3, 4, 5]


def test_each_recorder_has_requests_of_its_own(tmp_path: Path) -> None:
    """Of two models in one request, a recorder notes the rows of its own, and only those that it was asked for."""
    (embedder, first), (generator, second) = instrumented(make(PLAIN)), instrumented(make(PLAIN))
    one = Recorder(first, tmp_path / "one", min_free_bytes=0, requests_only=True)
    two = Recorder(second, tmp_path / "two", min_free_bytes=0)
    with one, two:
        with two.request("r1"):
            embedder(tokens(1, 7))
            generator(tokens(1, 5))
        with one.request("r2"), two.request("r2"):
            embedder(tokens(1, 6))
            generator(tokens(1, 3))
    with open_stream(tmp_path / "one") as stream:
        assert stream.requests == ("r2",)
        assert stream.request("r2")["layers.0.mlp"].token_positions.tolist() == list(range(6))
    with open_stream(tmp_path / "two") as stream:
        assert stream.requests == ("r1", "r2")
        for name, count in (("r1", 5), ("r2", 3)):
            assert stream.request(name)["layers.0.mlp"].token_positions.tolist() == list(range(count))


def test_a_generator_that_ends_in_another_context(tmp_path: Path) -> None:
    """A streamed response does not fail at its end for having been recorded."""
    model, framework = instrumented(make(PLAIN))
    with Recorder(framework, tmp_path / "r", min_free_bytes=0) as recorder:

        def answer() -> Iterator[int]:
            with recorder.request("s"):
                model(tokens(1, 4))
                yield 0

        steps = answer()
        assert contextvars.copy_context().run(next, steps) == 0
        assert contextvars.copy_context().run(next, steps, None) is None


def test_a_batch_that_its_ids_do_not_divide(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Recorded without ids; said once a request."""
    model, framework = instrumented(make(PLAIN))
    with Recorder(framework, tmp_path / "r", min_free_bytes=0) as recorder, recorder.request(["a", "b"]):
        for _ in range(2):
            model(tokens(3, 4))
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        "a request of 2 ids ran a batch of 3: its rows are recorded without ids"
    ]
    with open_stream(tmp_path / "r") as stream:
        assert stream.num_steps == 2 and stream.requests == ()
