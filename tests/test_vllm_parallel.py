"""Real vLLM engines of several workers on CPU: what each rank stores, and their files read as one.

Needs an environment of its own: `make test-vllm` builds it and runs this file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from vllm_engine import NEEDS_VLLM, Hooks, check_rows, environment_of, run_engine, save_even_model

from fx_instrument import open_stream

pytestmark = NEEDS_VLLM

SITES = {f"model.layers.{layer}.{kind}" for layer in range(2) for kind in ("self_attn", "mlp")}
PROMPTS = ["The capital of France is", "Once upon a time"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_even_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return environment_of(tmp_path_factory.mktemp("vllm_cache"))


def job_of(folder: Path, output: Path, **engine: Any) -> dict[str, Any]:
    return {
        "model": str(folder),
        "output": str(output),
        "engine": {"distributed_executor_backend": "mp", **engine},
        "rounds": [[{"prompt": prompt} for prompt in PROMPTS]],
    }


@pytest.mark.parametrize("way", ["official", "plugin", "eager"])
def test_a_tensor_parallel_group_stores_once(
    folder: Path, environment: dict[str, str], tmp_path: Path, way: str
) -> None:
    """Of two ranks the first stores, each site and row once, with the whole value that one rank would have."""
    job = job_of(folder, tmp_path / "out.stream", tensor_parallel_size=2, enforce_eager=way == "eager")
    job["capture"] = {"route": "plugin"} if way == "plugin" else {}
    found = run_engine(job, environment, tmp_path)
    report, silent = found["reports"]
    assert report["last_failure"] is None and report["dropped_records"] == 0 and silent is None
    assert [path.name for path in tmp_path.glob("*.stream")] == ["out.stream"]
    with open_stream(tmp_path / "out.stream") as stream:
        assert {site.name for site in stream.sites} == SITES
        assert len(stream) == len(SITES) * stream.num_steps
        check_results(folder, stream, found)


def test_a_request_asks_a_tensor_parallel_group(
    folder: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    """Only the storing rank changes between its two graphs; collectives still meet, and only who asked is stored."""
    job = job_of(folder, tmp_path / "out.stream", tensor_parallel_size=2)
    job["capture"] = {"capture": "requested"}
    wishes = [True, None, "last"]
    job["rounds"] = [[{"prompt": PROMPTS[0], "wish": wish}] for wish in wishes]
    # The second and third find the first one's tokens cached, if blocks are as small as the prompt.
    job["engine"]["enable_prefix_caching"] = False
    whole, _, last = run_engine(job, environment, tmp_path)["results"]
    with open_stream(tmp_path / "out.stream") as stream:
        assert set(stream.requests) == {whole["id"], last["id"]}
        hooks = Hooks(folder, sorted(SITES))
        tokens = (whole["prompt"] + whole["output"])[:-1]
        check_rows(stream, hooks, whole["id"], tokens, range(len(tokens)))
        check_rows(stream, hooks, last["id"], tokens, [len(last["prompt"]) - 1])


def test_a_request_names_layers_of_several_stages(
    folder: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    """Each stage stores what it has of a request's layers, and refuses none for those of another stage."""
    job = job_of(folder, tmp_path / "out.stream", pipeline_parallel_size=2)
    job["engine"]["enable_prefix_caching"] = False
    wishes = [{"layers": [0, 1], "roles": ["mlp"]}, {"layers": [1]}]
    job["rounds"] = [[{"prompt": PROMPTS[0], "wish": wish}] for wish in wishes]
    found = run_engine(job, environment, tmp_path)
    assert [report["refused_requests"] for report in found["reports"]] == [0, 0]
    with open_stream(sorted(tmp_path.glob("*.stream"))) as stream:
        both, second = (stream.request(result["id"]) for result in found["results"])
        assert set(both) == {site for site in SITES if site.endswith("mlp")}
        assert set(second) == {site for site in SITES if ".1." in site}
        assert all(len(rows) == both.num_tokens for request in (both, second) for rows in request.values())


def test_pipeline_stages_read_as_one(folder: Path, environment: dict[str, str], tmp_path: Path) -> None:
    """Each stage's first rank stores its own layers; a request's rows come from both files."""
    job = job_of(folder, tmp_path / "out.stream", pipeline_parallel_size=2)
    found = run_engine(job, environment, tmp_path)
    files = sorted(tmp_path.glob("*.stream"))
    assert [path.name for path in files] == ["out.rank0.stream", "out.rank1.stream"]
    for layer, path in enumerate(files):
        with open_stream(path) as stream:
            assert {site.name for site in stream.sites} == {s for s in SITES if f".{layer}." in s}
    with open_stream(files) as stream:
        assert stream.ranks == (0, 1)
        check_results(folder, stream, found)


def check_results(folder: Path, stream: Any, found: dict[str, Any]) -> None:
    hooks = Hooks(folder, sorted(SITES))
    assert set(stream.requests) == {result["id"] for result in found["results"]}
    for result in found["results"]:
        tokens = (result["prompt"] + result["output"])[:-1]
        rows = check_rows(stream, hooks, result["id"], tokens, range(len(tokens)))
        assert rows == len(tokens) * len(SITES)
