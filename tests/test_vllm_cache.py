"""Real vLLM engines over one cache folder: none runs a graph that was compiled for another plan, or for none.

Needs an environment of its own: `make test-vllm` builds it and runs this file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from vllm_engine import NEEDS_VLLM, Hooks, check_rows, environment_of, run_engine, save_even_model

from fx_instrument import open_stream

pytestmark = NEEDS_VLLM

PLAIN = "plain"
# Each plan after another one and after none, cold and warm.
PLANS = ["full_tensor", PLAIN, "attention_only", PLAIN, "mlp_only", "full_tensor", "attention_only"]
ROLES = {"full_tensor": {"attention", "mlp"}, "attention_only": {"attention"}, "mlp_only": {"mlp"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_even_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("route", ["plugin", "official"])
def test_one_cache_folder_serves_every_plan_its_own(folder: Path, tmp_path: Path, route: str) -> None:
    """What was planned is what is stored, with the right values; an engine without capture answers as ever."""
    cache = tmp_path / "cache"
    environment = {**environment_of(cache), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    # vLLM keeps artifacts of what it compiles piecewise only, which its CPU platform does not do by itself.
    plain = {"worker_cls": "vllm_piecewise.PiecewiseWorker"} if route == "plugin" else {}
    answers: list[list[int]] = []
    entries: dict[str, set[Path]] = {}
    # The official route compiles in one piece, which only torch's own cache keeps: fewer ways to go wrong.
    for number, plan in enumerate(PLANS if route == "plugin" else PLANS[:4]):
        output = tmp_path / f"{number}.stream"
        job: dict[str, Any] = {"model": str(folder), "rounds": [[{"prompt": "The capital of France is"}]]}
        if plan == PLAIN:
            job["engine"] = plain
        else:
            job |= {"output": str(output), "granularity": plan, "capture": {"route": route}}
        before = compiled(cache)
        (result,) = run_engine(job, environment, tmp_path)["results"]
        new = compiled(cache) - before
        if route == "plugin":
            # Warm the second time, and never from another plan's entries.
            assert bool(new) == (plan not in entries), (plan, new)
            assert not new & set().union(*entries.values())
        entries.setdefault(plan, set()).update(new)
        answers.append(result["output"])
        if plan == PLAIN:
            continue
        with open_stream(output) as stream:
            assert {site.role for site in stream.sites} == ROLES[plan]
            hooks = Hooks(folder, [site.name for site in stream.sites])
            tokens = (result["prompt"] + result["output"])[:-1]
            rows = check_rows(stream, hooks, result["id"], tokens, range(len(tokens)))
            assert rows == len(tokens) * len(stream.sites)
    assert all(answer == answers[0] for answer in answers)


def compiled(cache: Path) -> set[Path]:
    """The entries of vLLM's compile cache.

    What is inside one may grow: on a processor with AMX, the kernels of what vLLM compiled ahead of time were built
    again, under other names, when it was loaded.
    """
    folder = cache / "torch_compile_cache"
    inside = [path.relative_to(folder).parts for path in folder.glob("**/*") if path.is_file()]
    return {Path(*parts[: 2 if parts[0] == "torch_aot_compile" else -1]) for parts in inside}
