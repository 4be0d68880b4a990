"""Run by the vLLM tests in a process of its own: one offline engine, told what to do by JSON; no output, no capture."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(job: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    options: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": 512,
        "max_num_batched_tokens": 64,
        "max_num_seqs": 8,
        "enable_chunked_prefill": True,
        "disable_log_stats": False,
    }
    options.update(job.get("engine", {}))
    if "output" in job:
        options.update(capturing(job))
    llm = LLM(job["model"], **options)
    results = []
    for requests in job["rounds"]:
        if isinstance(requests, bool):
            switched = llm.collective_rpc("switch_capture", args=(requests,))
            assert switched == [requests], switched
            continue
        sampling = [
            SamplingParams(
                temperature=0,
                max_tokens=request.get("max_tokens", 8),
                ignore_eos=True,
                extra_args=None if request.get("wish") is None else {"fx_instrument": request["wish"]},
            )
            for request in requests
        ]
        for request, output in zip(
            requests, llm.generate([r["prompt"] for r in requests], sampling), strict=True
        ):
            results.append(
                {
                    "id": output.request_id,
                    "wish": request.get("wish"),
                    "prompt": list(output.prompt_token_ids),
                    "output": list(output.outputs[0].token_ids),
                }
            )
    reports = llm.collective_rpc("finish_capture") if "output" in job else []
    counters = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    return {
        "results": results,
        "reports": reports,
        "preemptions": counters.get("vllm:num_preemptions"),
        "prefix_hits": counters.get("vllm:prefix_cache_hits"),
        "modules": [name for name in sys.modules if name.startswith("fx_instrument")],
    }


def capturing(job: dict[str, Any]) -> dict[str, Any]:
    from fx_instrument import HookConfig, HookGranularity, InstrumentationConfig
    from fx_instrument.integrations.vllm import engine_arguments

    config = InstrumentationConfig(
        granularity=HookGranularity(job.get("granularity", "full_tensor")),
        hook_config=HookConfig(target_layers=job.get("target_layers")),
    )
    return engine_arguments(config, job["output"], **job.get("capture", {}))


if __name__ == "__main__":
    found = main(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(found))
