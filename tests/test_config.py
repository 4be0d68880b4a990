"""Configuration is checked when it is made, and errors say what was expected."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from fx_instrument import HookConfig, HookGranularity, InstrumentationConfig


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"granularity": "full_tensor"}, TypeError, "HookGranularity.FULL_TENSOR"),
        ({"compression_algorithm": "gzip"}, ValueError, "'none', 'lz4', 'zstd', got 'gzip'"),
        ({"compression_algorithm": None}, TypeError, "must be a string"),
        ({"target_throughput_gbps": 0}, ValueError, "greater than 0"),
        ({"target_throughput_gbps": "fast"}, TypeError, "must be a number"),
        ({"max_memory_gb": -1.0}, ValueError, "greater than 0"),
        ({"max_memory_gb": float("nan")}, ValueError, "finite"),
        ({"max_memory_gb": 10**400}, ValueError, "finite"),
        ({"max_memory_gb": True}, TypeError, "must be a number"),
        ({"max_relative_error": 0.0}, ValueError, "greater than 0"),
        ({"max_relative_error": 1.0}, ValueError, "below 1"),
        ({"hook_config": {}}, TypeError, "must be a HookConfig"),
    ],
)
def test_bad_values_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        InstrumentationConfig(**arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"sampling_rate": 0.0}, ValueError, r"in \(0, 1\]"),
        ({"sampling_rate": 1.5}, ValueError, r"in \(0, 1\]"),
        ({"seed": 1.0}, TypeError, "must be an int"),
        ({"target_layers": "model.*"}, TypeError, r"write \['model.\*'\]"),
        ({"target_layers": []}, ValueError, "empty"),
        ({"target_layers": [1]}, TypeError, "must hold strings"),
        ({"target_layers": {"a"}}, TypeError, "sequence of globs"),
    ],
)
def test_bad_hook_values_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        HookConfig(**arguments)


def test_defaults_and_json() -> None:
    """The defaults are those of the documentation, and a configuration is plain JSON."""
    config = InstrumentationConfig()
    assert config.granularity is HookGranularity.FULL_TENSOR
    assert (config.compression_algorithm, config.target_throughput_gbps, config.max_memory_gb) == (
        "zstd",
        1.0,
        1.0,
    )
    assert config.hook_config == HookConfig(0.01, 0, None)
    assert json.loads(json.dumps(config.to_dict()))["hook_config"]["sampling_rate"] == 0.01


def test_frozen() -> None:
    """A configuration can't drift after it was checked, nor can the list that it was made from."""
    globs = ["a.*"]
    hooks = HookConfig(target_layers=globs)
    globs.append("b.*")
    assert hooks.target_layers == ("a.*",)
    with pytest.raises(dataclasses.FrozenInstanceError):
        hooks.seed = 1  # type: ignore[misc]
