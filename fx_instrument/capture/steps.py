"""The steps of a capture: their numbers, and which value of its site in a step each one is."""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

Join = Callable[[], contextlib.AbstractContextManager[None]]
"""Of a step: what a thread delivers inside belongs to it."""

_MAX_RUNS = 256


class SiteLike(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def role(self) -> str: ...


class _Step:
    """A forward call that a thread is in, or the number reserved for its next one."""

    __slots__ = ("calls", "first", "number", "running")

    def __init__(self, number: int) -> None:
        self.number = number
        self.running = False
        self.first: _Run | None = None
        """What delivered first: nearly always all that does."""
        self.calls: dict[str, int] = {}
        """Values of each site, once there was more."""


class _Mine(threading.local):
    """What one thread delivers to."""

    step: _Step | None = None


class _Run(NamedTuple):
    """The sites that a run of a graph delivers."""

    sites: Sequence[SiteLike]
    """Held, as their id is what the run is remembered by."""
    names: tuple[str, ...]
    calls: Sequence[int]
    """Of each value which one of its site's in the step it is, from 0, if the step had none before."""
    counts: dict[str, int]
    """Values of each site after it, likewise."""


class Steps:
    """Numbers forward calls over all threads; each thread is in one at a time.

    Args:
        first: the number of the first one.
    """

    def __init__(self, first: int) -> None:
        self.begun = 0
        self.end = first
        """One more than the last number."""
        self._numbers = itertools.count(first)
        self._lock = threading.Lock()
        self._mine = _Mine()
        self._runs: dict[int, _Run] = {}

    def begin(self) -> tuple[int, Join]:
        """The number of the forward call that this thread begins, and how other threads deliver to it.

        A number that was reserved is taken.
        """
        step = self._mine.step
        if step is None or step.running:
            step = self._reserve()
        step.running = True
        with self._lock:
            self.begun += 1
        return step.number, functools.partial(self._joined, step)

    def finish(self) -> None:
        self._mine.step = None

    def count(self, sites: Sequence[SiteLike]) -> tuple[int, tuple[str, ...], Sequence[int]]:
        """Where values belong that this thread delivers, one of each site: ``(step, names, calls)``.

        The step is the forward call that the thread is in; outside of one, its next one. Calls say which of its site's
        in the step each value is, from 0.
        """
        # A graph runs again and again with one and the same tuple.
        run = self._runs.get(id(sites)) or self._new_run(sites)
        step = self._mine.step or self._reserve()
        with self._lock:
            if step.first is None:
                step.first = run
                return step.number, run.names, run.calls
            if not step.calls:
                step.calls = dict(step.first.counts)
            return step.number, run.names, _count(run.names, step.calls)

    def forked(self) -> None:
        """In a forked process: who held the lock is not there."""
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def _joined(self, step: _Step) -> Iterator[None]:
        mine = self._mine
        before, mine.step = mine.step, step
        try:
            yield
        finally:
            mine.step = before

    def _new_run(self, sites: Sequence[SiteLike]) -> _Run:
        """Of sites that were not seen before; remembered, where they are a graph's."""
        names = tuple(site.name for site in sites)
        counts: dict[str, int] = {}
        run = _Run(sites, names, _count(names, counts), counts)
        if isinstance(sites, tuple) and len(sites) > 1 and len(self._runs) < _MAX_RUNS:
            self._runs[id(sites)] = run
        return run

    def _reserve(self) -> _Step:
        with self._lock:
            number = next(self._numbers)
            self.end = number + 1
        step = self._mine.step = _Step(number)
        return step


def _count(names: Sequence[str], counts: dict[str, int]) -> list[int]:
    """Each name's number among its values of a step; ``counts`` goes on."""
    calls = []
    for name in names:
        call = counts.get(name, 0)
        counts[name] = call + 1
        calls.append(call)
    return calls
