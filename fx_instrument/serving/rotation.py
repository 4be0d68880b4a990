"""Files of a capture that goes on for weeks, one after the other in a private folder."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from ..capture.session import Session
from ..errors import InstrumentationError
from ..forks import track
from .folder import RecordingFolder
from .lane import Lane, say_off
from .limits import FileLimits
from .report import RecorderReport, RecorderTotals

log = logging.getLogger(__name__)

_POLL_S = 0.2


class RotatingFiles:
    """Writes one file after the other; a failure ends the writing, is counted and logged, and reaches no forward call.

    A forward call keeps the file that it entered until it leaves; the next one is current meanwhile, and a thread ends
    the old one after that. The same thread looks five times a second whether the current file is due, and whether it,
    its folder and its disk are still there.

    Args:
        folder: where the files go; made private to this user, with one owner at a time.
        limits: size, age and number of the files.
        open_session: begins what writes the file at a path. Two are open while one is being ended.
        again: how it is switched on again after a failure, for the log.
        check: raises what else stands against writing on; called at each look while there is a file.
        tend: called at each look; answers whether its owner is done with the thread, for the end.

    Raises:
        OSError: as ``RecordingFolder``.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        limits: FileLimits,
        *,
        open_session: Callable[[Path], Session],
        again: str,
        check: Callable[[], object] = lambda: None,
        tend: Callable[[], bool] = lambda: True,
    ) -> None:
        self._limits = limits
        self._folder = RecordingFolder(folder, max_files=limits.max_files, max_bytes=limits.max_total_bytes)
        self._open_session = open_session
        self._again = again
        self._check = check
        self._tend = tend
        self.control = threading.RLock()
        """Held while a file is begun or found to have failed, one at a time. What ends all waits for none of that:
        whoever has begun a file looks, with ``changed``, whether it is still wanted."""
        self.changed = threading.Condition()
        """Guards what follows; notified when a file is ended."""
        self._ended = RecorderTotals()
        self._ending: list[Lane] = []
        self._errors: list[tuple[Lane, BaseException]] = []
        self._begun = self._failures = 0
        self._last_failure: str | None = None
        self._lock = threading.Lock()  # the current lane and calls in flight: never held for long
        self._lane: Lane | None = None
        self._closed = False
        self._wake = threading.Event()
        track(self)
        self._thread = threading.Thread(target=self._run, name="fx_instrument-files", daemon=True)

    # -- what is asked ------------------------------------------------------------------------------------------

    @property
    def folder(self) -> Path:
        return self._folder.path

    @property
    def lane(self) -> Lane | None:
        """The file that new forward calls go to."""
        return self._lane

    @property
    def is_ending(self) -> bool:
        """Whether a file is on its way out."""
        return bool(self._ending)

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def report(self) -> RecorderReport:
        """What was recorded so far, over all files."""
        with self.changed:
            lane = self._lane
            lanes = {id(one): one for one in (*self._ending, *((lane,) if lane is not None else ()))}
            totals = self._ended.plus(one.session.report for one in lanes.values())
            return RecorderReport(
                **vars(totals),
                active=lane is not None,
                files=self._begun,
                failures=self._failures,
                last_failure=self._last_failure,
                path=str(lane.path) if lane is not None else None,
            )

    # -- the model's threads ------------------------------------------------------------------------------------

    def enter(self) -> Lane | None:
        """The current file, which is not ended before ``leave``; None while there is none."""
        with self._lock:
            lane = self._lane
            if lane is not None:
                lane.in_flight += 1
            return lane

    def enter_again(self, lane: Lane) -> None:
        """A second hold on a file that this forward call has entered."""
        with self._lock:
            lane.in_flight += 1

    def leave(self, lane: Lane) -> None:
        with self._lock:
            lane.in_flight -= 1

    def fail(self, lane: Lane, error: BaseException) -> None:
        """Record no more; the thread does the rest, so that the caller waits for nothing."""
        with self.changed:
            self._errors.append((lane, error))
        self._wake.set()

    # -- switches -----------------------------------------------------------------------------------------------

    def start(self, *, timeout_s: float = 10.0) -> None:
        """Have a current file, in the folder made anew if it is gone; a refusal is raised and counted.

        Raises:
            TimeoutError, OSError, InstrumentationError: as ``wait_ended`` and ``begin``.
        """
        try:
            if self._lane is None:
                self.wait_ended(timeout_s)
            with self.control:
                if self._lane is None:
                    self._follow(None, self.begin(open_folder=True))
                    self._check_open()
        except Exception as error:
            self._count(error)
            raise

    def stop(self) -> Lane | None:
        """Record no more, at once; the file, which is ended beside the caller."""
        return self.replace(None)

    def rotate(self) -> None:
        """Begin the next file now; forward calls in flight finish in the old one.

        Raises:
            OSError: the next file can't be created; the old one stays.
        """
        with self.control:
            self._follow(self._lane, self.begin())

    def begin(self, *, open_folder: bool = False) -> Lane:
        """A new file, not current yet; ``open_folder`` takes the folder at the path where the one before is gone.

        Raises:
            OSError: the folder is gone, the disk has too little room, or the file can't be created.
            InstrumentationError: the files are closed.
        """
        self._check_open()
        if open_folder:
            self._folder.open_again()
        self._folder.check_there()
        self._prune()
        self._check_room()
        path = self._folder.next_path()
        session = self._open_session(path)
        try:
            lane = Lane(path, self._begun, session)
        except OSError:
            session.close()
            raise
        with self.changed:
            self._begun += 1
            if not self._thread.is_alive():
                self._thread.start()
        return lane

    def replace(self, lane: Lane | None) -> Lane | None:
        """Make ``lane`` the current file; the one before is ended once its calls in flight have left."""
        # At no moment is it neither current nor on its way out: nothing would keep it from being deleted.
        with self.changed:
            with self._lock:
                before, self._lane = self._lane, lane
            if before is not None:
                self.retire(before)
        return before

    def _follow(self, before: Lane | None, lane: Lane) -> None:
        """Make ``lane`` the current file, unless ``before`` has been stopped, or all closed, while it was begun."""
        with self.changed:
            if self._lane is before and not self._closed:
                self.replace(lane)
            else:
                self.retire(lane)

    def retire(self, lane: Lane) -> None:
        """End a file that is not current, once its calls in flight have left."""
        with self.changed:
            self._ending.append(lane)
        self._wake.set()

    def wait_ended(self, timeout_s: float) -> None:
        """Wait until no file is on its way out.

        Raises:
            TimeoutError: one still is.
        """
        with self.changed:
            if not self.changed.wait_for(lambda: not self._ending, timeout_s):
                raise TimeoutError(f"the file before was not ended within {timeout_s:g} s: its disk may hang")

    def close(self, *, timeout_s: float = 30.0) -> None:
        """Stop for good and give the folder back.

        Raises:
            TimeoutError: the last file was not ended within ``timeout_s`` seconds.
        """
        if self._closed:
            return
        deadline_s = time.monotonic() + timeout_s
        # Whoever begins a file now may do so undisturbed, within that time.
        held = self.control.acquire(timeout=timeout_s)
        with self.changed:
            self._closed = True
            self.stop()
        if held:
            self.control.release()
        timeout_s = max(0.0, deadline_s - time.monotonic())
        try:
            self.wait_ended(timeout_s)
        except TimeoutError:
            raise TimeoutError(
                f"the last file in {self.folder} is still being ended (its disk may hang); what was written is "
                f"readable with recover=True"
            ) from None
        finally:
            self._wake.set()
            if self._thread.is_alive():
                self._thread.join(0 if self._ending else timeout_s)
            self._folder.close()

    def forked(self) -> None:
        """In a forked process, where no thread ends files: closed, and the folder is the parent's."""
        self._closed = True
        self._lane = None
        self._ending, self._errors = [], []
        self.control, self.changed = threading.RLock(), threading.Condition()
        self._lock, self._wake = threading.Lock(), threading.Event()
        self._folder.forked()

    # -- the thread ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        done = False
        while not (self._closed and not self._ending and done):
            self._wake.wait(_POLL_S)
            self._wake.clear()
            try:
                self.look()
                done = self._tend()
            except Exception:
                log.exception("the recording in %s goes on after an error of its own", self.folder)

    def look(self) -> None:
        """Do what is due."""
        with self.changed:
            errors, self._errors = self._errors, []
        for lane, error in errors:
            self._switch_off(lane, error)
        with self.control:
            current = self._lane
            if current is not None:
                try:
                    self._folder.check_there()
                    current.check()
                    if self._folder.free_bytes() < self._limits.min_free_bytes:
                        self._prune()
                    self._check_room()
                    self._check()
                    if self._is_due(current):
                        self.rotate()
                except Exception as error:
                    # Of a file that was stopped meanwhile nothing is due any more; how it ends is told by its end.
                    if self._lane is current:
                        self._switch_off(current, error)
        for lane in list(self._ending):
            if lane.in_flight == 0:
                self._end(lane)

    def _is_due(self, lane: Lane) -> bool:
        limits, report = self._limits, lane.session.report
        # One file may be on its way out at a time: that is what the memory bound is divided by.
        if not report.records or self._ending:
            return False
        if limits.is_full(report.stored_bytes):
            return True
        return limits.rotate_s is not None and time.monotonic() - lane.began_s >= limits.rotate_s

    def _check_open(self) -> None:
        if self._closed:
            raise InstrumentationError(f"the recording in {self.folder} is closed")

    def _check_room(self) -> None:
        free, least = self._folder.free_bytes(), self._limits.min_free_bytes
        if free < least:
            raise OSError(f"{free} bytes are free in {self.folder}, min_free_bytes is {least}")

    def _end(self, lane: Lane) -> None:
        """Write what is left of a file and its index; delete it if it holds nothing, and the oldest of too many."""
        failure: BaseException | None = None
        try:
            lane.session.close()
        except Exception as error:
            failure = error
        report = lane.session.report
        with self.changed:
            self._ended = self._ended.plus([report])
            self._ending.remove(lane)
            self.changed.notify_all()
        if failure is not None and not lane.failed:
            self._switch_off(lane, failure)
        if report.records == 0 and failure is None:
            try:
                lane.path.unlink(missing_ok=True)
            except OSError as error:
                log.warning("the empty recording %s could not be deleted: %s", lane.path, error)
        self._prune(lane)

    def _prune(self, *just_ended: Lane) -> None:
        """Delete the oldest of too many files; none that is written, or was just ended."""
        with self.changed:
            lanes = [*just_ended, *self._ending, *([] if self._lane is None else [self._lane])]
        try:
            for path in self._folder.prune([lane.path for lane in lanes]):
                log.info("deleted %s, the oldest recording", path)
        except OSError as error:
            log.warning("the recordings in %s could not be tidied: %s", self.folder, error)

    def _switch_off(self, lane: Lane, reason: BaseException) -> None:
        with self.control:
            if lane.failed:
                return
            current = self.replace(None)
            for failed in (lane, current or lane):
                failed.failed = True
            self._count(reason)
            say_off(lane, reason, f"{self._again} switches it on again")

    def _count(self, reason: BaseException) -> None:
        with self.changed:
            self._failures += 1
            self._last_failure = f"{type(reason).__name__}: {reason}"
