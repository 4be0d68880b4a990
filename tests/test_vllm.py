"""A real vLLM engine on CPU with a real small model: each captured row against Hugging Face's eager hooks.

Needs an environment of its own: `make test-vllm` builds it and runs this file.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
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
import torch

from fx_instrument import HookConfig, HookGranularity, InstrumentationConfig, open_stream
from fx_instrument.activations import ActivationStream
from fx_instrument.integrations.vllm import _Settings, engine_arguments, server_arguments

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM has an environment of its own"),
]

ROOT = Path(__file__).parents[1]
NUM_LAYERS = 4
# Seen: 3.7e-6 of a tensor's largest value (fp32, Inductor against eager); a row that is off by one gives 0.1 and more.
TOLERANCE = 1e-5
PROMPTS = ["The capital of France is", "Once upon a time", "def f(x):", "word " * 150, "I am", "2 + 2 ="]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first layers of SmolLM2-135M as a model folder."""
    from fx_instrument.demo.smollm import load_model

    model, tokenizer = load_model(torch.float32)
    config = model.config
    config.num_hidden_layers = NUM_LAYERS
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    cut = type(model)(config)
    state = model.state_dict()
    cut.load_state_dict({name: state[name] for name in cut.state_dict() if name in state})
    folder: Path = tmp_path_factory.mktemp("model")
    cut.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CACHE_ROOT": str(tmp_path_factory.mktemp("vllm_cache")),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def run_engine(job: Mapping[str, Any], environment: Mapping[str, str], tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "job.json").write_text(json.dumps(job))
    command = [sys.executable, str(ROOT / "tests/engines/vllm_offline.py")]
    done = subprocess.run(
        [*command, str(tmp_path / "job.json"), str(tmp_path / "found.json")],
        env=dict(environment),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    found: dict[str, Any] = json.loads((tmp_path / "found.json").read_text())
    return found


class Hooks:
    """What eager forward hooks see in Hugging Face's model."""

    def __init__(self, folder: Path, sites: Sequence[str]) -> None:
        import transformers

        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self._seen: dict[str, torch.Tensor] = {}
        for site in sites:
            self._model.get_submodule(site).register_forward_hook(self._hook(site))

    def _hook(self, site: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            self._seen[site] = (output[0] if isinstance(output, tuple) else output)[0]

        return hook

    def run(self, tokens: Sequence[int]) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            self._model(torch.tensor([list(tokens)]))
        return dict(self._seen)


def check_rows(
    stream: ActivationStream, hooks: Hooks, request_id: str, tokens: Sequence[int], positions: Sequence[int]
) -> int:
    """Compare the request's rows with the hooks'; every position exactly once, in order. Returns the rows."""
    request = stream.request(request_id)
    seen = hooks.run(tokens)
    recorded = request.token_ids()
    assert all(tokens[position] == token for position, token in recorded.items())
    num_rows = 0
    for site, rows in request.items():
        assert rows.token_positions.tolist() == list(positions), (request_id, site)
        if positions:
            expected = seen[site][list(positions)]
            error = (rows.tensor() - expected).abs().max() / seen[site].abs().max()
            assert error < TOLERANCE, (request_id, site, float(error))
        num_rows += len(rows)
    return num_rows


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
    assert report["failed"] is None and report["dropped_records"] == 0
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


def test_the_compile_cache_serves_no_other_plan(
    folder: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    """One cache folder, changing plans, cold and warm: what was planned is what is stored."""
    plans = ["full_tensor", "attention_only", "mlp_only", "full_tensor", "attention_only"]
    for number, granularity in enumerate(plans):
        output = tmp_path / f"{number}.stream"
        job = {
            "model": str(folder),
            "output": str(output),
            "granularity": granularity,
            "capture": {"route": "plugin"},
            "rounds": [[{"prompt": PROMPTS[0]}]],
        }
        (result,) = run_engine(job, environment, tmp_path)["results"]
        with open_stream(output) as stream:
            roles = {site.role for site in stream.sites}
            assert (
                roles
                == {
                    "full_tensor": {"attention", "mlp"},
                    "attention_only": {"attention"},
                    "mlp_only": {"mlp"},
                }[granularity]
            )
            hooks = Hooks(folder, [site.name for site in stream.sites])
            tokens = (result["prompt"] + result["output"])[:-1]
            check_rows(stream, hooks, result["id"], tokens, range(len(tokens)))


def test_the_plan_is_in_the_cache_key_and_the_path_is_not(tmp_path: Path) -> None:
    """vLLM's key of compiled artifacts changes with the sites, and with nothing that leaves the graphs as they are."""

    def key(config: InstrumentationConfig, name: str = "a", **options: Any) -> str:
        return _Settings(
            engine_arguments(config, tmp_path / name, **options)["additional_config"]
        ).compute_hash()

    full = key(InstrumentationConfig())
    assert key(InstrumentationConfig(), "b", on_full="drop") == full
    assert key(InstrumentationConfig(granularity=HookGranularity.MLP_ONLY)) != full
    globs = HookConfig(target_layers=["model.layers.0.*"])
    assert key(InstrumentationConfig(hook_config=globs)) != full


@contextlib.contextmanager
def openai_server(
    folder: Path, environment: Mapping[str, str], arguments: Sequence[str], log: Path
) -> Iterator[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
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


def complete(port: int, prompt: str, wish: object = None) -> dict[str, Any]:
    body = {"model": "small", "prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
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
