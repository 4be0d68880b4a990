"""A real vLLM engine on CPU with a real small model: each captured row against Hugging Face's eager hooks.

Needs an environment of its own: `make test-vllm` builds it and runs this file.
"""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from vllm_engine import NEEDS_VLLM, Hooks, check_rows, environment_of, run_engine, save_model

from fx_instrument import InstrumentationConfig, InstrumentationError, open_stream
from fx_instrument.integrations.vllm import engine_arguments, server_arguments

pytestmark = NEEDS_VLLM

NUM_LAYERS = 4
PROMPTS = ["The capital of France is", "Once upon a time", "def f(x):", "word " * 150, "I am", "2 + 2 ="]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), NUM_LAYERS)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return environment_of(tmp_path_factory.mktemp("vllm_cache"))


@pytest.mark.parametrize("way", ["official", "plugin", "eager"])
def test_parity_with_hugging_face(
    folder: Path, environment: dict[str, str], tmp_path: Path, way: str
) -> None:
    """Batched, chunked and mixed: every row of every site at the right request and position."""
    job = {
        "model": str(folder),
        "output": str(tmp_path / "out.stream"),
        "capture": {"route": "plugin"} if way == "plugin" else {},
        "engine": {"enforce_eager": True} if way == "eager" else {},
        "rounds": [[{"prompt": prompt} for prompt in PROMPTS]],
    }
    found = run_engine(job, environment, tmp_path)
    (report,) = found["reports"]
    assert report["last_failure"] is None and report["dropped_records"] == 0
    with open_stream(tmp_path / "out.stream") as stream:
        assert [site.name for site in stream.sites] == [
            f"model.layers.{layer}.{kind}" for layer in range(NUM_LAYERS) for kind in ("self_attn", "mlp")
        ]
        hooks = Hooks(folder, [site.name for site in stream.sites])
        num_rows = expected_rows = 0
        for result in found["results"]:
            # The last token was sampled, not run.
            tokens = (result["prompt"] + result["output"])[:-1]
            num_rows += check_rows(stream, hooks, result["id"], tokens, range(len(tokens)))
            expected_rows += len(tokens) * len(stream.sites)
        assert num_rows == expected_rows
        # More steps than the longest prompt needs whole, so it was cut; fewer than one a token, so it was batched.
        assert 10 <= stream.num_steps < sum(len(r["prompt"]) for r in found["results"])
        assert set(stream.requests) == {result["id"] for result in found["results"]}


def test_requests_choose(folder: Path, environment: dict[str, str], tmp_path: Path) -> None:
    """Opt-in: layers, roles and positions of each request's own; prefix hits are missing; nothing for the others."""
    long = "The quick brown fox jumps over the lazy dog. " * 12
    job = {
        "model": str(folder),
        "output": str(tmp_path / "out.stream"),
        "capture": {"capture": "requested"},
        "engine": {"enable_prefix_caching": True, "block_size": 32},
        "rounds": [
            [
                {"prompt": long, "wish": True},
                {"prompt": PROMPTS[0]},
                {"prompt": PROMPTS[1], "wish": {"positions": "last", "layers": [0, "2-3"]}},
                {"prompt": PROMPTS[2], "wish": {"positions": "generated", "roles": ["mlp"]}},
                {"prompt": PROMPTS[4], "wish": "none"},
                {"prompt": PROMPTS[5], "wish": {"layers": [99]}},
            ],
            [{"prompt": long, "wish": "all"}],
        ],
    }
    found = run_engine(job, environment, tmp_path)
    assert found["reports"][0]["refused_requests"] == 1
    assert found["prefix_hits"] > 0
    whole, _, last, generated, _, _, again = found["results"]
    with open_stream(tmp_path / "out.stream") as stream:
        assert set(stream.requests) == {whole["id"], last["id"], generated["id"], again["id"]}
        hooks = Hooks(folder, [site.name for site in stream.sites])

        def tokens(result: Mapping[str, Any]) -> list[int]:
            return (result["prompt"] + result["output"])[:-1]

        check_rows(stream, hooks, whole["id"], tokens(whole), range(len(tokens(whole))))
        prompt = len(last["prompt"])
        assert list(stream.request(last["id"])) == [
            f"model.layers.{layer}.{kind}" for layer in (0, 2, 3) for kind in ("self_attn", "mlp")
        ]
        check_rows(stream, hooks, last["id"], tokens(last), [prompt - 1])
        assert {name.rpartition(".")[2] for name in stream.request(generated["id"])} == {"mlp"}
        prompt = len(generated["prompt"])
        check_rows(stream, hooks, generated["id"], tokens(generated), range(prompt, len(tokens(generated))))

        cached = stream.request(again["id"]).num_cached_tokens
        assert cached and cached % 32 == 0
        check_rows(stream, hooks, again["id"], tokens(again), range(cached, len(tokens(again))))
        missing = stream.request(again["id"])["model.layers.0.mlp"].missing_positions
        assert missing.tolist() == list(range(cached))


