"""A model compiled by Inductor in states that follow each other over one folder of caches; run by test_caches."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

import torch
import torch._dynamo
from models import Shape, make, tokens
from torch._dynamo.utils import counters

from fx_instrument import HookConfig, InstrumentationConfig, InstrumentationFramework

SHAPE = Shape(in_place=True, depth=1)
CONFIGS = {
    "idle": InstrumentationConfig(),
    "all": InstrumentationConfig(),
    "attention": InstrumentationConfig(hook_config=HookConfig(target_layers=["layers.*.self_attn"])),
    "strict": InstrumentationConfig(strict_numerics=True),
    "last": InstrumentationConfig(hook_config=HookConfig(target_layers=["layers.0.mlp"])),
}
STATES = ("plain", "idle", "all", "attention", "last")


def run(state: str, folder: Path) -> dict[str, int]:
    """Run the model in ``state``, leave ``<state>.pt`` (outputs) and ``<state>.stream`` there; the caches' counts."""
    torch._dynamo.reset()
    counters.clear()
    model = make(SHAPE)
    if state == "plain":
        model.compile()
        block: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    else:
        framework = InstrumentationFramework(CONFIGS[state])
        framework.instrument_model(model)
        block = contextlib.nullcontext()
        if state != "idle":
            block = framework.capture_activations(folder / f"{state}.stream")
    with torch.no_grad(), block:
        outputs = [model(tokens(2, 6, seed=seed)) for seed in range(2)]
    torch.save(outputs, folder / f"{state}.pt")
    counts = {**counters["inductor"], **counters["aot_autograd"]}
    return {
        f"{cache} {what}": counts[key]
        for cache in ("autograd", "fxgraph")
        for what in ("hit", "miss", "bypass")
        if (key := f"{cache}_cache_{what}") in counts
    }


if __name__ == "__main__":
    print(json.dumps([run(state, Path(sys.argv[1])) for state in sys.argv[2:]]))
