"""Captures into one file that are killed at random moments, each going on where the last was; run by test_kill.py.

    python tests/killed.py FILE CODEC NUM_KILLS SEED PACE

PACE "fast" captures as fast as it can into a small buffer, so that pages are small and many; "slow" one step every
ten milliseconds into a large one, so that pages are written because of their age; "overloaded" is "fast" on a disk
that takes its time, so that the buffer is full and the model waits; "large" is "fast" with values of 2 MiB, whose
blocks go past the page cache. A process forks a child for each capture, reads what the child says of its progress,
kills it after a random time and looks at what the file has.
Prints JSON.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import select
import signal
import struct
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from loud import Loud, instrumented, step_input

from fx_instrument import InstrumentationFramework, TruncatedStreamError, open_stream
from fx_instrument.stream.reader import StreamReader

NUM_SITES = 4
SHAPES = {"large": (512, 1024)}
SMALL = (8, 96)
EVENT = struct.Struct("=cqd")
"""b"s": a forward call of so many steps before it has returned; b"w", b"d": the file's first so many bytes are the
kernel's, the last of them through its page cache or past it. And when, by the monotonic clock."""


def capture(
    model: Loud, framework: InstrumentationFramework, path: str, pace: str, pipe: int, last: bool
) -> None:
    """Runs in the child until it is killed; the ``last`` one comes to its end."""
    writev = os.writev

    def told_writev(fd: int, views: Sequence[memoryview]) -> int:
        if pace == "overloaded":
            select.select([], [], [], 0.002)
        written = writev(fd, views)
        past_cache = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT
        os.write(
            pipe, EVENT.pack(b"d" if past_cache else b"w", os.lseek(fd, 0, os.SEEK_CUR), time.monotonic())
        )
        return written

    os.writev = told_writev  # type: ignore[assignment]
    shape = SHAPES.get(pace, SMALL)
    with framework.capture_activations(path, mode="a"):
        for step in range(20 if last else 10_000_000):
            model(step_input(step, shape))
            os.write(pipe, EVENT.pack(b"s", step, time.monotonic()))
            if pace == "slow":
                select.select([], [], [], 0.01)


@dataclass
class Seen:
    """What a child said before it died."""

    steps: list[float]
    """When each of its steps was done."""
    handed_over: int = 0
    """Bytes of the file that were the kernel's."""
    direct_writes: int = 0
    died: float = 0.0


