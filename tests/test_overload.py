"""The bound on memory, from the framework to the file, under a model that is ten times too fast for the file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from loud import step_input

from fx_instrument import open_stream
from fx_instrument.capture.drain import RECORD_OVERHEAD_BYTES

MIB = 1 << 20
TESTS = Path(__file__).parent


def overloaded(path: Path, codec: str, on_full: str, *sizes: int) -> dict[str, Any]:
    environment = {
        **os.environ,
        "PYTHONPATH": f"{TESTS.parent}:{os.environ.get('PYTHONPATH', '')}",
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.run(
        [sys.executable, TESTS / "overloaded.py", path, codec, on_full, *map(str, sizes)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
    )
    assert process.returncode == 0, process.stderr
    found: dict[str, Any] = json.loads(process.stdout)
    return found


def check(path: Path, codec: str, on_full: str, bound: int, steps: int, elements: int, sites: int) -> None:
    found = overloaded(path, codec, on_full, bound, steps, elements, sites)
    print(path.parent.name, {key: found[key] for key in ("growth", "peak_buffer_bytes", "stalled_seconds")})
    assert found["records"] + found["dropped_records"] == steps * sites
    # More was offered than the buffer holds, so that it was full.
    assert steps * (sites * elements * 4 + RECORD_OVERHEAD_BYTES) > 1.5 * bound
    assert found["peak_buffer_bytes"] <= bound
    assert found["growth"] <= bound + 32 * MIB
    dropped = found["dropped_by_site"]
    with open_stream(path) as stream:
        assert stream.metadata["summary"]["dropped_records"] == dropped
        assert len(stream) == found["records"]
        for index, site in enumerate(stream.sites):
            records = stream[site.name]
            assert len(records) + dropped.get(site.name, 0) == steps
            for record in records[:: max(1, len(records) // 5)]:
                expected = step_input(record.step, (1, elements)) * 2.0**index
                assert torch.equal(record.tensor(), expected)
    if on_full == "stall":
        assert not dropped and found["stalled_seconds"] > 0
    else:
        # What comes ten times too fast is mostly lost, beside what the buffer itself takes.
        assert found["dropped_records"] > steps * sites // 4 and found["stalled_seconds"] == 0


@pytest.mark.parametrize(
    ("codec", "on_full", "bound", "steps", "elements", "sites"),
    [
        pytest.param("zstd", "stall", 64_000_000, 40, 262_144, 8, id="large-stall"),
        pytest.param("none", "drop", 64_000_000, 60, 262_144, 8, id="large-drop"),
        pytest.param("lz4", "stall", 16_000_000, 400, 2304, 16, id="small-stall"),
    ],
)
def test_a_tenfold_overload_stays_within_the_bound(
    tmp_path: Path, codec: str, on_full: str, bound: int, steps: int, elements: int, sites: int
) -> None:
    """Resident growth at its peak is the bound and 32 MiB; "stall" loses nothing, "drop" counts each loss by site."""
    check(tmp_path / "o.stream", codec, on_full, bound, steps, elements, sites)


@pytest.mark.slow
@pytest.mark.parametrize("on_full", ["stall", "drop"])
@pytest.mark.parametrize("codec", ["none", "lz4", "zstd"])
@pytest.mark.parametrize(
    ("bound", "steps", "elements", "sites"),
    [
        pytest.param(512_000_000, 50, 1_048_576, 8, id="large"),
        pytest.param(128_000_000, 1200, 2304, 60, id="decode"),
        pytest.param(12_000_000, 10_000, 16, 64, id="tiny"),
    ],
)
def test_a_tenfold_overload_of_any_kind(
    tmp_path: Path, codec: str, on_full: str, bound: int, steps: int, elements: int, sites: int
) -> None:
    """The same for steps of 32 MiB, for records of a decode step and for records of 64 bytes."""
    check(tmp_path / "o.stream", codec, on_full, bound, steps, elements, sites)
