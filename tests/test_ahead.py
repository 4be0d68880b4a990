"""Jobs are done ahead by as many threads as there are, in order, within a bound on memory."""

from __future__ import annotations

import threading
import time

import pytest

from fx_instrument.stream.ahead import LARGE_BYTES, Ahead

PREFILL_RECORD_BYTES = 8 * 512 * 576 * 2


def test_records_larger_than_a_page_are_decoded_side_by_side() -> None:
    """Two threads are at work on two records of a prefill at the same time."""
    together = threading.Barrier(2, timeout=30)

    def run(job: int) -> int:
        if job < 2:
            together.wait()
        return job

    done = [*Ahead(2).done(range(8), run, lambda job: PREFILL_RECORD_BYTES)]
    assert done == [(job, job) for job in range(8)]


def test_results_that_no_one_takes_are_bounded() -> None:
    """No job begins whose result would find no room beside those that wait; one of any size always does."""
    begun: list[int] = []
    sizes = [LARGE_BYTES, LARGE_BYTES, 3 * LARGE_BYTES, 1, 1]

    def run(job: int) -> int:
        begun.append(job)
        return job

    jobs = Ahead(2).done(range(len(sizes)), run, sizes.__getitem__)
    assert next(jobs) == (0, 0)
    assert max(begun) <= 1
    assert [job for job, _ in jobs] == [1, 2, 3, 4]


def test_the_callers_thread_works_too() -> None:
    """No more threads run than were asked for, the caller's among them."""
    seen: set[int] = set()
    together = threading.Barrier(3, timeout=30)

    def run(job: int) -> int:
        seen.add(threading.get_ident())
        if job < 3:
            together.wait()
        return job

    assert [job for job, _ in Ahead(3).done(range(9), run, lambda job: 1)] == [*range(9)]
    assert len(seen) == 3 and threading.get_ident() in seen


def test_an_error_comes_where_its_job_does() -> None:
    """What was done before it is given out first; whichever thread met the error."""
    for num_threads in (1, 2, 3):

        def run(job: int) -> int:
            if job == 2:
                raise ValueError("the third")
            return job

        jobs = Ahead(num_threads).done(range(4), run, lambda job: 1)
        assert [next(jobs), next(jobs)] == [(0, 0), (1, 1)]
        with pytest.raises(ValueError, match="the third"):
            next(jobs)


def test_who_stops_in_the_middle_leaves_nothing_at_work() -> None:
    """Jobs that were not begun never are, and those that were have ended; others can follow, also after ``close``."""
    begun, ended = [], []

    def run(job: int) -> int:
        begun.append(job)
        time.sleep(0.01)
        ended.append(job)
        return job

    ahead = Ahead(3)
    jobs = ahead.done(range(100), run, lambda job: 1)
    assert next(jobs) == (0, 0)
    jobs.close()
    assert sorted(begun) == sorted(ended) and len(begun) < 10
    assert [job for job, _ in ahead.done(range(5), run, lambda job: 1)] == [*range(5)]
    ahead.close()
    assert [job for job, _ in ahead.done(range(5), run, lambda job: 1)] == [*range(5)]


def test_several_takers_share_the_threads() -> None:
    """Each gets its own results in order, also while others have jobs waiting."""
    ahead = Ahead(2)
    first = ahead.done(range(50), lambda job: job, lambda job: 1)
    assert next(first) == (0, 0)
    second = ahead.done(range(50), lambda job: -job, lambda job: 1)
    assert [-result for _, result in second] == [*range(50)]
    assert [result for _, result in first] == [*range(1, 50)]
