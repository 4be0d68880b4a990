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
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..config import HookConfig, HookGranularity, InstrumentationConfig
from ..engine_capture import EngineCapture, Scheduled
from ..errors import InstrumentationError, NoSitesError
from ..row_plan import draw_number
from ..serving.limits import FileLimits
from .vllm_arguments import BACKEND, KEY, WORKER, engine_arguments, server_arguments
from .vllm_checks import check_supported, check_whole, language_part, restore_piecewise

__all__ = ["engine_arguments", "server_arguments"]

log = logging.getLogger(__name__)

# vLLM's CPU platform compiles with these, but sets them only for a backend of its own.
_CPU_OPTIONS = {
    "dce": True,
    "size_asserts": False,
    "nan_asserts": False,
    "epilogue_fusion": True,
    "cpp.dynamic_threads": True,
}
_Said = TypeVar("_Said")
_INTERNAL_SUFFIX = re.compile(r"-[0-9a-f]{8}$")


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
        # The language model of a multimodal one has a configuration of its own, which shares this part.
        if (
            worker is None
            or not worker.stores
            or worker.vllm_config.compilation_config is not self.vllm_config.compilation_config
        ):
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
        restore_piecewise(vllm_config)
    check_supported(vllm_config, settings["route"])
    vllm_config.additional_config = _graph_settings(vllm_config.additional_config)
    limits = settings["limits"]
    return EngineCapture(
        _config_of(settings["config"]),
        Path(settings["output_path"]),
        all_requests=settings["capture"] == "all",
        mode=settings["mode"],
        drop=settings["on_full"] == "drop",
        max_stall_s=settings["max_stall_s"],
        engine=f"vllm {settings['route']}",
        limits=None if limits is None else FileLimits(**limits),
    )


class WorkerCapture:
    """What ``CaptureWorker`` adds to vLLM's worker for the platform."""

    model_runner: Any
    vllm_config: Any

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        # Taken before they are reduced to what vLLM's compile cache should know.
        self._metrics = ((vllm_config.additional_config or {}).get(KEY) or {}).get("metrics")
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
            self.capture.take_rank(rank)
        model = self.model_runner.get_model()
        within = language_part(model, named=self.capture.config.hook_config.target_layers is not None)
        sites = self.capture.sites_of(model, within)
        if self.vllm_config.parallel_config.tensor_parallel_size > 1:
            check_whole(model, sites, self.vllm_config.parallel_config)
        stages = _of_all_stages((draw_number(), sites))
        elsewhere = {name: role for _, sites in stages for name, role in sites.items()}
        try:
            self.capture.attach(
                model, rank, world, within=within, first_number=stages[0][0], elsewhere=elsewhere
            )
        except NoSitesError:
            if self.vllm_config.parallel_config.pipeline_parallel_size == 1:
                raise
            log.warning("this pipeline stage has none of the chosen sites: it captures nothing")
            return
        self.stores = True
        if self._metrics is not None:
            address, port = self._metrics
            self._serve_metrics(address, port + rank)

    def _serve_metrics(self, address: str, port: int) -> None:
        # Imported only when asked for: an extra of this package, which vLLM happens to bring.
        prometheus = importlib.import_module("fx_instrument.integrations.prometheus")
        assert self.capture.files is not None
        try:
            prometheus.serve(self.capture.files, port, address)
        except OSError:
            self.capture.close()
            raise

    def compile_or_warm_up_model(self) -> Any:
        times = super().compile_or_warm_up_model()  # type: ignore[misc]
        if int(self.vllm_config.compilation_config.mode) == 0:
            # Engines that don't compile may start without running the model; all ranks run it, for its collectives.
            self.model_runner.profile_run()
        self.capture.check_fired(self.vllm_config.scheduler_config.max_num_batched_tokens)
        return times

    def execute_model(self, scheduler_output: Any) -> Any:
        capture = self.capture
        scheduled: dict[str, Scheduled] = {}
        try:
            if capture.is_following:
                scheduled = self._begin_step(scheduler_output)
            armed = bool(scheduled) and capture.arm(scheduled.values())
        except Exception as error:
            capture.give_up(error)
            armed = False
        if not armed:
            return super().execute_model(scheduler_output)  # type: ignore[misc]
        try:
            output = super().execute_model(scheduler_output)  # type: ignore[misc]
        except BaseException:
            capture.sink.take()
            raise
        try:
            names, token_ids = _batch_of(self.model_runner, output)
            order = [scheduled[name] for name in names if name in scheduled]
            if len(order) != len(scheduled):
                raise InstrumentationError(
                    f"vLLM's batch holds {len(order)} of {len(scheduled)} scheduled requests"
                )
        except Exception as error:
            capture.give_up(error)
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

    def switch_capture(self, on: bool | str) -> bool:
        """Store nothing from the next step on, or go on: ``llm.collective_rpc("switch_capture", args=(False,))``.

        Where files rotate, off ends the file and on begins the next one, also after a failure.

        Args:
            on: or "true" or "false", as vLLM's HTTP endpoint for such calls promises to pass text only.

        Returns:
            Whether this worker stores now; False as well where another rank does, and after a failure that is still
            there or that ended a single file.
        """
        if isinstance(on, str):
            if on.lower() not in ("true", "false"):
                raise ValueError(f"switch_capture takes true or false, got {on!r}")
            on = on.lower() == "true"
        return self.capture.switch(bool(on))

    def capture_report(self) -> dict[str, Any] | None:
        """What this worker captured so far; None where another rank stores.

        Its keys are the fields of ``RecorderReport`` (``active``, ``files``, ``failures``, ``last_failure``, ``path``
        and the counts), ``paused`` (switched off by hand) and ``refused_requests`` (whose argument was bad).
        """
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


