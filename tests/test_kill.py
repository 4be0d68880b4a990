"""`kill -9` while capturing through the framework: what was handed to the kernel comes back, and mode "a" goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent


def kill(path: Path, codec: str, num_kills: int, pace: str) -> dict[str, Any]:
    environment = {
        **os.environ,
        "PYTHONPATH": f"{TESTS.parent}:{os.environ.get('PYTHONPATH', '')}",
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.run(
        [sys.executable, TESTS / "killed.py", path, codec, str(num_kills), "1", pace],
        capture_output=True,
        text=True,
        env=environment,
        timeout=1800,
    )
    assert process.returncode == 0, process.stderr
    found: dict[str, Any] = json.loads(process.stdout)
    print(found)
    assert found["last_steps"] == 20
    assert found["records"] > 0 and sum(found["recovered_steps"]) + 20 == found["steps"]
    assert found["damage_to_blocks"] == 0
    # A second of capture, or the buffer where that is smaller.
    assert found["largest_loss_bytes"] <= found["bound_bytes"]
    assert found["longest_loss_s"] <= 1 or pace == "overloaded"
    return found


def test_killed_captures_go_on(tmp_path: Path) -> None:
    """Five captures into one file, each killed at a random moment: no page that the kernel had is lost."""
    kill(tmp_path / "o.stream", "zstd", 5, "fast")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("codec", "num_kills", "pace"),
    [
        ("none", 40, "fast"),
        ("lz4", 40, "fast"),
        ("zstd", 40, "fast"),
        ("zstd", 40, "slow"),
        ("zstd", 40, "overloaded"),
    ],
)
def test_two_hundred_kills(tmp_path: Path, codec: str, num_kills: int, pace: str) -> None:
    """Whatever the codec and the pace, a second of capture is lost at most, or what the buffer held."""
    kill(tmp_path / "o.stream", codec, num_kills, pace)


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_kills_past_the_page_cache(tmp_path: Path, codec: str) -> None:
    """Blocks that O_DIRECT brings to the disk are whole in the file, or come after all that are."""
    found = kill(tmp_path / "o.stream", codec, 12, "large")
    if not found["direct_writes"]:
        pytest.skip("files in the temporary folder can't be written past the page cache")
