"""The FastAPI example: concurrent requests get their own text, and those that asked their own rows in the folder."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from test_transformers_serve import free_port
from tiny_llm import save_tiny_llm

from fx_instrument import open_stream

pytestmark = pytest.mark.server

EXAMPLE = Path(__file__).parent.parent / "docs" / "examples" / "serve_fastapi.py"


def load_example() -> Any:
    spec = importlib.util.spec_from_file_location("serve_fastapi", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its annotations are looked up by the name of the module.
    sys.modules["serve_fastapi"] = module
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def running(app: Any, timeout_s: int = 120) -> Iterator[str]:
    """The app behind a port of this machine; its address."""
    import uvicorn

    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        for _ in range(10 * timeout_s):
            if server.started or not thread.is_alive():
                break
            thread.join(0.1)
        assert server.started
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(60)


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    pytest.importorskip("fastapi")
    from transformers import AutoTokenizer, LlamaForCausalLM

    save_tiny_llm(tmp_path / "model")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    with running(
        load_example().create_app(model, tokenizer, str(tmp_path / "r"), token="secret", backend="aot_eager")
    ) as address:
        yield address


def call(url: str, body: Any = None, method: str = "GET", **headers: str) -> tuple[str, str]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        url, data, {"Content-Type": "application/json", **headers}, method=method
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return response.read().decode(), response.headers.get("X-Request-Id", "")


def test_concurrent_requests(url: str, tmp_path: Path) -> None:
    prompts = [" ".join(f"w{(5 * n + i) % 100}" for i in range(3 + n)) for n in range(8)]

    def ask(number: int, record: bool) -> tuple[str, str]:
        headers = {"X-Record": "1"} if record else {}
        body = {"prompt": prompts[number], "max_new_tokens": 6}
        text, request_id = call(url + "/generate", body, "POST", **headers)
        return json.loads(text)["text"], request_id

    with pytest.raises(urllib.error.HTTPError, match="403"):
        call(url + "/recording?on=false", method="PUT", Authorization="Bearer wrong")
    call(url + "/recording?on=false", method="PUT", Authorization="Bearer secret")
    plain = [ask(number, record=True)[0] for number in range(8)]
    state, _ = call(url + "/recording?on=true", method="PUT", Authorization="Bearer secret")
    assert json.loads(state) == {"active": True, "failures": 0}
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda number: ask(number, record=number % 2 == 1), range(8)))
    assert [text for text, _ in answers] == plain
    metrics, _ = call(url + "/metrics/")
    assert "fx_instrument_recording 1.0" in metrics and "fx_instrument_failures_total 0.0" in metrics
    call(url + "/recording?on=false", method="PUT", Authorization="Bearer secret")
    with open_stream(tmp_path / "r") as stream:
        assert set(stream.requests) == {request_id for _, request_id in answers[1::2]}
        for number in range(1, 8, 2):
            rows = stream.request(answers[number][1])["model.layers.0.mlp"]
            assert torch.equal(rows.token_positions, torch.arange(3 + number + 6 - 1))
    assert (tmp_path / "r").stat().st_mode & 0o777 == 0o700
