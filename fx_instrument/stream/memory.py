"""How much memory a writer takes: workers and pages that fit into what it is given."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from .blocks import MAX_PAGE_BYTES
from .direct import staging_bytes
from .filters import AT_ONCE_BYTES

DEFAULT_MEMORY_BYTES = 64 << 20
MIN_PAGE_BYTES = 16 << 10
WORKER_FIXED_BYTES = 3 << 19
"""Of a worker: its two zstd contexts (1 MiB), a directory."""
WORKER_BYTES_PER_S = 0.8e9
"""About what a worker takes in, compressing best, on the slowest processor that was measured."""
_USUAL_WORKERS = 4
WORKER_PAGES = 5
"""What a worker holds at most in pages: stacked, gathered, planes, compressed planes and the room zstd asks for."""


def at_once_bytes(page_bytes: int, num_workers: int) -> int:
    """How much of a page is split in one go: what a core's cache holds, or all of it where threads would meet."""
    return page_bytes if num_workers > 1 else min(page_bytes, AT_ONCE_BYTES)


def worker_bytes(page_bytes: int, num_workers: int) -> int:
    """What one of so many workers holds at most: pages, and what is split, and its exponents packed, at once."""
    return WORKER_FIXED_BYTES + WORKER_PAGES * page_bytes + 5 * at_once_bytes(page_bytes, num_workers) // 2


MIN_MEMORY_BYTES = worker_bytes(MIN_PAGE_BYTES, 1)
"""The least that a writer works with: one worker, the smallest pages."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What a writer holds beside the records."""

    num_workers: int
    page_bytes: int
    last_help: bool
    """Whether one more worker may run once nothing more comes."""

    @property
    def at_once_bytes(self) -> int:
        """So much of a page is split in one go."""
        return at_once_bytes(self.page_bytes, self.num_workers)

    @property
    def total_bytes(self) -> int:
        workers = self.num_workers + self.last_help
        return workers * worker_bytes(self.page_bytes, self.num_workers) + staging_bytes(self.page_bytes)


def plan_memory(
    memory_bytes: int,
    num_workers: int | None,
    page_bytes: int | None,
    target_bytes_per_s: float | None = None,
) -> MemoryPlan:
    """Workers and page size that fit: fewer workers before smaller pages than 1 MiB.

    Unless ``num_workers`` says how many: half of the cores, but no more than four, or one for each
    ``WORKER_BYTES_PER_S`` of the target if that is more. A worker with the smallest page is the least there can be,
    also where that is more than ``memory_bytes``.
    """
    if page_bytes is not None and not 1024 <= page_bytes <= MAX_PAGE_BYTES:
        raise ValueError(f"page_bytes must be from 1024 to {MAX_PAGE_BYTES}, got {page_bytes!r}")
    if num_workers is not None and num_workers < 1:
        raise ValueError(f"num_workers must be at least 1, got {num_workers!r}")
    if num_workers is None:
        wanted = max(_USUAL_WORKERS, math.ceil((target_bytes_per_s or 0) / WORKER_BYTES_PER_S))
        num_workers = max(1, min(wanted, len(os.sched_getaffinity(0)) // 2))
        while num_workers > 1 and num_workers * worker_bytes(1 << 20, num_workers) > memory_bytes:
            num_workers -= 1
    if page_bytes is None:
        # Five quarters of a page bring blocks together for the disk, whoever writes; ten of each worker's hold what is
        # split at once, but of one alone no more than those of AT_ONCE_BYTES.
        quarters, room = 4 * WORKER_PAGES * num_workers + 5, memory_bytes - num_workers * WORKER_FIXED_BYTES
        fitting = 4 * room // (quarters + 10 * num_workers)
        if num_workers == 1 and fitting >= AT_ONCE_BYTES:
            fitting = (4 * room - 10 * AT_ONCE_BYTES) // quarters
        page_bytes = max(MIN_PAGE_BYTES, min(MAX_PAGE_BYTES, fitting // 4096 * 4096))
    plan = MemoryPlan(num_workers, page_bytes, True)
    fits = plan.total_bytes <= memory_bytes and num_workers < len(os.sched_getaffinity(0))
    return plan if fits else MemoryPlan(num_workers, page_bytes, False)