def _place(vllm_config: Any) -> tuple[int, int] | None:
    """Number of this worker's file and how many there are; None for a worker whose rows another one stores."""
    state = importlib.import_module("vllm.distributed.parallel_state")
    if state.get_tp_group().rank_in_group != 0:
        # Outputs of attention and MLP are whole on every rank of a tensor-parallel group.
        return None
    parallel = vllm_config.parallel_config
    stages = parallel.pipeline_parallel_size
    # Replicas of a dense model are told that they are alone, but for this number.
    replica = parallel.data_parallel_index
    replicas = max(parallel.data_parallel_size, replica + 1)
    return replica * stages + state.get_pp_group().rank_in_group, stages * replicas


def _of_all_stages(mine: _Said) -> list[_Said]:
    """What each pipeline stage says of itself, the first one first; all of them are told of the same requests."""
    group = importlib.import_module("vllm.distributed.parallel_state").get_pp_group()
    if group.world_size == 1:
        return [mine]
    said = [mine] * group.world_size
    torch.distributed.all_gather_object(said, mine, group=group.cpu_group)
    return said


def _client_id(engine_id: str) -> str:
    """The request id as the client knows it: the engine appends eight random hexadecimal digits."""
    if os.environ.get("VLLM_DISABLE_REQUEST_ID_RANDOMIZATION", "0") not in ("", "0"):
        return engine_id
    return _INTERNAL_SUFFIX.sub("", engine_id)


def _batch_of(runner: Any, output: Any) -> tuple[Sequence[str], torch.Tensor | None]:
    """The engine ids of the step that the runner just ran, in the order of the batch's rows, and its token ids."""
    state = getattr(runner, "execute_model_state", None)
    batch = getattr(state, "input_batch", None)
    if batch is not None:
        return batch.req_ids, getattr(batch, "input_ids", None)
    if hasattr(runner, "input_batch"):
        return runner.input_batch.req_ids, getattr(getattr(runner, "input_ids", None), "gpu", None)
    # The second runner of a pooling model has pooled already, and forgotten the batch.
    output = getattr(output, "model_runner_output", output)
    return output.req_ids, runner.input_buffers.input_ids
