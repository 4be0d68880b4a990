"""A FastAPI server of a Hugging Face model that records the requests that ask for it.

    pip install 'fx_instrument[serve,demo]' fastapi uvicorn
    RECORDING_TOKEN=secret python serve_fastapi.py
    curl -H 'X-Record: 1' -d '{"prompt": "The capital of France is"}' -H 'Content-Type: application/json' \
        http://127.0.0.1:8000/generate

A client may ask to be recorded (`X-Record: 1`); it cannot say where: the folder and the ids are the server's. Recording
is switched by `PUT /recording` with the operator's token; `GET /metrics` is for Prometheus.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import os
import uuid
from collections.abc import AsyncIterator
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, Header, HTTPException, Response
from prometheus_client import make_asgi_app
from pydantic import BaseModel, Field

from fx_instrument import InstrumentationConfig, InstrumentationFramework, Recorder
from fx_instrument.demo.smollm import load_model
from fx_instrument.integrations import prometheus


class Prompt(BaseModel):
    prompt: str = Field(min_length=1, max_length=4000)
    max_new_tokens: int = Field(default=16, ge=1, le=256)


def create_app(
    model: Any, tokenizer: Any, folder: str, *, token: str, backend: str = "inductor", **recording: Any
) -> FastAPI:
    framework = InstrumentationFramework(InstrumentationConfig(max_memory_gb=0.5))
    framework.instrument_model(model, backend=backend, dynamic=True)
    limits = {"max_stall_s": 0.1, "rotate_s": 600, "max_total_bytes": 10 << 30, **recording}
    recorder = Recorder(framework, folder, requests_only=True, **limits)

    def generate(prompt: Prompt) -> str:
        inputs = tokenizer(prompt.prompt, return_tensors="pt")
        with torch.inference_mode():
            ids = model.generate(**inputs, max_new_tokens=prompt.max_new_tokens, do_sample=False)
        return str(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        metrics = prometheus.register(recorder)
        # Both variants are compiled before the first request.
        await asyncio.to_thread(
            recorder.start, warm_up=lambda: generate(Prompt(prompt="Hello there", max_new_tokens=3))
        )
        yield
        await asyncio.to_thread(recorder.close)
        prometheus.REGISTRY.unregister(metrics)

    app = FastAPI(lifespan=lifespan)
    app.mount("/metrics", make_asgi_app())

    @app.post("/generate")
    async def respond(
        prompt: Prompt, response: Response, x_record: str = Header(default="0")
    ) -> dict[str, str]:
        request_id = response.headers["X-Request-Id"] = uuid.uuid4().hex
        # to_thread takes the context along, so the forward calls in that thread are this request's.
        with recorder.request(request_id) if x_record == "1" else contextlib.nullcontext():
            return {"text": await asyncio.to_thread(generate, prompt)}

    @app.put("/recording")
    async def switch(on: bool, authorization: str = Header(default="")) -> dict[str, Any]:
        if not token or not hmac.compare_digest(authorization, f"Bearer {token}"):
            raise HTTPException(403, "recording is switched with the operator's token")
        try:
            await asyncio.to_thread(recorder.start if on else recorder.stop)
        except OSError as error:
            raise HTTPException(503, f"recording can't be switched on: {error}") from error
        return {"active": recorder.active, "failures": recorder.report.failures}

    return app


def main() -> None:
    model, tokenizer = load_model(torch.float32)
    app = create_app(model, tokenizer, "recordings", token=os.environ.get("RECORDING_TOKEN", ""))
    uvicorn.run(app, host="127.0.0.1", port=8000)


if __name__ == "__main__":
    main()
