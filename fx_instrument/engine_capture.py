"""The capture of an inference engine whose forward calls mix the rows of many requests; knows no engine by name.

What an engine's file in integrations/ gives: the loaded model, the traced graphs, and of each forward call which
requests it holds, in the order of its rows. What this room does with it: markers into the model, the graphs
rewritten and compiled, and after each call the rows that were asked for brought to the file.
"""

from __future__ import annotations

import atexit
import functools
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .capture.session import Session
from .capture_block import open_session
from .config import InstrumentationConfig
from .errors import BufferTooSmallError, InstrumentationError, NoSitesError
from .framework import InstrumentationFramework
from .graph.attach import Attachment
from .graph.backend import CaptureBackend
from .graph.rewrite import insert_captures
from .graph.sites import choose_sites
from .row_plan import EVERYTHING, RowPlanner
from .serving.lane import Lane
from .serving.limits import FileLimits
from .serving.off_file import OffFile
from .serving.one_file import OneFile
from .serving.rotation import RotatingFiles
from .step_sink import StepSink, store_rows

log = logging.getLogger(__name__)

# The values of a call go to the buffer in pieces, so that a large prefill needs no buffer of its size.
_PIECES = 8

Scheduled = tuple[str, int, int]
"""A request's part of a forward call: engine id, position of its first token, number of tokens."""


