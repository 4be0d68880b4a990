"""What vLLM is told so that its engines capture; imports nothing of vLLM."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from ..config import HookGranularity, InstrumentationConfig
from ..serving.limits import MIN_FREE_BYTES, FileLimits
from ..version import __version__

KEY = "fx_instrument"
"""Of vLLM's additional_config, and of a request's extra arguments."""
BACKEND = f"{__package__}.vllm.backend"
WORKER = f"{__package__}.vllm.CaptureWorker"
SHUTDOWN_TIMEOUT_S = 30

Route = Literal["official", "plugin"]


def engine_arguments(
    config: InstrumentationConfig,
    output_path: str | os.PathLike[str],
    *,
    capture: Literal["all", "requested"] = "all",
    route: Route = "official",
    mode: Literal["w", "x"] = "w",
    on_full: Literal["stall", "drop"] | None = None,
    max_stall_s: float | None = None,
    rotate_bytes: int | None = None,
    rotate_s: float | None = None,
    max_files: int | None = None,
    max_total_bytes: int | None = None,
    min_free_bytes: int | None = None,
    metrics_port: int | None = None,
    metrics_address: str = "127.0.0.1",
) -> dict[str, Any]:
    """What ``vllm.LLM(model, **...)``, ``AsyncEngineArgs`` or the server need so that the engine captures.

    Args:
        config: what to capture. SAMPLED_SLICES is refused: it samples whole values, which mix requests; so is
            ``strict_numerics``: it runs graphs twice.
        output_path: the stream file; with several workers (pipeline stages, data-parallel replicas) each writes
            ``<stem>.rank<n><suffix>`` beside it. Where files rotate, a folder, which is made private to this user; with
            several workers each has ``<name>.rank<n>``. No request can change it.
        capture: "all" stores every request that does not say otherwise, "requested" those that ask for it through
            ``SamplingParams(extra_args={"fx_instrument": ...})``, in the OpenAI API ``vllm_xargs``. With "requested"
            a second graph without captures runs the steps in which nobody asked.
        route: "official" gives vLLM a compile backend for the whole graph; "plugin" rewrites in front of vLLM's own
            backend and keeps its piecewise compilation and CUDA graphs.
        mode: "w" replaces an existing file, "x" refuses one. Files that rotate have new names: only "w" is taken.
        on_full: when the buffer is full, "stall" makes the step wait, "drop" counts the lost values. None drops where
            files rotate and stalls where one is written.
        max_stall_s: the longest that a step may wait before values are dropped, and counted; None waits. With
            ``on_full="drop"`` no step waits.
        rotate_bytes: a file that is larger is ended and the next one begun. This or ``rotate_s`` makes files rotate.
        rotate_s: so is one that has records and is older, in seconds.
        max_files: how many files a worker keeps, the oldest are deleted; None keeps all. Files that were in the
            folder before count, and are deleted, too.
        max_total_bytes: how many bytes of files a worker keeps, likewise, beside the file that is written; one that has
            half of it is ended.
        min_free_bytes: capturing switches itself off before the folder's disk has less room; None leaves 1 GiB.
        metrics_port: each worker that stores serves its counters to Prometheus there; with several workers the n-th
            at ``metrics_port + n``. Needs ``prometheus_client``. None serves none.
        metrics_address: the address of this machine that they are served at.

    Raises:
        TypeError, ValueError: a bad argument.
    """
    if not isinstance(config, InstrumentationConfig):
        raise TypeError(f"config must be an InstrumentationConfig, got {config!r}")
    if config.granularity is HookGranularity.SAMPLED_SLICES:
        raise ValueError(
            "SAMPLED_SLICES samples whole values, and a server's hold rows of many requests: capture whole tensors "
            "and let requests choose layers and positions"
        )
    if config.strict_numerics:
        raise ValueError(
            "strict_numerics runs a graph twice, and an engine's graph writes its key-value cache: leave it False; "
            "capturing may round an engine's outputs otherwise in their last bits"
        )
    for name, value, allowed in (
        ("capture", capture, ("all", "requested")),
        ("route", route, ("official", "plugin")),
        ("mode", mode, ("w", "x")),
        ("on_full", on_full or "stall", ("stall", "drop")),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    if max_stall_s is not None and not (isinstance(max_stall_s, (int, float)) and max_stall_s >= 0):
        raise ValueError(f"max_stall_s must be None or a number of seconds from 0, got {max_stall_s!r}")
    limits = _limits_of(rotate_bytes, rotate_s, max_files, max_total_bytes, min_free_bytes)
    if metrics_port is not None and not (isinstance(metrics_port, int) and 0 < metrics_port < 1 << 16):
        raise ValueError(f"metrics_port must be None or a port from 1 to 65535, got {metrics_port!r}")
    path = Path(output_path).absolute()
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder of output_path does not exist: {path.parent}")
    if limits is not None:
        if mode == "x":
            raise ValueError("mode='x' is for one file: files that rotate have new names and replace none")
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(
                f"where files rotate, output_path is a folder, but there is a file: {path}"
            )
    settings = {
        "config": config.to_dict(),
        "output_path": str(path),
        "capture": capture,
        "route": route,
        "mode": mode,
        "on_full": on_full or ("stall" if limits is None else "drop"),
        "max_stall_s": max_stall_s,
        "limits": None if limits is None else asdict(limits),
        "metrics": None if metrics_port is None else [metrics_address, metrics_port],
        "version": __version__,
    }
    compilation: dict[str, Any]
    if route == "official":
        compilation = {"mode": 2, "backend": BACKEND, "custom_ops": ["none"], "cudagraph_mode": "NONE"}
    else:
        # A full CUDA graph would replay past the point where values are taken.
        # Only one rank captures: a fusion that its graph has no place for must happen on none.
        compilation = {
            "mode": 3,
            "cudagraph_mode": "PIECEWISE",
            "pass_config": {"fuse_allreduce_rms": False},
        }
    return {
        "worker_cls": WORKER,
        "compilation_config": compilation,
        "additional_config": {KEY: settings},
        # The engine's default is to kill its workers at once: what they hold for the file would be lost.
        "shutdown_timeout": SHUTDOWN_TIMEOUT_S,
    }


def server_arguments(*args: Any, **kwargs: Any) -> list[str]:
    """``engine_arguments`` as command-line arguments of ``vllm serve`` (``vllm.entrypoints.openai.api_server``)."""
    arguments = engine_arguments(*args, **kwargs)
    return [
        *("--worker-cls", arguments["worker_cls"]),
        *("--compilation-config", json.dumps(arguments["compilation_config"])),
        *("--additional-config", json.dumps(arguments["additional_config"])),
        *("--shutdown-timeout", str(arguments["shutdown_timeout"])),
    ]


def _limits_of(
    rotate_bytes: int | None,
    rotate_s: float | None,
    max_files: int | None,
    max_total_bytes: int | None,
    min_free_bytes: int | None,
) -> FileLimits | None:
    """The limits of files that rotate; None where one file is written, of which there can be no limits."""
    if rotate_bytes is None and rotate_s is None:
        given = {
            "max_files": max_files,
            "max_total_bytes": max_total_bytes,
            "min_free_bytes": min_free_bytes,
        }
        named = [name for name, value in given.items() if value is not None]
        if named:
            raise ValueError(
                f"{' and '.join(named)} can't hold for one file that is written until the engine ends: give "
                f"rotate_bytes or rotate_s as well, so that files rotate"
            )
        return None
    return FileLimits(
        rotate_bytes=rotate_bytes,
        rotate_s=rotate_s,
        max_files=max_files,
        max_total_bytes=max_total_bytes,
        min_free_bytes=MIN_FREE_BYTES if min_free_bytes is None else min_free_bytes,
    )
