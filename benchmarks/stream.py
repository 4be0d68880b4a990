"""What the stream costs: ratios, speeds as shares of a memcpy in the same process, random access, memory.

    OMP_NUM_THREADS=1 python -m benchmarks.stream [--synthetic] [--values FILE] [--gb 2] [--only PART] [--json FILE]

The values are the attention and MLP outputs of SmolLM2-135M on English text: prefill of 8 x 512 tokens, then 16 decode
steps of 8. Speeds are bytes a CPU second of the whole process, medians of interleaved rounds; a memcpy runs over the
same memory in every round, so that a machine whose speed drifts drifts for both. CPU figures are of one thread, writing
and reading; "wall" is time on the clock: of one compressor thread, and of a reader with its default threads.

PART is one of codecs, huffman, put, workers, lossy, target, memory, large; all of them without ``--only``.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard

from fx_instrument.stream import filters
from fx_instrument.stream.codec import _HUFFMAN_ONLY
from fx_instrument.stream.reader import StreamReader
from fx_instrument.stream.records import RecordMeta
from fx_instrument.stream.writer import StreamWriter

from .machine import resident, versions
from .stream_values import (
    Data,
    Described,
    Step,
    as_bytes,
    describe,
    entropy_bound,
    kept_data,
    repeated,
    synthetic_data,
)

ALONE: dict[str, Any] = {"num_workers": 1, "memory_bytes": 30 << 20}
"""One compressor thread, with pages of the usual size and no memory for the one that helps at the end."""
PARTS = ("codecs", "huffman", "put", "workers", "lossy", "target", "memory", "large")


class Meter:
    """CPU and wall seconds of a call."""

    def __init__(self, call: Callable[[], Any]) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        self.result = call()
        self.wall, self.cpu = time.perf_counter() - wall, time.process_time() - cpu


def memcpy_cpu(steps: list[Step], target: npt.NDArray[np.uint8]) -> float:
    """CPU seconds of copying every record once, one after another into ``target``, and again from its beginning."""

    def copy() -> None:
        start = 0
        for step in steps:
            for _, values in step:
                if start + values.nbytes > len(target):
                    start = 0
                np.copyto(target[start : start + values.nbytes], as_bytes(values))
                start += values.nbytes

    return Meter(copy).cpu


def write(path: Path | None, dtype: str, steps: list[Step], **options: Any) -> StreamWriter:
    """Write all records; the time is that of ``put`` and the workers, the records' descriptions were made before."""
    return _put_all(StreamWriter(path, metadata={}, **options), describe(dtype, steps))


def _put_all(writer: StreamWriter, described: Described) -> StreamWriter:
    for name in described[0]:
        writer.add_site(name, "other")
    for meta, data in described[1]:
        writer.put(meta, data)
    writer.close({})
    return writer


def write_to_null(codec: str, described: Described) -> StreamWriter:
    return _put_all(StreamWriter(None, metadata={}, codec=codec, **ALONE), described)


def scan(path: Path, num_threads: int | None = None) -> int:
    with StreamReader(path, num_threads=num_threads) as reader:
        return sum(len(data) for _, data in reader.scan())


