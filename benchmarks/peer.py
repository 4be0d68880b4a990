"""Capturing beside llm-instrumentation 1.3.1, a hook-based system: the same values, one process, interleaved rounds.

    pip install --no-deps --target peer llm-instrumentation==1.3.1 aiofiles
    OMP_NUM_THREADS=1 PYTHONPATH=peer python -m benchmarks.peer [--synthetic] [--values FILE] [--only GLOB]
        [--json FILE]

The values are those of ``benchmarks/stream.py``: attention and MLP outputs of SmolLM2-135M. Both sides begin where a
value is there and end when it is on the disk, ``fsync`` included on both (the peer does none by itself, so it is
done for it):

- The peer is used as its documentation says: a model, ``instrument_model``, ``capture_activations``. It hooks the
  direct children of a model, so the model is one whose children return the values.
- "capture" begins where our compiled graph hands its outputs on (``Session.reserve`` and ``deliver``, one run a step).
- "writer" is our file alone, from ``StreamWriter.put`` on: no steps, no bound on memory, no drain thread.

Both of ours compress as well as they can, whatever the rate.

bfloat16 is what the peer can't take: it stores nothing and says nothing. To compare speeds on the very same bytes it
is given them as int16 ("as int16"), which its user would have to do by hand. float32 it rounds to float16, unasked.

Times are those of a captured record (wall clock, and CPU of the whole process): what was lost does not count. "Times
the peer" is the median over rounds of the peer's time by ours in the same round.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fx_instrument.capture.session import Session
from fx_instrument.graph.sites import Site
from fx_instrument.stream.reader import StreamReader
from fx_instrument.stream.records import RecordMeta
from fx_instrument.stream.writer import StreamWriter

from .machine import versions
from .stream import Meter
from .stream_values import Data, Described, Step, kept_data, repeated, synthetic_data

PEER_VERSION = "1.3.1"
MAX_MEMORY_BYTES = 1_000_000_000
TARGETS = {
    ("zstd", "prefill"): 3.0,
    ("zstd", "decode"): 8.0,
    ("none", "prefill"): 4.0,
    ("none", "decode"): 12.0,
}
"""How many times the peer's speed is asked for."""

SIDES = ["capture", "writer", "peer"]
CLOCKS = ["wall", "cpu"]

Steps = list[list[tuple[str, torch.Tensor]]]


class Replay(nn.Module):
    """A model whose direct children return the values of a step, one after the other."""

    class Site(nn.Module):
        def forward(self, value: torch.Tensor) -> torch.Tensor:
            return value

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        # Names of direct children have no dots.
        for name in names:
            self.add_module(name.replace(".", "_"), Replay.Site())

    def forward(self, step: list[tuple[str, torch.Tensor]]) -> torch.Tensor:
        for child, (_, value) in zip(self.children(), step, strict=True):
            child(value)
        # The peer hooks the model as well; its record is not counted.
        return torch.empty(0)


def run_peer(peer: Any, path: Path, codec: str, names: Sequence[str], steps: Steps) -> None:
    config = peer.InstrumentationConfig(
        granularity=peer.HookGranularity.FULL_TENSOR,
        compression_algorithm=codec,
        max_memory_gb=MAX_MEMORY_BYTES / 1e9,
    )
    framework = peer.InstrumentationFramework(config)
    model = Replay(names)
    framework.instrument_model(model)
    with framework.capture_activations(str(path)):
        for step in steps:
            model(step)
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def count_peer(peer: Any, path: Path, codec: str) -> int:
    """The records that the peer's own analysis finds in its file."""
    config = peer.InstrumentationConfig(
        granularity=peer.HookGranularity.FULL_TENSOR, compression_algorithm=codec
    )
    found = peer.InstrumentationFramework(config).analyze_activations(str(path))
    return int(sum(entry["count"] for name, entry in found["per_layer"].items() if name))


