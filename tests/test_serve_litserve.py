"""The LitServe example: batched requests, each with its own rows in the worker's folder."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
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
from fx_instrument.requests import NO_REQUEST, ROWS_INPUT

pytestmark = pytest.mark.server

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"
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
        tiny = {"load": functools.partial(load, sys.argv[1]), "backend": "aot_eager"} if sys.argv[1] else {}
        api = RecordedLLM(sys.argv[2], max_batch_size=4, batch_timeout=0.2, **tiny)
        server = ls.LitServer(api, accelerator="cpu", workers_per_device=1, timeout=600)
        server.run(host="127.0.0.1", port=int(sys.argv[3]), generate_client_file=False, pretty_logs=False)
"""


@contextlib.contextmanager
def serving(folder: Path, model: Path | None, timeout_s: int = 180) -> Iterator[tuple[str, Path]]:
    """The example's server of a model, by default its own; its address, and the log with what torch compiles again."""
    script, log, port = folder / "server.py", folder / "server.log", free_port()
    script.write_text(textwrap.dedent(SERVER))
    arguments = [str(model or ""), str(folder / "r"), str(port), str(EXAMPLES)]
    with (
        log.open("w") as out,
        subprocess.Popen(
            [sys.executable, str(script), *arguments],
            env={**os.environ, "TORCH_LOGS": "recompiles"},
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # Ignored in what a shell runs in the background, which its children would inherit.
            preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        ) as process,
    ):
        try:
            for _ in range(timeout_s):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).read()
                    break
                except OSError:
                    assert process.poll() is None, log.read_text()[-4000:]
                    with pytest.raises(subprocess.TimeoutExpired):
                        process.wait(1)
            yield f"http://127.0.0.1:{port}", log
            process.send_signal(signal.SIGINT)
            process.wait(60)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def ask(url: str, prompt: str) -> dict[str, Any]:
    body = json.dumps({"prompt": prompt}).encode()
    request = urllib.request.Request(url + "/predict", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as response:
        return dict(json.loads(response.read()))


def test_batched_requests(tmp_path: Path) -> None:
    """Alone and in batches, long, short and empty: rows are their request's, and nothing is compiled for them."""
    pytest.importorskip("litserve")
    save_tiny_llm(tmp_path / "model")
    prompts = [" ".join(f"w{(5 * n + i) % 100}" for i in range(3 + n)) for n in range(6)]
    with serving(tmp_path, tmp_path / "model") as (url, log):
        compiled = log.read_text().count("Recompiling function")
        answers = [ask(url, prompts[0]), ask(url, "w1")]
        with ThreadPoolExecutor(6) as pool:
            answers += pool.map(functools.partial(ask, url), prompts)
        # All of one length: no row is padded for the others' sake.
        with ThreadPoolExecutor(4) as pool:
            answers += pool.map(functools.partial(ask, url), [prompts[5]] * 4)
        ask(url, "")
        assert log.read_text().count("Recompiling function") == compiled
    assert len({answer["text"] for answer in answers[-4:]}) == 1 and answers[0]["text"] == answers[2]["text"]
    (worker,) = (tmp_path / "r").iterdir()
    with open_stream(worker, recover=True) as stream:
        assert set(stream.requests) >= {answer["id"] for answer in answers}
        lengths = [3, 1, *range(3, 9), *[8] * 4]
        for length, answer in zip(lengths, answers, strict=True):
            rows = stream.request(answer["id"])["model.layers.1.mlp"]
            assert torch.equal(rows.token_positions, torch.arange(length + 6 - 1))
        batches = {stream.inputs(step)["input_ids"].shape[0] for step in range(stream.num_steps)}
        # Every call ran the same number of rows; those that serve nobody have no request.
        assert batches == {4}
        shared = [len(_served(stream.inputs(step))) for step in range(stream.num_steps)]
        assert 1 in shared and max(shared) > 1


def _served(inputs: dict[str, torch.Tensor]) -> set[int]:
    return {number for number in inputs[ROWS_INPUT][:, 0].tolist() if number != NO_REQUEST}


def test_the_worker_can_be_given_its_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    """LitServe sends the API to a process of its own: what loads the model must be found there by its name."""
    pytest.importorskip("litserve")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import serve_litserve

    api = serve_litserve.RecordedLLM("recordings")
    assert pickle.loads(pickle.dumps(api.load)) is serve_litserve.load
