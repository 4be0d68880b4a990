"""To the host: on CPU a hand-over without a copy, from CUDA through a pinned ring, from elsewhere a plain copy."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from .engine import CopyEngine
from .layout import Kinds, device_of
from .pinned import Landing, PinnedTransfer


class Transfer:
    """Moves the values of graph runs to the host without holding up the thread that runs the model.

    On CPU the graph's output is memory of its own, so it is taken over as it is.

    Args:
        make_engine: the device's side, made when the first value on a device comes.
        claim: counts in the pinned memory once it is needed, and answers how many bytes it may have.
    """

    def __init__(self, make_engine: Callable[[], CopyEngine], claim: Callable[[], int]) -> None:
        self._make_engine = make_engine
        self._claim = claim
        self._pinned: PinnedTransfer | None = None
        self._lock = threading.Lock()
        self._open = True

    @property
    def stalled_ns(self) -> int:
        """How long graph runs on devices waited for earlier ones' values."""
        return self._pinned.stalled_ns if self._pinned is not None else 0

    @property
    def has_ring(self) -> bool:
        """Whether values came from a device."""
        return self._pinned is not None

    @property
    def is_waited_for(self) -> bool:
        """Whether a thread that runs the model waits for room."""
        return self._pinned is not None and self._pinned.num_waiting > 0

    def admit(self, num_bytes: int, *, wait: bool, timeout_s: float | None = None) -> bool:
        """Before a graph runs on a device: as ``PinnedTransfer.admit``."""
        return self._through_pinned().admit(num_bytes, wait=wait, timeout_s=timeout_s)

    def in_order(self, device: torch.device | None) -> AbstractContextManager[Any]:
        """Held around ``start`` and the hand-over of what it answers."""
        return nullcontext() if device is None else self._through_pinned().order

    def start(
        self, values: Sequence[torch.Tensor], kinds: Kinds | None = None, *, overwritten: bool = False
    ) -> Landing | list[torch.Tensor]:
        """Begin moving ``values``; called on the thread that ran the graph, right after it.

        Args:
            kinds: what is known of them.
            overwritten: as for ``PinnedTransfer.start``, of values on a device.

        Returns:
            The values themselves where they are on the host already.

        Raises:
            BufferTooSmallError: as ``PinnedTransfer.start``.
        """
        if (kinds.device if kinds is not None else device_of(values)) is not None:
            return self._through_pinned().start(values, kinds, overwritten=overwritten)
        return [value if value.is_cpu else value.cpu() for value in values]

    def shut(self) -> None:
        """Let nothing wait any more: what would make room has failed."""
        with self._lock:
            self._open = False
            if self._pinned is not None:
                self._pinned.shut()

    def close(self) -> None:
        """Give pinned memory back; after the last value."""
        self.shut()
        if self._pinned is not None:
            self._pinned.close()

    def _through_pinned(self) -> PinnedTransfer:
        if self._pinned is None:
            with self._lock:
                if self._pinned is None:
                    pinned = PinnedTransfer(self._claim(), self._make_engine())
                    if not self._open:
                        pinned.shut()
                    self._pinned = pinned
        return self._pinned
