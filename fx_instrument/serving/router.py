"""Where captured values go while files change under them: each forward call keeps the file that it began with."""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..graph.sink import Join
from ..graph.sites import Site
from .lane import Lane
from .rotation import RotatingFiles
from .tags import Request, RowSource, SourcedRows, TaggedRun, current_request, ran, tagged


@dataclass
class _Ticket:
    lane: Lane
    inner: Any


class _Mine(threading.local):
    """The forward call that this thread is in."""

    def __init__(self) -> None:
        self.in_step = False
        self.step: object = None
        self.lane: Lane | None = None
        self.request: Request | None = None
        self.patience_s = 0.0
        self.runs: list[TaggedRun] = []
        self.handled: BaseException | None = None
        """The exception that was being handled when the call began, as in a caller's second try."""


class Router:
    """A sink whose file can change at any moment, without waiting for a call and without one seeing two files.

    An exception of the capture ends the recording and never gets into the forward call.

    Args:
        files: where values go.
        requests_only: record the forward calls inside ``in_request`` only.
        max_stall_s: how long a request, or a forward call outside of one, may be held up in all.
    """

    def __init__(self, files: RotatingFiles, *, requests_only: bool, max_stall_s: float) -> None:
        self._files = files
        self._requests_only = requests_only
        self._max_stall_s = max_stall_s
        self._sourced: SourcedRows | None = None
        self._lock = threading.Lock()  # which requests a file has named
        self._mine = _Mine()
        self._steps: dict[object, Lane] = {}  # the files that forward calls entered and have not left
        self.epoch = 0
        """Changed before each file that is begun after a time without one: a request may have calls from in between."""

    def set_row_source(self, source: RowSource | None) -> None:
        """Ask ``source`` whose rows a forward call outside ``in_request`` computes."""
        self._sourced = SourcedRows(source) if source is not None else None

    def patience(self) -> float:
        """How long the capture may still hold up this thread."""
        mine = self._mine
        return mine.request.patience_s if mine.request is not None else mine.patience_s

    # -- the sink -----------------------------------------------------------------------------------------------

    def begin_step(self, inputs: Mapping[str, torch.Tensor]) -> Join:
        mine = self._mine
        if mine.lane is not None:
            # The call before was cut off by an exception inside one compiled function.
            self._end_step(completed=False)
        request = current_request(self)
        mine.in_step = True
        mine.request = request
        mine.runs, mine.handled = [], sys.exc_info()[1]
        mine.patience_s = self._max_stall_s
        in_session: Join = contextlib.nullcontext
        if request is not None or not self._requests_only:
            lane = mine.lane = self._files.enter()
            if lane is not None:
                mine.step = object()
                self._steps[mine.step] = lane
                try:
                    with self._shielded(lane):
                        in_session = self._begin(lane, inputs, request)
                except BaseException:
                    self._end_step(completed=False)
                    raise
        return functools.partial(self._joined, mine.lane, request, in_session)

    def _begin(self, lane: Lane, inputs: Mapping[str, torch.Tensor], request: Request | None) -> Join:
        session, sourced = lane.session, self._sourced
        runs: list[TaggedRun] = []
        if request is not None:
            runs = request.runs(inputs, self.epoch)
        elif sourced is not None:
            runs = sourced.runs()
        self._mine.runs = runs
        if not runs:
            return session.begin_step(inputs)
        with self._lock:
            noted, told = tagged(inputs, runs, lane.introduced)
        lost = session.dropped_inputs
        in_session = session.begin_step(noted)
        if session.dropped_inputs != lost:
            # The names may have found no room: say them again with the next step.
            with self._lock:
                lane.introduced.difference_update(told)
        return in_session

    @contextlib.contextmanager
    def _joined(self, lane: Lane | None, request: Request | None, in_session: Join) -> Iterator[None]:
        """This thread works for another one's forward call, unless it serves a request of its own."""
        mine = self._mine
        if current_request(self) not in (None, request):
            yield
            return
        mine.in_step, mine.lane, mine.request, mine.patience_s = True, lane, request, self._max_stall_s
        try:
            with in_session():
                yield
        finally:
            mine.in_step, mine.lane, mine.request = False, None, None

    def end_step(self) -> None:
        # A call that an exception ends may be tried again: its tokens are still to come.
        self._end_step(completed=sys.exc_info()[1] is self._mine.handled)

    def _end_step(self, *, completed: bool) -> None:
        mine = self._mine
        lane, request, runs = mine.lane, mine.request, mine.runs
        mine.lane, mine.request, mine.in_step, mine.runs, mine.handled = None, None, False, [], None
        if completed:
            ran(runs)
        if request is not None and runs:
            request.ended()
        if lane is not None:
            try:
                with self._shielded(lane):
                    lane.session.end_step()
            finally:
                self._leave_step(mine.step)

    def _leave_step(self, step: object) -> None:
        lane = self._steps.pop(step, None)
        if lane is not None:
            self._files.leave(lane)

    def leave_steps(self) -> None:
        """Once the model runs its idle variant, forward calls deliver no more, and the end of some goes unseen."""
        for step in list(self._steps):
            self._leave_step(step)

    def reserve(
        self,
        sites: Sequence[Site],
        num_bytes: int,
        *,
        device: torch.device | None = None,
        device_bytes: int = 0,
        replays: bool = False,
        early: bool = False,
        alike: object = None,
    ) -> _Ticket | None:
        lane = self._enter_again()
        if lane is None:
            return None
        ticket = None
        try:
            with self._shielded(lane):
                inner = lane.session.reserve(
                    sites,
                    num_bytes,
                    device=device,
                    device_bytes=device_bytes,
                    replays=replays,
                    early=early,
                    alike=alike,
                )
                ticket = _Ticket(lane, inner)
        finally:
            if ticket is None:
                self._files.leave(lane)
        return ticket

    def deliver(
        self,
        ticket: _Ticket | None,
        sites: Sequence[Site],
        values: Sequence[torch.Tensor],
        full_shapes: Sequence[tuple[int, ...]] | None,
    ) -> None:
        if ticket is not None:
            with self._until_left(ticket.lane):
                ticket.lane.session.deliver(ticket.inner, sites, values, full_shapes)

    def cancel(self, ticket: _Ticket | None) -> None:
        if ticket is not None:
            with self._until_left(ticket.lane):
                ticket.lane.session.cancel(ticket.inner)

    def returned(self, ticket: _Ticket | None) -> None:
        if ticket is not None:
            # No lane is needed any longer: the file may be closed by now.
            ticket.lane.session.returned(ticket.inner)

    def record_eager(self, site: Site, value: torch.Tensor) -> None:
        lane = self._enter_again()
        if lane is not None:
            with self._until_left(lane):
                lane.session.record_eager(site, value)

    # -- lanes --------------------------------------------------------------------------------------------------

    def _enter_again(self) -> Lane | None:
        """The lane of this thread's forward call; outside of one (T5's encoder in ``generate``) the current lane."""
        mine = self._mine
        if not mine.in_step:
            mine.request = current_request(self)
            if mine.request is None and self._requests_only:
                return None
            mine.patience_s = self._max_stall_s
            return self._files.enter()
        if mine.lane is not None:
            self._files.enter_again(mine.lane)
        return mine.lane

    @contextlib.contextmanager
    def _until_left(self, lane: Lane) -> Iterator[None]:
        """The last that is done in a lane that was entered: it is left behind it, whatever happens."""
        try:
            with self._shielded(lane):
                yield
        finally:
            self._files.leave(lane)

    @contextlib.contextmanager
    def _shielded(self, lane: Lane) -> Iterator[None]:
        """Keep exceptions of the capture out of the forward call, and count the time that it was held up."""
        started_s = time.perf_counter()
        try:
            yield
        except Exception as error:
            self._files.fail(lane, error)
        finally:
            mine, spent_s = self._mine, time.perf_counter() - started_s
            if mine.request is not None:
                mine.request.patience_s = max(0.0, mine.request.patience_s - spent_s)
            else:
                mine.patience_s = max(0.0, mine.patience_s - spent_s)
