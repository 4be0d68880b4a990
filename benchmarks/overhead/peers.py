"""Other libraries, each used as its documentation says, on the same weights: the values of every site of a call.

They are not required: ``pip install 'fx_instrument[bench-peers]'``. One that is missing or fails is a row that says
why.
nnsight, TransformerLens and torchlens keep values in memory; llm-instrumentation writes a file. None of them compiles.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from .models import duplicate
from .variants import Rows, Setup, Variant

PACKAGES = {
    "nnsight": "nnsight",
    "TransformerLens": "transformer-lens",
    "torchlens": "torchlens",
    "llm-instrumentation": "llm-instrumentation",
}
SLOW = ("torchlens",)
"""Twenty times as slow as the model: of these one call stands for a block of them, or they would take minutes."""


class Kept:
    """What a peer held after its calls: token vectors, counted once a block is left."""

    def __init__(self) -> None:
        self.rows = 0

    def add(self, values: Sequence[torch.Tensor]) -> None:
        self.rows += sum(value.numel() // value.shape[-1] for value in values)

    @contextlib.contextmanager
    def block(self, folder: Path) -> Iterator[Rows]:
        self.rows = 0
        yield lambda: self.rows


def nnsight(setup: Setup) -> Variant:
    """``with model.trace(...)`` and ``.save()`` of each module's output, in the order of execution."""
    import nnsight as package
    from nnsight import NNsight

    model = NNsight(duplicate(setup.model))
    kept = Kept()
    layers = range(len(setup.model.model.layers))

    def run(ids: torch.Tensor, **options: Any) -> Any:
        with model.trace(ids, **options):
            values = package.save([])
            for layer in layers:
                values.append(model.model.layers[layer].self_attn.output[0])
                values.append(model.model.layers[layer].mlp.output)
            logits = model.output.logits.save()
        kept.add(values)
        return SimpleNamespace(logits=logits)

    return Variant("nnsight, memory", run, kept.block, 2 * len(layers), kinds=("prefill",))


def transformer_lens(setup: Setup) -> Variant:
    """``TransformerBridge.run_with_cache`` with a filter on the names of the wanted hook points."""
    from transformer_lens.model_bridge import TransformerBridge

    model = duplicate(setup.model)
    dtype = next(model.parameters()).dtype
    bridge = TransformerBridge.boot_transformers(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        hf_model=model,
        tokenizer=setup.tokenizer,
        device=str(next(model.parameters()).device),
        dtype=dtype,
    )
    names = [
        f"blocks.{layer}.{part}.hook_out"
        for layer in range(len(setup.model.model.layers))
        for part in ("attn", "mlp")
    ]
    kept = Kept()

    def run(ids: torch.Tensor, **options: Any) -> Any:
        logits, cache = bridge.run_with_cache(ids, names_filter=names)
        kept.add([cache[name] for name in names])
        return SimpleNamespace(logits=logits)

    return Variant("TransformerLens, memory", run, kept.block, len(names), kinds=("prefill",))


def torchlens(setup: Setup) -> Variant:
    """``torchlens.trace`` with the operations inside the wanted modules saved; module outputs read by their path.

    Left to itself it keeps torch's functions wrapped after a trace: guards of compiled code then fail, and the compiled
    model is compiled anew in each of its blocks. Putting them back takes .04 s of a trace of several seconds.
    """
    import torchlens as package

    model = duplicate(setup.model)
    names = setup.names()
    kept = Kept()
    wanted = package.in_module(names[0])
    for name in (*names[1:], "lm_head"):
        wanted = wanted | package.in_module(name)

    def run(ids: torch.Tensor, **options: Any) -> Any:
        log = package.trace(
            model, ids, save=wanted, capture=package.options.CaptureOptions(unwrap_when_done=True)
        )
        kept.add([log[name].out for name in names])
        return SimpleNamespace(logits=log["output_1"].out)

    return Variant("torchlens, memory", run, kept.block, len(names), kinds=("prefill",))


def llm_instrumentation(setup: Setup) -> Variant:
    """``instrument_model``, ``capture_activations``; rows are those whose packets bear a site's name."""
    import llm_instrumentation as package
    import llm_instrumentation.core.streaming

    model = duplicate(setup.model)
    names = setup.names()
    config = package.InstrumentationConfig(
        granularity=package.HookGranularity.FULL_TENSOR, compression_algorithm=setup.codec, max_memory_gb=1.0
    )
    framework = package.InstrumentationFramework(config)
    framework.instrument_model(model)
    width = setup.model.config.hidden_size * next(model.parameters()).element_size()

    @contextlib.contextmanager
    def block(folder: Path) -> Iterator[Rows]:
        path = folder / "peer.stream"

        def rows() -> int:
            found = framework.analyze_activations(str(path))["per_layer"]
            return int(sum(found[name]["bytes"] // width for name in names if name in found))

        with framework.capture_activations(str(path)):
            yield rows

    return Variant("llm-instrumentation, file", model, block, len(names))


PEERS: dict[str, Callable[[Setup], Variant]] = {
    "nnsight": nnsight,
    "TransformerLens": transformer_lens,
    "torchlens": torchlens,
    "llm-instrumentation": llm_instrumentation,
}


def installed() -> list[str]:
    """Those of the packages that are there."""
    return [name for name, package in PACKAGES.items() if importlib.util.find_spec(package.replace("-", "_"))]


def peer(name: str, setup: Setup) -> Variant | str:
    """The peer on a copy of the model, or the reason why it can't be used."""
    try:
        variant = PEERS[name](setup)
        variant.note = f"{name} {importlib.metadata.version(PACKAGES[name])}"
        return variant
    except (ImportError, importlib.metadata.PackageNotFoundError) as error:
        return f"did not install: {first_line(error)}"
    except Exception as error:
        return f"did not start: {first_line(error)}"


def first_line(error: BaseException) -> str:
    text = re.sub(r"\s+", " ", str(error)).strip()
    return f"{type(error).__name__}: {text[:160]}"
