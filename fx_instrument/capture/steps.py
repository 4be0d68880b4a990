"""The steps of a capture: their numbers, and which value of its site in a step each one is."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from typing import NamedTuple, Protocol

_MAX_RUNS = 256


class SiteLike(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def role(self) -> str: ...


class _Step(threading.local):
    """The forward call that this thread is in, or the number reserved for its next one."""

    number: int | None = None
    running: bool = False
    calls: dict[str, int]

    def __init__(self) -> None:
        self.calls = {}


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
        self._step = _Step()
        self._runs: dict[int, _Run] = {}

    def begin(self) -> int:
        """The number of the forward call that this thread begins; one that was reserved is taken."""
        step = self._step
        if step.running or step.number is None:
            self._reserve()
        step.running = True
        with self._lock:
            self.begun += 1
        assert step.number is not None
        return step.number

    def finish(self) -> None:
        step = self._step
        step.running = False
        step.number = None
        step.calls = {}

    def number(self) -> int:
        """Of the forward call that this thread is in; outside of one, that of its next one."""
        step = self._step
        if step.number is None:
            self._reserve()
        assert step.number is not None
        return step.number

    def count(self, sites: Sequence[SiteLike]) -> tuple[tuple[str, ...], Sequence[int]]:
        """Names of the sites that deliver a value each, and which of its site's in this step it is, from 0."""
        run, step = self._run_of(sites), self._step
        if step.calls:
            return run.names, _count(run.names, step.calls)
        step.calls = dict(run.counts)
        return run.names, run.calls

    def _run_of(self, sites: Sequence[SiteLike]) -> _Run:
        """Remembered for graphs, which run again and again with one and the same tuple."""
        run = self._runs.get(id(sites))
        if run is None:
            names = tuple(site.name for site in sites)
            counts: dict[str, int] = {}
            run = _Run(sites, names, _count(names, counts), counts)
            if isinstance(sites, tuple) and len(sites) > 1 and len(self._runs) < _MAX_RUNS:
                self._runs[id(sites)] = run
        return run

    def _reserve(self) -> None:
        self._step.calls = {}
        with self._lock:
            self._step.number = next(self._numbers)
            self.end = self._step.number + 1


def _count(names: Sequence[str], counts: dict[str, int]) -> list[int]:
    """Each name's number among its values of a step; ``counts`` goes on."""
    calls = []
    for name in names:
        call = counts.get(name, 0)
        counts[name] = call + 1
        calls.append(call)
    return calls
