"""vLLM: capture the activations of an engine's requests, offline and in its OpenAI server.

    llm = LLM(model, **engine_arguments(config, "output.stream"))

The arguments name three things of this file. ``CaptureWorker`` is vLLM's own worker; it plants the markers once the
model is loaded, and after each step brings the rows of the step's requests to the file. ``backend`` (the official
route) is what vLLM's Dynamo trace of the whole model goes to: the graph is rewritten and compiled by Inductor.
``register`` (the plugin route) puts the same rewriting in front of vLLM's own piecewise backend.
"""

from __future__ import annotations

import functools
import importlib
import json
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from ..config import HookConfig, HookGranularity, InstrumentationConfig
from ..engine_capture import EngineCapture, Scheduled
from ..errors import InstrumentationError, NoSitesError
from ..version import __version__

log = logging.getLogger(__name__)

KEY = "fx_instrument"
"""Of vLLM's additional_config, and of a request's extra arguments."""
BACKEND = f"{__name__}.backend"
WORKER = f"{__name__}.CaptureWorker"
SHUTDOWN_TIMEOUT_S = 30
# vLLM's CPU platform compiles with these, but sets them only for a backend of its own.
_CPU_OPTIONS = {
    "dce": True,
    "size_asserts": False,
    "nan_asserts": False,
    "epilogue_fusion": True,
    "cpp.dynamic_threads": True,
}
_INTERNAL_SUFFIX = re.compile(r"-[0-9a-f]{8}$")

Route = Literal["official", "plugin"]


def engine_arguments(
    config: InstrumentationConfig,
    output_path: str | os.PathLike[str],
    *,
    capture: Literal["all", "requested"] = "all",
    route: Route = "official",
    mode: Literal["w", "x"] = "w",
    on_full: Literal["stall", "drop"] = "stall",
    max_stall_s: float | None = None,
) -> dict[str, Any]:
    """What ``vllm.LLM(model, **...)``, ``AsyncEngineArgs`` or the server need so that the engine captures.

    Args:
        config: what to capture. SAMPLED_SLICES is refused: it samples whole values, which mix requests; so is
            ``strict_numerics``: it runs graphs twice.
        output_path: the stream file; with several workers (pipeline stages, data-parallel replicas) each writes
            ``<stem>.rank<n><suffix>`` beside it. No request can change it.
        capture: "all" stores every request that does not say otherwise, "requested" those that ask for it through
            ``SamplingParams(extra_args={"fx_instrument": ...})``, in the OpenAI API ``vllm_xargs``. With "requested"
            a second graph without captures runs the steps in which nobody asked.
        route: "official" gives vLLM a compile backend for the whole graph; "plugin" rewrites in front of vLLM's own
            backend and keeps its piecewise compilation and CUDA graphs.
        mode: "w" replaces an existing file, "x" refuses one.
        on_full: when the buffer is full, "stall" makes the step wait, "drop" counts the lost values.
        max_stall_s: the longest that a step may wait before values are dropped, and counted; None waits.

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
        ("on_full", on_full, ("stall", "drop")),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    if max_stall_s is not None and not (isinstance(max_stall_s, (int, float)) and max_stall_s >= 0):
        raise ValueError(f"max_stall_s must be None or a number of seconds from 0, got {max_stall_s!r}")
    path = Path(output_path).absolute()
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder of output_path does not exist: {path.parent}")
    settings = {
        "config": config.to_dict(),
        "output_path": str(path),
        "capture": capture,
        "route": route,
        "mode": mode,
        "on_full": on_full,
        "max_stall_s": max_stall_s,
        "version": __version__,
    }
    compilation: dict[str, Any]
    if route == "official":
        compilation = {"mode": 2, "backend": BACKEND, "custom_ops": ["none"], "cudagraph_mode": "NONE"}
    else:
        # A full CUDA graph would replay past the point where values are taken.
        compilation = {"mode": 3, "cudagraph_mode": "PIECEWISE"}
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


def _graph_settings(additional_config: Mapping[str, Any]) -> dict[str, Any]:
    """Of vLLM's additional_config what changes the graphs, and only that, for the key of its compile cache.

    Without our part, captured and plain artifacts would be one entry of the cache; with all of it, each output file
    would compile anew. vLLM hashes a dict as its JSON text, so what must not count must not be in it.
    """
    ours = additional_config[KEY]
    config = ours["config"]
    plan = {
        "granularity": config["granularity"],
        "target_layers": config["hook_config"]["target_layers"],
        "version": ours["version"],
    }
    return {**additional_config, KEY: plan}


# The worker of this process whose model is compiled now; vLLM builds one at a time.
_worker: WorkerCapture | None = None


def backend(graph: torch.fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
    """The compile backend that ``engine_arguments`` names; vLLM resolves it by name.

    Raises:
        InstrumentationError: the engine's worker is not the one that ``engine_arguments`` names.
    """
    if _worker is None:
        raise InstrumentationError(
            f"the backend {BACKEND} works with the worker {WORKER} only: give vLLM all that engine_arguments returns"
        )
    vllm_config = _worker.vllm_config
    options = dict(vllm_config.compilation_config.inductor_compile_config)
    options.pop("guard_filter_fn", None)
    if vllm_config.device_config.device_type == "cpu":
        options = {**_CPU_OPTIONS, **options}
    if not _worker.stores:
        compile_plain = torch._TorchCompileInductorWrapper(None, options, None)  # type: ignore[no-untyped-call]
        compiled: Callable[..., Any] = compile_plain(graph, example_inputs, **kwargs)
        return compiled
    return _worker.capture.compile(graph, example_inputs, "inductor", options=options, **kwargs)


def register() -> None:
    """Put the rewriting in front of vLLM's piecewise backend; does nothing in engines that don't capture.

    The entry point of ``vllm.general_plugins``; the worker calls it too. May be called any number of times.
    """
    backends = importlib.import_module("vllm.compilation.backends")
    original = backends.VllmBackend.__call__
    if getattr(original, "captures", False):
        return

    @functools.wraps(original)
    def call(self: Any, graph: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        compile_plain = functools.partial(original, self)
        worker = _worker
        if worker is None or not worker.stores or worker.vllm_config is not self.vllm_config:
            return compile_plain(graph, example_inputs)
        return worker.capture.compile(graph, example_inputs, compile_plain)

    call.captures = True  # type: ignore[attr-defined]
    backends.VllmBackend.__call__ = call


def _capture_of(vllm_config: Any) -> EngineCapture:
    """The capture that an engine's configuration asks for; refuses what would lose or misplace rows in silence."""
    settings = (vllm_config.additional_config or {}).get(KEY)
    if settings is None:
        raise InstrumentationError(
            f"the worker {WORKER} needs additional_config[{KEY!r}]: give vLLM all that engine_arguments returns"
        )
    if settings["route"] == "plugin":
        _restore_piecewise(vllm_config)
    _check_supported(vllm_config, settings["route"])
    vllm_config.additional_config = _graph_settings(vllm_config.additional_config)
    return EngineCapture(
        _config_of(settings["config"]),
        Path(settings["output_path"]),
        all_requests=settings["capture"] == "all",
        mode=settings["mode"],
        drop=settings["on_full"] == "drop",
        max_stall_s=settings["max_stall_s"],
        engine=f"vllm {settings['route']}",
    )


