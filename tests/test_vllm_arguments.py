"""What an engine's arguments say, and what is refused before it starts, each with what to do; needs no vLLM."""

from __future__ import annotations

import enum
import json
import socket
import sys
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from toy_engine import capture_into

from fx_instrument import (
    HookConfig,
    HookGranularity,
    InstrumentationConfig,
    InstrumentationError,
    open_stream,
)
from fx_instrument.engine_capture import EngineCapture
from fx_instrument.errors import NoSitesError
from fx_instrument.integrations import vllm, vllm_checks
from fx_instrument.integrations.vllm import BACKEND, WorkerCapture, engine_arguments, server_arguments
from fx_instrument.serving.limits import FileLimits


class CudaGraphs(enum.Enum):
    """vLLM's CUDAGraphMode, as far as the checks look at it."""

    NONE = 0
    PIECEWISE = 1
    FULL = 2
    FULL_DECODE_ONLY = (2, 0)
    FULL_AND_PIECEWISE = (2, 1)

    def has_full_cudagraphs(self) -> bool:
        return self.name.startswith("FULL")


def engine(output: Path, parts: Mapping[str, Mapping[str, Any]], **options: Any) -> SimpleNamespace:
    """A GPU engine's configuration with ``engine_arguments``, and what a user set besides."""
    arguments = engine_arguments(InstrumentationConfig(), output, **options)
    given = dict(arguments["compilation_config"])
    defaults: dict[str, dict[str, Any]] = {
        "parallel_config": {
            "prefill_context_parallel_size": 1,
            "decode_context_parallel_size": 1,
            "use_ubatching": False,
            "tensor_parallel_size": 1,
            "use_sequence_parallel_moe": False,
        },
        "cache_config": {"kv_sharing_fast_prefill": False},
        "compilation_config": {
            "mode": given["mode"],
            "backend": given.get("backend", "inductor"),
            "cudagraph_mode": CudaGraphs[given["cudagraph_mode"]],
            "pass_config": SimpleNamespace(**{"fuse_allreduce_rms": True, **given.get("pass_config", {})}),
        },
        "device_config": {"device_type": "cuda"},
    }
    sections = {name: SimpleNamespace(**{**some, **parts.get(name, {})}) for name, some in defaults.items()}
    return SimpleNamespace(
        **sections,
        additional_config=arguments["additional_config"],
        speculative_config=parts.get("speculative_config"),
        num_speculative_tokens=parts.get("num_speculative_tokens", 0),
        ec_transfer_config=parts.get("ec_transfer_config"),
    )


@pytest.mark.parametrize("route", ["official", "plugin"])
def test_what_the_arguments_say_is_accepted(tmp_path: Path, route: str) -> None:
    """With nothing changed, and eagerly, an engine starts: the refusals below are of what was changed."""
    for eagerly in (False, True):
        off = {"mode": 0, "cudagraph_mode": CudaGraphs.NONE} if eagerly else {}
        both = SimpleNamespace(is_ec_producer=True, is_ec_consumer=True)
        parts = {
            "compilation_config": off,
            "parallel_config": {"tensor_parallel_size": 2},
            "ec_transfer_config": both,
        }
        config = engine(tmp_path / "a.stream", parts, route=route)
        capture = vllm._capture_of(config)
        assert capture.path == tmp_path / "a.stream" and not capture.is_capturing


