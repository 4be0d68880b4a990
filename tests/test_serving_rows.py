"""Whose rows a recorded forward call computes, and at which token positions: missing where unknown, never misplaced."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llm import tiny_llama

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
    """Where a boolean mask hides the call's first token from all, nothing is known of padding."""
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[:, 3:6] = True
    runs = Request(("a", "b"), 0.0).runs({"input_ids": prompt(2, 6), "attention_mask": mask})
    assert [(tag and tag.id, position, count) for tag, position, count in runs] == [("a", 0, 6), ("b", 0, 6)]
