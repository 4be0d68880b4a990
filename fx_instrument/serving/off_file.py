"""An operator's switch that needs no way into the process, and that no client of a server can reach."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from .rotation import RotatingFiles

log = logging.getLogger(__name__)

OFF = "off"


class OffFile:
    """While a file named "off" lies in the private folder of files that rotate, nothing is recorded.

    Args:
        folder: the folder.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / OFF
        self.there = self._path.exists()
        """Whether recording is held off, as it was seen last."""

    def obey(self, files: RotatingFiles, go_on: Callable[[], object]) -> bool:
        """Look for the file and act on it, on the thread of the ``files``; ``go_on`` once it has been removed."""
        # A folder that vanished with the file in it is no word of the operator's.
        if self._path.exists() or (self.there and not self._path.parent.exists()):
            if files.lane is not None:
                files.stop()
                log.info("activation recording is off as long as there is %s", self._path)
            self.there = True
        elif self.there and not files.is_ending and not files.closed:
            # Not while a file is being ended: two files share the bound on memory.
            self.there = False
            go_on()
        return True