@pytest.mark.parametrize("route", ["official", "plugin"])
@pytest.mark.parametrize(
    "parts, says",
    [
        ({"speculative_config": {"method": "ngram"}}, "speculative decoding .* switch one of the two off"),
        ({"num_speculative_tokens": 32}, "diffusion computes each row several times"),
        ({"cache_config": {"kv_sharing_fast_prefill": True}}, "kv_sharing_fast_prefill computes some rows"),
        (
            {"ec_transfer_config": SimpleNamespace(is_ec_producer=True, is_ec_consumer=False)},
            "runs encoders for other instances and never its language model",
        ),
        (
            {
                "parallel_config": {"tensor_parallel_size": 2},
                "compilation_config": {"mode": 3, "pass_config": SimpleNamespace(fuse_allreduce_rms=True)},
            },
            "fuse_allreduce_rms would fuse",
        ),
        ({"parallel_config": {"prefill_context_parallel_size": 2}}, "prefill_context_parallel_size > 1"),
        ({"parallel_config": {"decode_context_parallel_size": 2}}, "decode_context_parallel_size > 1"),
        ({"parallel_config": {"use_ubatching": True}}, "enable_dbo and ubatch_size > 1 run a batch in parts"),
        (
            {"compilation_config": {"cudagraph_mode": CudaGraphs.FULL}},
            "FULL replays .* NONE or PIECEWISE",
        ),
        (
            {"compilation_config": {"cudagraph_mode": CudaGraphs.FULL_DECODE_ONLY}},
            "FULL_DECODE_ONLY replays",
        ),
        (
            {"compilation_config": {"cudagraph_mode": CudaGraphs.FULL_AND_PIECEWISE}},
            "FULL_AND_PIECEWISE replays",
        ),
        # "Breakable" CUDA graphs: no traced graph, and a replay.
        (
            {"compilation_config": {"mode": 0, "cudagraph_mode": CudaGraphs.PIECEWISE}},
            "no traced graph, .* PIECEWISE.* enforce_eager=True",
        ),
        (
            {"compilation_config": {"mode": 0, "cudagraph_mode": CudaGraphs.FULL_DECODE_ONLY}},
            "no traced graph, .* FULL_DECODE_ONLY.* enforce_eager=True",
        ),
    ],
)
def test_engines_that_lose_or_misplace_rows(
    tmp_path: Path, parts: Mapping[str, Mapping[str, Any]], says: str, route: str
) -> None:
    """An engine whose rows would be wrong, or missing in silence, does not start."""
    with pytest.raises(InstrumentationError, match=says):
        vllm._capture_of(engine(tmp_path / "a.stream", parts, route=route))
    assert not list(tmp_path.iterdir())


