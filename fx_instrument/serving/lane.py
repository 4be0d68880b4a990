"""One file of a capture inside a server, while forward calls are on their way into it."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from ..capture.session import Session
from ..errors import InstrumentationError
from ..stream.files import check_in_place

log = logging.getLogger(__name__)

_SILENT_STEPS = 100
"""After so many forward calls without a single value something is wrong: an empty file would grow in silence."""


class Lane:
    """One file that is being written, and how many forward calls are on their way into it.

    Args:
        number: the how-manieth file of its writer it is.
        session: what brings values to the file, which is there.
    """

    def __init__(self, path: Path, number: int, session: Session) -> None:
        self.path = path
        self.number = number
        self.session = session
        self.began_s = time.monotonic()
        self.in_flight = 0
        self.failed = False
        self.introduced: set[tuple[int, int | None]] = set()  # what the file was told of requests
        self._inode = path.stat().st_ino

    def check(self) -> None:
        """Raise what stands against writing on: a failure, a file that is gone, or nothing to write."""
        if self.session.failure is not None:
            raise self.session.failure
        check_in_place(self.path, self._inode)
        num_steps = self.session.report.steps
        if num_steps > _SILENT_STEPS and not self.session.has_delivered:
            raise InstrumentationError(
                f"{num_steps} forward calls have delivered no value of any site: the model runs past the capture"
            )


def say_off(lane: Lane, reason: BaseException, again: str) -> None:
    """The one line in the log about a capture that a failure ended; ``again`` is what to do."""
    log.error(
        "activation recording switched off, responses are not affected: %s: %s (file %s, %d records); %s",
        type(reason).__name__,
        reason,
        lane.path,
        lane.session.report.records,
        again,
    )
