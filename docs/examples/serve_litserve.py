"""A LitServe server that batches requests and records them all; each worker process has a folder of its own.

    pip install 'fx_instrument[demo]' litserve
    python serve_litserve.py

A forward call is recorded whole, so with batching either all requests are recorded or none: this one records all.

No request waits for a compiler: every batch has the same number of rows and some padding, so that what the warm-up
compiled serves them all. Otherwise torch compiles apart a batch of one, and transformers drops a mask without padding.
"""

from __future__ import annotations

import multiprocessing.util
import os
import signal
import sys
import uuid
from pathlib import Path
from typing import Any

import litserve as ls
import torch

from fx_instrument import InstrumentationConfig, InstrumentationFramework, Recorder
from fx_instrument.demo.smollm import load_model


def load() -> tuple[Any, Any]:
    return load_model(torch.float32)


class RecordedLLM(ls.LitAPI):
    """Generates text; what ``load`` returns is instrumented in the worker process."""

    def __init__(
        self,
        folder: str,
        *,
        load: Any = load,  # goes to the worker process by its name: no lambda
        backend: str = "inductor",
        rotate_s: float = 600,
        **options: Any,
    ):
        super().__init__(**options)
        self.folder, self.load, self.backend, self.rotate_s = folder, load, backend, rotate_s

    def setup(self, device: str) -> None:
        self.model, self.tokenizer = self.load()
        self.tokenizer.padding_side = "left"
        self.model.to(device).eval()
        framework = InstrumentationFramework(InstrumentationConfig(max_memory_gb=0.5))
        framework.instrument_model(self.model, backend=self.backend, dynamic=True)
        folder = Path(self.folder)
        folder.mkdir(mode=0o700, exist_ok=True)
        self.recorder = Recorder(
            framework, folder / f"worker-{os.getpid()}", rotate_s=self.rotate_s, max_total_bytes=10 << 30
        )
        # Longer than the batch has rows, as torch takes sizes for one that are equal while it compiles.
        warm_up = "Hello there " * self.max_batch_size
        # Three tokens: prefill leaves the cache in another layout than decoding does, which takes a third graph.
        self.recorder.start(warm_up=lambda: self.generate([warm_up], 3))
        # LitServe ends its workers with SIGTERM: let the last file have its index.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        multiprocessing.util.Finalize(None, self.recorder.close, exitpriority=10)

    # LitServe reads the annotations of these two as FastAPI does; without any a request is its JSON.
    def decode_request(self, request):
        return {"id": uuid.uuid4().hex, "prompt": str(request["prompt"])}

    def predict(self, batch: list[dict[str, str]]) -> list[dict[str, str]]:
        ids = [one["id"] for one in batch]
        # Rows that fill the batch are nobody's.
        with self.recorder.request(ids + [""] * (self.max_batch_size - len(ids))):
            texts = self.generate([one["prompt"] for one in batch], 6)
        return [{"text": text, "id": one} for text, one in zip(texts, ids, strict=True)]

    def encode_response(self, output):
        return output

    def generate(self, prompts: list[str], new_tokens: int) -> list[str]:
        rows = prompts + prompts[-1:] * (self.max_batch_size - len(prompts))
        length = max(2, 1 + max(map(len, self.tokenizer(rows)["input_ids"])))
        padding = {"padding": "max_length", "max_length": length, "return_tensors": "pt"}
        inputs = self.tokenizer(rows, **padding).to(self.model.device)
        with torch.inference_mode():
            ids = self.model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
        texts = self.tokenizer.batch_decode(ids[:, length:], skip_special_tokens=True)
        return list(texts[: len(prompts)])


def main() -> None:
    api = RecordedLLM("recordings", max_batch_size=4, batch_timeout=0.05)
    server = ls.LitServer(api, accelerator="auto", workers_per_device=1)
    server.run(host="127.0.0.1", port=8000, generate_client_file=False)


if __name__ == "__main__":
    main()
