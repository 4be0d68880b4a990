"""``transformers serve`` in this process: every request's rows, no response changed, one by one and batched."""

from __future__ import annotations

import json
import socket
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llm import save_tiny_llm

from fx_instrument import InstrumentationConfig, InstrumentationFramework, Recorder, open_stream

pytestmark = pytest.mark.server

PROMPTS = {f"request-{n}": " ".join(f"w{(7 * n + i) % 100}" for i in range(2 + 3 * n)) for n in range(5)}
NEW_TOKENS = 8


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Client:
    def __init__(self, port: int, model: str) -> None:
        self._url, self._model = f"http://127.0.0.1:{port}", model

    def get(self, path: str) -> None:
        urllib.request.urlopen(self._url + path, timeout=60).read()

    def ask(
        self,
        request_id: str,
        stream: bool = False,
        *,
        prompt: str | None = None,
        max_tokens: int | None = None,
    ) -> str:
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": prompt or PROMPTS[request_id]}],
            "max_tokens": max_tokens or NEW_TOKENS,
            "temperature": 0.0,
            "stream": stream,
        }
        headers = {"content-type": "application/json", "x-request-id": request_id}
        request = urllib.request.Request(
            self._url + "/v1/chat/completions", json.dumps(body).encode(), headers
        )
        with urllib.request.urlopen(request, timeout=600) as response:
            text = response.read().decode()
        if not stream:
            return str(json.loads(text)["choices"][0]["message"]["content"])
        chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        return "".join(
            chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"]
        )


ROOMY = {
    "continuous_batching": True,
    "cb_num_blocks": 16,
    "cb_block_size": 32,
    "cb_max_batch_tokens": 64,
}
# Three requests of 40 tokens are more than the 96 that the cache has room for, and a step computes eight.
TIGHT = {**ROOMY, "cb_num_blocks": 3, "cb_max_batch_tokens": 8}


@pytest.fixture(params=[{}, ROOMY], ids=["one by one", "continuous batching"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Any, Client]]:
    pytest.importorskip("fastapi")
    pytest.importorskip("openai")
    from transformers.cli.serve import Serve

    save_tiny_llm(tmp_path / "model")
    port = free_port()
    serve = Serve(
        force_model=str(tmp_path / "model"),
        device="cpu",
        host="127.0.0.1",
        port=port,
        non_blocking=True,
        **request.param,
    )
    try:
        client = Client(port, str(tmp_path / "model"))
        for _ in range(300):
            try:
                client.get("/health")
                break
            except OSError:
                serve._thread.join(0.1)
        yield serve, client
    finally:
        serve.kill_server()


def test_rows_of_concurrent_requests(server: tuple[Any, Client], tmp_path: Path) -> None:
    from fx_instrument.integrations.transformers_serve import served_model, tag_requests

    serve, client = server
    plain = {name: client.ask(name) for name in PROMPTS}
    assert len(set(plain.values())) == len(PROMPTS)
    model = served_model(serve)
    framework = InstrumentationFramework(InstrumentationConfig(max_memory_gb=0.1))
    framework.instrument_model(model, backend="aot_eager", dynamic=True)
    with Recorder(framework, tmp_path / "r", min_free_bytes=0) as recorder:
        tag_requests(serve, recorder)
        names = list(PROMPTS)
        with ThreadPoolExecutor(len(names)) as pool:
            answers = dict(
                zip(names, pool.map(lambda n: client.ask(n, stream=n == "request-1"), names), strict=True)
            )
    assert answers == plain
    assert recorder.report.failures == 0 and recorder.report.dropped_records == 0
    framework.restore(model)
    seen: list[torch.Tensor] = []
    model.model.layers[1].self_attn.register_forward_hook(
        lambda module, args, output: seen.append(output[0][0])
    )
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    with open_stream(tmp_path / "r") as stream:
        assert set(stream.requests) == set(PROMPTS)
        for name, prompt in PROMPTS.items():
            request = stream.request(name)
            # The last token that was generated is never fed in again.
            words = len(prompt.split())
            count = words + NEW_TOKENS - 1
            assert request.num_prompt_tokens == words
            ids = list(request.token_ids().values())
            assert len(ids) == count and ids[:words] == tokenizer(prompt)["input_ids"]
            assert plain[name].startswith(tokenizer.decode(ids[words:], skip_special_tokens=True))
            rows = request["model.layers.1.self_attn"]
            assert torch.equal(rows.token_positions, torch.arange(count)) and not len(rows.missing_positions)
            with torch.no_grad():
                model(torch.tensor([ids]))
            torch.testing.assert_close(rows.tensor(), seen.pop(), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("server", [TIGHT], indirect=True)
def test_a_request_that_is_computed_again(
    server: tuple[Any, Client], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the cache is full the engine gives up requests and computes them again, in pieces: each stays one."""
    from transformers.generation.continuous_batching.requests import RequestState

    from fx_instrument.integrations.transformers_serve import served_model, tag_requests

    given_up: list[str] = []
    again = RequestState.create_equivalent_initial_request

    def counted(state: Any) -> Any:
        given_up.append(state.request_id)
        return again(state)

    monkeypatch.setattr(RequestState, "create_equivalent_initial_request", counted)
    serve, client = server
    prompts = {f"r{n}": " ".join(f"w{(9 * n + i) % 100}" for i in range(20)) for n in range(3)}
    client.ask("loads", prompt="w1")
    model = served_model(serve)
    framework = InstrumentationFramework(InstrumentationConfig(max_memory_gb=0.1))
    framework.instrument_model(model, backend="eager", dynamic=True)

    def ask(name: str) -> str:
        return client.ask(name, prompt=prompts[name], max_tokens=20)

    with Recorder(framework, tmp_path / "r", min_free_bytes=0) as recorder:
        tag_requests(serve, recorder)
        with ThreadPoolExecutor(len(prompts)) as pool:
            list(pool.map(ask, prompts))
        ask("r0")
    framework.restore(model)
    assert given_up and recorder.report.failures == 0
    seen: list[torch.Tensor] = []
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    with open_stream(tmp_path / "r") as stream:
        # Which request came first is the engine's matter; an id that comes again is a request of its own.
        assert sorted(name[:2] for name in stream.requests) == ["r0", "r0", "r1", "r2"]
        for name in prompts:
            request = stream.request(name)
            rows = request["model.layers.1.mlp"]
            ids = list(request.token_ids().values())
            assert request.num_prompt_tokens == 20 and rows.token_positions.tolist() == list(range(39))
            with torch.no_grad():
                model(torch.tensor([ids]))
            torch.testing.assert_close(rows.tensor(), seen.pop(), atol=1e-6, rtol=1e-4)
