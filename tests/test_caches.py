"""Inductor's caches across processes: hit by the same model in the same state, and never by another state's graph."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cached import STATES
from hooks import same_bits

from fx_instrument import open_stream

HERE = Path(__file__).parent
HIT = {"autograd hit": 1, "fxgraph hit": 1}
MISS = {"autograd miss": 1, "fxgraph miss": 1}


def in_a_process(cache: Path, folder: Path, *states: str) -> list[dict[str, int]]:
    """What the caches counted while a process of its own ran ``states`` one after the other."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, str(HERE / "cached.py"), str(folder), *states],
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=300,
    )
    counts: list[dict[str, int]] = json.loads(done.stdout)
    return counts


def same_files(left: Path, right: Path, state: str) -> None:
    """The same outputs, and the same records of the same sites."""
    for a, b in zip(torch.load(left / f"{state}.pt"), torch.load(right / f"{state}.pt"), strict=True):
        assert same_bits(a, b)
    if state in ("plain", "idle"):
        return
    with open_stream(left / f"{state}.stream") as a, open_stream(right / f"{state}.stream") as b:
        assert len(a) == len(b) > 0
        for record in a:
            assert same_bits(record.tensor(), b.read(record.site, record.step, record.call))


@pytest.mark.slow
@pytest.mark.parametrize(("state", "num_graphs"), [("all", 1), ("strict", 2)])
def test_a_second_process(tmp_path: Path, state: str, num_graphs: int) -> None:
    """Warm caches: nothing is compiled, and the values are the first process's; strict captures are proven again.

    Strictly captured graphs are compiled without captures too, and a third time only if their kernels differ.
    """
    cold = in_a_process(tmp_path / "cache", tmp_path / "first", state)
    warm = in_a_process(tmp_path / "cache", tmp_path / "second", state)
    assert cold == [dict.fromkeys(MISS, num_graphs)]
    assert warm == [dict.fromkeys(HIT, num_graphs)]
    same_files(tmp_path / "first", tmp_path / "second", state)


@pytest.mark.slow
@pytest.mark.parametrize("order", [STATES, STATES[::-1]], ids=["plain first", "plain last"])
def test_states_share_a_folder_of_caches(tmp_path: Path, order: tuple[str, ...]) -> None:
    """Plain, idle and capturing other sites, a process each: idle and plain are one graph, all others are apart."""
    cache = tmp_path / "cache"
    seen: set[str] = set()
    for state in order:
        graph = "plain" if state == "idle" else state
        assert in_a_process(cache, tmp_path / state, state) == [HIT if graph in seen else MISS], state
        seen.add(graph)
    assert in_a_process(cache, tmp_path / "again", *order) == [HIT] * len(order)
    for state in order:
        same_files(tmp_path / state, tmp_path / "again", state)
    outputs = [torch.load(tmp_path / state / f"{state}.pt") for state in order]
    assert all(same_bits(a, b) for other in outputs[1:] for a, b in zip(outputs[0], other, strict=True))
    with open_stream(tmp_path / "all" / "all.stream") as everything:
        for state in ("attention", "last"):
            with open_stream(tmp_path / state / f"{state}.stream") as some:
                assert 0 < len(some) < len(everything)
                for record in some:
                    assert same_bits(record.tensor(), everything.read(record.site, record.step, record.call))
