"""Jobs done in threads ahead of whoever takes their results, in order and within a bound on memory."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

_Job = TypeVar("_Job")
_Result = TypeVar("_Result")

_PAGE_BYTES = 4 << 20
LARGE_BYTES = 16 << 20
"""Results that no one has taken yet hold at most a page a thread, and one more. Larger ones may be as many, up to this
for each of them, or one: a record of a prefill is often a little more than a page, and with room for pages only two
threads took turns over such records."""
_MAX_THREADS = 4
"""Zstandard's Huffman decoder and a core's share of memory bandwidth: more threads than this starve each other."""


def default_threads() -> int:
    """As many as there are cores for this process, up to four."""
    return min(_MAX_THREADS, len(os.sched_getaffinity(0)))


def done_ahead(
    jobs: Iterable[_Job], run: Callable[[_Job], _Result], num_bytes: Callable[[_Job], int], num_threads: int
) -> Iterator[tuple[_Job, _Result]]:
    """Each job with its result, in order; an error comes where its job does.

    The caller's thread is one of so many: it does jobs too while the result that is next is not there. A thread more
    would take a core, and the interpreter's lock, from the others (reading took a sixth longer).
    """
    if num_threads <= 1:
        for job in jobs:
            yield job, run(job)
        return
    waiting: deque[tuple[_Job, Future[_Result]]] = deque()
    held = 0
    pool = ThreadPoolExecutor(num_threads - 1, thread_name_prefix="fx-read")
    try:
        for job in jobs:
            size = num_bytes(job)
            while waiting and (
                held + size > (num_threads + 1) * min(max(size, _PAGE_BYTES), LARGE_BYTES)
                or len(waiting) > 2 * num_threads
            ):
                held -= num_bytes(waiting[0][0])
                yield _taken(waiting, run)
            waiting.append((job, pool.submit(run, job)))
            held += size
        while waiting:
            yield _taken(waiting, run)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _taken(
    waiting: deque[tuple[_Job, Future[_Result]]], run: Callable[[_Job], _Result]
) -> tuple[_Job, _Result]:
    """The oldest job and its result, to which nothing here refers any more: its memory is the taker's to free.

    While it is not done, jobs that no thread has begun are done here.
    """
    while not waiting[0][1].done():
        mine = next((number for number, (_, future) in enumerate(waiting) if future.cancel()), None)
        if mine is None:
            break
        waiting[mine] = waiting[mine][0], _run_here(run, waiting[mine][0])
    job, future = waiting.popleft()
    return job, future.result()


def _run_here(run: Callable[[_Job], _Result], job: _Job) -> Future[_Result]:
    future: Future[_Result] = Future()
    try:
        future.set_result(run(job))
    except Exception as error:
        future.set_exception(error)
    return future
