"""What a forked process lets go of.

A child has its parent's memory, and none of its threads: what they held locked stays locked, what they were to do is
never done. And it has the parent's open files: it must neither write to them, nor unlock them, nor keep them open, as
their locks would outlive the parent.
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class Forked(Protocol):
    """Something that a parent goes on with and a child has no part in."""

    def forked(self) -> None:
        """In the child, before anything else runs there: be over. Waits for nothing and raises nothing."""


_tracked: weakref.WeakSet[Forked] = weakref.WeakSet()


def track(one: Forked) -> None:
    """Tell ``one`` of forks for as long as it lives, in no particular order."""
    _tracked.add(one)


def _in_child() -> None:
    failure: Exception | None = None
    for one in list(_tracked):
        try:
            one.forked()
        except Exception as error:  # the others must hear of it all the same
            failure = failure or error
    if failure is not None:
        raise failure  # the interpreter reports it, and goes on


if hasattr(os, "register_at_fork"):  # POSIX
    os.register_at_fork(after_in_child=_in_child)