class WorkerCapture:
    """What ``CaptureWorker`` adds to vLLM's worker for the platform."""

    model_runner: Any
    vllm_config: Any

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        self.capture = _capture_of(vllm_config)
        self.stores = False
        """Whether this worker writes a file: the first rank of each tensor-parallel group does."""
        # Cached ahead-of-time artifacts hold no Python, so they would run without handing values on.
        os.environ["VLLM_USE_AOT_COMPILE"] = "0"
        register()
        super().__init__(vllm_config, *args, **kwargs)  # type: ignore[call-arg]

    def load_model(self, **kwargs: Any) -> None:
        global _worker
        super().load_model(**kwargs)  # type: ignore[misc]
        _worker = self
        place = _place(self.vllm_config)
        if place is None:
            return
        rank, world = place
        if world > 1:
            path = self.capture.path
            self.capture.path = path.with_name(f"{path.stem}.rank{rank}{path.suffix}")
        try:
            self.capture.attach(self.model_runner.get_model(), rank, world)
        except NoSitesError:
            if self.vllm_config.parallel_config.pipeline_parallel_size == 1:
                raise
            log.warning("this pipeline stage has none of the chosen sites: it captures nothing")
            return
        self.stores = True

    def compile_or_warm_up_model(self) -> Any:
        times = super().compile_or_warm_up_model()  # type: ignore[misc]
        if int(self.vllm_config.compilation_config.mode) == 0:
            # Engines that don't compile may start without running the model; all ranks run it, for its collectives.
            self.model_runner.profile_run()
        self.capture.check_fired(self.vllm_config.scheduler_config.max_num_batched_tokens)
        return times

    def execute_model(self, scheduler_output: Any) -> Any:
        capture = self.capture
        scheduled = self._begin_step(scheduler_output) if capture.is_capturing else {}
        if not scheduled or not capture.arm(scheduled.values()):
            return super().execute_model(scheduler_output)  # type: ignore[misc]
        try:
            output = super().execute_model(scheduler_output)  # type: ignore[misc]
        except BaseException:
            capture.sink.take()
            raise
        try:
            batch, token_ids = _batch_of(self.model_runner)
            order = [scheduled[name] for name in batch.req_ids if name in scheduled]
            if len(order) != len(scheduled):
                raise InstrumentationError(
                    f"vLLM's batch holds {len(order)} of {len(scheduled)} scheduled requests"
                )
        except Exception as error:
            capture.switch_off(error)
        else:
            capture.store(order, token_ids)
        return output

    def _begin_step(self, scheduler_output: Any) -> dict[str, Scheduled]:
        """What the step computes, by engine id; new requests are told to the capture, finished ones forgotten."""
        capture = self.capture
        capture.finish_requests(scheduler_output.finished_req_ids)
        firsts = {}
        for new in scheduler_output.scheduled_new_reqs:
            firsts[new.req_id] = new.num_computed_tokens
            wish = (getattr(new.sampling_params, "extra_args", None) or {}).get(KEY)
            client_id = _client_id(new.req_id)
            capture.begin_request(new.req_id, client_id, new.prompt_len, new.num_computed_tokens, wish)
        cached = scheduler_output.scheduled_cached_reqs
        firsts.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        counts = scheduler_output.num_scheduled_tokens
        return {name: (name, firsts[name], count) for name, count in counts.items()}

    def shutdown(self) -> None:
        try:
            self.capture.close()
        finally:
            super().shutdown()  # type: ignore[misc]

    def finish_capture(self) -> dict[str, Any] | None:
        """End the capture and close this worker's file: ``llm.collective_rpc("finish_capture")``."""
        self.capture.close()
        return self.capture.report()

    def switch_capture(self, on: bool) -> bool:
        """Store nothing from the next step on, or go on: ``llm.collective_rpc("switch_capture", args=(False,))``.

        Returns:
            Whether this worker stores now; False as well where another rank does, or after a failure.
        """
        self.capture.paused = not on
        return bool(on) and self.capture.is_capturing

    def capture_report(self) -> dict[str, Any] | None:
        """What this worker captured so far; None where another rank stores."""
        return self.capture.report()


