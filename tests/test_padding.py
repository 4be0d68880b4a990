"""Padding of models that are given a mask for each kind of layer, or a window's: no request's rows, and not counted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import tokens
from tiny_llm import tiny_causal_lm

from fx_instrument import InstrumentationConfig, InstrumentationFramework, Recorder, open_stream
from fx_instrument.graph.counting import integer_inputs
from fx_instrument.mask_columns import padding_before

SITE = "model.layers.0.mlp"


@pytest.mark.parametrize(
    "positions, padding",
    [
        ([0, 0, 0, 0, 1, 2], 3),
        ([1, 1, 0, 1], 2),
        ([0, 1, 2], 0),
        ([5], 0),
        ([], 0),
        ([7, 8], 0),
        ([0, 1, 0, 1, 2], 0),
        ([0, 1, 2, 0, 0], 0),
        ([-5, -5], 0),
        ([0, 1, 2, 1, 1], 0),
    ],
)
def test_padding_by_positions(positions: list[int], padding: int) -> None:
    """Only what stands in front of position 0 and shares one; sequences behind each other are none."""
    assert padding_before(positions) == padding


def test_of_several_masks_that_of_full_attention_is_kept() -> None:
    full = torch.tril(torch.ones(4, 6, dtype=torch.bool)).expand(2, 1, 4, 6)
    window = torch.zeros(2, 1, 4, 6, dtype=torch.bool)
    masks = {"sliding_attention": window, "full_attention": full}
    found = integer_inputs((), (), {"attention_mask": masks})
    assert torch.equal(found["attention_mask"], full[:, 0, -1].to(torch.int8))
    assert integer_inputs((), (), {"attention_mask": {"sliding_attention": window}}) == {}


@pytest.mark.parametrize("kind", ["qwen2", "gemma3_text", "mistral"])
def test_a_padded_batch_with_a_static_cache(kind: str, tmp_path: Path) -> None:
    """generate() gives these a mask for each kind of layer, some none that tells of padding: their positions do."""
    window = {"sliding_window": 4} if kind == "mistral" else {}
    model = tiny_causal_lm(kind, head_dim=8, pad_token_id=0, **window)
    model.generation_config.eos_token_id = None
    framework = InstrumentationFramework(InstrumentationConfig(max_memory_gb=0.05))
    framework.instrument_model(model, backend="eager")
    prompt = tokens(2, 9, vocabulary=35) + 2
    mask = torch.ones_like(prompt)
    prompt[1, :3] = mask[1, :3] = 0
    options = {"do_sample": False, "cache_implementation": "static", "max_new_tokens": 4}
    with torch.no_grad(), Recorder(framework, tmp_path / "r", min_free_bytes=0) as recorder:
        with recorder.request(["a", "b"]):
            answer = model.generate(prompt, attention_mask=mask, **options)
        with recorder.request("c"):
            model.generate(prompt[1:], attention_mask=mask[1:], **options)
    expected = {"a": answer[0, :-1], "b": answer[1, 3:-1], "c": answer[1, 3:-1]}
    with open_stream(tmp_path / "r") as stream:
        for name, ids in expected.items():
            request = stream.request(name)
            assert request.token_ids() == dict(enumerate(ids.tolist()))
            assert request.num_prompt_tokens == len(ids) - 3
            assert request[SITE].missing_positions.tolist() == []
        rows = torch.cat([stream.read(SITE, step)[1, 3 if step == 0 else 0 :] for step in range(4)])
        assert torch.equal(stream.request("b")[SITE].tensor(), rows)
    analysis = framework.analyze_activations(tmp_path / "r")
    assert {site["tokens"] for site in analysis["sites"].values()} == {sum(map(len, expected.values()))}
