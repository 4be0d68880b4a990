"""What an open capture shows of itself: one line on standard error, drawn anew twice a second."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from .report import CaptureReport

_EVERY_S = 0.5


class ProgressLine:
    """The line of one capture; once it can't be written, nothing is shown any more.

    Args:
        report: what the capture has done so far.
        held_bytes: what its buffer holds now.
    """

    def __init__(self, report: Callable[[], CaptureReport], held_bytes: Callable[[], int]) -> None:
        self._report = report
        self._held_bytes = held_bytes
        self._last_shown = time.monotonic()
        self._is_read = True

    def tick(self) -> None:
        now = time.monotonic()
        if now - self._last_shown > _EVERY_S:
            self._last_shown = now
            self._show()

    def finish(self) -> None:
        self._show(end="\n")

    def _show(self, end: str = "") -> None:
        if not self._is_read:
            return
        report = self._report()
        held = "" if report.target_held else f", {report.target_verdict}"
        line = (
            f"\rcaptured {report.steps} steps, {report.records} records, {report.raw_bytes / 1e6:.1f} MB "
            f"({report.achieved_gbps:.2f} GB/s), buffer {self._held_bytes() / 1e6:.1f} MB, "
            f"dropped {report.dropped_records}{held}   "
        )
        try:
            print(line, end=end, file=sys.stderr, flush=True)
        except (OSError, ValueError):
            self._is_read = False  # the capture goes on
