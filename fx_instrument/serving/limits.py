"""How large, how old and how many the files of a recording may be."""

from __future__ import annotations

from dataclasses import dataclass

MIN_FREE_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class FileLimits:
    """When a file is ended, how many are kept, and how much of the disk is left to others.

    Raises:
        ValueError: a limit is 0 or less.
    """

    rotate_bytes: int | None = None
    """A file that is larger is ended and the next one begun; None sets no such limit."""
    rotate_s: float | None = None
    """So is one that has records and is older, in seconds."""
    max_files: int | None = None
    """So many files are kept, the oldest are deleted before a file is begun and after one was ended; None keeps all.
    Files that were there before count."""
    max_total_bytes: int | None = None
    """So many bytes of files are kept, likewise, beside the file that is written; one that has half of it is ended."""
    min_free_bytes: int = MIN_FREE_BYTES
    """Nothing is written while the folder's disk has less room than that."""

    def __post_init__(self) -> None:
        for name in ("rotate_bytes", "rotate_s", "max_files", "max_total_bytes"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be greater than 0 or None, got {value!r}")
        if not self.min_free_bytes >= 0:
            raise ValueError(f"min_free_bytes must be 0 or more, got {self.min_free_bytes!r}")

    def is_full(self, stored_bytes: int) -> bool:
        """Whether a file of so many bytes is to be ended."""
        if self.max_total_bytes is not None and 2 * stored_bytes >= self.max_total_bytes:
            return True
        return self.rotate_bytes is not None and stored_bytes >= self.rotate_bytes
