"""Which forward calls of a model run in an open capture, and to which of them a value belongs.

A step is one forward call from outside: what the model calls of itself inside, it calls in that step. Calls are known
by frames of Python's stack, as the end of one may go unseen: no hook runs after Ctrl-C, none in compiled code after an
exception. A call whose frame is gone is over.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any

import torch

from ..errors import IncompleteCaptureWarning
from .sink import Join, Sink
from .sites import Site

_BETWEEN = {f"{__package__}.{name}" for name in ("calls", "counting", "backend")} | {
    "torch._dynamo.eval_frame"
}
"""Modules whose functions stand on the stack between a forward call and what counts it."""


class _Call:
    """A forward call from outside, while it runs."""

    __slots__ = ("_frame", "_thread_id", "join")

    def __init__(self, frame: FrameType) -> None:
        self._frame = frame
        self._thread_id = threading.get_ident()
        self.join: Join | None = None

    def is_running(self) -> bool:
        return self._frame in _stack(sys._current_frames().get(self._thread_id))


class _Mine(threading.local):
    """The forward call that this thread is in, if any, and those of the same model inside it."""

    has_called = False
    has_joined = False
    """It delivered to another thread's call."""
    call: _Call | None = None

    def __init__(self) -> None:
        self.frames: list[FrameType] = []


class Calls:
    """The forward calls of one model while a capture is open."""

    def __init__(self) -> None:
        self._mine = _Mine()
        self._running: set[_Call] = set()
        self._has_warned = False

    def begin(self, sink: Sink, inputs: Mapping[str, torch.Tensor]) -> None:
        """A forward call begins on this thread; ``sink`` is told of one from outside."""
        mine, frame = self._mine, _callers_frame()
        if mine.frames:
            _forget_cut_off(mine.frames)
            if mine.frames:
                mine.frames.append(frame)
                return
        if mine.has_joined:
            mine.has_joined = False
            self._warn(
                "a thread captured values while another one was in a forward call of this model, and they were noted "
                "with that call; now it calls the model itself, so that they may belong to this call of its own"
            )
        mine.has_called = True
        self._over(mine)
        mine.call = _Call(frame)
        mine.frames.append(frame)
        try:
            mine.call.join = sink.begin_step(inputs)
        except BaseException:
            self.end(sink)
            raise
        self._running.add(mine.call)

    def end(self, sink: Sink) -> None:
        """The forward call that began last on this thread is over."""
        mine = self._mine
        frames = mine.frames
        if len(frames) > 1:
            _forget_cut_off(frames)
        if frames:
            frames.pop()
        if not frames:
            self._over(mine)
            sink.end_step()

    def sink_here(self, sink: Sink) -> Sink | None:
        """Where values go that come up on this thread now: to ``sink``; None leaves them out, and a warning says so.

        A thread that is in no forward call prepares its next one (an encoder under ``generate``), or works for the call
        of another thread. The latter is taken to be so while another thread is in one, and this one never was.
        """
        mine = self._mine
        if mine.frames or not self._running or mine.has_called:
            return sink
        running = [call for call in tuple(self._running) if call.is_running()]
        if len(running) > 1:
            self._warn(
                f"a thread that is in no forward call of this model captured values while {len(running)} others were: "
                f"such values were left out, as whose they are can't be told; call the model from one thread at a time"
            )
            return None
        if not running or running[0].join is None:
            return sink
        mine.has_joined = True
        return _JoinedSink(sink, running[0].join)

    def _over(self, mine: _Mine) -> None:
        if mine.call is not None:
            self._running.discard(mine.call)
            mine.call = None

    def _warn(self, message: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(message, IncompleteCaptureWarning, stacklevel=2)


class _JoinedSink:
    """A sink to a thread that works for another thread's forward call."""

    def __init__(self, sink: Sink, join: Join) -> None:
        self._sink = sink
        self._join = join

    def begin_step(self, inputs: Mapping[str, torch.Tensor]) -> None: ...
    def end_step(self) -> None: ...

    def reserve(self, sites: Sequence[Site], num_bytes: int, **of_values: Any) -> Any:
        with self._join():
            return self._sink.reserve(sites, num_bytes, **of_values)

    def deliver(self, *of_run: Any, **named: Any) -> None:
        with self._join():
            self._sink.deliver(*of_run, **named)

    def cancel(self, ticket: Any) -> None:
        with self._join():
            self._sink.cancel(ticket)

    def returned(self, ticket: Any) -> None:
        with self._join():
            self._sink.returned(ticket)

    def record_eager(self, site: Site, value: torch.Tensor) -> None:
        with self._join():
            self._sink.record_eager(site, value)


def _callers_frame() -> FrameType:
    """The frame that lasts as long as the forward call that is being counted."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        module = frame.f_globals.get("__name__")
        # A module's hooks run in a function inside its _call_impl, which is over when those after a failure run.
        if module not in _BETWEEN and (module, frame.f_code.co_name) != ("torch.nn.modules.module", "inner"):
            return frame
        frame = frame.f_back
    raise AssertionError("someone calls the model")


def _stack(frame: FrameType | None) -> list[FrameType]:
    frames = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames


def _forget_cut_off(frames: list[FrameType]) -> None:
    """Leave out those that are on this thread's stack no longer."""
    there = set(map(id, _stack(sys._getframe(1))))
    frames[:] = [frame for frame in frames if id(frame) in there]