def test_preempted_requests(folder: Path, environment: dict[str, str], tmp_path: Path) -> None:
    """With too few cache blocks requests are preempted and computed again: still each position once, and right."""
    job = {
        "model": str(folder),
        "output": str(tmp_path / "out.stream"),
        "engine": {"block_size": 32, "num_gpu_blocks_override": 12, "max_model_len": 160},
        "rounds": [[{"prompt": f"{number} {'word ' * 40}", "max_tokens": 64} for number in range(6)]],
    }
    found = run_engine(job, environment, tmp_path)
    assert found["preemptions"] > 0
    with open_stream(tmp_path / "out.stream") as stream:
        hooks = Hooks(folder, [site.name for site in stream.sites])
        for result in found["results"]:
            tokens = (result["prompt"] + result["output"])[:-1]
            check_rows(stream, hooks, result["id"], tokens, range(len(tokens)))


def test_switched_off_and_on(folder: Path, environment: dict[str, str], tmp_path: Path) -> None:
    """While the capture is off a request leaves nothing; the next one is stored whole."""
    rounds = [[{"prompt": PROMPTS[0]}], False, [{"prompt": PROMPTS[1]}], True, [{"prompt": PROMPTS[2]}]]
    job = {"model": str(folder), "output": str(tmp_path / "out.stream"), "rounds": rounds}
    first, _, last = run_engine(job, environment, tmp_path)["results"]
    with open_stream(tmp_path / "out.stream") as stream:
        assert set(stream.requests) == {first["id"], last["id"]}
        hooks = Hooks(folder, [site.name for site in stream.sites])
        for result in (first, last):
            tokens = (result["prompt"] + result["output"])[:-1]
            check_rows(stream, hooks, result["id"], tokens, range(len(tokens)))


