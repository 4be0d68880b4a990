"""The rate to hold, on machines whose disk and cores are simulated in a time of their own, and what the report says."""

from __future__ import annotations

import os
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from loud import instrumented, step_input
from stream_files import floats

from fx_instrument import CaptureReport, open_stream
from fx_instrument.stream import files as files_module
from fx_instrument.stream import writer as writer_module
from fx_instrument.stream.codec import PageEncoder
from fx_instrument.stream.records import RecordMeta
from fx_instrument.stream.tiers import BEST, TierControl
from fx_instrument.stream.writer import StreamWriter

MB, GB = 1_000_000, 1_000_000_000
PAGE = 64 << 10


class SimulatedMachine:
    """Makes the writer live in a time that passes only where its disk and its compressor work."""

    def __init__(self, patch: pytest.MonkeyPatch, *, disk_mbps: float, cores_mbps: tuple[float, ...]) -> None:
        self.now = 0.0
        self._lock = threading.Lock()
        encode, writev = PageEncoder.encode, os.writev

        def slow_encode(
            encoder: PageEncoder, buffers: Any, dtype: str, *, site: int = -1, tier: int = BEST
        ) -> Any:
            self.pass_by(sum(map(len, buffers)) / (cores_mbps[tier] * MB))
            return encode(encoder, buffers, dtype, site=site, tier=tier)

        def slow_writev(fd: int, views: Any) -> int:
            written = writev(fd, views)
            self.pass_by(written / (disk_mbps * MB))
            return written

        clock = SimpleNamespace(
            perf_counter=self.time, monotonic=time.monotonic, time_ns=time.time_ns, sleep=time.sleep
        )
        patch.setattr(PageEncoder, "encode", slow_encode)
        patch.setattr(files_module, "os", SimpleNamespace(**{**vars(os), "writev": slow_writev}))
        patch.setattr(files_module, "_sync_file_range", None)
        patch.setattr(writer_module, "time", clock)
        patch.setattr(writer_module, "TierControl", partial(TierControl, clock=self.time))

    def time(self) -> float:
        return self.now

    def pass_by(self, seconds: float) -> None:
        with self._lock:
            self.now += seconds


