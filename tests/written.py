"""Real streams for tests, written by the library's own writer from torch tensors."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fx_instrument.config import HookConfig, InstrumentationConfig
from fx_instrument.sampling import positions
from fx_instrument.stream.records import RecordMeta
from fx_instrument.stream.writer import StreamWriter


def write_stream(
    path: Path,
    steps: Iterable[Mapping[str, torch.Tensor | list[torch.Tensor]]],
    *,
    inputs: Iterable[Mapping[str, torch.Tensor]] = (),
    codec: str = "zstd",
    roles: Mapping[str, str] | None = None,
    sampling: HookConfig | None = None,
    finish: bool = True,
    summary: Mapping[str, Any] | None = None,
    **options: Any,
) -> Path:
    """A stream with one entry of ``steps`` a step: site -> its value, or the values of its calls.

    Inputs go first within a step. ``sampling`` stores only the elements at its positions. ``finish=False`` cuts
    the last byte off, so that the file has no index. ``options`` are the writer's.
    """
    config = InstrumentationConfig(hook_config=sampling or HookConfig())
    metadata = {
        "config": config.to_dict(),
        "model": {"class": "Tiny"},
        "backend": "aot_eager",
        "versions": {"torch": torch.__version__},
    }
    writer = StreamWriter(path, metadata=metadata, codec=codec, **options)
    steps, inputs = list(steps), list(inputs)
    for step in range(max(len(steps), len(inputs))):
        for name, tensor in inputs[step].items() if step < len(inputs) else ():
            _put(writer, writer.add_site(name, "input"), step, 0, tensor, None)
        for name, values in steps[step].items() if step < len(steps) else ():
            site_id = writer.add_site(name, (roles or {}).get(name, "mlp" if "mlp" in name else "attention"))
            calls = values if isinstance(values, list) else [values]
            for call, tensor in enumerate(calls):
                _put(writer, site_id, step, call, tensor, sampling)
    writer.close({"num_steps": max(len(steps), len(inputs)), "duration_s": 0.5, **(summary or {})})
    if not finish:
        os.truncate(path, path.stat().st_size - 1)
    return path


def _put(
    writer: StreamWriter,
    site_id: int,
    step: int,
    call: int,
    tensor: torch.Tensor,
    sampling: HookConfig | None,
) -> None:
    full_shape = None
    if sampling is not None:
        full_shape = tuple(tensor.shape)
        kept = positions(tensor.numel(), sampling.sampling_rate, sampling.seed)
        tensor = tensor.reshape(-1)[torch.from_numpy(kept)]
    dtype = str(tensor.dtype).removeprefix("torch.")
    data = (
        tensor.contiguous().reshape(-1).view(torch.uint8).numpy() if tensor.numel() else np.empty(0, np.uint8)
    )
    writer.put(RecordMeta(site_id, step, call, dtype, tuple(tensor.shape), full_shape), data)
