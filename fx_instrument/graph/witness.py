"""What one capture block saw: which sites delivered, and whether the model ran at all."""

from __future__ import annotations

from collections.abc import Iterable


class Witness:
    """Notes of one block, taken by graphs and hooks while it is open; read when it is left.

    Every graph that runs notes one frozen set, the same object each time, so that a note costs one look-up.
    """

    __slots__ = ("_delivered", "completed")

    def __init__(self) -> None:
        self._delivered: set[frozenset[str]] = set()
        self.completed = False
        """A forward call of the model came to its end inside the block."""

    def note(self, names: frozenset[str]) -> None:
        """These sites delivered, or were counted as dropped."""
        self._delivered.add(names)

    def silent(self, names: Iterable[str]) -> tuple[str, ...]:
        """Those of ``names`` that never delivered."""
        delivered = frozenset().union(*self._delivered)
        return tuple(name for name in names if name not in delivered)
