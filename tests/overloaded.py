"""A process that captures ten times faster than its file takes; run by test_overload.py.

    python tests/overloaded.py FILE CODEC ON_FULL BOUND_BYTES NUM_STEPS ELEMENTS NUM_SITES

The writer stores a block once ten times the values that it has stored were offered, or once the model itself waits
for room. So the buffer is as full as it can be for as long as it can be, however fast the machine is. Prints JSON.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import Any

import torch
from loud import instrumented, step_input
from memory import resident

from fx_instrument.capture.budget import HostBudget
from fx_instrument.capture.drain import RECORD_OVERHEAD_BYTES
from fx_instrument.stream.blocks import BlockHeader
from fx_instrument.stream.segment_writer import SegmentWriter

OVERLOAD = 10


class Brake:
    """Lets the writer store a tenth of the values that the model offers, however well they compress."""

    def __init__(self, record_bytes: int, stalls: bool) -> None:
        self._stalls = stalls
        # What is offered is counted with the bookkeeping of its records, what is stored is not.
        self._ratio = OVERLOAD * (record_bytes + RECORD_OVERHEAD_BYTES) / record_bytes
        self.offered = self.stored = self.blocked = 0
        self.released = False
        self._changed = threading.Condition()
        self._acquire, self._write_block = HostBudget.acquire, SegmentWriter.write_block

    def put_on(self) -> None:
        brake = self

        def acquire(budget: HostBudget, num_bytes: int, *, wait: bool, **more: Any) -> bool:
            with brake._changed:
                brake.offered += 0 if wait else num_bytes
                # Under "drop" only the values of a run that is dropped ask to wait, and don't have to.
                brake.blocked += wait and brake._stalls
                brake._changed.notify_all()
            try:
                return brake._acquire(budget, num_bytes, wait=wait, **more)
            finally:
                with brake._changed:
                    brake.blocked -= wait and brake._stalls

        def write_block(writer: SegmentWriter, header: BlockHeader, *block: Any, **more: Any) -> int:
            with brake._changed:
                brake._changed.wait_for(lambda: brake.may_store(header.raw_bytes))
                brake.stored += header.raw_bytes
            return brake._write_block(writer, header, *block, **more)

        HostBudget.acquire = acquire  # type: ignore[method-assign]
        SegmentWriter.write_block = write_block  # type: ignore[method-assign]

    def may_store(self, num_bytes: int) -> bool:
        return self.released or self.blocked > 0 or self.offered >= self._ratio * (self.stored + num_bytes)

    def let_go(self) -> None:
        with self._changed:
            self.released = True
            self._changed.notify_all()


def main() -> None:
    path, codec, on_full = sys.argv[1:4]
    bound, num_steps, elements, num_sites = map(int, sys.argv[4:8])
    torch.set_num_threads(1)
    model, framework = instrumented(num_sites, compression_algorithm=codec, max_memory_gb=bound / 1e9)
    shape = (1, elements)
    # Libraries, the traced graphs and the pool are there before the measurement begins; no buffer is.
    with framework.capture_activations(path):
        model(step_input(0, shape))
    model(step_input(0, shape))
    brake = Brake(elements * 4, on_full == "stall")
    brake.put_on()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    with framework.capture_activations(path, on_full=on_full) as capture:  # type: ignore[arg-type]
        try:
            for step in range(num_steps):
                model(step_input(step, shape))
        finally:
            brake.let_go()
    print(
        json.dumps(
            {
                "growth": resident("VmHWM") - before,
                "before": before,
                **capture.report.to_dict(),
            }
        )
    )


if __name__ == "__main__":
    main()
