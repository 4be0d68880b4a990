"""A single file for as long as an engine lives, with the face of files that rotate."""

from __future__ import annotations

import time
from pathlib import Path

from ..capture.session import Session
from ..forks import track
from .lane import Lane, say_off
from .report import RecorderReport, RecorderTotals

# A file that was deleted or replaced takes what is written with it: it is looked for so often.
_LOOK_S = 1.0


class OneFile:
    """Writes one file, for one thread; a failure ends it for good, is counted and logged, and reaches no forward call.

    Args:
        path: the file.
        session: what writes it.
    """

    def __init__(self, path: Path, session: Session) -> None:
        self._file = Lane(path, 0, session)
        self._failure: BaseException | None = None
        self._closed = False
        self._looked_s = time.monotonic()
        track(self)

    @property
    def lane(self) -> Lane | None:
        """The file; None once it has failed or is closed."""
        return None if self.closed else self._file

    @property
    def closed(self) -> bool:
        return self._closed or self._failure is not None

    @property
    def report(self) -> RecorderReport:
        """What was recorded so far."""
        return RecorderReport(
            **vars(RecorderTotals().plus([self._file.session.report])),
            active=self.lane is not None,
            files=1,
            failures=int(self._failure is not None),
            last_failure=None
            if self._failure is None
            else f"{type(self._failure).__name__}: {self._failure}",
            path=str(self._file.path),
        )

    def enter(self) -> Lane | None:
        """The file, looked for once a second."""
        now_s = time.monotonic()
        if not self.closed and now_s - self._looked_s >= _LOOK_S:
            self._looked_s = now_s
            try:
                self._file.check()
            except Exception as error:
                self.fail(self._file, error)
        return self.lane

    def leave(self, lane: Lane) -> None:
        failure = lane.session.failure
        if failure is not None:
            self.fail(lane, failure)

    def fail(self, lane: Lane, error: BaseException) -> None:
        """Record no more."""
        if self._failure is None:
            self._failure = error
            say_off(lane, error, "files that rotate could be switched on again, a single one can not")

    def start(self) -> None:
        """Nothing: the file is there from the beginning to the end."""

    def stop(self) -> None:
        """Nothing, likewise."""

    def forked(self) -> None:
        """In a forked process: the file is the parent's."""
        self._closed = True

    def close(self) -> None:
        """Write the index and close the file.

        Raises:
            CaptureFailedError: a thread of the capture failed; the file holds what was written before.
        """
        if not self._closed:
            self._closed = True
            self._file.session.close()