def test_parts_of_the_arguments_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker without its settings, the backend without its worker, a worker with another backend."""
    with pytest.raises(InstrumentationError, match=r"additional_config\['fx_instrument'\].*engine_arguments"):
        vllm._capture_of(SimpleNamespace(additional_config={}))
    with pytest.raises(InstrumentationError, match=r"additional_config\['fx_instrument'\]"):
        vllm._capture_of(SimpleNamespace(additional_config=None))
    monkeypatch.setattr(vllm, "_worker", None)
    with pytest.raises(InstrumentationError, match=r"works with the worker .*CaptureWorker only"):
        vllm.backend(torch.fx.symbolic_trace(torch.nn.ReLU()), [])
    other = engine(tmp_path / "a.stream", {"compilation_config": {"backend": "inductor"}})
    with pytest.raises(InstrumentationError, match=f"is 'inductor', expected '{BACKEND}'"):
        vllm._capture_of(other)
    with pytest.raises(AttributeError, match="no attribute 'Worker'"):
        vllm.Worker  # noqa: B018


@pytest.mark.parametrize(
    "arguments, error, says",
    [
        ({"config": {"granularity": "full_tensor"}}, TypeError, "must be an InstrumentationConfig"),
        (
            {"config": InstrumentationConfig(granularity=HookGranularity.SAMPLED_SLICES)},
            ValueError,
            "SAMPLED_SLICES samples whole values",
        ),
        ({"config": InstrumentationConfig(strict_numerics=True)}, ValueError, "runs a graph twice"),
        ({"capture": "some"}, ValueError, "capture must be one of 'all', 'requested', got 'some'"),
        ({"route": "hooks"}, ValueError, "route must be one of 'official', 'plugin', got 'hooks'"),
        ({"mode": "a"}, ValueError, "mode must be one of 'w', 'x', got 'a'"),
        ({"on_full": "wait"}, ValueError, "on_full must be one of 'stall', 'drop', got 'wait'"),
        ({"max_stall_s": -1}, ValueError, "max_stall_s must be None or a number of seconds from 0, got -1"),
        ({"max_stall_s": "1"}, ValueError, "max_stall_s must be None or a number"),
        ({"max_files": 3}, ValueError, "max_files can't hold for one file .* rotate_bytes or rotate_s"),
        ({"min_free_bytes": 0, "max_total_bytes": 9}, ValueError, "max_total_bytes and min_free_bytes can't"),
        ({"rotate_bytes": 0}, ValueError, "rotate_bytes must be greater than 0 or None, got 0"),
        ({"rotate_s": 60, "max_files": -1}, ValueError, "max_files must be greater than 0 or None, got -1"),
        ({"rotate_s": 60, "mode": "x"}, ValueError, "mode='x' is for one file"),
        ({"rotate_s": 60, "output_path": __file__}, NotADirectoryError, "output_path is a folder, but"),
        ({"metrics_port": 70_000}, ValueError, "metrics_port must be None or a port .*got 70000"),
        ({"output_path": "none/deeper/a.stream"}, FileNotFoundError, "the folder of output_path does not"),
    ],
)
def test_bad_arguments(tmp_path: Path, arguments: dict[str, Any], error: type[Exception], says: str) -> None:
    given = {"config": InstrumentationConfig(), "output_path": tmp_path / "a.stream", **arguments}
    with pytest.raises(error, match=says):
        engine_arguments(**given)


def test_the_plan_is_in_the_cache_key_and_the_path_is_not(tmp_path: Path) -> None:
    """What a worker leaves of its settings, which vLLM hashes as JSON, changes with the sites and with nothing else."""

    def key(config: InstrumentationConfig, name: str = "a", **options: Any) -> str:
        arguments = engine_arguments(config, tmp_path / name, **options)
        vllm_config = engine(tmp_path / name, {})
        vllm_config.additional_config = {"another": 1, **arguments["additional_config"]}
        vllm._capture_of(vllm_config)
        assert type(vllm_config.additional_config) is dict
        assert vllm_config.additional_config["another"] == 1
        return json.dumps(vllm_config.additional_config, sort_keys=True)

    full = key(InstrumentationConfig())
    assert key(InstrumentationConfig(max_memory_gb=0.5), "b", on_full="drop", capture="requested") == full
    assert key(InstrumentationConfig(granularity=HookGranularity.MLP_ONLY)) != full
    globs = HookConfig(target_layers=["model.layers.0.*"])
    assert key(InstrumentationConfig(hook_config=globs)) != full


def test_what_rotates(tmp_path: Path) -> None:
    """Files that rotate drop by default and leave the disk 1 GiB; one file stalls and has no limits."""

    def settings(**options: Any) -> dict[str, Any]:
        arguments = server_arguments(InstrumentationConfig(), tmp_path / "r", **options)
        found: dict[str, Any] = json.loads(arguments[arguments.index("--additional-config") + 1])
        return found[vllm.KEY]

    one = settings()
    assert (one["on_full"], one["limits"], one["metrics"]) == ("stall", None, None)
    many = settings(rotate_s=60.0, max_files=5, metrics_port=9400)
    assert (many["on_full"], many["metrics"]) == ("drop", ["127.0.0.1", 9400])
    assert many["limits"] == {
        "rotate_bytes": None,
        "rotate_s": 60.0,
        "max_files": 5,
        "max_total_bytes": None,
        "min_free_bytes": 1 << 30,
    }
    assert settings(rotate_bytes=1 << 20, on_full="stall")["on_full"] == "stall"
    capture = vllm._capture_of(engine(tmp_path / "r", {}, rotate_bytes=1 << 20, max_total_bytes=1 << 30))
    assert capture._limits == FileLimits(rotate_bytes=1 << 20, max_total_bytes=1 << 30)


@pytest.mark.parametrize("rotates", [False, True])
def test_each_worker_has_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rotates: bool) -> None:
    """The second of two workers has a file or folder of its own, and the next port; a port that is taken ends it."""
    pytest.importorskip("prometheus_client")

    class Engine:
        def __init__(self, vllm_config: Any) -> None:
            self.vllm_config = vllm_config
            self.model_runner = SimpleNamespace(
                get_model=lambda: torch.nn.ModuleDict({"mlp": torch.nn.Linear(2, 2)})
            )

        def load_model(self) -> None: ...

    class Worker(WorkerCapture, Engine): ...

    monkeypatch.setattr(vllm, "register", lambda: None)
    monkeypatch.setattr(vllm, "_worker", None)
    monkeypatch.setattr(vllm, "_place", lambda config: (1, 2))
    monkeypatch.setattr(vllm, "_of_all_stages", lambda mine: [mine, mine])
    monkeypatch.setenv("VLLM_USE_AOT_COMPILE", "0")
    limits = {"rotate_s": 60.0, "min_free_bytes": 0} if rotates else {}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options: dict[str, Any] = {"metrics_port": port - 1, **limits}
    worker = Worker(engine(tmp_path / "a.stream", {}, **options))
    worker.load_model()
    assert worker.stores
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as response:
        assert "fx_instrument_recording 1.0" in response.read().decode()
    second = Worker(engine(tmp_path / "b.stream", {}, **options))
    with pytest.raises(OSError, match=f"can't be served at 127.0.0.1:{port} .*name another metrics_port"):
        second.load_model()
    assert second.switch_capture(True) is False
    assert worker.switch_capture("false") is False and worker.switch_capture("true") is True
    with pytest.raises(ValueError, match="takes true or false, got 'no'"):
        worker.switch_capture("no")
    report = worker.finish_capture()
    assert report is not None and report["failures"] == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert names == (
        {"a.stream.rank1", "b.stream.rank1"} if rotates else {"a.rank1.stream", "b.rank1.stream"}
    )


class Engine:
    """vLLM's worker as far as ``WorkerCapture`` asks of it, with a model of one site."""

    batch: tuple[str, ...] = ()

    def __init__(self, vllm_config: Any) -> None:
        self.model = torch.nn.ModuleDict({"mlp": torch.nn.Linear(2, 2)})
        self.model_runner = SimpleNamespace(input_ids=None)

    def execute_model(self, scheduler_output: Any) -> Any:
        self.model_runner.input_batch = SimpleNamespace(req_ids=list(self.batch))
        self.model["mlp"](torch.ones(2, 2))
        return "tokens"

    def compile_or_warm_up_model(self) -> str:
        # As vLLM's second model runner does: its kernels are warmed up by requests through the worker's own method.
        self.batch = ("_warmup_0_",)
        self.execute_model(step("_warmup_0_"))
        self.execute_model(step(finished=("_warmup_0_",)))
        return "times"


