"""What to capture and how to keep it: frozen, checked once, when made."""

from __future__ import annotations

import enum
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

CODECS = ("none", "lz4", "zstd")
BYTES_PER_GB = 1_000_000_000


class HookGranularity(enum.Enum):
    """Which module outputs are captured."""

    FULL_TENSOR = "full_tensor"
    """Attention and MLP outputs, whole tensors."""
    SAMPLED_SLICES = "sampled_slices"
    """A fixed pseudo-random subset of the elements of attention and MLP outputs."""
    ATTENTION_ONLY = "attention_only"
    """Attention outputs, whole tensors."""
    MLP_ONLY = "mlp_only"
    """MLP outputs, whole tensors."""


def _finite_number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {value!r}")
    return number


def _positive(value: Any, name: str) -> float:
    number = _finite_number(value, name)
    if number <= 0:
        raise ValueError(f"{name} must be greater than 0, got {value!r}")
    return number


@dataclass(frozen=True)
class HookConfig:
    """Which sites, and how densely they are sampled."""

    sampling_rate: float = 0.01
    """Share of the elements that SAMPLED_SLICES keeps, in (0, 1]; other granularities ignore it."""
    seed: int = 0
    """Chooses the sampled positions; no random state is read or changed."""
    target_layers: Sequence[str] | None = None
    """Globs over module names (``*`` stops at dots, ``**`` crosses them); given, they choose the sites
    instead of the roles that the granularity stands for."""

    def __post_init__(self) -> None:
        rate = _finite_number(self.sampling_rate, "sampling_rate")
        if not 0 < rate <= 1:
            raise ValueError(f"sampling_rate must be in (0, 1], got {self.sampling_rate!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"seed must be an int, got {self.seed!r}")
        if self.target_layers is None:
            return
        if isinstance(self.target_layers, str):
            raise TypeError(
                f"target_layers must be a sequence of globs, got the string {self.target_layers!r}; "
                f"write [{self.target_layers!r}]"
            )
        if not isinstance(self.target_layers, Sequence):
            raise TypeError(f"target_layers must be a sequence of globs, got {self.target_layers!r}")
        globs = tuple(self.target_layers)
        for glob in globs:
            if not isinstance(glob, str):
                raise TypeError(f"target_layers must hold strings, got {glob!r}")
            if not glob:
                raise ValueError("target_layers holds an empty glob")
            numbers = re.search(r"\[!?(\d+-\d{2,}|\d{2,}-\d+)\]", glob)
            if numbers is not None:
                raise ValueError(
                    f"target_layers glob {glob!r}: {numbers[0]} is a class of single characters, no range of numbers; "
                    f"give a glob for each number, or for each first digit ('1[0-5]')"
                )
        if not globs:
            raise ValueError("target_layers is empty; None lets the granularity choose the sites")
        object.__setattr__(self, "target_layers", globs)


@dataclass(frozen=True)
class InstrumentationConfig:
    """Everything that a framework needs to know, checked when made.

    Raises:
        TypeError: a value of the wrong kind.
        ValueError: a value outside its range, or a codec that does not exist.
    """

    granularity: HookGranularity = HookGranularity.FULL_TENSOR
    compression_algorithm: str = "zstd"
    """``"none"``, ``"lz4"`` (fast) or ``"zstd"`` (close to the entropy bound). All are lossless."""
    target_throughput_gbps: float = 1.0
    """The capture rate to hold, in raw GB/s (1e9 bytes a second)."""
    max_memory_gb: float = 1.0
    """The most host memory that buffering may hold, in GB (1e9 bytes)."""
    hook_config: HookConfig = field(default_factory=HookConfig)
    strict_numerics: bool = False
    """Keep the compiled model's outputs bit for bit what they are without captures, also where a captured value is one
    that Inductor would not round to its dtype (blocks, norms, mixtures of experts); such graphs then run their captures
    apart, which costs up to a second forward pass."""
    max_relative_error: float | None = None
    """None stores every bit. A number in (0, 1) lets each token's vector be off by so much of its length (L2), for
    float32, bfloat16 and float16; whatever can't be kept within it is stored exactly."""

    def __post_init__(self) -> None:
        if not isinstance(self.granularity, HookGranularity):
            names = ", ".join(f"HookGranularity.{member.name}" for member in HookGranularity)
            raise TypeError(f"granularity must be one of {names}, got {self.granularity!r}")
        if not isinstance(self.compression_algorithm, str):
            raise TypeError(f"compression_algorithm must be a string, got {self.compression_algorithm!r}")
        if self.compression_algorithm not in CODECS:
            raise ValueError(
                f"compression_algorithm must be one of {', '.join(map(repr, CODECS))}, "
                f"got {self.compression_algorithm!r}"
            )
        _positive(self.target_throughput_gbps, "target_throughput_gbps")
        _positive(self.max_memory_gb, "max_memory_gb")
        if not isinstance(self.strict_numerics, bool):
            raise TypeError(f"strict_numerics must be a bool, got {self.strict_numerics!r}")
        if not isinstance(self.hook_config, HookConfig):
            raise TypeError(f"hook_config must be a HookConfig, got {self.hook_config!r}")
        if self.max_relative_error is not None:
            error = _positive(self.max_relative_error, "max_relative_error")
            if error >= 1:
                raise ValueError(f"max_relative_error must be below 1, got {self.max_relative_error!r}")

    @property
    def max_memory_bytes(self) -> int:
        return int(self.max_memory_gb * BYTES_PER_GB)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON values."""
        layers = self.hook_config.target_layers
        return {
            "granularity": self.granularity.value,
            "compression_algorithm": self.compression_algorithm,
            "target_throughput_gbps": self.target_throughput_gbps,
            "max_memory_gb": self.max_memory_gb,
            "strict_numerics": self.strict_numerics,
            "max_relative_error": self.max_relative_error,
            "hook_config": {
                "sampling_rate": self.hook_config.sampling_rate,
                "seed": self.hook_config.seed,
                "target_layers": None if layers is None else list(layers),
            },
        }