def measure_codecs(data: Data, folder: Path, rounds: int) -> dict[str, Any]:
    """Ratio, writing and reading speed of each codec on each workload."""
    found: dict[str, Any] = {}
    for name, (dtype, steps) in data.items():
        bound = entropy_bound(dtype, steps)
        # Long enough that what is tried on a site's first page counts as it does in a capture of some seconds.
        many = repeated(steps, 1_200_000_000)
        raw = sum(values.nbytes for step in many for _, values in step)
        described = describe(dtype, many)
        speeds: dict[str, list[tuple[Meter, Meter, Meter, float]]] = {
            codec: [] for codec in ("none", "lz4", "zstd")
        }
        ratios = {}
        in_cache: list[float] = []
        memory = np.ones(raw, np.uint8)
        # A hundred thousand descriptions of records, which no capture holds at once, are not to be collected again
        # and again.
        gc.freeze()
        for _ in range(rounds):
            copy_s = memcpy_cpu(many, memory)
            in_cache.append(memcpy_cpu(many, memory[: max(map(len, (data for _, data in described[1])))]))
            for codec, rows in speeds.items():
                sink = Meter(partial(write_to_null, codec, described))
                path = folder / "codec.stream"
                write(path, dtype, many, codec=codec, num_workers=1)
                # Long files go past the page cache: the first scan brings this one there.
                scan(path)
                reading, threads = Meter(partial(scan, path, 1)), Meter(partial(scan, path))
                ratios[codec] = raw / sink.result.stored_bytes
                rows.append((sink, reading, threads, copy_s))
        for codec, rows in speeds.items():
            found[f"{name} {codec}"] = {
                "ratio": ratios[codec],
                "share_of_bound": ratios[codec] / bound,
                "write_x_memcpy": statistics.median(copy / write.cpu for write, _, _, copy in rows),
                "write_gb_per_cpu_s": statistics.median(raw / write.cpu / 1e9 for write, _, _, _ in rows),
                "write_gb_s_wall": statistics.median(raw / write.wall / 1e9 for write, _, _, _ in rows),
                "read_gb_per_cpu_s": statistics.median(raw / read.cpu / 1e9 for _, read, _, _ in rows),
                "read_gb_s_wall": statistics.median(raw / read.wall / 1e9 for _, _, read, _ in rows),
                "read_x_write_cpu": statistics.median(write.cpu / read.cpu for write, read, _, _ in rows),
                "read_x_write_wall": statistics.median(write.wall / read.wall for write, _, read, _ in rows),
                "memcpy_gb_per_cpu_s": statistics.median(raw / copy / 1e9 for _, _, _, copy in rows),
                "memcpy_into_cache_gb_per_cpu_s": raw / statistics.median(in_cache) / 1e9,
            }
        gc.unfreeze()
    return found


def measure_huffman(data: Data) -> dict[str, float]:
    """Huffman-only against zstd-1 on the same planes of exponents."""
    dtype, steps = data["bf16 prefill"]
    planes = [
        filters.Planes().split(filters.split_filter(dtype), [page], np.empty(len(page) + 64, np.uint8))[0]
        for page in (as_bytes(values) for _, values in steps[0])
    ]
    huffman = zstandard.ZstdCompressor(compression_params=_HUFFMAN_ONLY)
    level1 = zstandard.ZstdCompressor(level=1)
    a = Meter(lambda: sum(len(huffman.compress(plane.data)) for plane in planes))
    b = Meter(lambda: sum(len(level1.compress(plane.data)) for plane in planes))
    return {"speed_x_zstd1": b.cpu / a.cpu, "size_x_zstd1": a.result / b.result}


