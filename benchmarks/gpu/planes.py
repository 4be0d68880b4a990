"""Where the first stage of compression, bytes into planes, is best done: on the device or by the writer's threads."""

from __future__ import annotations

import timeit
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from fx_instrument.stream.codec import PageEncoder
from fx_instrument.stream.filters import Planes, split_filter
from fx_instrument.stream.tiers import BEST

PAGE_BYTES = 4 << 20


def best_of(times: int, call: Callable[[], object]) -> float:
    return min(timeit.repeat(call, number=1, repeat=times))


def split_on_device(values: torch.Tensor) -> torch.Tensor:
    """bfloat16 to two planes of bytes: exponents, then signs and mantissas, as the format's filter 11 has them."""
    bits = values.view(torch.int16)
    exponents = (bits >> 7).to(torch.uint8)
    rest = ((bits >> 8) & 0x80 | bits & 0x7F).to(torch.uint8)
    return torch.stack((exponents.view(-1), rest.view(-1)))


def compare(device: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Seconds a GB of normally distributed bfloat16 on one thread of the host, and on the device."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(PAGE_BYTES // 2, generator=generator).bfloat16()
    page = values.view(torch.uint8).numpy()
    scratch = np.empty(PAGE_BYTES, np.uint8)
    planes, encoder = Planes(PAGE_BYTES), PageEncoder("zstd", PAGE_BYTES)
    code = split_filter("bfloat16")
    gb = PAGE_BYTES / 1e9
    found: dict[str, Any] = {
        "host_split_s_a_gb": best_of(30, lambda: planes.split(code, [page], scratch)) / gb,
        "host_encode_s_a_gb": best_of(30, lambda: encoder.encode([page], "bfloat16", tier=BEST)) / gb,
    }
    if device.startswith("cuda"):
        large = torch.randn(1 << 28, device=device).bfloat16()
        split = torch.compile(split_on_device)
        expected = planes.split(code, [page], scratch)
        got = split(values.to(device)).cpu().numpy()
        assert all(
            np.array_equal(np.asarray(mine).view(np.uint8).ravel(), yours)
            for mine, yours in zip(expected, got, strict=True)
        )

        def once() -> None:
            split(large)
            torch.cuda.synchronize()

        found["device_split_s_a_gb"] = best_of(10, once) / (large.nbytes / 1e9)
    say(", ".join(f"{key} {value:.4f}" for key, value in found.items()))
    return found
