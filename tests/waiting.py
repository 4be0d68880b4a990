"""What the tests of recordings share: the files in a folder, and waiting for what another thread does."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path


def recordings(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.stream"))


def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread does."""
    for _ in range(6000):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError("did not happen within a minute")