class Worker(WorkerCapture, Engine):
    def __init__(self, vllm_config: Any) -> None:
        self.vllm_config = vllm_config
        vllm_config.scheduler_config = SimpleNamespace(max_num_batched_tokens=64)
        self.capture = vllm._capture_of(vllm_config)
        Engine.__init__(self, vllm_config)
        self.capture.attach(self.model, 0, 1)


def step(*names: str, finished: tuple[str, ...] = ()) -> Any:
    """A scheduler's output: new requests of one token each."""
    new = [
        SimpleNamespace(req_id=name, num_computed_tokens=0, sampling_params=None, prompt_len=1)
        for name in names
    ]
    cached = SimpleNamespace(req_ids=[], num_computed_tokens=[])
    return SimpleNamespace(
        finished_req_ids=finished,
        scheduled_new_reqs=new,
        scheduled_cached_reqs=cached,
        num_scheduled_tokens=dict.fromkeys(names, 1),
    )


def test_requests_that_the_engine_warms_up_with_are_not_stored(tmp_path: Path) -> None:
    """They run through the worker as a client's do, before it serves; their sites count as delivering."""
    worker = Worker(engine(tmp_path / "a.stream", {}))
    assert worker.compile_or_warm_up_model() == "times"
    worker.batch = ("a-00000000",)
    assert worker.execute_model(step("a-00000000")) == "tokens"
    report = worker.finish_capture()
    assert report is not None and report["failures"] == 0
    with open_stream(tmp_path / "a.stream") as stream:
        assert stream.requests == ("a",)
        assert stream.num_steps == 1


