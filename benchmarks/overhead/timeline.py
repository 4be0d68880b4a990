"""When the model computes, values are handed over, pages are compressed and written: one short capture, watched."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from fx_instrument.capture.drain import Drain
from fx_instrument.capture.session import Session
from fx_instrument.stream.codec import PageEncoder
from fx_instrument.stream.segment_writer import SegmentWriter

from .measure import synchronize
from .variants import Variant
from .workloads import Bench

LANES = ("forward", "hand-over", "drain", "compress", "write")


def record(variant: Variant, bench: Bench, folder: Path) -> list[dict[str, Any]]:
    """Spans ``{"lane", "thread", "start_s", "end_s"}``, seconds from the beginning of the block."""
    spans: list[dict[str, Any]] = []
    run = bench.ready()
    started = time.perf_counter()

    def watched(owner: Any, name: str, lane: str) -> Any:
        inner = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                spans.append(
                    {
                        "lane": lane,
                        "thread": threading.current_thread().name,
                        "start_s": begin - started,
                        "end_s": time.perf_counter() - started,
                    }
                )

        return mock.patch.object(owner, name, call)

    @contextlib.contextmanager
    def all_watched() -> Iterator[None]:
        with (
            watched(Session, "deliver", "hand-over"),
            watched(Drain, "_write", "drain"),
            watched(PageEncoder, "encode", "compress"),
            watched(SegmentWriter, "write_block", "write"),
        ):
            yield

    class Forward:
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            result = variant.run(*args, **kwargs)
            synchronize()
            end = time.perf_counter()
            spans.append(
                {"lane": "forward", "thread": "model", "start_s": begin - started, "end_s": end - started}
            )
            return result

        def __getattr__(self, name: str) -> Any:
            return getattr(variant.run, name)

    with all_watched(), variant.block(folder):
        run(Forward())
    return sorted(spans, key=lambda span: span["start_s"])
