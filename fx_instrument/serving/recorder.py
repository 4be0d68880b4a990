"""A recorder: captures of one instrumented model that go on for as long as a server runs."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType

from ..capture_block import open_session
from ..errors import CaptureActiveError, InstrumentationError
from ..framework import InstrumentationFramework
from .folder import RecordingFolder
from .report import RecorderReport, RecorderTotals
from .router import Lane, Router
from .tags import Request, RowSource, in_request

log = logging.getLogger(__name__)

_POLL_S = 0.2
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
        rotate_bytes: a file that is larger is ended and the next one begun.
        rotate_s: so is one that has records and is older, in seconds.
        max_files: how many files are kept, the oldest are deleted; None keeps all. Files that were in the folder
            before count, and are deleted, too.
        max_total_bytes: how many bytes of files are kept, likewise.
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
        rotate_bytes: int = 1 << 30,
        rotate_s: float = 3600.0,
        max_files: int | None = None,
        max_total_bytes: int | None = None,
        requests_only: bool = False,
        max_stall_s: float = 0.0,
        min_free_bytes: int = 1 << 30,
    ) -> None:
        for name, value in (("max_files", max_files), ("max_total_bytes", max_total_bytes)):
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be greater than 0 or None, got {value!r}")
        for name, number in (("rotate_bytes", rotate_bytes), ("rotate_s", rotate_s)):
            if not number > 0:
                raise ValueError(f"{name} must be greater than 0, got {number!r}")
        for name, number in (("max_stall_s", max_stall_s), ("min_free_bytes", min_free_bytes)):
            if not number >= 0:
                raise ValueError(f"{name} must be 0 or more, got {number!r}")
        self._framework = framework
        self._rotate_bytes = rotate_bytes
        self._rotate_s = rotate_s
        self._max_stall_s = float(max_stall_s)
        self._min_free_bytes = min_free_bytes
        self._folder = RecordingFolder(folder, max_files=max_files, max_bytes=max_total_bytes)
        self._router = Router(
            requests_only=requests_only, max_stall_s=self._max_stall_s, on_error=self._on_error
        )
        self._control = threading.RLock()  # start, stop, rotate and what the thread decides, one at a time
        self._changed = threading.Condition()  # guards what follows, waited on until a file is ended
        self._ended = RecorderTotals()
        self._ending: list[Lane] = []
        self._errors: list[tuple[Lane, BaseException]] = []
        self._files = self._failures = 0
        self._last_failure: str | None = None
        self._is_capturing = False
        self._closed = False
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fx_instrument-recorder", daemon=True)
        self._thread.start()

    # -- what the server calls ----------------------------------------------------------------------------------

    @property
    def folder(self) -> str:
        return str(self._folder.path)

    @property
    def active(self) -> bool:
        """Whether forward calls are recorded now."""
        return self._router.lane is not None

    @property
    def report(self) -> RecorderReport:
        """What was recorded so far, over all files."""
        with self._changed:
            lane = self._router.lane
            lanes = {id(one): one for one in (*self._ending, *((lane,) if lane is not None else ()))}
            totals = self._ended.plus(one.session.report for one in lanes.values())
            return RecorderReport(
                **vars(totals),
                active=lane is not None,
                files=self._files,
                failures=self._failures,
                last_failure=self._last_failure,
                path=str(lane.path) if lane is not None else None,
            )

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
            CaptureActiveError: another capture of the framework is open.
            TimeoutError: forward calls never paused, or the file before is still being ended.
        """
        # Before taking the lock, which the thread that ends files needs too.
        if not self.active and not self._wait_ended(timeout_s):
            raise TimeoutError(f"the file before was not ended within {timeout_s:g} s: its disk may hang")
        with self._control:
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
            self._folder.open_again()
            lane = self._begin()
            try:
                if not self._is_capturing:
                    framework._capture = self
                    self._switch(True, timeout_s)
                if warm_up is not None:
                    warm_up()
            except BaseException:
                self._retire(lane)
                if not self._is_capturing:
                    framework._capture = None
                raise
            self._router.replace(lane)
            log.info("activation recording switched on: %s", lane.path)

    def stop(self, *, timeout_s: float = 30.0) -> bool:
        """Record no more, at once, and end the file; the model runs its idle variant as soon as calls pause.

        Returns:
            True once both are done; False if they were not within ``timeout_s`` seconds, and go on in the background.
        """
        with self._control:
            lane = self._router.replace(None)
            if lane is not None:
                self._retire(lane)
                log.info("activation recording switched off")
        with self._changed:
            return self._changed.wait_for(lambda: not self._ending and not self._is_capturing, timeout_s)

    def rotate(self) -> None:
        """End the file and begin the next one now; forward calls in flight finish in the old one.

        Raises:
            InstrumentationError: the recorder is off.
            OSError: the next file can't be created; the recorder goes on with the old one.
        """
        with self._control:
            if not self.active:
                raise InstrumentationError("the recorder is off: start() begins a file")
            before = self._router.replace(self._begin())
            if before is not None:
                self._retire(before)

    @contextlib.contextmanager
    def request(self, request_id: str | Sequence[str]) -> Iterator[None]:
        """Forward calls inside belong to this request: they are recorded (``requests_only``) and share its stall.

        Their rows are stored with the id and their token positions, so that ``open_stream(folder).request(id)`` finds
        them. Of a batch that serves several requests, give the ids in the order of the batch rows; padding, as the
        attention mask has it, belongs to none. The id is stored as it is, and never part of a path.

        What is inside may run in another thread, if that was given this context, as ``asyncio.to_thread`` and
        Starlette's thread pool do. Costs nothing while the recorder is off.
        """
        ids = (request_id,) if isinstance(request_id, str) else tuple(request_id)
        if not ids or not all(isinstance(one, str) and one for one in ids):
            raise ValueError(
                f"request_id must be one or several strings that are not empty, got {request_id!r}"
            )
        with in_request(Request(ids, self._max_stall_s)):
            yield

    def set_row_source(self, source: RowSource | None) -> None:
        """For engines that mix requests in one forward call: ``source`` says whose rows the call that begins computes.

        Args:
            source: called on the engine's thread before each recorded forward call outside ``request``; returns
                (request id, token position of the first row, number of rows) for each run of rows, in their order
                and covering them, with "" for padding; None if it can't tell.
        """
        self._router.set_row_source(source)

    def close(self, *, timeout_s: float = 30.0) -> None:
        """Stop for good and give the folder back.

        Raises:
            TimeoutError: the last file was not ended, or calls did not pause, within ``timeout_s`` seconds.
        """
        if self._closed:
            return
        done = self.stop(timeout_s=timeout_s)
        self._closed = True
        self._wake.set()
        self._thread.join(timeout_s if done else 0)
        self._folder.close()
        if not done:
            raise TimeoutError(
                f"the last file in {self.folder} was not ended within {timeout_s:g} s; what was written is readable "
                f"with recover=True"
            )

    def __enter__(self) -> Recorder:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- files --------------------------------------------------------------------------------------------------

    def _begin(self) -> Lane:
        self._folder.check_there()
        self._check_room()
        lane = Lane(self._folder.next_path())
        framework = self._framework
        lane.session = open_session(
            framework,
            lane.path,
            mode="x",
            on_full="stall" if self._max_stall_s else "drop",
            max_memory_bytes=framework.config.max_memory_bytes // 2,
            patience=self._router.patience,
        )
        lane.inode = lane.path.stat().st_ino
        with self._changed:
            self._files += 1
        return lane

    def _retire(self, lane: Lane) -> None:
        with self._changed:
            self._ending.append(lane)
        self._wake.set()

    def _end(self, lane: Lane) -> None:
        """Write what is left of a file and its index; runs in the recorder's thread."""
        failure: BaseException | None = None
        try:
            lane.session.close()
        except Exception as error:
            failure = error
        report = lane.session.report
        with self._changed:
            self._ended = self._ended.plus([report])
            self._ending.remove(lane)
            self._changed.notify_all()
        if failure is not None and not lane.failed:
            self._switch_off(lane, failure)
        try:
            if report.records == 0 and failure is None:
                lane.path.unlink(missing_ok=True)
            for path in self._folder.prune(keep=lane.path):
                log.info("deleted %s, the oldest recording", path)
        except OSError as error:
            log.warning("the recordings in %s could not be tidied: %s", self.folder, error)

    def _check_room(self) -> None:
        free = self._folder.free_bytes()
        if free < self._min_free_bytes:
            raise OSError(f"{free} bytes are free in {self.folder}, min_free_bytes is {self._min_free_bytes}")

    def _wait_ended(self, timeout_s: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: not self._ending, timeout_s)

    # -- failures -----------------------------------------------------------------------------------------------

    def _on_error(self, lane: Lane, error: BaseException) -> None:
        """Called from the model's threads: record no more, and leave the rest to the recorder's thread."""
        with self._changed:
            self._errors.append((lane, error))
        self._wake.set()

    def _switch_off(self, lane: Lane, reason: BaseException) -> None:
        with self._control:
            current = self._router.replace(None)
            if current is not None:
                self._retire(current)
            elif lane.failed:
                return
            for failed in (lane, current or lane):
                failed.failed = True
            with self._changed:
                self._failures += 1
                self._last_failure = f"{type(reason).__name__}: {reason}"
            log.error(
                "activation recording switched off, responses are not affected: %s: %s (file %s, %d records); "
                "Recorder.start() switches it on again",
                type(reason).__name__,
                reason,
                lane.path,
                lane.session.report.records,
            )

    def _check_file(self, lane: Lane) -> None:
        """Raise what stands against writing on."""
        self._folder.check_there()
        lane.check()
        self._check_room()
        self._framework._attached("Recorder").check_unchanged()

    # -- the recorder's thread ----------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closed or self._ending or self._is_capturing:
            self._wake.wait(_POLL_S)
            self._wake.clear()
            try:
                self._look()
            except Exception:
                log.exception("the recorder's thread goes on after an error of its own")

    def _look(self) -> None:
        with self._changed:
            errors, self._errors = self._errors, []
        for lane, error in errors:
            self._switch_off(lane, error)
        with self._control:
            current = self._router.lane
            if current is not None:
                try:
                    self._check_file(current)
                    if self._is_due(current):
                        self.rotate()
                except Exception as error:
                    self._switch_off(current, error)
        for lane in list(self._ending):
            if lane.in_flight == 0:
                self._end(lane)
        with self._control:
            if self._is_capturing and not self.active:
                with contextlib.suppress(TimeoutError):
                    self._switch(False, 0.0)
                    self._framework._capture = None

    def _is_due(self, lane: Lane) -> bool:
        report = lane.session.report
        # One file may be on its way out at a time: that is what the memory bound is divided by.
        if not report.records or self._ending:
            return False
        return report.stored_bytes >= self._rotate_bytes or time.monotonic() - lane.began_s >= self._rotate_s

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
                break
            except TimeoutError:
                if time.monotonic() >= deadline_s:
                    raise
                time.sleep(door_s)
        with self._changed:
            self._is_capturing = capturing
            self._changed.notify_all()

    def _check_open(self) -> None:
        if self._closed:
            raise InstrumentationError("the recorder is closed: make a new one")
