"""Jobs done in threads ahead of whoever takes their results, in order and within a bound on memory."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
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


class Ahead:
    """Does jobs ahead of whoever takes their results, in order. Safe to use from several threads.

    The thread that takes results is one of ``num_threads``: it does jobs too while the result that is next is not
    there. A thread more would take a core, and the interpreter's lock, from the others.
    The others are started once they are needed, and stay: what they work in was new memory for each else.
    """

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    def close(self) -> None:
        """End the threads, after what was begun; they are started again where jobs come all the same."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=True)

    def done(
        self, jobs: Iterable[_Job], run: Callable[[_Job], _Result], num_bytes: Callable[[_Job], int]
    ) -> Iterator[tuple[_Job, _Result]]:
        """Each job with its result, in order; an error comes where its job does."""
        if self._num_threads <= 1:
            for job in jobs:
                yield job, run(job)
            return
        room = self._num_threads + 1
        waiting: deque[tuple[_Job, Future[_Result]]] = deque()
        held = 0
        try:
            for job in jobs:
                size = num_bytes(job)
                while waiting and (
                    held + size > room * min(max(size, _PAGE_BYTES), LARGE_BYTES)
                    or len(waiting) > 2 * self._num_threads
                ):
                    held -= num_bytes(waiting[0][0])
                    yield _taken(waiting, run)
                waiting.append((job, self._submit(run, job)))
                held += size
            while waiting:
                yield _taken(waiting, run)
        finally:
            # What nobody will take is not done, and nothing is at work any more for who stops in the middle.
            wait([future for _, future in waiting if not future.cancel()])

    def _submit(self, run: Callable[[_Job], _Result], job: _Job) -> Future[_Result]:
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self._num_threads - 1, thread_name_prefix="fx-read")
            return self._pool.submit(run, job)


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
