"""Starts real vLLM engines in processes of their own, and checks their rows against Hugging Face's eager hooks."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fx_instrument.activations import ActivationStream

NEEDS_VLLM = [
    pytest.mark.server,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM has an environment of its own"),
]
ENGINES = Path(__file__).parent / "engines"
# Seen: 3.7e-6 of a tensor's largest value (fp32, Inductor against eager); a row that is off by one gives 0.1 and more.
TOLERANCE = 1e-5


def environment_of(cache: Path) -> dict[str, str]:
    """The environment of an engine whose compile caches lie in ``cache``."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(ENGINES.parents[1]), str(ENGINES))),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CACHE_ROOT": str(cache),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def save_model(folder: Path, num_layers: int) -> Path:
    """The first layers of SmolLM2-135M as a model folder."""
    from fx_instrument.demo.smollm import load_model

    model, tokenizer = load_model(torch.float32)
    config = model.config
    config.num_hidden_layers = num_layers
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    cut = type(model)(config)
    state = model.state_dict()
    cut.load_state_dict({name: state[name] for name in cut.state_dict() if name in state})
    cut.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_even_model(folder: Path) -> Path:
    """A small Llama whose heads two ranks can share (SmolLM2-135M has 9 and 3); random weights, its tokenizer."""
    import transformers

    from fx_instrument.demo.smollm import load_model

    _, tokenizer = load_model(torch.float32)
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run_engine(job: Mapping[str, Any], environment: Mapping[str, str], tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "job.json").write_text(json.dumps(job))
    command = [sys.executable, str(ENGINES / "vllm_offline.py")]
    done = subprocess.run(
        [*command, str(tmp_path / "job.json"), str(tmp_path / "found.json")],
        env=dict(environment),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    found: dict[str, Any] = json.loads((tmp_path / "found.json").read_text())
    return found


class Hooks:
    """What eager forward hooks see in Hugging Face's model."""

    def __init__(self, folder: Path, sites: Sequence[str]) -> None:
        import transformers

        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self._seen: dict[str, torch.Tensor] = {}
        for site in sites:
            self._model.get_submodule(site).register_forward_hook(self._hook(site))

    def _hook(self, site: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            self._seen[site] = (output[0] if isinstance(output, tuple) else output)[0]

        return hook

    def run(self, tokens: Sequence[int]) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            self._model(torch.tensor([list(tokens)]))
        return dict(self._seen)


def check_rows(
    stream: ActivationStream, hooks: Hooks, request_id: str, tokens: Sequence[int], positions: Sequence[int]
) -> int:
    """Compare the request's rows with the hooks'; every position exactly once, in order. Returns the rows."""
    request = stream.request(request_id)
    seen = hooks.run(tokens)
    recorded = request.token_ids()
    assert all(tokens[position] == token for position, token in recorded.items())
    num_rows = 0
    for site, rows in request.items():
        assert rows.token_positions.tolist() == list(positions), (request_id, site)
        if positions:
            expected = seen[site][list(positions)]
            error = (rows.tensor() - expected).abs().max() / seen[site].abs().max()
            assert error < TOLERANCE, (request_id, site, float(error))
        num_rows += len(rows)
    return num_rows
