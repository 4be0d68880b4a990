"""How much memory a writer takes: workers and pages that fit into what it is given."""

from __future__ import annotations

import os
from dataclasses import dataclass

from .blocks import MAX_PAGE_BYTES
from .direct import staging_bytes

DEFAULT_MEMORY_BYTES = 64 << 20
MIN_PAGE_BYTES = 16 << 10
WORKER_FIXED_BYTES = 7 << 19
"""Of a worker: its two zstd contexts (1 MiB), what is split and packed in one go (2.5 MiB)."""
WORKER_PAGES = 5
"""What a worker holds at most in pages: stacked, gathered, planes, compressed planes and the room zstd asks for."""
MIN_MEMORY_BYTES = WORKER_PAGES * MIN_PAGE_BYTES + WORKER_FIXED_BYTES
"""The least that a writer works with: one worker, the smallest pages."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What a writer holds beside the records."""

    num_workers: int
    page_bytes: int
    last_help: bool
    """Whether one more worker may run once nothing more comes."""

    @property
    def total_bytes(self) -> int:
        workers = self.num_workers + self.last_help
        return workers * (WORKER_PAGES * self.page_bytes + WORKER_FIXED_BYTES) + staging_bytes(
            self.page_bytes
        )


def plan_memory(memory_bytes: int, num_workers: int | None, page_bytes: int | None) -> MemoryPlan:
    """Workers and page size that fit: fewer workers before smaller pages than 1 MiB.

    A worker with the smallest page is the least there can be, also where that is more than ``memory_bytes``.
    """
    if page_bytes is not None and not 1024 <= page_bytes <= MAX_PAGE_BYTES:
        raise ValueError(f"page_bytes must be from 1024 to {MAX_PAGE_BYTES}, got {page_bytes!r}")
    if num_workers is not None and num_workers < 1:
        raise ValueError(f"num_workers must be at least 1, got {num_workers!r}")
    if num_workers is None:
        num_workers = max(1, min(4, len(os.sched_getaffinity(0)) // 2))
        while num_workers > 1 and num_workers * (WORKER_FIXED_BYTES + (WORKER_PAGES << 20)) > memory_bytes:
            num_workers -= 1
    if page_bytes is None:
        # Five quarters of a page bring blocks together for the disk, whoever writes.
        room = 4 * (memory_bytes - num_workers * WORKER_FIXED_BYTES) // (4 * WORKER_PAGES * num_workers + 5)
        page_bytes = max(MIN_PAGE_BYTES, min(MAX_PAGE_BYTES, room // 4096 * 4096))
    plan = MemoryPlan(num_workers, page_bytes, True)
    fits = plan.total_bytes <= memory_bytes and num_workers < len(os.sched_getaffinity(0))
    return plan if fits else MemoryPlan(num_workers, page_bytes, False)