def test_a_step_whose_batch_does_not_match(tmp_path: Path) -> None:
    """Rows that can't be assigned switch the capture off, once; the step's output is the engine's all the same."""
    worker = Worker(engine(tmp_path / "a.stream", {}))
    worker.compile_or_warm_up_model()
    worker.batch = ("a-00000000",)
    assert worker.execute_model(step("a-00000000", "b-00000000")) == "tokens"
    assert worker.execute_model(step("c-00000000")) == "tokens"
    report = worker.finish_capture()
    assert report is not None and report["records"] == 0 and report["failures"] == 1
    assert "holds 1 of 2 scheduled requests" in report["last_failure"]


def test_a_pooling_model_s_rows_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second runner pools inside the step: the answer says which requests it held, in which order."""

    def execute(self: Engine, scheduler_output: Any) -> Any:
        self.model["mlp"](torch.ones(3, 2))
        answer = SimpleNamespace(req_ids=["b-00000000", "a-00000000"])
        return SimpleNamespace(model_runner_output=answer)

    worker = Worker(engine(tmp_path / "a.stream", {}))
    worker.compile_or_warm_up_model()
    monkeypatch.setattr(Engine, "execute_model", execute)
    ids = torch.tensor([7, 8, 9], dtype=torch.int32)
    worker.model_runner = SimpleNamespace(
        execute_model_state=None, input_buffers=SimpleNamespace(input_ids=ids)
    )
    both = step("a-00000000", "b-00000000")
    both.num_scheduled_tokens["a-00000000"] = 2
    worker.execute_model(both)
    report = worker.finish_capture()
    assert report is not None and report["failures"] == 0
    with open_stream(tmp_path / "a.stream") as stream:
        assert stream.request("b").token_ids() == {0: 7}
        assert stream.request("a").token_ids() == {0: 8, 1: 9}


def test_a_scheduler_that_is_not_understood(tmp_path: Path) -> None:
    """What this package expects of vLLM's scheduler and does not find ends the capture, never the engine's step."""
    worker = Worker(engine(tmp_path / "a.stream", {}))
    worker.compile_or_warm_up_model()
    worker.batch = ("a-00000000",)
    renamed = step("a-00000000")
    del renamed.scheduled_cached_reqs
    assert worker.execute_model(renamed) == "tokens"
    report = worker.finish_capture()
    assert report is not None and report["failures"] == 1
    assert "scheduled_cached_reqs" in report["last_failure"]


def test_the_language_model_of_a_multimodal_one(tmp_path: Path) -> None:
    """Only it has rows of tokens: sites are chosen in it, and those that are named outside it are refused."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.visual = torch.nn.ModuleDict({"mlp": torch.nn.Linear(2, 2)})
            self.language_model = torch.nn.ModuleDict({"mlp": torch.nn.Linear(2, 2)})

        def get_language_model(self) -> torch.nn.Module:
            return self.language_model

    class Unknown(Model):
        def get_language_model(self) -> torch.nn.Module:
            raise NotImplementedError

    assert vllm_checks.language_part(torch.nn.Linear(2, 2), named=False) == ""
    assert vllm_checks.language_part(Unknown(), named=True) == ""
    with pytest.raises(InstrumentationError, match=r"part of Unknown is its language model.*target_layers"):
        vllm_checks.language_part(Unknown(), named=False)
    within = vllm_checks.language_part(Model(), named=False)
    assert within == "language_model"

    def capture_of(*globs: str) -> EngineCapture:
        hooks = HookConfig(target_layers=list(globs) or None)
        return capture_into(tmp_path / "a.stream", InstrumentationConfig(hook_config=hooks))

    assert set(capture_of().sites_of(Model(), within)) == {"language_model.mlp"}
    assert set(capture_of("language_model.*").sites_of(Model(), within)) == {"language_model.mlp"}
    for globs in (["visual.mlp"], ["**.mlp"]):
        with pytest.raises(NoSitesError, match=r"visual.mlp lies outside language_model.*language_model\."):
            capture_of(*globs).attach(Model(), 0, 1, within=within)
    assert not list(tmp_path.iterdir())
    capture = capture_of()
    capture.attach(Model(), 0, 1, within=within)
    capture.close()
    assert [site.name for site in capture.sites] == ["language_model.mlp"]