def test_refusals_of_real_configurations(
    folder: Path, environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What test_vllm_arguments.py sees refused of stand-ins is refused of vLLM's own configuration, by its names."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    from vllm.config import CompilationMode, CUDAGraphMode
    from vllm.engine.arg_utils import EngineArgs

    from fx_instrument.integrations.vllm import _capture_of

    def configured(**options: Any) -> Any:
        arguments = engine_arguments(InstrumentationConfig(), tmp_path / "out.stream")
        return EngineArgs(
            model=str(folder), dtype="float32", max_model_len=512, **arguments, **options
        ).create_engine_config()

    assert _capture_of(configured()).path == tmp_path / "out.stream"
    assert _capture_of(configured(enforce_eager=True)).path == tmp_path / "out.stream"
    guessing = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
    with pytest.raises(InstrumentationError, match="speculative decoding"):
        _capture_of(configured(speculative_config=guessing))
    for section, changed, says in (
        ("parallel_config", {"ubatch_size": 2}, "run a batch in parts"),
        ("parallel_config", {"prefill_context_parallel_size": 2}, "prefill_context_parallel_size > 1"),
        ("parallel_config", {"decode_context_parallel_size": 2}, "decode_context_parallel_size > 1"),
        ("compilation_config", {"cudagraph_mode": CUDAGraphMode.FULL_AND_PIECEWISE}, "replays the whole"),
        ("compilation_config", {"backend": "inductor"}, "give vLLM the compilation_config"),
        (
            "compilation_config",
            {"mode": CompilationMode.NONE, "cudagraph_mode": CUDAGraphMode.PIECEWISE},
            "no traced graph",
        ),
    ):
        config = configured()
        config.device_config.device_type = "cuda"
        for option, setting in changed.items():
            assert hasattr(getattr(config, section), option)
            setattr(getattr(config, section), option, setting)
        with pytest.raises(InstrumentationError, match=says):
            _capture_of(config)
    assert not (tmp_path / "out.stream").exists()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@contextlib.contextmanager
def openai_server(
    folder: Path, environment: Mapping[str, str], arguments: Sequence[str], log: Path
) -> Iterator[int]:
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    options = [
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--dtype",
        "float32",
        "--served-model-name",
        "small",
    ]
    limits = ["--max-model-len", "512", "--max-num-batched-tokens", "64", "--max-num-seqs", "8"]
    with log.open("w") as out:
        server = subprocess.Popen(
            [*command, *options, *limits, *arguments],
            env={**environment, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + 600
        while True:
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-6000:]
            with contextlib.suppress(OSError, urllib.error.URLError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(0.5)
        yield port
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(120)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def complete(port: int, prompt: str, wish: object = None, *, max_tokens: int = 8) -> dict[str, Any]:
    body = {
        "model": "small",
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
    }
    body["return_token_ids"] = True
    if wish is not None:
        body["vllm_xargs"] = {"fx_instrument": wish}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        answer: dict[str, Any] = json.load(response)
    return answer


def test_openai_server(folder: Path, environment: dict[str, str], tmp_path: Path) -> None:
    """Concurrent clients of the OpenAI server: those that ask through vllm_xargs find their rows by response id."""
    path = tmp_path / "served.stream"
    arguments = server_arguments(InstrumentationConfig(), path, capture="requested")
    wishes: list[object] = ["all", None, '{"positions": "last"}', 1, "none", "generated"]
    with openai_server(folder, environment, arguments, tmp_path / "server.log") as port:
        with ThreadPoolExecutor(len(PROMPTS)) as clients:
            answers = list(clients.map(lambda pair: complete(port, *pair), zip(PROMPTS, wishes, strict=True)))
        # An argument that can't be served is no reason to fail the request.
        assert complete(port, "Hello", '{"layers": "x"}')["choices"]
    assert path.stat().st_mode & 0o077 == 0
    with open_stream(path) as stream:
        hooks = Hooks(folder, [site.name for site in stream.sites])
        asked = {}
        for answer, wish in zip(answers, wishes, strict=True):
            choice = answer["choices"][0]
            prompt, output = choice["prompt_token_ids"], choice["token_ids"]
            tokens = (prompt + output)[:-1]
            positions = {
                "all": range(len(tokens)),
                1: range(len(tokens)),
                '{"positions": "last"}': [len(prompt) - 1],
                "generated": range(len(prompt), len(tokens)),
            }.get(wish)  # type: ignore[call-overload]
            if positions is not None:
                asked[f"{answer['id']}-0"] = (tokens, positions)
        assert set(stream.requests) == set(asked)
        for request_id, (tokens, positions) in asked.items():
            check_rows(stream, hooks, request_id, tokens, positions)


def test_openai_server_for_weeks(folder: Path, environment: dict[str, str], tmp_path: Path) -> None:
    """Files rotate under concurrent clients, counters are served, and an operator switches, by call and by file."""
    recordings, port_of_metrics = tmp_path / "r", free_port()
    arguments = server_arguments(
        InstrumentationConfig(max_memory_gb=0.5),
        recordings,
        rotate_bytes=50_000,
        min_free_bytes=0,
        max_stall_s=5.0,
        on_full="stall",
        metrics_port=port_of_metrics,
    )

    def count(name: str) -> float:
        with urllib.request.urlopen(f"http://127.0.0.1:{port_of_metrics}/metrics", timeout=60) as response:
            lines = response.read().decode().splitlines()
        return float(next(line for line in lines if line.startswith(f"fx_instrument_{name} ")).split()[1])

    def until(name: str, value: float) -> None:
        for _ in range(600):
            if count(name) == value:
                return
            time.sleep(0.1)
        raise AssertionError(f"{name} is {count(name)}, not {value}")

    asked: dict[str, list[int]] = {}

    def note(answer: dict[str, Any]) -> None:
        choice = answer["choices"][0]
        asked[f"{answer['id']}-0"] = (choice["prompt_token_ids"] + choice["token_ids"])[:-1]

    # The development endpoint is there only where an operator asks for it.
    development = {**environment, "VLLM_SERVER_DEV_MODE": "1"}
    with openai_server(folder, development, arguments, tmp_path / "server.log") as port:

        def call(method: str, *values: object) -> list[Any]:
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/collective_rpc",
                data=json.dumps({"method": method, "args": values}).encode(),
                headers={"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=120) as response:
                results: list[Any] = json.load(response)["results"]
                return results

        assert count("recording") == 1
        plain = None
        for _ in range(3):
            with ThreadPoolExecutor(len(PROMPTS)) as clients:
                answers = list(clients.map(lambda prompt: complete(port, prompt, max_tokens=128), PROMPTS))
            texts = [answer["choices"][0]["text"] for answer in answers]
            assert plain is None or texts == plain
            plain = texts
            for answer in answers:
                note(answer)
        assert call("switch_capture", False) == ["False"]
        until("recording", 0)
        assert plain[1].startswith(complete(port, PROMPTS[1])["choices"][0]["text"])
        assert call("switch_capture", True) == ["True"]
        note(complete(port, PROMPTS[1]))
        (recordings / "off").touch()
        until("recording", 0)
        assert plain[2].startswith(complete(port, PROMPTS[2])["choices"][0]["text"])
        (recordings / "off").unlink()
        until("recording", 1)
        note(complete(port, PROMPTS[2]))
        (report,) = call("capture_report")
        assert report["failures"] == report["dropped_records"] == report["refused_requests"] == 0
        assert not report["paused"] and report["active"] and report["files"] > 6
        until("steps_total", report["steps"])
    paths = sorted(recordings.glob("*.stream"))
    assert len(paths) > 6 and recordings.stat().st_mode & 0o077 == 0
    with open_stream(recordings) as stream:
        assert set(stream.requests) == set(asked) and stream.num_steps == report["steps"]
        hooks = Hooks(folder, [site.name for site in stream.sites])
        for request_id, tokens in asked.items():
            # The second time the long prompt's blocks are cached, and spared.
            cached = stream.request(request_id).num_cached_tokens
            check_rows(stream, hooks, request_id, tokens, range(cached, len(tokens)))
        assert sum(stream.request(request_id).num_cached_tokens == 0 for request_id in asked) >= len(PROMPTS)
    # Each file has its index, and at least one request goes over several.
    held = []
    for path in paths:
        with open_stream(path) as stream:
            held += stream.requests
    assert len(held) > len(set(held))
