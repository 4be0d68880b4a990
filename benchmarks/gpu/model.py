"""The model that is measured: a Llama of the shape of an 8B one, on random weights; and the ways to run it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from fx_instrument import InstrumentationConfig, InstrumentationFramework
from fx_instrument.stream.writer import StreamWriter

from ..overhead.models import call_through, compile_alone, duplicate

BASE = "compiled"
AGAIN = "compiled, once more"
IDLE = "FX, not capturing"
HOST = "FX, to host memory"
NULL = "FX, null sink"
FILE = "FX, zstd file"
Block = Callable[[], contextlib.AbstractContextManager[Any]]


def llama(layers: int, hidden: int, device: str) -> Any:
    """Llama 3's 8B at ``hidden`` 4096 and 32 layers; proportions are kept elsewhere."""
    import transformers

    config = transformers.LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=hidden * 7 // 2,
        num_attention_heads=max(4, hidden // 128),
        num_key_value_heads=max(1, hidden // 512),
        vocab_size=128256,
        max_position_embeddings=16384,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        dtype=torch.bfloat16,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        torch.manual_seed(0)
        with torch.device(device):
            return transformers.LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


@dataclass
class Variant:
    """One way to run the model; ``block`` is open while it runs, and not part of the timing."""

    name: str
    model: Any
    block: Block
    report: Any = None
    """Of the last block, once it is left."""

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        with self.block() as capture:
            yield
        self.report = getattr(capture, "report", None)


@contextlib.contextmanager
def discarding() -> Iterator[None]:
    """Writers give each value's memory back at once, so that its way ends in host memory."""

    def put(self: StreamWriter, meta: Any, data: Any, done: Callable[[], None] | None = None) -> None:
        if done is not None:
            done()

    def put_packed(
        self: StreamWriter, layout: Any, step: int, data: Any, done: Callable[[], None] | None = None
    ) -> None:
        if done is not None:
            done()

    with (
        mock.patch.object(StreamWriter, "put", put),
        mock.patch.object(StreamWriter, "put_packed", put_packed),
    ):
        yield


def plain(model: nn.Module, name: str, **options: Any) -> Variant:
    own = duplicate(model)
    call_through(own, compile_alone(own, **options))
    return Variant(name, own, contextlib.nullcontext)


def plain_layers(model: nn.Module, name: str) -> Variant:
    """Each layer compiled by itself, as one graph that all share."""
    own: Any = duplicate(model)
    for layer in own.model.layers:
        call_through(layer, compile_alone(layer))
    return Variant(name, own, contextlib.nullcontext)


def captured(
    model: nn.Module, memory_gb: float, folder: Path, sinks: tuple[str, ...], **options: Any
) -> list[Variant]:
    """One instrumented model, idle and with captures that end in each of ``sinks``."""
    own = duplicate(model)
    framework = InstrumentationFramework(InstrumentationConfig(max_memory_gb=memory_gb))
    framework.instrument_model(own, **options)
    return [Variant(IDLE, own, contextlib.nullcontext), *_sinks(own, framework, folder, sinks)]


def captured_layers(
    model: nn.Module, memory_gb: float, folder: Path, sinks: tuple[str, ...]
) -> list[Variant]:
    own: Any = duplicate(model)
    framework = InstrumentationFramework(InstrumentationConfig(max_memory_gb=memory_gb))
    framework.instrument_model(own, backend=None)
    for layer in own.model.layers:
        call_through(layer, compile_alone(layer, backend=framework.backend("inductor")))
    return _sinks(own, framework, folder, sinks)


def _sinks(
    model: Any, framework: InstrumentationFramework, folder: Path, sinks: tuple[str, ...]
) -> list[Variant]:
    config = framework.config

    def block(sink: str) -> Block:
        codec = "zstd" if sink == FILE else "none"
        chosen = dataclasses.replace(config, compression_algorithm=codec, target_throughput_gbps=8.0)

        @contextlib.contextmanager
        def opened() -> Iterator[Any]:
            framework.config = chosen
            with contextlib.ExitStack() as stack:
                if sink == HOST:
                    stack.enter_context(discarding())
                capture = framework.capture_activations(folder / "gpu.stream" if sink == FILE else None)
                yield stack.enter_context(capture)

        return opened

    return [Variant(sink, model, block(sink)) for sink in sinks]
