"""A worker of a CPU engine that captures nothing but compiles piecewise, and caches, as engines on GPUs do."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker

from fx_instrument.integrations.vllm_checks import restore_piecewise


class PiecewiseWorker(CPUWorker):
    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        restore_piecewise(vllm_config)
        super().__init__(vllm_config, *args, **kwargs)