def __getattr__(name: str) -> Any:
    # The class is made when vLLM asks for it: which worker it extends is known only inside vLLM.
    if name != "CaptureWorker":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    on_cpu = importlib.import_module("vllm.platforms").current_platform.is_cpu()
    base = (
        importlib.import_module("vllm.v1.worker.cpu_worker").CPUWorker
        if on_cpu
        else importlib.import_module("vllm.v1.worker.gpu_worker").Worker
    )
    worker = globals()["CaptureWorker"] = type("CaptureWorker", (WorkerCapture, base), {})
    return worker


def _config_of(values: Mapping[str, Any]) -> InstrumentationConfig:
    known = dict(values)
    known["granularity"] = HookGranularity(known["granularity"])
    known["hook_config"] = HookConfig(**known["hook_config"])
    return InstrumentationConfig(**known)


def _check_supported(vllm_config: Any, route: Route) -> None:
    """Refuse what would lose or misplace rows in silence."""
    parallel, compilation = vllm_config.parallel_config, vllm_config.compilation_config
    if vllm_config.speculative_config is not None:
        raise InstrumentationError(
            "speculative decoding computes rows of tokens that are rejected later, so rows and positions would not "
            "match: switch one of the two off"
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
    if route == "official" and compilation.backend != BACKEND:
        raise InstrumentationError(
            f"compilation_config.backend is {compilation.backend!r}, expected {BACKEND!r}: give vLLM the "
            f"compilation_config that engine_arguments returns"
        )


def _restore_piecewise(vllm_config: Any) -> None:
    """vLLM's CPU platform turns mode 3 into 2 to spare compile time; the plugin route needs 3, which works there."""
    compilation, parallel = vllm_config.compilation_config, vllm_config.parallel_config
    if int(compilation.mode) == 2 and vllm_config.device_config.device_type == "cpu":
        compilation.mode = type(compilation.mode)(3)
        compilation.splitting_ops = None
        compilation.compile_sizes = compilation.compile_sizes or []
        # vLLM's own pass for the older form names CUDA operators that its CPU build lacks.
        compilation.inductor_compile_config["enable_auto_functionalized_v2"] = True
        compilation.set_splitting_ops_for_v1(parallel.all2all_backend, parallel.data_parallel_size)


def _place(vllm_config: Any) -> tuple[int, int] | None:
    """Number of this worker's file and how many there are; None for a worker whose rows another one stores."""
    state = importlib.import_module("vllm.distributed.parallel_state")
    if state.get_tp_group().rank_in_group != 0:
        # Outputs of attention and MLP are whole on every rank of a tensor-parallel group.
        return None
    parallel = vllm_config.parallel_config
    stages = parallel.pipeline_parallel_size
    replica = parallel.data_parallel_rank
    return replica * stages + state.get_pp_group().rank_in_group, stages * parallel.data_parallel_size


def _client_id(engine_id: str) -> str:
    """The request id as the client knows it: the engine appends eight random hexadecimal digits."""
    if os.environ.get("VLLM_DISABLE_REQUEST_ID_RANDOMIZATION", "0") not in ("", "0"):
        return engine_id
    return _INTERNAL_SUFFIX.sub("", engine_id)


def _batch_of(runner: Any) -> tuple[Any, torch.Tensor | None]:
    """The batch that the runner just ran, in the order of its rows, and its token ids."""
    state = getattr(runner, "execute_model_state", None)
    batch = getattr(state, "input_batch", None)
    if batch is not None:
        return batch, getattr(batch, "input_ids", None)
    token_ids = getattr(getattr(runner, "input_ids", None), "gpu", None)
    return runner.input_batch, token_ids
