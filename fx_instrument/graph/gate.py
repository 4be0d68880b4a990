"""Switching between the two compiled variants while other threads run the model: calls in flight finish first."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator

_LET_IN_AFTER_S = 0.05


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

    A call that is inside may itself wait for a call of another thread, which the switch keeps out. So a switch that has
    to wait lets in those that wait for it, again and again as long as a call is inside that was there before them, and
    ever later after that, so that threads which call all the time hold it up for a while only.
    """

    def __init__(self) -> None:
        self.switching = False
        self.mine = threading.local()
        self._changed = threading.Condition()
        self._let_in = 0  # how often those that waited for a switch were let in before it
        self._before: set[Turn] = set()  # whose calls were inside before others were let in
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
        try:
            if self.switching:
                self.wait(turn)
        except BaseException:
            self.leave()  # Ctrl-C while it waits
            raise

    def leave(self) -> None:
        self.turn().depth -= 1
        if self.switching:
            self.left()

    def others_are_in(self) -> bool:
        """Whether another thread is inside the model."""
        return bool(self._others_in())

    def _others_in(self) -> set[Turn]:
        own = self.turn()
        return {turn for turn in tuple(self._turns) if turn.depth and turn is not own}

    def wait(self, turn: Turn) -> None:
        """Step back until the switch is made or lets calls in; one inside a call of this thread's goes on at once."""
        if turn.depth > 1:
            return
        with self._changed:
            turn.depth -= 1
            self._changed.notify_all()
            self._before.discard(turn)
            let_in = self._let_in
            try:
                self._changed.wait_for(lambda: not self.switching or self._let_in != let_in)
            finally:
                turn.depth += 1

    def left(self) -> None:
        """Tell the switch that waits that a call is over."""
        with self._changed:
            self._changed.notify_all()

    @contextlib.contextmanager
    def switch(self, *, timeout_s: float | None = None) -> Iterator[None]:
        """Keep new calls out and wait for those of other threads; this thread's own may be around the switch.

        Args:
            timeout_s: how long, with new calls kept out all the time; None waits until it is done, and lets some in.

        Raises:
            TimeoutError: calls were in flight for ``timeout_s`` seconds; nothing was switched.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: not self.switching, timeout_s):
                raise TimeoutError(f"another switch has been waiting for more than {timeout_s:g} s")
            self.switching = True
            try:
                self._wait_for_others(timeout_s)
                yield
            finally:
                self.switching = False
                self._changed.notify_all()

    def forked(self) -> None:
        """In a forked process: nobody else is inside, and nobody switches."""
        own = getattr(self.mine, "turn", None)
        self.switching = False
        self._changed = threading.Condition()
        self._turns = weakref.WeakSet([own] if own is not None else [])

    def _wait_for_others(self, timeout_s: float | None) -> None:
        wait_s = _LET_IN_AFTER_S if timeout_s is None else timeout_s
        self._before = self._others_in()
        while not self._changed.wait_for(lambda: not self.others_are_in(), wait_s):
            if timeout_s is not None:
                raise TimeoutError(f"forward calls of other threads were in flight for {timeout_s:g} s")
            self._let_in += 1
            self._changed.notify_all()
            if not any(turn.depth for turn in self._before):
                self._before = self._others_in()
                wait_s *= 4
