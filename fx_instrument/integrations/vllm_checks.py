"""What vLLM's configurations and models must be for rows to be whole, and found again; the rest is refused at start."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from ..errors import InstrumentationError
from .vllm_arguments import BACKEND, Route


def check_supported(vllm_config: Any, route: Route) -> None:
    """Refuse what would lose or misplace rows in silence."""
    parallel, compilation = vllm_config.parallel_config, vllm_config.compilation_config
    if vllm_config.speculative_config is not None:
        raise InstrumentationError(
            "speculative decoding computes rows of tokens that are rejected later, so rows and positions would not "
            "match: switch one of the two off"
        )
    if vllm_config.num_speculative_tokens:
        raise InstrumentationError(
            "diffusion computes each row several times, as its tokens change: not supported"
        )
    if vllm_config.cache_config.kv_sharing_fast_prefill:
        raise InstrumentationError(
            "kv_sharing_fast_prefill computes some rows of a prompt in some layers only: switch one of the two off"
        )
    encoders = vllm_config.ec_transfer_config
    if encoders is not None and encoders.is_ec_producer and not encoders.is_ec_consumer:
        raise InstrumentationError(
            "an instance of ec_role 'ec_producer' runs encoders for other instances and never its language model, so "
            "there is nothing to capture: capture in those that it works for"
        )
    for option in ("prefill_context_parallel_size", "decode_context_parallel_size"):
        if getattr(parallel, option, 1) > 1:
            raise InstrumentationError(f"{option} > 1 spreads a request's rows over workers: not supported")
    if getattr(parallel, "use_ubatching", False):
        raise InstrumentationError("enable_dbo and ubatch_size > 1 run a batch in parts: not supported")
    cudagraphs = compilation.cudagraph_mode
    if int(compilation.mode) == 0:
        if vllm_config.device_config.device_type != "cpu" and cudagraphs is not None and cudagraphs.value:
            raise InstrumentationError(
                f"without compilation there is no traced graph, and under CUDA graphs (cudagraph_mode "
                f"{cudagraphs.name}) Python hooks run only once: use enforce_eager=True to capture eagerly"
            )
        return
    if cudagraphs is not None and cudagraphs.has_full_cudagraphs():
        raise InstrumentationError(
            f"cudagraph_mode {cudagraphs.name} replays the whole model past the point where values are taken: use "
            f"the NONE or PIECEWISE that engine_arguments returns"
        )
    if (
        int(compilation.mode) == 3
        and parallel.tensor_parallel_size > 1
        and compilation.pass_config.fuse_allreduce_rms
    ):
        raise InstrumentationError(
            "pass_config.fuse_allreduce_rms would fuse all-reduces on the ranks that capture nothing and not on the "
            "one that does, which then wait for each other for ever: give vLLM the compilation_config that "
            "engine_arguments returns"
        )
    if route == "official" and compilation.backend != BACKEND:
        raise InstrumentationError(
            f"compilation_config.backend is {compilation.backend!r}, expected {BACKEND!r}: give vLLM the "
            f"compilation_config that engine_arguments returns"
        )


def restore_piecewise(vllm_config: Any) -> None:
    """vLLM's CPU platform turns mode 3 into 2 to spare compile time; the plugin route needs 3, which works there."""
    compilation, parallel = vllm_config.compilation_config, vllm_config.parallel_config
    if int(compilation.mode) == 2 and vllm_config.device_config.device_type == "cpu":
        compilation.mode = type(compilation.mode)(3)
        compilation.splitting_ops = None
        compilation.compile_sizes = compilation.compile_sizes or []
        # vLLM's own pass for the older form names CUDA operators that its CPU build lacks.
        compilation.inductor_compile_config["enable_auto_functionalized_v2"] = True
        compilation.set_splitting_ops_for_v1(parallel.all2all_backend, parallel.data_parallel_size)


def language_part(model: torch.nn.Module, *, named: bool) -> str:
    """Name of the module whose rows are tokens: a multimodal model's language model, a decoder; "" for all of it.

    Args:
        named: whether the sites are named (``target_layers``): they are taken as they are where vLLM can't tell.

    Raises:
        InstrumentationError: vLLM can't tell which part it is.
    """
    get = getattr(model, "get_language_model", None)
    if get is None:
        return ""
    unknown = InstrumentationError(
        f"vLLM does not say which part of {type(model).__name__} is its language model, and other parts have no "
        f"rows of tokens: name sites inside it, HookConfig(target_layers=[...])"
    )
    # Nothing is unfinished here: by raising NotImplementedError vLLM's method answers that it found no language model.
    # Without names that is this package's error, with vLLM's behind it; sites that were named have no bound then.
    try:
        part = get()
    except NotImplementedError as error:
        if not named:
            raise unknown from error
        return ""
    name = next((name for name, module in model.named_modules() if module is part), None)
    if name is None and not named:
        raise unknown
    return name or ""


def check_whole(model: torch.nn.Module, names: Iterable[str], parallel_config: Any) -> None:
    """Of a tensor-parallel group one rank stores, so a site's output must be the same on each of them.

    Raises:
        InstrumentationError: some models add the ranks' parts up later, or split the rows.
    """
    if parallel_config.use_sequence_parallel_moe:
        raise InstrumentationError(
            "tensor, data and expert parallelism together split the rows of experts over the ranks: not supported"
        )
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in names:
        module = modules.get(name)
        if module is None or (getattr(module, "gather_output", True) is False and _is_split(module)):
            raise InstrumentationError(
                f"{name} gives each rank of a tensor-parallel group a share of its columns: choose the attention or "
                f"MLP around it, or use one rank"
            )
        parts = dict(module.named_modules())
        if any(part.rpartition(".")[2] == "experts" for part in parts):
            continue  # what experts and shared experts gave is added up inside the module
        for part, inside in parts.items():
            if getattr(inside, "reduce_results", True) is False and _is_split(inside):
                raise InstrumentationError(
                    f"{name} gives each rank of a tensor-parallel group a summand of its output "
                    f"({part or 'it'} leaves the sum to the layer): capture the layers instead, "
                    f"HookConfig(target_layers=[...]), or use one rank"
                )


def _is_split(module: torch.nn.Module) -> bool:
    return int(getattr(module, "tp_size", 2)) > 1
