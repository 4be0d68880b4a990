"""transformers' continuous batching: its paged attention breaks the graph, and every value is what eager hooks see."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hooks import eager_values, same_bits

from fx_instrument import InstrumentationFramework, open_stream

transformers = pytest.importorskip("transformers")

from test_generate import build  # noqa: E402

PROMPTS = [[5, 6, 7, 8, 9], [11, 12, 13], [20] * 9]
NEW_TOKENS = 4


def run(model: Any) -> dict[str, list[int]]:
    """The tokens of all prompts, which the engine puts into one batch: all are queued before it starts."""
    manager = model.init_continuous_batching(
        generation_config=transformers.GenerationConfig(
            max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0
        ),
        continuous_batching_config=transformers.ContinuousBatchingConfig(
            page_size=16,
            num_blocks=8,
            max_batch_tokens=32,
            max_requests_per_batch=4,
            auto_switch_to_flash=False,
        ),
    )
    for number, prompt in enumerate(PROMPTS):
        manager.add_request(prompt, request_id=str(number))
    manager.start()
    try:
        results = [manager.get_result(timeout=200) for _ in PROMPTS]
    finally:
        manager.stop(block=True)
    assert all(result is not None and result.error is None for result in results)
    return {result.request_id: result.generated_tokens for result in results}


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_continuous_batching(tmp_path: Path, backend: str, attention: str) -> None:
    """Mixed prefill and decode steps: the tokens of the plain model, and under aot_eager the bits of eager hooks."""
    model = build("llama", attn_implementation=attention)
    reference = copy.deepcopy(model)
    expected_tokens = run(reference)
    framework = InstrumentationFramework()
    framework.instrument_model(model, backend=backend, dynamic=True)
    with framework.capture_activations(tmp_path / "o.stream") as capture:
        assert run(model) == expected_tokens
    expected = eager_values(reference, [site.name for site in framework.sites], run)
    report = capture.report
    assert report.records == len(expected) == 4 * NEW_TOKENS and report.steps == NEW_TOKENS
    # Attention runs as Python behind the break, MLPs in graphs.
    assert report.eager_records == report.records // 2
    with open_stream(tmp_path / "o.stream") as stream:
        for key, value in expected.items():
            if backend == "aot_eager":
                assert same_bits(stream.read(*key), value), key
            else:
                torch.testing.assert_close(stream.read(*key), value, rtol=1e-5, atol=1e-6)
        rows = [record.shape[1] for record in stream["model.layers.0.mlp"]]
    assert rows == [sum(map(len, PROMPTS)), *[len(PROMPTS)] * (NEW_TOKENS - 1)]
