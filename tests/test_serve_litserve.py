"""The LitServe example: batched requests, each with its own rows in the worker's folder."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from test_transformers_serve import free_port
from tiny_llm import save_tiny_llm

from fx_instrument import open_stream

pytestmark = pytest.mark.server

SERVER = """
    import sys
    sys.path.insert(0, sys.argv[4])
    import functools
    import litserve as ls
    from serve_litserve import RecordedLLM

    def load(folder):
        from transformers import AutoTokenizer, LlamaForCausalLM
        return LlamaForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)

    if __name__ == "__main__":
        load_tiny = functools.partial(load, sys.argv[1])
        api = RecordedLLM(sys.argv[2], load=load_tiny, backend="aot_eager", max_batch_size=4, batch_timeout=0.2)
        server = ls.LitServer(api, accelerator="cpu", workers_per_device=1)
        server.run(host="127.0.0.1", port=int(sys.argv[3]), generate_client_file=False, pretty_logs=False)
"""


def test_batched_requests(tmp_path: Path) -> None:
    pytest.importorskip("litserve")
    save_tiny_llm(tmp_path / "model")
    script = tmp_path / "server.py"
    script.write_text(textwrap.dedent(SERVER))
    port = free_port()
    examples = Path(__file__).parent.parent / "docs" / "examples"
    command = [
        sys.executable,
        str(script),
        str(tmp_path / "model"),
        str(tmp_path / "r"),
        str(port),
        str(examples),
    ]
    prompts = [" ".join(f"w{(5 * n + i) % 100}" for i in range(3 + n)) for n in range(6)]

    def ask(prompt: str) -> dict[str, Any]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/predict",
            json.dumps({"prompt": prompt}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            return dict(json.loads(response.read()))

    with subprocess.Popen(command, start_new_session=True) as process:
        try:
            for _ in range(180):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).read()
                    break
                except OSError:
                    assert process.poll() is None
                    with pytest.raises(subprocess.TimeoutExpired):
                        process.wait(1)
            with ThreadPoolExecutor(6) as pool:
                answers = list(pool.map(ask, prompts))
            process.send_signal(signal.SIGINT)
            process.wait(60)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    (worker,) = (tmp_path / "r").iterdir()
    with open_stream(worker, recover=True) as stream:
        assert set(stream.requests) == {answer["id"] for answer in answers}
        for prompt, answer in zip(prompts, answers, strict=True):
            rows = stream.request(answer["id"])["model.layers.1.mlp"]
            assert torch.equal(rows.token_positions, torch.arange(len(prompt.split()) + 6 - 1))
        batches = [stream.inputs(step)["input_ids"].shape[0] for step in range(stream.num_steps)]
    assert max(batches) > 1


def test_the_worker_can_be_given_its_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    """LitServe sends the API to a process of its own: what loads the model must be found there by its name."""
    pytest.importorskip("litserve")
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "docs" / "examples"))
    import serve_litserve

    api = serve_litserve.RecordedLLM("recordings")
    assert pickle.loads(pickle.dumps(api.load)) is serve_litserve.load
