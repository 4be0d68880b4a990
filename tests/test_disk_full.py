"""A disk that is full in the middle of a capture: told, nothing else lost, and gone on with once there is room."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from loud import instrumented, step_input

from fx_instrument import CaptureFailedError, StreamError, open_stream
from fx_instrument.stream import files as files_module

SHAPE = (1, 4096)
TESTS = Path(__file__).parent


class SmallDisk:
    """Takes so many bytes, the last write in part, and then says ENOSPC."""

    def __init__(self, patch: pytest.MonkeyPatch, room: int) -> None:
        self.room = room
        self._writev = os.writev
        patch.setattr(files_module, "os", SimpleNamespace(**{**vars(os), "writev": self._write}))

    def _write(self, fd: int, views: Any) -> int:
        data = b"".join(map(bytes, views))[: max(0, self.room)]
        if not data:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = self._writev(fd, [data])
        self.room -= written
        return written


def check(path: Path, first_steps: list[int], sites: int) -> int:
    """Every record is what its step was; how many there are."""
    count = 0
    with open_stream(path, recover=True) as stream:
        for site in stream.sites:
            for record in stream[site.name]:
                began = max(first for first in first_steps if first <= record.step)
                factor = 2.0 ** int(site.name.rpartition(".")[2])
                assert torch.equal(record.tensor(), step_input(record.step - began, SHAPE) * factor)
                count += 1
        assert count == len(stream) and count % sites in range(sites)
    return count


@pytest.mark.parametrize("codec", ["none", "lz4", "zstd"])
@pytest.mark.parametrize("on_full", ["stall", "drop"])
def test_a_full_disk_costs_what_came_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str, on_full: str
) -> None:
    """The block raises with ENOSPC as the cause, each forward call had its result, and mode "a" goes on."""
    path = tmp_path / "o.stream"
    model, framework = instrumented(4, compression_algorithm=codec, max_memory_gb=0.006)
    with pytest.MonkeyPatch.context() as patch:
        SmallDisk(patch, 700_000)
        results = 0
        with (
            pytest.raises(CaptureFailedError, match="No space left") as raised,
            framework.capture_activations(path, on_full=on_full) as capture,  # type: ignore[arg-type]
        ):
            for step in range(60):
                results += int(model(step_input(step, SHAPE)).numel() == 1)
    cause = raised.value.__cause__
    assert isinstance(cause, OSError) and cause.errno == errno.ENOSPC
    assert results == 60 and capture.report.steps == 60
    assert path.stat().st_size <= 700_000
    with pytest.raises(StreamError):
        open_stream(path)
    kept = check(path, [0], 4)
    assert 20 < kept < 240
    with open_stream(path, recover=True) as stream:
        first = stream.num_steps
    with framework.capture_activations(path, mode="a") as capture:
        for step in range(5):
            model(step_input(step, SHAPE))
    assert capture.report.records == 20
    assert check(path, [0, first], 4) == kept + 20
    open_stream(path).close()


FILLS_A_FILE_SYSTEM = """
    import errno, os, sys
    from pathlib import Path
    import torch
    from loud import instrumented, step_input
    from test_disk_full import SHAPE, check
    from fx_instrument import CaptureFailedError, open_stream

    folder = Path(sys.argv[1])
    path = folder / "o.stream"
    (folder / "filler").write_bytes(bytes(1 << 20))
    model, framework = instrumented(4, max_memory_gb=0.006)
    results = 0
    try:
        with framework.capture_activations(path):
            for step in range(60):
                results += model(step_input(step, SHAPE)).numel()
    except CaptureFailedError as failure:
        assert failure.__cause__.errno == errno.ENOSPC, failure
    else:
        raise AssertionError("it fitted")
    assert results == 60
    kept = check(path, [0], 4)
    (folder / "filler").unlink()
    with open_stream(path, recover=True) as stream:
        first = stream.num_steps
    with framework.capture_activations(path, mode="a"):
        for step in range(5):
            model(step_input(step, SHAPE))
    assert check(path, [0, first], 4) == kept + 20 > 20
    open_stream(path).close()
    print("gone on after", kept)
"""


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare")
def test_a_file_system_that_is_full(tmp_path: Path) -> None:
    """The same on a file system of 2 MiB that another file fills by half."""
    prefix = ["unshare", *(() if os.geteuid() == 0 else ("-Ur",)), "-m"]
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(tmp_path)]
    if subprocess.run([*prefix, *mount], capture_output=True, timeout=60).returncode:
        pytest.skip("mounting is not allowed here")
    environment = {**os.environ, "PYTHONPATH": f"{TESTS}:{TESTS.parent}:{os.environ.get('PYTHONPATH', '')}"}
    script = '"$1" -t tmpfs -o size=2m none "$2" && exec "$3" -c "$4" "$2"'
    code = textwrap.dedent(FILLS_A_FILE_SYSTEM)
    done = subprocess.run(
        [*prefix, "sh", "-c", script, "sh", "mount", str(tmp_path), sys.executable, code],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert "gone on after" in done.stdout, done.stderr