def run_ours(path: Path, codec: str, names: Sequence[str], steps: Steps) -> None:
    sites = [Site(name, "mlp" if name.endswith("mlp") else "attention") for name in names]
    writer = StreamWriter(path, metadata={}, codec=codec, memory_bytes=MAX_MEMORY_BYTES // 4)
    session = Session(
        writer,
        RecordMeta,
        sites,
        max_memory_bytes=MAX_MEMORY_BYTES,
        drop=False,
        sampling=None,
        target_gbps=1.0,
        progress=False,
    )
    for step in steps:
        values = [value for _, value in step]
        session.begin_step({})
        session.deliver(session.reserve(sites, sum(value.nbytes for value in values)), sites, values, None)
        session.end_step()
    session.close()


def described_for_writer(names: list[str], steps: Steps) -> Described:
    dtype = str(steps[0][0][1].dtype).removeprefix("torch.")
    return names, [
        (RecordMeta(index, number, 0, dtype, tuple(value.shape)), value.view(-1).view(torch.uint8).numpy())
        for number, step in enumerate(steps)
        for index, (_, value) in enumerate(step)
    ]


def run_writer(path: Path, codec: str, described: Described) -> None:
    writer = StreamWriter(path, metadata={}, codec=codec, memory_bytes=MAX_MEMORY_BYTES // 4)
    for name in described[0]:
        writer.add_site(name, "mlp" if name.endswith("mlp") else "attention")
    for meta, data in described[1]:
        writer.put(meta, data)
    writer.close({})


def count_ours(path: Path, steps: Steps) -> int:
    """The records in the file that are, bit for bit, what was handed over."""
    same = 0
    with StreamReader(path) as reader:
        for ref, data in reader.scan():
            name, value = steps[ref.step][ref.site_id]
            assert name == reader.sites[ref.site_id].name
            same += np.array_equal(data, value.reshape(-1).view(torch.uint8).numpy())
    return same


def workloads(data: Data) -> dict[str, tuple[Steps, Steps]]:
    """Name -> what ours is given, what the peer is given."""
    found = {}
    for kind, num_bytes in (("prefill", 280_000_000), ("decode", 100_000_000)):
        bits = repeated(data[f"bf16 {kind}"][1], num_bytes)
        bf16 = as_tensors(bits, torch.bfloat16)
        found[f"bf16 {kind}"] = bf16, bf16
        found[f"bf16 {kind} as int16"] = bf16, as_tensors(bits, torch.int16)
        fp16 = halves(bf16)
        found[f"fp16 {kind}"] = fp16, fp16
    fp32 = as_tensors(repeated(data["fp32 prefill"][1], 140_000_000), torch.float32)
    found["fp32 prefill"] = fp32, fp32
    return found


def as_tensors(steps: list[Step], dtype: torch.dtype) -> Steps:
    return [[(name, torch.from_numpy(values).view(dtype)) for name, values in step] for step in steps]


def halves(steps: Steps) -> Steps:
    """The values in float16; steps that are repeated stay the same memory."""
    made: dict[int, torch.Tensor] = {}
    for _, value in (record for step in steps for record in step):
        made.setdefault(value.data_ptr(), value.to(torch.float16))
    return [[(name, made[value.data_ptr()]) for name, value in step] for step in steps]


def measure(
    peer: Any, codec: str, ours: Steps, theirs: Steps, folder: Path, rounds: int
) -> dict[str, float | int]:
    names = [name for name, _ in ours[0]]
    assert max(Counter(names).values()) == 1 and all(len(step) == len(names) for step in ours)
    expected = sum(len(step) for step in ours)
    raw = sum(value.nbytes for step in ours for _, value in step)
    paths = {side: folder / f"{side}.stream" for side in SIDES}
    described = described_for_writer(names, ours)
    runs = {
        "capture": partial(run_ours, paths["capture"], codec, names, ours),
        "writer": partial(run_writer, paths["writer"], codec, described),
        "peer": partial(run_peer, peer, paths["peer"], codec, names, theirs),
    }
    kept = dict.fromkeys(SIDES, expected)
    # Microseconds that a captured record takes; of nothing captured there is none.
    costs: dict[tuple[str, str], list[float]] = {}
    for number in range(rounds):
        meters = {side: Meter(runs[side]) for side in SIDES[number % 3 :] + SIDES[: number % 3]}
        for side in SIDES:
            count = count_peer(peer, paths[side], codec) if side == "peer" else count_ours(paths[side], ours)
            kept[side] = min(kept[side], count)
            if count:
                for clock in CLOCKS:
                    costs.setdefault((side, clock), []).append(getattr(meters[side], clock) / count * 1e6)
    found: dict[str, float | int] = {"raw_mb": raw / 1e6, "records_expected": expected}
    for side in SIDES:
        found[f"records_{side}"] = kept[side]
        if kept[side]:
            found[f"ratio_{side}"] = raw * kept[side] / expected / paths[side].stat().st_size
            for clock in CLOCKS:
                found[f"{side}_{clock}_us_a_record"] = statistics.median(costs[side, clock])
    if kept["peer"]:
        for side in ("capture", "writer"):
            for clock in CLOCKS:
                pairs = zip(costs["peer", clock], costs[side, clock], strict=True)
                found[f"{side}_x_peer_{clock}"] = statistics.median(theirs / mine for theirs, mine in pairs)
    return found


def show(found: dict[str, dict[str, float | int]]) -> None:
    print(f"{'':28s}{'captured of expected':>24s}{'ratio':>14s}{'times the peer: wall':>23s}{'CPU':>15s}")
    print(f"{'':28s}{'ours':>8s}{'peer':>8s}{'of':>8s}{'ours':>7s}{'peer':>7s}", end="")
    print(f"{'capture':>12s}{'writer':>8s}{'capture':>10s}{'writer':>8s}{'asked':>8s}")
    for name, row in found.items():
        codec, _, kind = name.split(" ")[:3]
        ratios = [f"{row[key]:.2f}" if key in row else "-" for key in ("ratio_capture", "ratio_peer")]
        gains = [f"{side}_x_peer_{clock}" for clock in CLOCKS for side in ("capture", "writer")]
        shown = [f"{row[gain]:.1f}" if gain in row else "-" for gain in gains]
        print(
            f"{name:28s}{row['records_capture']:8d}{row['records_peer']:8d}{row['records_expected']:8d}"
            f"{ratios[0]:>7s}{ratios[1]:>7s}{shown[0]:>12s}{shown[1]:>8s}{shown[2]:>10s}{shown[3]:>8s}"
            f"{TARGETS[codec, kind]:8.0f}"
        )


def load_peer() -> Any:
    try:
        import llm_instrumentation
        import llm_instrumentation.core.streaming  # its own imports: aiofiles
    except ModuleNotFoundError as error:
        sys.exit(
            f"{error}. Install the peer in a folder of its own, then run again with it:\n"
            f"  {sys.executable} -m pip install --no-deps --target peer llm-instrumentation=={PEER_VERSION} aiofiles\n"
            f"  PYTHONPATH=peer {sys.executable} -m benchmarks.peer {' '.join(sys.argv[1:])}"
        )
    return llm_instrumentation


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--synthetic", action="store_true", help="made-up values instead of the model's")
    parser.add_argument(
        "--values", type=Path, help="keep the model's values in this .npz file, or take them from it"
    )
    parser.add_argument(
        "--only", default="*", help="only these workloads, such as 'zstd bf16*' or '* decode*'"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the files go, instead of the temporary folder")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    peer = load_peer()
    from importlib.metadata import version

    if (installed := version("llm-instrumentation")) != PEER_VERSION:
        sys.exit(f"llm-instrumentation {installed} is installed, {PEER_VERSION} is compared with")
    data = synthetic_data() if options.synthetic else kept_data(options.values)
    found: dict[str, dict[str, float | int]] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        for workload, (ours, theirs) in workloads(data).items():
            for codec in ("zstd", "none"):
                if not fnmatch.fnmatch(f"{codec} {workload}", options.only):
                    continue
                print(f"{codec} {workload} ...", file=sys.stderr, flush=True)
                found[f"{codec} {workload}"] = measure(peer, codec, ours, theirs, Path(name), options.rounds)
    show(found)
    stated = {
        "data": "synthetic" if options.synthetic else "SmolLM2-135M",
        "rounds": options.rounds,
        "figures": found,
        "versions": {**versions(), "torch": torch.__version__, "llm-instrumentation": installed},
    }
    print(json.dumps(stated["versions"]))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(stated, indent=1) + "\n")


if __name__ == "__main__":
    main()
