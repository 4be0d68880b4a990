"""A recorder: captures of one instrumented model that go on for as long as a server runs."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

from ..capture.session import Session
from ..capture_block import open_session
from ..errors import CaptureActiveError, InstrumentationError
from ..forks import track
from ..framework import InstrumentationFramework
from .limits import MIN_FREE_BYTES, FileLimits
from .report import RecorderReport
from .rotation import RotatingFiles
from .router import Router
from .tags import Request, RowSource, in_request

log = logging.getLogger(__name__)

_DOOR_S = 0.05
"""How long one try to switch between the compiled variants keeps new forward calls waiting, at least."""


class Recorder:
    """Records a server's forward calls into files that rotate, and never lets a failure reach a response.

    Switched on by ``start`` (or by entering it as a context manager) and off by ``stop``, from any thread. A full or
    vanished disk, or any failure of the capture, switches it off as well: one line in the log, one more in
    ``report.failures``; ``start`` switches it on again. A full buffer drops values and counts them; with
    ``max_stall_s`` it holds a response up for so long at most before it does.

    Args:
        framework: has an instrumented model; no other capture of it can be open while the recorder is on.
        folder: where the files go; made private to this user, and owned by one recorder at a time. Each process of
            a server needs one of its own.
        rotate_bytes: a file that is larger is ended and the next one begun; None sets no such limit.
        rotate_s: so is one that has records and is older, in seconds; None never is.
        max_files: how many files are kept, the oldest are deleted; None keeps all. Files that were in the folder
            before count, and are deleted, too.
        max_total_bytes: how many bytes of files are kept, likewise, beside the file that is written; one that has half
            of it is ended.
        requests_only: record the forward calls inside ``request`` only.
        max_stall_s: how long capturing may hold up what runs inside one ``request``, or one forward call outside
            of it, in all; 0 never waits for room.
        min_free_bytes: the recorder switches itself off before the folder's disk has less room left.

    Buffers take ``max_memory_gb`` at most, the file that is being ended included: each file's share is half of it.
    """

    def __init__(
        self,
        framework: InstrumentationFramework,
        folder: str | os.PathLike[str],
        *,
        rotate_bytes: int | None = 1 << 30,
        rotate_s: float | None = 3600.0,
        max_files: int | None = None,
        max_total_bytes: int | None = None,
        requests_only: bool = False,
        max_stall_s: float = 0.0,
        min_free_bytes: int = MIN_FREE_BYTES,
    ) -> None:
        if not max_stall_s >= 0:
            raise ValueError(f"max_stall_s must be 0 or more, got {max_stall_s!r}")
        limits = FileLimits(
            rotate_bytes=rotate_bytes,
            rotate_s=rotate_s,
            max_files=max_files,
            max_total_bytes=max_total_bytes,
            min_free_bytes=min_free_bytes,
        )
        self._framework = framework
        self._max_stall_s = float(max_stall_s)
        self._is_capturing = False
        self._starting = self._stops = 0  # guarded by the files' ``changed``
        self._closed = False
        self._files = RotatingFiles(
            folder,
            limits,
            open_session=self._open_session,
            again="Recorder.start()",
            check=lambda: framework._attached("Recorder").check_unchanged(),
            tend=self._leave_variant,
        )
        self._router = Router(self._files, requests_only=requests_only, max_stall_s=self._max_stall_s)
        track(self)

    # -- what the server calls ----------------------------------------------------------------------------------

    @property
    def folder(self) -> str:
        return str(self._files.folder)

    @property
    def active(self) -> bool:
        """Whether forward calls are recorded now."""
        return self._files.lane is not None

    @property
    def report(self) -> RecorderReport:
        """What was recorded so far, over all files."""
        return self._files.report

    def start(self, *, warm_up: Callable[[], object] | None = None, timeout_s: float = 30.0) -> None:
        """Begin a file and record from now on; does nothing if that is so already.

        The first forward call of each shape that is recorded compiles the capturing variant of the model, as the
        first one that is not compiles the other. Later switches compile nothing.

        Args:
            warm_up: calls the model as requests will; run twice, before and after the switch and recorded in neither,
                so that no request waits for a compiler.
            timeout_s: how long to look for a moment without forward calls, which switching takes. Each try
                holds new calls back for ``max_stall_s``, 50 ms at least.

        Raises:
            NotInstrumentedError, InstrumentationError, BufferTooSmallError, OSError: as ``capture_activations``.
                InstrumentationError also where ``stop`` or ``close`` was called meanwhile: nothing is recorded then.
            CaptureActiveError: another capture of the framework is open.
            TimeoutError: forward calls never paused, or the file before is still being ended.
        """
        changed = self._files.changed
        with changed:
            self._starting += 1
            stops = self._stops
        try:
            # Before taking the lock, which the thread that ends files needs too.
            if not self.active:
                self._files.wait_ended(timeout_s)
            with self._files.control:
                self._start(warm_up, timeout_s, stops)
        finally:
            with changed:
                self._starting -= 1
                changed.notify_all()

    def _start(self, warm_up: Callable[[], object] | None, timeout_s: float, stops: int) -> None:
        """Begin a file, unless ``stop`` is called meanwhile: ``stops`` is how often it was before."""
        self._check_open()
        if self.active:
            return
        framework = self._framework
        attachment = framework._attached("Recorder.start")
        if framework._capture not in (None, self):
            raise CaptureActiveError("a capture of this framework is open: leave its block first")
        attachment.check_unchanged()
        if warm_up is not None and not self._is_capturing:
            warm_up()
        self._check_not_stopped(stops)
        lane = self._files.begin(open_folder=True)
        try:
            if not self._is_capturing:
                framework._capture = self
                self._switch(True, timeout_s)
            if warm_up is not None:
                warm_up()
            # With the lock under which stop() counts itself: it either comes before, or finds the file.
            with self._files.changed:
                self._check_not_stopped(stops)
                self._router.epoch += 1
                self._files.replace(lane)
        except BaseException:
            self._files.retire(lane)
            if not self._is_capturing:
                framework._capture = None
            raise
        log.info("activation recording switched on: %s", lane.path)

    def stop(self, *, timeout_s: float = 30.0) -> bool:
        """Record no more, at once, and end the file; the model runs its idle variant as soon as calls pause.

        A ``start`` that goes on in another thread, warming up, ends without recording.

        Returns:
            True once all that is done; False if it was not within ``timeout_s`` seconds, and goes on in the background.
        """
        files = self._files
        with files.changed:
            self._stops += 1
            active = files.stop() is not None
        if active:
            log.info("activation recording switched off")
        with files.changed:
            return files.changed.wait_for(
                lambda: not (files.is_ending or self._is_capturing or self._starting), timeout_s
            )

    def rotate(self) -> None:
        """End the file and begin the next one now; forward calls in flight finish in the old one.

        Raises:
            InstrumentationError: the recorder is off.
            OSError: the next file can't be created; the recorder goes on with the old one.
        """
        with self._files.control:
            if not self.active:
                raise InstrumentationError("the recorder is off: start() begins a file")
            self._files.rotate()

    @contextlib.contextmanager
    def request(self, request_id: str | Sequence[str]) -> Iterator[None]:
        """Forward calls inside belong to this request: they are recorded (``requests_only``) and share its stall.

        Their rows are stored with the id and their token positions, so that ``open_stream(folder).request(id)`` finds
        them. Of a batch that serves several requests, give the ids in the order of the batch rows, and "" for rows
        that only fill the batch; padding, as the attention mask has it, belongs to none. The id is stored as it is,
        and never part of a path.

        What is inside may run in another thread, if that was given this context, as ``asyncio.to_thread`` and
        Starlette's thread pool do. Not around a ``yield`` to whoever sends a streamed response: each step of such a
        generator may run in a context of its own, or in that of another request, and its rows then get that one's id
        or none. Costs nothing while the recorder is off.
        """
        ids = (request_id,) if isinstance(request_id, str) else tuple(request_id)
        if not any(ids) or not all(isinstance(one, str) for one in ids):
            raise ValueError(
                f"request_id must be one or several strings that are not all empty, got {request_id!r}"
            )
        epoch = self._router.epoch  # read first: what starts in between counts as not seen
        request = Request(ids, self._max_stall_s, epoch=epoch if self.active else None)
        with in_request(self._router, request):
            yield

    def set_row_source(self, source: RowSource | None) -> None:
        """For engines that mix requests in one forward call: ``source`` says whose rows the call that begins computes.

        Args:
            source: called on the engine's thread before each recorded forward call outside ``request``; returns
                (request id, token position of the first row, number of rows) for each run of rows, in their order
                and covering them, with "" for padding; None if it can't tell. Each may go on with the number of the
                prompt's tokens (None: not known) and with what tells requests of one id apart: equal (and hashable)
                in all runs of a request, different in those of another. Without the latter an id that begins again
                at position 0 is another request, unless the run has all of its tokens so far and one more; so an
                engine that gives up what it computed and computes it again in pieces should say it. Runs of no rows
                are left out; an id that is no string, or a number below 0, ends the recording as any failure does.
        """
        self._router.set_row_source(source)

    def close(self, *, timeout_s: float = 30.0) -> None:
        """Stop for good and give the folder back.

        Raises:
            TimeoutError: the last file was not ended, a ``start`` went on in another thread, or calls did not pause,
                within ``timeout_s`` seconds.
        """
        if self._closed:
            return
        done = self.stop(timeout_s=timeout_s)
        self._closed = True
        starting = bool(self._starting)
        self._files.close(timeout_s=timeout_s if done else 0)
        if not done:
            raise TimeoutError(
                f"start() was not done within {timeout_s:g} s: it ends without recording"
                if starting
                else f"forward calls did not pause within {timeout_s:g} s: their variant is left later"
            )

    def __enter__(self) -> Recorder:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def forked(self) -> None:
        """In a forked process: closed, and the framework is free for recorders and captures of its own."""
        self._closed = True
        self._is_capturing = False
        self._starting = 0
        if self._framework._capture is self:
            self._framework._capture = None

    # -- files and variants -------------------------------------------------------------------------------------

    def _open_session(self, path: Path) -> Session:
        framework = self._framework
        return open_session(
            framework,
            path,
            mode="x",
            on_full="stall" if self._max_stall_s else "drop",
            # The other half is the file's that is being ended.
            max_memory_bytes=framework.config.max_memory_bytes // 2,
            patience=self._router.patience,
        )

    def _leave_variant(self) -> bool:
        """Have the model run its idle variant again once nothing is recorded; whether it does."""
        with self._files.control:
            if self._is_capturing and not self.active:
                with contextlib.suppress(TimeoutError):
                    self._switch(False, 0.0)
                    self._framework._capture = None
            return not self._is_capturing

    def _switch(self, capturing: bool, timeout_s: float) -> None:
        """Change between the model's two variants at a moment without forward calls.

        Each try keeps new calls out for a moment, in between they pass.

        Raises:
            TimeoutError: there was none.
        """
        attachment = self._framework._attached("Recorder")
        door_s = max(self._max_stall_s, _DOOR_S)
        deadline_s = time.monotonic() + timeout_s
        while True:
            try:
                if capturing:
                    attachment.open(self._router, timeout_s=door_s)
                else:
                    attachment.close(timeout_s=door_s)
                    self._router.leave_steps()
                break
            except TimeoutError:
                if time.monotonic() >= deadline_s:
                    raise
                time.sleep(door_s)
        with self._files.changed:
            self._is_capturing = capturing
            self._files.changed.notify_all()

    def _check_open(self) -> None:
        if self._closed:
            raise InstrumentationError("the recorder is closed: make a new one")

    def _check_not_stopped(self, stops: int) -> None:
        if self._stops != stops:
            raise InstrumentationError("stop() was called while the recorder started: nothing is recorded")
