"""What an engine's arguments say, and what is refused before it starts, each with what to do; needs no vLLM."""

from __future__ import annotations

import enum
import json
import socket
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fx_instrument import (
    HookConfig,
    HookGranularity,
    InstrumentationConfig,
    InstrumentationError,
    open_stream,
)
from fx_instrument.integrations import vllm
from fx_instrument.integrations.vllm import BACKEND, WorkerCapture, engine_arguments, server_arguments
from fx_instrument.serving.rotation import FileLimits


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
        },
        "compilation_config": {
            "mode": given["mode"],
            "backend": given.get("backend", "inductor"),
            "cudagraph_mode": CudaGraphs[given["cudagraph_mode"]],
        },
        "device_config": {"device_type": "cuda"},
    }
    sections = {name: SimpleNamespace(**{**some, **parts.get(name, {})}) for name, some in defaults.items()}
    return SimpleNamespace(
        **sections,
        additional_config=arguments["additional_config"],
        speculative_config=parts.get("speculative_config"),
    )


@pytest.mark.parametrize("route", ["official", "plugin"])
def test_what_the_arguments_say_is_accepted(tmp_path: Path, route: str) -> None:
    """With nothing changed, and eagerly, an engine starts: the refusals below are of what was changed."""
    for eagerly in (False, True):
        off = {"mode": 0, "cudagraph_mode": CudaGraphs.NONE} if eagerly else {}
        config = engine(tmp_path / "a.stream", {"compilation_config": off}, route=route)
        capture = vllm._capture_of(config)
        assert capture.path == tmp_path / "a.stream" and not capture.is_capturing


@pytest.mark.parametrize("route", ["official", "plugin"])
@pytest.mark.parametrize(
    "parts, says",
    [
        ({"speculative_config": {"method": "ngram"}}, "speculative decoding .* switch one of the two off"),
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

    def execute_model(self, scheduler_output: Any) -> str:
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
