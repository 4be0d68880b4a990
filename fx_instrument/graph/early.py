"""The op that hands a graph's values on as soon as the last of them is there, while the rest of the graph runs.

    before   %clone_1 = clone(...)                after   %clone_1 = clone(...)
             ...                                          ...
             %clone_n = clone(...)                        %clone_n = clone(...)
             %logits  = linear(%h, %head)                 %there   = hand_over([%clone_1, ..., %clone_n])
             return (%logits, %clone_1, ...)              %logits  = linear(%h, %head)
                                                          return (%logits, %clone_1, ..., %there[0])

What follows the last layer is mostly one large product: values are compressed beside it, and not only after the call.
They stay outputs of the graph, so nothing is written over them while they are read.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence

import torch

FROM_BYTES = 4 << 20
"""Below that there is little to compress, and the op is not free: decode steps were slower with it."""


class Taker:
    """Takes the values of one run of a graph on this thread from the op, once, while it is entered."""

    def __init__(self, take: Callable[[Sequence[torch.Tensor]], None]) -> None:
        self.took = False
        """Whether the op came; what it handed over is then no longer the graph's to deliver."""
        self._take = take

    def __enter__(self) -> Taker:
        self._outer, _thread.taker = _thread.taker, self
        return self

    def __exit__(self, *error: object) -> None:
        _thread.taker = self._outer

    def __call__(self, values: Sequence[torch.Tensor]) -> None:
        if not self.took:
            self.took = True
            self._take(values)


class _Thread(threading.local):
    taker: Taker | None = None


_thread = _Thread()


# Two results: Inductor moves what has one user to just before that user, which would be the graph's output.
@torch.library.custom_op(
    "fx_instrument::hand_over", mutates_args=(), schema="(Tensor[] values) -> (Tensor, Tensor)"
)
def _hand_over(values: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    if _thread.taker is not None:
        _thread.taker(values)
    return _nothing()


def _nothing() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(0, device="cpu"), torch.empty(0, device="cpu")


_hand_over.register_fake(lambda values: _nothing())
hand_over = torch.ops.fx_instrument.hand_over.default


def is_worthwhile(values: Iterable[torch.Tensor]) -> bool:
    """Whether fake ``values`` of a graph are all on the host, and of a size at which handing them over early pays.

    A symbolic size counts as it was when the graph was traced; that adds no guard.
    """
    num_bytes = 0
    for value in values:
        numel: int | torch.SymInt = value.numel()
        if value.device.type != "cpu":
            return False
        if isinstance(numel, torch.SymInt):
            if not numel.node.has_hint():
                return False
            numel = int(numel.node.hint)
        num_bytes += numel * value.element_size()
    return num_bytes >= FROM_BYTES
