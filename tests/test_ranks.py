"""Data parallelism over two processes: a file a rank, right values, equal gradients, read as one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed

from fx_instrument import InstrumentationFramework, open_stream

HERE = Path(__file__).parent

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="gloo is not built in",
)


@pytest.mark.slow
def test_two_ranks(tmp_path: Path) -> None:
    """DistributedDataParallel inside, around and compiled by the user, and FSDP2: each rank's own values."""
    logs = [tmp_path / f"{rank}.log" for rank in range(2)]
    processes = []
    try:
        for rank, log in enumerate(logs):
            with log.open("w") as out:
                process = subprocess.Popen(
                    [sys.executable, str(HERE / "ranks.py"), str(tmp_path)],
                    env={**os.environ, "RANK": str(rank), "OMP_NUM_THREADS": "1"},
                    stdout=out,
                    stderr=subprocess.STDOUT,
                )
            processes.append(process)
        codes = [process.wait(timeout=400) for process in processes]
    finally:
        for process in processes:
            process.kill()
    outputs = [log.read_text() for log in logs]
    assert codes == [0, 0], "\n".join(output[-3000:] for output in outputs)
    assert all(f"rank {rank} done" in output for rank, output in enumerate(outputs))
    assert "a path of its own" in outputs[1]
    for way in ("inner", "outer", "user", "fsdp"):
        with open_stream(tmp_path / way) as stream:
            assert stream.ranks == (0, 1) and len(stream) == 12
            assert {record.rank for record in stream} == {0, 1}
    with open_stream(tmp_path / "one.stream") as stream:
        assert len(stream) == 6 and stream.ranks == (0,)


def test_one_writer_a_file(tmp_path: Path) -> None:
    """A file that a capture writes is refused to a second one, in modes "w" and "a", and free again after it."""
    from models import PLAIN, make, tokens

    models = [make(PLAIN) for _ in range(2)]
    frameworks = [InstrumentationFramework() for _ in models]
    for model, framework in zip(models, frameworks, strict=True):
        framework.instrument_model(model, backend="eager")
    first, second = frameworks
    path = tmp_path / "o.stream"
    for _ in range(2):
        with first.capture_activations(path):
            for mode in ("w", "a"):
                refused = pytest.raises(BlockingIOError, match="a path of its own")
                with refused, second.capture_activations(path, mode=mode):  # type: ignore[arg-type]
                    raise AssertionError("the block must not be entered")
            models[0](tokens(1, 3))
        with open_stream(path) as stream:
            assert len(stream) == 4
    with second.capture_activations(path):
        models[1](tokens(1, 3))
