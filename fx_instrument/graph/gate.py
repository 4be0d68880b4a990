"""Switching between the two compiled variants while other threads run the model: calls in flight finish first."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator


class Turn:
    """How deep one thread is inside the model; only that thread writes it."""

    __slots__ = ("__weakref__", "depth")

    def __init__(self) -> None:
        self.depth = 0


class Gate:
    """Lets calls pass, except while a switch is made; a switch waits for the calls that are inside.

    Without it a call that is being traced would see the switch change under it (Dynamo's guards then contradict
    themselves), and a call that began under a capture would deliver into one that is closed.

    Calls take no lock, as a million of them pass for one switch: a call first notes its turn and then reads
    ``switching``, a switch first sets ``switching`` and then reads every turn, so that under the interpreter's lock one
    of the two sees the other. ``CountedCall`` spells ``enter`` and ``leave`` out: calling them costs more than they do.
    """

    def __init__(self) -> None:
        self.switching = False
        self.mine = threading.local()
        self._changed = threading.Condition()
        # A thread's turn lives as long as the thread, which holds it in its local storage.
        self._turns: weakref.WeakSet[Turn] = weakref.WeakSet()

    def turn(self) -> Turn:
        """This thread's turn."""
        try:
            turn: Turn = self.mine.turn
        except AttributeError:
            turn = self.mine.turn = Turn()
            with self._changed:
                self._turns.add(turn)
        return turn

    def enter(self) -> None:
        turn = self.turn()
        turn.depth += 1
        if self.switching:
            self.wait(turn)

    def leave(self) -> None:
        self.turn().depth -= 1
        if self.switching:
            self.left()

    def others_are_in(self) -> bool:
        """Whether another thread is inside the model."""
        own = self.turn()
        return any(turn.depth for turn in tuple(self._turns) if turn is not own)

    def wait(self, turn: Turn) -> None:
        """Step back until the switch is made; a call inside a call of this thread's goes on, or neither would end."""
        if turn.depth > 1:
            return
        with self._changed:
            turn.depth -= 1
            self._changed.notify_all()
            try:
                self._changed.wait_for(lambda: not self.switching)
            finally:
                turn.depth += 1

    def left(self) -> None:
        """Tell the switch that waits that a call is over."""
        with self._changed:
            self._changed.notify_all()

    @contextlib.contextmanager
    def switch(self, *, timeout_s: float | None = None) -> Iterator[None]:
        """Keep new calls out and wait for those of other threads; this thread's own may be around the switch.

        Raises:
            TimeoutError: calls were in flight for ``timeout_s`` seconds; nothing was switched.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: not self.switching, timeout_s):
                raise TimeoutError(f"another switch has been waiting for more than {timeout_s:g} s")
            self.switching = True
            try:
                if not self._changed.wait_for(lambda: not self.others_are_in(), timeout_s):
                    raise TimeoutError(f"forward calls of other threads were in flight for {timeout_s:g} s")
                yield
            finally:
                self.switching = False
                self._changed.notify_all()
