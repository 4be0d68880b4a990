"""Capturing adds no kernel to Inductor's code: attention and MLP outputs are materialised anyway."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from fx_instrument import InstrumentationFramework

transformers = pytest.importorskip("transformers")

SMALL: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "vocab_size": 100,
    "use_cache": False,
}
# SmolLM2 is a Llama with grouped queries and tied embeddings.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "smollm2": ("llama", {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "gpt2": ("gpt2", {"n_layer": 2, "n_embd": 48, "n_head": 3}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_kernels_do_not_rise(name: str) -> None:
    """The capturing variant calls as many fused kernels as the idle one, which is the plain model's."""
    from torch._inductor.utils import run_and_get_code

    architecture, more = MODELS[name]
    config = transformers.AutoConfig.for_model(architecture, **{**SMALL, **more})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
    framework = InstrumentationFramework()
    framework.instrument_model(model)
    ids = torch.arange(3, 11)[None]

    def kernels() -> int:
        with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
            _, code = run_and_get_code(lambda: model(input_ids=ids).logits)
        return sum(len(re.findall(r"^\s*cpp_fused\w*\(", text, re.M)) for text in code)

    idle = kernels()
    with framework.capture_activations(None) as capture:
        capturing = kernels()
    assert capture.report.records == len(framework.sites) == 4
    assert 0 < capturing <= idle
