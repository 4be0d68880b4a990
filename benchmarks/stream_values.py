"""What the stream is measured with: activations of the real model, and how well they could be compressed at best."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fx_instrument.stream import filters
from fx_instrument.stream.records import RecordMeta

Values = npt.NDArray[Any]
Step = list[tuple[str, Values]]
"""The records of one step: site and values (bfloat16 as its bit patterns)."""
Data = dict[str, tuple[str, list[Step]]]
"""Name of the workload -> dtype and steps."""
Described = tuple[list[str], list[tuple[RecordMeta, npt.NDArray[np.uint8]]]]
"""Names of the sites, and the records of all steps."""


def real_data() -> Data:
    """Activations of the model, by forward hooks."""
    import pydoc_data.topics

    import torch

    from fx_instrument.demo.smollm import load_model

    text = "\n".join(pydoc_data.topics.topics.values())
    data: Data = {}
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        model, tokenizer = load_model(dtype)
        ids = tokenizer(text, return_tensors="pt").input_ids[0, : 8 * 512].reshape(8, 512)
        seen: Step = []

        def keep(site: str, seen: Step, module: Any, args: Any, output: Any) -> None:
            value = (output[0] if isinstance(output, tuple) else output).detach()
            bits = value.view(torch.uint16) if value.dtype == torch.bfloat16 else value
            seen.append((site, bits.clone().numpy()))

        for number, layer in enumerate(model.model.layers):
            layer.self_attn.register_forward_hook(partial(keep, f"layers.{number}.self_attn", seen))
            layer.mlp.register_forward_hook(partial(keep, f"layers.{number}.mlp", seen))
        with torch.no_grad():
            if name == "fp32":
                model(ids[:2])
                data["fp32 prefill"] = ("float32", [seen])
                continue
            output = model(ids, use_cache=True)
            data["bf16 prefill"] = ("bfloat16", [list(seen)])
            steps = []
            for _ in range(16):
                seen.clear()
                next_ids = output.logits[:, -1].argmax(-1, keepdim=True)
                output = model(next_ids, past_key_values=output.past_key_values, use_cache=True)
                steps.append(list(seen))
            data["bf16 decode"] = ("bfloat16", steps)
    return data


def kept_data(path: Path | None) -> Data:
    """The model's activations, from ``path`` if it is there, else kept there: the model takes a minute."""
    if path is None:
        return real_data()
    if not path.exists():
        arrays = {}
        for name, (dtype, steps) in real_data().items():
            for number, step in enumerate(steps):
                arrays |= {f"{name}|{dtype}|{number}|{site}": values for site, values in step}
        np.savez(path, **arrays)
    data: Data = {}
    with np.load(path) as arrays:
        for key in arrays.files:
            name, dtype, number, site = key.split("|")
            steps = data.setdefault(name, (dtype, []))[1]
            if int(number) == len(steps):
                steps.append([])
            steps[int(number)].append((site, arrays[key]))
    return data


def synthetic_data() -> Data:
    """Normal values under log-normal channel scales, in the shapes of the real ones."""
    rng = np.random.default_rng(0)

    def values(*shape: int) -> npt.NDArray[np.float32]:
        scales = np.exp(rng.standard_normal(shape[-1]) * 0.7).astype(np.float32)
        return rng.standard_normal(shape, np.float32) * scales

    def bf16(*shape: int) -> npt.NDArray[np.uint16]:
        return (values(*shape).view(np.uint32) >> 16).astype(np.uint16)

    sites = [f"layers.{number // 2}.{'mlp' if number % 2 else 'self_attn'}" for number in range(60)]
    return {
        "bf16 prefill": ("bfloat16", [[(site, bf16(8, 512, 576)) for site in sites]]),
        "bf16 decode": ("bfloat16", [[(site, bf16(8, 1, 576)) for site in sites] for _ in range(16)]),
        "fp32 prefill": ("float32", [[(site, values(2, 512, 576)) for site in sites]]),
    }


def as_bytes(values: Values) -> npt.NDArray[np.uint8]:
    return values.reshape(-1).view(np.uint8)


def repeated(steps: list[Step], num_bytes: int) -> list[Step]:
    """The steps again and again until they are so many bytes."""
    size = sum(values.nbytes for step in steps for _, values in step)
    return steps * max(1, round(num_bytes / size))


def entropy_bound(dtype: str, steps: list[Step]) -> float:
    """The ratio that an ideal order-0 coder of each site's planes would reach."""
    by_site: dict[str, list[Values]] = {}
    for step in steps:
        for site, values in step:
            by_site.setdefault(site, []).append(as_bytes(values))
    raw, bits = 0, 0.0
    for parts in by_site.values():
        page = np.concatenate(parts)
        raw += len(page)
        planes = filters.Planes().split(
            filters.split_filter(dtype), [page], np.empty(len(page) + 64, np.uint8)
        )
        for plane in planes:
            shares = np.bincount(plane, minlength=256) / len(plane)
            shares = shares[shares > 0]
            bits -= float((shares * np.log2(shares)).sum()) * len(plane)
    return raw / (bits / 8)


def describe(dtype: str, steps: list[Step]) -> Described:
    names = list(dict.fromkeys(site for step in steps for site, _ in step))
    ids = {name: number for number, name in enumerate(names)}
    return names, [
        (RecordMeta(ids[site], number, 0, dtype, values.shape), as_bytes(values))
        for number, step in enumerate(steps)
        for site, values in step
    ]
