"""What a request's rows and tokens are where a site has not one row a token, and where a position is computed twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import tokens
from tiny_llm import tiny_llama
from written import write_stream

from fx_instrument import HookConfig, InstrumentationConfig, InstrumentationFramework, Recorder, open_stream
from fx_instrument.requests import NEW_INPUT, ROWS_INPUT, TOKENS_INPUT, encode_new, encode_rows

SITE = "model.layers.0.mlp"


def generate(folder: Path, prompt: torch.Tensor, names: list[str], **options: Any) -> torch.Tensor:
    """Record one ``generate`` of the named requests, a row of ``prompt`` each; answers all token ids."""
    model = tiny_llama()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    hooks = HookConfig(target_layers=["lm_head", SITE])
    framework = InstrumentationFramework(InstrumentationConfig(max_memory_gb=0.05, hook_config=hooks))
    framework.instrument_model(model, backend="eager")
    with torch.no_grad(), Recorder(framework, folder, min_free_bytes=0) as recorder, recorder.request(names):
        mask = torch.ones_like(prompt)
        answer: torch.Tensor = model.generate(prompt, attention_mask=mask, do_sample=False, **options)
    return answer


def test_last_tokens_only_are_never_taken_for_a_request(tmp_path: Path) -> None:
    """lm_head's prefill has a row a request, and more of them than the first request has tokens."""
    names = ["a", "b", "c", "d"]
    generate(tmp_path / "r", tokens(4, 3), names, max_new_tokens=3)
    with open_stream(tmp_path / "r") as stream:
        assert stream.read("lm_head", 0).shape[:2] == (4, 1)
        for index, name in enumerate(names):
            rows = stream.request(name)["lm_head"]
            assert rows.token_positions.tolist() == [3, 4]
            assert rows.missing_positions.tolist() == [0, 1, 2]
            expected = torch.cat([stream.read("lm_head", step)[index] for step in (1, 2)])
            assert torch.equal(rows.tensor(), expected)
            assert stream.request(name)[SITE].token_positions.tolist() == [0, 1, 2, 3, 4]


def test_a_site_without_a_row_a_token_says_so(tmp_path: Path) -> None:
    generate(tmp_path / "r", tokens(4, 3), ["a", "b", "c", "d"], max_new_tokens=1)
    with open_stream(tmp_path / "r") as stream:
        rows = stream.request("b")["lm_head"]
        assert len(rows) == 0
        with pytest.raises(ValueError, match="'lm_head' has not one row a token"):
            rows.tensor()


@pytest.mark.parametrize("seed", range(2))
def test_a_rejected_draft_is_no_token(seed: int, tmp_path: Path) -> None:
    """Prompt lookup computes drafts and, where they are rejected, the same positions again."""
    prompt = (tokens(1, 6, vocabulary=6, seed=seed) + 1).repeat(1, 3)
    answer = generate(tmp_path / "r", prompt, ["s"], max_new_tokens=14, prompt_lookup_num_tokens=4)
    with open_stream(tmp_path / "r") as stream:
        found = stream.request("s").token_ids()
        if stream.inputs(0)["input_ids"].shape[1] > prompt.shape[1]:
            assert stream.request("s").num_prompt_tokens is None  # drafts came with the prompt
        else:
            assert stream.request("s").num_prompt_tokens == prompt.shape[1]
        computed_twice = sum(stream.read(SITE, step).shape[1] for step in range(stream.num_steps)) - len(
            found
        )
        last = {}
        for step in range(stream.num_steps):
            inputs = stream.inputs(step)
            position = int(inputs["request_rows"][0, 1])
            last.update(enumerate(inputs["input_ids"].flatten().tolist(), position))
    assert computed_twice > 0 and found == last
    # The last call's drafts may be rejected, too; what lies before it is the answer.
    assert [found[place] for place in range(position)] == answer[0, :position].tolist()


def test_a_batch_that_is_padded_behind_its_rows(tmp_path: Path) -> None:
    """Continuous batching pads to sizes that it has graphs for: the ids have as many rows as the values."""
    value = torch.arange(8.0).view(1, 4, 2)
    inputs = {
        ROWS_INPUT: encode_rows([(5, 0, 2), (6, 3, 1)]),
        NEW_INPUT: encode_new([{"number": 5, "id": "a"}, {"number": 6, "id": "b"}]),
        TOKENS_INPUT: torch.arange(4).view(1, 4),
    }
    with open_stream(write_stream(tmp_path / "a.stream", [{SITE: value}], inputs=[inputs])) as stream:
        assert torch.equal(stream.request("a")[SITE].tensor(), value[0, :2])
        assert torch.equal(stream.request("b")[SITE].tensor(), value[0, 2:3])
        assert stream.request("b").token_ids() == {3: 2}


def test_sites_of_several_workers(tmp_path: Path) -> None:
    """A request's sites are those of all workers that hold some, each of which names its own."""
    paths = []
    for rank, site in enumerate(("layers.0.mlp", "layers.1.mlp")):
        entry = {"number": 5, "id": "a", "engine_id": "a-00", "prompt_tokens": 2, "sites": [site]}
        inputs = {ROWS_INPUT: encode_rows([(5, 0, 2)]), NEW_INPUT: encode_new([entry])}
        value = torch.full((2, 3), float(rank))
        paths.append(
            write_stream(tmp_path / f"{rank}.stream", [{site: value}], inputs=[inputs], rank=rank, world=2)
        )
    with open_stream(paths) as stream:
        assert stream.requests == ("a",)
        request = stream.request("a")
        assert {site: int(rows.tensor()[0, 0]) for site, rows in request.items()} == {
            "layers.0.mlp": 0,
            "layers.1.mlp": 1,
        }