class EngineCapture(InstrumentationFramework):
    """The capture of one worker of an engine.

    Args:
        config: what to capture.
        path: the file of this worker; its folder where files rotate.
        all_requests: capture every request that does not say otherwise; else those that ask, and a second graph
            without captures runs the calls in which nobody asked.
        mode: "w" replaces an existing file, "x" refuses one; where files rotate, none is ever replaced.
        drop: when the buffer is full, drop values at once and count them, instead of waiting.
        max_stall_s: the longest that a call may wait before values are dropped; None waits.
        engine: its name, for the file's metadata.
        limits: of files that rotate; None writes one file.
    """

    def __init__(
        self,
        config: InstrumentationConfig,
        path: Path,
        *,
        all_requests: bool,
        mode: str,
        drop: bool,
        max_stall_s: float | None,
        engine: str,
        limits: FileLimits | None = None,
    ) -> None:
        super().__init__(config)
        self.path = path
        self.sink = StepSink()
        self.files: OneFile | RotatingFiles | None = None
        """Where rows go, once the model is attached."""
        self.refused_requests = 0
        self.paused = False
        """Whether nothing is stored for now; requests are followed all the same, so that it can go on at any step."""
        self._backend_name = engine
        self._all_requests = all_requests
        self._mode = mode
        self._drop = drop
        self._max_stall_s = max_stall_s
        self._limits = limits
        # Of two files, one of which is being ended, each has half of the bound.
        self._memory_bytes = config.max_memory_bytes // (1 if limits is None else 2)
        self._planner: RowPlanner | None = None
        self._waits_until_s = 0.0
        self._off_file: OffFile | None = None

    # -- starting -----------------------------------------------------------------------------------------------

    def take_rank(self, rank: int) -> None:
        """One of several workers: a path of its own, beside those of the others; before ``attach``."""
        path = self.path
        stem, suffix = (path.stem, path.suffix) if self._limits is None else (path.name, "")
        self.path = path.with_name(f"{stem}.rank{rank}{suffix}")

    def sites_of(self, model: torch.nn.Module, within: str = "") -> dict[str, str]:
        """Name -> role of the sites that ``attach`` would capture; empty where the model has none of them."""
        try:
            return {site.name: site.role for site in choose_sites(model, self.config, within)}
        except NoSitesError:
            return {}

    def attach(
        self,
        model: torch.nn.Module,
        rank: int,
        world: int,
        *,
        within: str = "",
        first_number: int | None = None,
        elsewhere: Mapping[str, str] | None = None,
    ) -> None:
        """Plant the markers, and open the file, which is the ``rank``-th of ``world``'s.

        Args:
            within: name of the part of the model whose rows are tokens; "" for all of it.
            first_number: of the requests', drawn once for workers that are told of the same requests and store
                different sites of them; None draws one.
            elsewhere: ``sites_of`` the models of those workers.

        Raises:
            NoSitesError: the model has none of the sites.
            OSError: the file can't be created, or the folder is not this process' own.
        """
        attachment = self._attachment = Attachment(model, choose_sites(model, self.config, within))
        attachment.marker.capturing = True
        attachment.marker.sink = self.sink
        roles = {site.name: site.role for site in attachment.sites}
        default = EVERYTHING if self._all_requests else None
        self._planner = RowPlanner(roles, default, first_number, elsewhere)
        opened = functools.partial(self._open_session, rank=rank, world=world)
        if self._limits is None:
            self.files = OneFile(self.path, opened(self.path, mode=self._mode))
        else:
            off_file = self._off_file = OffFile(self.path)
            files = self.files = RotatingFiles(
                self.path,
                self._limits,
                open_session=opened,
                again="switch_capture(True), or a file 'off' put into the folder and removed,",
                tend=lambda: off_file.obey(files, lambda: self.switch(not self.paused)),
            )
            try:
                files.start()
            except BaseException:
                files.close()
                raise
        atexit.register(self.close)

    def _open_session(self, path: Path, *, mode: str = "x", rank: int, world: int) -> Session:
        waits_for_ever = not self._drop and self._max_stall_s is None
        return open_session(
            self,
            path,
            mode=mode,
            on_full="drop" if self._drop else "stall",
            max_memory_bytes=self._memory_bytes,
            patience=None if waits_for_ever else self._patience,
            rank=rank,
            world=world,
        )

    def compile(
        self,
        graph: torch.fx.GraphModule,
        example_inputs: Sequence[Any],
        inner: str | Callable[..., Any],
        *,
        options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Callable[..., Any]:
        """Rewrite a traced graph and compile it with ``inner``."""
        attachment = self._attachment
        if not isinstance(attachment, Attachment):
            raise InstrumentationError("attach the model before its graphs are compiled")
        captured = CaptureBackend(attachment.marker, attachment.finder, None, inner, options=options)
        compiled = captured(graph, example_inputs, **kwargs)
        if self._all_requests or not isinstance(inner, str):
            return compiled
        stripped = insert_captures(graph, lambda mark, token: False, None)
        if stripped is None:
            return compiled
        # Calls in which nobody asked run the graph that they would have run without us.
        arguments = stripped.arguments
        plain = CaptureBackend(attachment.marker, attachment.finder, None, inner, options=options)
        idle = plain(stripped.gm, [example_inputs[index] for index in arguments], **kwargs)
        sink = self.sink

        def run(*args: Any) -> Any:
            if sink.armed or sink.starting:
                return compiled(*args)
            return idle(*[args[index] for index in arguments])

        return run

    def check_fired(self, max_rows: int) -> None:
        """The engine has warmed up: every planned site must have delivered; ``max_rows`` is a call's most.

        Raises:
            InstrumentationError: one did not.
            BufferTooSmallError: a site's rows of one call are larger than the buffer.
        """
        sink = self.sink
        if self.files is None:
            return
        silent = [site.name for site in self.sites if site not in sink.fired]
        if silent:
            raise InstrumentationError(
                f"{len(silent)} of {len(self.sites)} planned sites delivered nothing while the engine warmed up: "
                f"{', '.join(silent[:4])}{', ...' if len(silent) > 4 else ''}. Modules outside the compiled model "
                f"can't be captured; if it is all of them, a compile cache served a graph without captures, or the "
                f"model runs without a traced graph under CUDA graphs: run the engine eagerly"
            )
        if sink.in_replays:
            raise InstrumentationError(
                f"{min(site.name for site in sink.in_replays)} runs inside an operator that CUDA graphs replay without "
                f"its Python: choose other sites, or run the engine eagerly"
            )
        most = max(sink.fired.values()) * max_rows
        if most > self._piece_bytes * _PIECES and not self._drop and self._max_stall_s is None:
            raise BufferTooSmallError(
                f"one site's rows of a full call ({max_rows} tokens) take {most} bytes, but max_memory_gb="
                f"{self.config.max_memory_gb:g} leaves the buffer {self._piece_bytes * _PIECES}: raise it, or let "
                f"the engine batch fewer tokens"
            )
        sink.starting = False
        log.info(
            "capturing %s: %d sites%s, into %s",
            "all requests" if self._all_requests else "requests that ask",
            len(self.sites),
            " (eagerly: there is no traced graph)" if sink.eager else "",
            self.path,
        )

    @property
    def _piece_bytes(self) -> int:
        # Three quarters of a file's bound are the values' (the writer has the rest).
        return self._memory_bytes * 3 // 4 // _PIECES

    # -- a forward call -----------------------------------------------------------------------------------------

    @property
    def is_capturing(self) -> bool:
        """Whether rows are stored now."""
        return not self.paused and self.files is not None and self.files.lane is not None

    @property
    def is_following(self) -> bool:
        """Whether to tell it of requests: it stores their rows, or may go on with it in their middle.

        Not while the engine starts: it may warm up with requests of its own.
        """
        return self.files is not None and not self.files.closed and not self.sink.starting

    def switch(self, on: bool) -> bool:
        """Store nothing from the next call on, or go on, also after a failure where files rotate.

        Where files rotate, switching off ends the file and switching on begins the next one. Never raises: what stands
        against it is logged and counted.

        Returns:
            Whether rows are stored now.
        """
        self.paused = not on
        if self.files is not None and not (self._off_file is not None and self._off_file.there):
            try:
                (self.files.start if on else self.files.stop)()
            except Exception as error:
                log.error("capturing into %s can't be switched on: %r", self.path, error)
        return self.is_capturing

    def begin_request(
        self, engine_id: str, request_id: str, num_prompt_tokens: int, num_cached_tokens: int, wish: Any
    ) -> None:
        """A request is scheduled for the first time; a bad ``wish`` is logged and counted, and not captured."""
        assert self._planner is not None
        try:
            self._planner.begin(engine_id, request_id, num_prompt_tokens, num_cached_tokens, wish)
        except ValueError as error:
            self.refused_requests += 1
            log.warning("request %s is not captured, its argument is bad: %s", engine_id, error)

    def finish_requests(self, engine_ids: Iterable[str]) -> None:
        if self._planner is not None:
            self._planner.finish(engine_ids)

    def arm(self, scheduled: Iterable[Scheduled]) -> bool:
        """Before a forward call: whether it has rows to keep."""
        assert self._planner is not None
        self.sink.armed = self.is_capturing and self._planner.any_wanted(scheduled)
        return self.sink.armed

    def store(self, scheduled: Sequence[Scheduled], token_ids: torch.Tensor | None) -> None:
        """After an armed call: bring the wanted rows to the file; ``scheduled`` in the order of the batch's rows.

        Never raises: a failure switches the capture off, and the engine goes on.
        """
        if self._max_stall_s is not None:
            self._waits_until_s = time.monotonic() + self._max_stall_s
        files = self.files
        lane = files.enter() if files is not None else None
        if files is None or lane is None:
            self.sink.take()
            return
        try:
            self._store(lane, scheduled, token_ids)
        except Exception as error:
            files.fail(lane, error)
        finally:
            files.leave(lane)

    def _patience(self) -> float:
        """How long the call may still wait, all pieces of its values together."""
        return max(0.0, self._waits_until_s - time.monotonic())

    def _store(self, lane: Lane, scheduled: Sequence[Scheduled], token_ids: torch.Tensor | None) -> None:
        assert self._planner is not None
        values = self.sink.take()
        missing = len(self.sites) - len({site for site, _ in values})
        if missing:
            raise InstrumentationError(
                f"{missing} of {len(self.sites)} planned sites delivered nothing in a call"
            )
        total = sum(count for _, _, count in scheduled)
        for group in self._planner.plan(scheduled, lane.number):
            wanted = [
                (site, value) for site, value in values if group.sites is None or site.name in group.sites
            ]
            if not store_rows(lane.session, group, wanted, token_ids, total, self._piece_bytes):
                self._planner.announce_again(group)

    def give_up(self, error: Exception) -> None:
        """What the engine said of an armed call makes no sense: as a failure in ``store``."""
        self.sink.take()
        files = self.files
        lane = files.lane if files is not None else None
        if files is not None and lane is not None:
            files.fail(lane, error)

    # -- ending -------------------------------------------------------------------------------------------------

    def report(self) -> dict[str, Any] | None:
        """What was captured so far, as ``RecorderReport`` has it; None where another worker stores.

        Beside its keys ``paused`` (switched off by hand) and ``refused_requests`` (whose argument was bad).
        """
        if self.files is None:
            return None
        return {
            **self.files.report.to_dict(),
            "paused": self.paused,
            "refused_requests": self.refused_requests,
        }

    def close(self) -> None:
        """Write the index and close the file; the engine goes on without capturing.

        Raises:
            CaptureFailedError, TimeoutError: the file has no index; ``open_stream(recover=True)`` reads it.
        """
        atexit.unregister(self.close)
        self.sink.take()
        if self.files is not None:
            self.files.close()