def measure_put() -> dict[str, float]:
    """Microseconds that put takes of a 9216-byte record, and a bare memmove of it."""
    count, size, sites = 20_000, 9216, 60
    source, target = np.ones(size, np.uint8), np.empty(size, np.uint8)
    pack = np.ones(sites * size, np.uint8)
    meta = RecordMeta(0, 0, 0, "bfloat16", (8, 1, 576))
    results: dict[str, list[float]] = {"put_us": [], "put_packed_us_a_record": [], "memmove_us": []}

    def timed(name: str, calls: int, records: int, call: Callable[[], Any]) -> None:
        started = time.thread_time()
        for _ in range(calls):
            call()
        results[name].append((time.thread_time() - started) / records * 1e6)

    for _ in range(5):
        for name in ("put_us", "put_packed_us_a_record"):
            writer = StreamWriter(None, metadata={}, codec="none", num_workers=1)
            for number in range(sites):
                writer.add_site(str(number), "mlp")
            layout = writer.layout("bfloat16", [(number, 0, ((8, 1, 576), None)) for number in range(sites)])
            if name == "put_us":
                timed(name, count, count, partial(writer.put, meta, source))
            else:
                timed(name, count // sites, count, partial(writer.put_packed, layout, 0, pack))
            writer.close({})
        to, of = target.ctypes.data, source.ctypes.data
        timed("memmove_us", count, count, partial(ctypes.memmove, to, of, size))
    found = {name: statistics.median(times) for name, times in results.items()}
    return {**found, "put_x_memmove": found["put_us"] / found["memmove_us"]}


def measure_workers(data: Data, rounds: int) -> dict[str, float]:
    """Wall-clock gain of two compressor threads over one, and their CPU time by its."""
    dtype, steps = data["bf16 prefill"]
    pairs = [
        [
            Meter(partial(write, None, dtype, steps * 3, codec="zstd", **options))
            for options in (ALONE, {"num_workers": 2})
        ]
        for _ in range(rounds)
    ]
    return {
        "two_workers_x_one": statistics.median(one.wall / two.wall for one, two in pairs),
        "two_workers_cpu_x_one": statistics.median(two.cpu / one.cpu for one, two in pairs),
    }


def measure_lossy(data: Data) -> dict[str, float]:
    """Ratio against float32 with a bounded error of a thousandth of each token's length."""
    dtype, steps = data["fp32 prefill"]
    writer = write(None, dtype, steps, codec="zstd", max_relative_error=1e-3)
    return {"ratio_at_1e-3": writer.raw_bytes / writer.stored_bytes}


def measure_large_file(data: Data, folder: Path, num_bytes: int) -> dict[str, Any]:
    """Random access, memory and recovery on a file of so many raw bytes: prefills and decode steps in turn."""
    dtype, prefill = data["bf16 prefill"]
    steps = prefill + data["bf16 decode"][1]
    path = folder / "large.stream"
    many = repeated(steps, num_bytes)
    writing = Meter(lambda: write(path, dtype, many, codec="zstd", num_workers=2))
    found: dict[str, Any] = {
        "gb": sum(v.nbytes for s in many for _, v in s) / 1e9,
        "file_gb": path.stat().st_size / 1e9,
        "write_wall_s": writing.wall,
    }
    opening = Meter(lambda: StreamReader(path))
    with opening.result as reader:
        found["open_ms"] = opening.wall * 1e3
        before = resident("RssAnon")
        rng = random.Random(0)
        for kind, wanted in (("prefill", 0), ("decode", 1)):
            rounds = len(many) // len(steps)
            places = [
                (
                    rng.choice(reader.sites).id,
                    len(steps) * rng.randrange(rounds) + wanted * rng.randrange(1, 17),
                )
                for _ in range(200)
            ]
            # Each record is let go before the next is read, or what is measured is how fast the kernel finds memory.
            cold = [Meter(lambda place=place: len(reader.read(reader.find(*place)))) for place in places]
            found[f"{kind}_cold_ms_median"] = statistics.median(meter.wall for meter in cold) * 1e3
            finds = [Meter(lambda place=place: reader.find(*place)) for place in places]
            reads = [Meter(lambda ref=meter.result: len(reader.read(ref))) for meter in finds]
            both = sorted((find.wall + read.wall) * 1e3 for find, read in zip(finds, reads, strict=True))
            found[f"{kind}_record_mb"] = reads[0].result / 1e6
            found[f"{kind}_find_ms_median"] = statistics.median(meter.wall for meter in finds) * 1e3
            found[f"{kind}_find_and_read_ms_median"] = statistics.median(both)
            found[f"{kind}_find_and_read_ms_p99"] = both[-2]
            del finds, reads
        found["held_after_400_reads_mb"] = (resident("RssAnon") - before) / 1e6
    forget(path)
    found["plain_read_s_per_gb"] = Meter(partial(read_through, path)).wall / found["file_gb"]
    forget(path)
    for key in ("recover_s_per_gb", "recover_again_s_per_gb"):
        # The second time all of the file lies in the page cache.
        recovering = Meter(lambda: StreamReader(path, recover=True))
        recovering.result.close()
        found[key] = recovering.wall / found["file_gb"]
    path.unlink()
    return found


def forget(path: Path) -> None:
    """Have the kernel read the file from the disk the next time."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_through(path: Path) -> None:
    """Read a file once, front to back, and look at nothing."""
    room = bytearray(1 << 20)
    with path.open("rb", buffering=0) as file:
        while file.readinto(room):
            pass


def measure_memory(data: Data, folder: Path, bound: int = 256_000_000) -> dict[str, float]:
    """Growth of resident memory under a producer that is held back by the bound all the time."""
    import torch

    from fx_instrument.capture.session import Session
    from fx_instrument.graph.sites import Site

    dtype, (step, *_) = data["bf16 prefill"]
    writer = StreamWriter(folder / "memory.stream", metadata={}, codec="zstd", memory_bytes=bound // 4)
    sites = [Site(name, "other") for name, _ in step]
    session = Session(
        writer,
        RecordMeta,
        sites,
        max_memory_bytes=bound,
        drop=False,
        sampling=None,
        target_gbps=1.0,
        progress=False,
    )
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    for _ in range(8):
        session.begin_step({})
        for site, (_, values) in zip(sites, step, strict=True):
            ticket = session.reserve([site], values.nbytes)
            value = torch.from_numpy(values.copy()).view(getattr(torch, dtype))
            session.deliver(ticket, [site], [value], None)
        session.end_step()
    session.close()
    found = {
        "bound_mb": bound / 1e6,
        "growth_at_peak_mb": (resident("VmHWM") - before) / 1e6,
        "counted_at_peak_mb": session.report.peak_buffer_bytes / 1e6,
        "stalled_s": session.report.stalled_seconds,
        "offered_mb": session.report.raw_bytes / 1e6,
    }
    (folder / "memory.stream").unlink()
    return found


def measure_target(data: Data) -> list[dict[str, Any]]:
    """Producers that offer ten times the target, held back by a bound on what waits; what is kept, and how."""
    dtype, steps = data["bf16 prefill"]
    return [overload(dtype, steps[0], target) for target in (0.3e9, 0.6e9, 1.2e9, 2.4e9)]


def overload(
    dtype: str, records: Step, target: float, bound: int = 200_000_000, run_s: float = 4
) -> dict[str, Any]:
    writer = StreamWriter(None, metadata={}, codec="zstd", target_bytes_per_s=target)
    sites = {site: writer.add_site(site, "other") for site, _ in records}
    room = threading.Condition()
    waiting = offered = step = 0

    def done(size: int) -> None:
        nonlocal waiting
        with room:
            waiting -= size
            room.notify()

    started = time.perf_counter()
    while time.perf_counter() - started < run_s:
        for site, values in records:
            size = values.nbytes
            with room:
                while waiting >= bound:
                    room.wait()
                waiting += size
            # No sooner than a load of ten times the target would come.
            time.sleep(max(0.0, started + offered / (10 * target) - time.perf_counter()))
            meta = RecordMeta(sites[site], step, 0, dtype, values.shape)
            writer.put(meta, as_bytes(values), partial(done, size))
            offered += size
        step += 1
    # Once nothing more comes, what still waits is compressed better.
    kept, seconds = offered - waiting, time.perf_counter() - started
    writer.close({})
    return {
        "target_gb_s": target / 1e9,
        "kept_gb_s": kept / seconds / 1e9,
        "ratio": writer.raw_bytes / writer.stored_bytes,
        "tiers": {name: count / writer.raw_bytes for name, count in writer.tiers.raw_bytes.items()},
        "capacity_gb_s": writer.tiers.capacity_bytes_per_s(dtype) / 1e9,
        "held_bytes_bound_mb": (bound + writer.memory_bytes) / 1e6,
    }


def show(title: str, rows: Iterable[tuple[str, dict[str, Any]]]) -> None:
    print(f"\n{title}")
    for name, values in rows:
        flat = {**values, **values.get("tiers", {})}
        figures = "  ".join(f"{key} {value:.3f}" for key, value in flat.items() if isinstance(value, float))
        print(f"  {name:22s} {figures}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--synthetic", action="store_true", help="made-up values instead of the model's")
    parser.add_argument(
        "--values", type=Path, help="keep the model's values in this .npz file, or take them from it"
    )
    parser.add_argument("--gb", type=float, default=2.0, help="raw size of the large file")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=PARTS, help="measure this part alone")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    data = synthetic_data() if options.synthetic else kept_data(options.values)
    found: dict[str, Any] = {"data": "synthetic" if options.synthetic else "SmolLM2-135M"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        measures: dict[str, Callable[[], Any]] = {
            "codecs": lambda: measure_codecs(data, folder, options.rounds),
            "huffman": lambda: measure_huffman(data),
            "put": measure_put,
            "workers": lambda: measure_workers(data, options.rounds),
            "lossy": lambda: measure_lossy(data),
            "target": lambda: measure_target(data),
            "memory": lambda: measure_memory(data, folder),
            "large": lambda: measure_large_file(data, folder, int(options.gb * 1e9)),
        }
        for part, measure in measures.items():
            if options.only not in (None, part):
                continue
            figures = found[part] = measure()
            if part == "codecs":
                show(part, figures.items())
            elif part == "target":
                show("target under a tenfold load", ((f"{row['target_gb_s']} GB/s", row) for row in figures))
            else:
                show(part, [("", figures)])
    found["versions"] = versions()
    print(json.dumps(found["versions"]))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