def overload(
    machine: SimulatedMachine, path: Path, target_mbps: float, num_bytes: int
) -> tuple[StreamWriter, float]:
    """Keeps four pages waiting all the time; ``(the closed writer, simulated MB/s)``."""
    # Room for one worker: a second one at the end would share the simulated time.
    writer = StreamWriter(
        path,
        metadata={},
        codec="zstd",
        num_workers=1,
        memory_bytes=3 * MB,
        page_bytes=PAGE,
        target_bytes_per_s=target_mbps * MB,
    )
    site = writer.add_site("a", "mlp")
    room = threading.Semaphore(4)
    data = np.frombuffer(floats(PAGE // 2), np.uint8)
    began = machine.now
    for step in range(num_bytes // PAGE):
        room.acquire()
        writer.put(RecordMeta(site, step, 0, "bfloat16", (PAGE // 2,)), data, lambda: room.release())
        writer.seal()
    writer.close({})
    return writer, writer.raw_bytes / (machine.now - began) / MB


def shares(writer: StreamWriter) -> dict[str, float]:
    return {name: count / writer.raw_bytes for name, count in writer.tiers.raw_bytes.items()}


def test_a_slow_sink_is_compressed_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk of 1 MB/s under a target of 10: pages stay compressed, and the disk is named as what limits."""
    machine = SimulatedMachine(monkeypatch, disk_mbps=1, cores_mbps=(40, 20, 10))
    writer, kept = overload(machine, tmp_path / "a", 10, 30 * MB)
    assert shares(writer)["raw"] < 0.05
    assert kept > 1.1
    limit = writer.capacity()
    assert limit is not None and limit[1] == "disk" and limit[0] == pytest.approx(kept * MB, rel=0.15)


def test_a_slow_compressor_is_spared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cores that compress 2 MB/s under a target of 8: pages go to cheaper tiers, and the target is held."""
    machine = SimulatedMachine(monkeypatch, disk_mbps=200, cores_mbps=(30, 12, 2))
    writer, kept = overload(machine, tmp_path / "a", 8, 160 * MB)
    assert shares(writer)["best"] < 0.15 and shares(writer)["fast"] > 0.5
    assert kept > 0.9 * 8
    limit = writer.capacity()
    assert limit is not None and limit[1] == "cores" and limit[0] > 8 * MB


def test_a_target_that_leaves_time_is_used_for_compression(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cores that compress best at twice the target: every page is compressed best."""
    machine = SimulatedMachine(monkeypatch, disk_mbps=200, cores_mbps=(40, 30, 20))
    writer, kept = overload(machine, tmp_path / "a", 10, 40 * MB)
    assert shares(writer)["best"] == 1.0 and kept > 10


def test_a_target_beyond_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no tier can hold the target, as much goes as can, and the capacity says how much."""
    machine = SimulatedMachine(monkeypatch, disk_mbps=200, cores_mbps=(5, 3, 1))
    writer, kept = overload(machine, tmp_path / "a", 50, 100 * MB)
    limit = writer.capacity()
    assert limit is not None and limit[1] == "cores"
    assert limit[0] == pytest.approx(5 * MB, rel=0.1) and kept > 4


def report(**changes: Any) -> CaptureReport:
    values: dict[str, Any] = {
        "steps": 1,
        "records": 1,
        "raw_bytes": 1,
        "stored_bytes": 1,
        "dropped_records": 0,
        "dropped_inputs": 0,
        "stalled_seconds": 0.0,
        "eager_records": 0,
        "achieved_gbps": 0.3,
        "peak_buffer_bytes": 1,
        "target_gbps": 1.0,
        "duration_s": 10.0,
        "capacity_gbps": 0.4,
        "bottleneck": "cores",
    }
    return CaptureReport(**{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "held", "verdict"),
    [
        ({}, True, "the target of 1 GB/s was held: 0.3 GB/s, at the model's own rate"),
        ({"stalled_seconds": 0.4}, True, "the target of 1 GB/s was held: 0.3 GB/s, at the model's own rate"),
        (
            {"stalled_seconds": 4.0, "achieved_gbps": 0.97},
            True,
            "the target of 1 GB/s was held: 0.97 GB/s, under a load beyond the buffer",
        ),
        (
            {"stalled_seconds": 4.0},
            False,
            "the target of 1 GB/s is beyond these cores, at most 0.4 GB/s; 0.3 GB/s were stored",
        ),
        (
            {"dropped_records": 1, "bottleneck": "disk"},
            False,
            "the target of 1 GB/s is beyond this disk, at most 0.4 GB/s; 0.3 GB/s were stored",
        ),
        (
            {"stalled_seconds": 4.0, "capacity_gbps": 1.5},
            False,
            "the target of 1 GB/s was not held: 0.3 GB/s, though the cores would take 1.5; values come in bursts "
            "larger than the buffer, so raise max_memory_gb",
        ),
        (
            {"stalled_seconds": 4.0, "capacity_gbps": None, "bottleneck": None},
            False,
            "the target of 1 GB/s was not held: 0.3 GB/s",
        ),
    ],
)
def test_the_verdict(changes: dict[str, Any], held: bool, verdict: str) -> None:
    """Held: stored at the target, or at the model's rate; else why not, and what would be possible."""
    found = report(**changes)
    assert (found.target_held, found.target_verdict) == (held, verdict)
    as_dict = found.to_dict()
    assert (as_dict["target_held"], as_dict["target_verdict"]) == (held, verdict)


def test_the_verdict_is_in_report_progress_and_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A target that no machine holds, and a buffer that fills: report, progress line and file say the same."""
    model, framework = instrumented(
        4, compression_algorithm="zstd", target_throughput_gbps=1e6, max_memory_gb=0.02
    )
    path = tmp_path / "o.stream"
    with framework.capture_activations(path, on_full="drop", progress=True) as capture:
        for step in range(60):
            model(step_input(step, (1, 250_000)))
    found = capture.report
    assert found.dropped_records > 0 and not found.target_held
    assert "the target of 1e+06 GB/s is beyond" in found.target_verdict
    assert found.target_verdict in capsys.readouterr().err
    with open_stream(path) as stream:
        summary = stream.metadata["summary"]
    assert summary["target_held"] is False and "is beyond" in summary["target_verdict"]
    assert summary["capacity_gbps"] == found.capacity_gbps and summary["bottleneck"] == found.bottleneck
    assert summary["target_gbps"] == 1e6 and summary["achieved_gbps"] == pytest.approx(found.achieved_gbps)