def run_child(
    model: Loud, framework: InstrumentationFramework, path: str, pace: str, lifetime_s: float | None
) -> Seen:
    """Fork, listen, kill once ``lifetime_s`` has passed since the first step (None: let it end)."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reading)
            capture(model, framework, path, pace, writing, lifetime_s is None)
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    seen, data, deadline = Seen([]), b"", float("inf")
    while True:
        left = deadline - time.monotonic()
        if left <= 0 and not seen.died:
            seen.died = time.monotonic()
            os.kill(child, signal.SIGKILL)
        ready, _, _ = select.select([reading], [], [], left if 0 < left < 1e6 else None)
        if not ready:
            continue
        chunk = os.read(reading, 1 << 16)
        if not chunk:
            break
        data += chunk
        whole = len(data) // EVENT.size * EVENT.size
        for kind, number, when in EVENT.iter_unpack(data[:whole]):
            if kind != b"s":
                seen.handed_over = number
                seen.direct_writes += kind == b"d"
                continue
            if not seen.steps and lifetime_s is not None:
                deadline = when + lifetime_s
            assert number == len(seen.steps)
            seen.steps.append(when)
        data = data[whole:]
    os.close(reading)
    _, status = os.waitpid(child, 0)
    assert (os.waitstatus_to_exitcode(status) == 0) == (lifetime_s is None), status
    return seen


def look(path: str, seen: Seen, first_step: int) -> tuple[int, float, int]:
    """Steps in the file, how much older than the kill the first step is that is not whole in it, and lost steps."""
    with StreamReader(path, recover=True) as reader:
        # Whatever was handed to the kernel is there; only what came after may be cut.
        assert all(lost.offset >= seen.handed_over for lost in reader.damage), (
            reader.damage,
            seen.handed_over,
        )
        names = {site.name: site.id for site in reader.sites if site.role != "input"}
        lost, num_lost = seen.died, 0
        for index in range(NUM_SITES):
            refs = reader.refs(names[f"layers.{index}"]) if f"layers.{index}" in names else []
            steps = [ref.step for ref in refs if ref.step >= first_step]
            assert steps == list(range(first_step, first_step + len(steps)))
            # A step may have been captured whose forward call had not returned.
            assert len(steps) <= len(seen.steps) + 1
            if len(steps) < len(seen.steps):
                lost = min(lost, seen.steps[len(steps)])
                num_lost = max(num_lost, len(seen.steps) - len(steps))
        return reader.num_steps, seen.died - lost, num_lost


def check_values(path: str, first_steps: list[int], shape: tuple[int, ...]) -> int:
    """Every record of the file, compared with what its capture gave it."""
    count = 0
    with open_stream(path) as stream:
        for index in range(NUM_SITES):
            for record in stream[f"layers.{index}"]:
                began = max(first for first in first_steps if first <= record.step)
                expected = step_input(record.step - began, shape) * 2.0**index
                assert torch.equal(record.tensor(), expected), (record.site, record.step)
                count += 1
        assert count == len(stream)
    return count


def main() -> None:
    path, codec, num_kills, seed, pace = *sys.argv[1:3], *map(int, sys.argv[3:5]), sys.argv[5]
    torch.set_num_threads(1)
    rng = random.Random(seed)
    bound_gb = {"slow": 1.0, "large": 0.1}.get(pace, 0.006)
    shape = SHAPES.get(pace, SMALL)
    model, framework = instrumented(NUM_SITES, compression_algorithm=codec, max_memory_gb=bound_gb)
    # Traced and warm before the first fork; a child has the threads of its own capture only.
    with framework.capture_activations(None):
        model(step_input(0, shape))
    model(step_input(0, shape))
    first_steps, losses, recovered, lost_steps = [], [], [], []
    before = direct_writes = 0
    for _ in range(num_kills):
        first_steps.append(before)
        seen = run_child(model, framework, path, pace, rng.uniform(0, 2.5 if pace == "slow" else 0.3))
        direct_writes += seen.direct_writes
        # Not only where the child told of a write: it may die before it does.
        if Path(path).stat().st_size:
            try:
                after, lost_s, num_lost = look(path, seen, before)
            except TruncatedStreamError:
                assert before == 0, "only a file without its first block has nothing to recover"
                after, lost_s, num_lost = 0, seen.died - seen.steps[0], len(seen.steps)
        else:
            after, lost_s, num_lost = before, seen.died - seen.steps[0], len(seen.steps)
        lost_steps.append(num_lost)
        assert after >= before
        losses.append(lost_s)
        recovered.append(after - before)
        before = after
    first_steps.append(before)
    run_child(model, framework, path, pace, None)
    records = check_values(path, first_steps, shape)
    with StreamReader(path) as reader:
        steps, damage = reader.num_steps, reader.verify()
    print(
        json.dumps(
            {
                "kills": num_kills,
                "records": records,
                "steps": steps,
                "last_steps": steps - before,
                "recovered_steps": recovered,
                "longest_loss_s": max(losses),
                "largest_loss_bytes": max(lost_steps) * NUM_SITES * torch.Size(shape).numel() * 4,
                "bound_bytes": int(bound_gb * 1e9),
                "direct_writes": direct_writes,
                "damage_to_blocks": len(damage),
                "bytes": Path(path).stat().st_size,
            }
        )
    )


if __name__ == "__main__":
    main()
