"""What a recorder has done, over all its files."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from ..capture.report import CaptureReport


@dataclass(frozen=True)
class RecorderTotals:
    """Counts that only grow, summed over the files of a recorder."""

    steps: int = 0
    """Forward calls that were recorded."""
    records: int = 0
    raw_bytes: int = 0
    """Size of the values uncompressed."""
    stored_bytes: int = 0
    """Bytes written, those of files that were deleted since included."""
    dropped_records: int = 0
    dropped_inputs: int = 0
    stalled_seconds: float = 0.0
    """How long forward calls waited for the buffer, over all threads."""
    eager_records: int = 0

    def plus(self, reports: Iterable[CaptureReport]) -> RecorderTotals:
        """These counts and those of ``reports``."""
        sums = asdict(self)
        for report in reports:
            for name in sums:
                sums[name] += getattr(report, name)
        return RecorderTotals(**sums)


@dataclass(frozen=True)
class RecorderReport(RecorderTotals):
    """What a recorder has done since it was made; its counts go on over files, stops and starts."""

    active: bool = False
    """Whether forward calls are recorded now."""
    files: int = 0
    """Files that were begun."""
    failures: int = 0
    """How often something switched the recorder off: a full or vanished disk, or a failure of the capture."""
    last_failure: str | None = None
    path: str | None = None
    """The file that is written now."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