def test_outputs_that_are_not_whole_on_each_rank() -> None:
    """One rank of a tensor-parallel group stores: a site that holds a share or a summand there is refused, by name."""

    class Row(torch.nn.Linear):
        def __init__(self, reduce_results: bool, tp_size: int = 2) -> None:
            super().__init__(2, 2)
            self.reduce_results, self.tp_size = reduce_results, tp_size

    class Column(torch.nn.Linear):
        gather_output = False
        tp_size = 2

    alone = SimpleNamespace(use_sequence_parallel_moe=False)

    def check(name: str = "mlp", parallel: Any = alone, **modules: torch.nn.Module) -> None:
        model = torch.nn.ModuleDict({"mlp": torch.nn.ModuleDict(modules)})
        vllm_checks.check_whole(model, [name], parallel)

    check(gate_up_proj=Column(2, 2), down_proj=Row(True))
    check(down_proj=Row(False, tp_size=1))
    check(experts=torch.nn.Linear(2, 2), shared_experts=torch.nn.ModuleDict({"down_proj": Row(False)}))
    with pytest.raises(InstrumentationError, match=r"mlp gives .* a summand .*\(down_proj leaves the sum"):
        check(down_proj=Row(False))
    with pytest.raises(InstrumentationError, match=r"mlp.down_proj gives .* a summand .*\(it leaves the sum"):
        check("mlp.down_proj", down_proj=Row(False))
    with pytest.raises(InstrumentationError, match=r"mlp.gate_up_proj gives .* share of its columns"):
        check("mlp.gate_up_proj", gate_up_proj=Column(2, 2))
    with pytest.raises(InstrumentationError, match=r"dot_product_attention gives .* share of its columns"):
        check("mlp.scaled_dot_product_attention")
    with pytest.raises(InstrumentationError, match="split the rows of experts"):
        check(parallel=SimpleNamespace(use_sequence_parallel_moe=True), down_proj=Row(True))


@pytest.mark.parametrize(
    "dense, index, place", [(True, 0, (1, 2)), (True, 1, (3, 4)), (False, 0, (1, 4)), (False, 1, (3, 4))]
)
def test_replicas_have_a_number_each(
    monkeypatch: pytest.MonkeyPatch, dense: bool, index: int, place: tuple[int, int]
) -> None:
    """Replicas of a dense model are told that they are alone, so their number is taken from where it is left."""
    group = SimpleNamespace(rank_in_group=1)
    state = SimpleNamespace(get_tp_group=lambda: SimpleNamespace(rank_in_group=0), get_pp_group=lambda: group)
    monkeypatch.setitem(sys.modules, "vllm.distributed.parallel_state", state)
    parallel = SimpleNamespace(
        pipeline_parallel_size=2,
        data_parallel_index=index,
        data_parallel_rank=0 if dense else index,
        data_parallel_size=1 if dense else 2,
    )
    monkeypatch.setattr(vllm.importlib, "import_module", lambda name: sys.modules[name])
    assert vllm._place(SimpleNamespace(parallel_config=parallel)) == place


def test_a_language_model_with_a_configuration_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM gives that of a multimodal model a copy, which shares the compilation's; another engine's does not."""

    class VllmBackend:
        def __init__(self, vllm_config: Any) -> None:
            self.vllm_config = vllm_config

        def __call__(self, graph: Any, example_inputs: Any) -> str:
            return "plain"

    monkeypatch.setattr(
        vllm.importlib, "import_module", lambda name: SimpleNamespace(VllmBackend=VllmBackend)
    )
    mine = engine(tmp_path / "a.stream", {}, route="plugin")
    capture = SimpleNamespace(compile=lambda graph, example_inputs, compile_plain: "captured")
    monkeypatch.setattr(vllm, "_worker", SimpleNamespace(stores=True, vllm_config=mine, capture=capture))
    vllm.register()
    vllm.register()
    assert VllmBackend(mine)(None, []) == "captured"
    assert VllmBackend(SimpleNamespace(**vars(mine)))(None, []) == "captured"
    assert VllmBackend(engine(tmp_path / "b.stream", {}))(None, []) == "plain"
