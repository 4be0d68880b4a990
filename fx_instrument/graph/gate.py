"""Switching between the two compiled variants while other threads run the model: calls in flight finish first."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class Gate:
    """Lets calls pass, except while a switch is made; a switch waits for the calls that are inside.

    Without it a call that is being traced would see the switch change under it (Dynamo's guards then contradict
    themselves), and a call that began under a capture would deliver into one that is closed.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._switching = False
        self._mine = threading.local()

    @contextlib.contextmanager
    def switch(self, *, timeout_s: float | None = None) -> Iterator[None]:
        """Keep new calls out and wait for those of other threads; this thread's own may be around the switch.

        Raises:
            TimeoutError: calls were in flight for ``timeout_s`` seconds; nothing was switched.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: not self._switching, timeout_s):
                raise TimeoutError(f"another switch has been waiting for more than {timeout_s:g} s")
            self._switching = True
            try:
                if not self._changed.wait_for(lambda: self._inside == self._depth(), timeout_s):
                    raise TimeoutError(f"forward calls of other threads were in flight for {timeout_s:g} s")
                yield
            finally:
                self._switching = False
                self._changed.notify_all()

    def enter(self) -> None:
        with self._changed:
            if self._switching and not self._depth():
                self._changed.wait_for(lambda: not self._switching)
            self._inside += 1
        self._mine.depth = self._depth() + 1

    def leave(self) -> None:
        self._mine.depth -= 1
        with self._changed:
            self._inside -= 1
            if self._switching:
                self._changed.notify_all()

    def _depth(self) -> int:
        depth: int = getattr(self._mine, "depth", 0)
        return depth
