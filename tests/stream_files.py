"""Small stream files for the stream's tests."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fx_instrument.stream.reader import StreamReader
from fx_instrument.stream.records import RecordMeta, element_bytes
from fx_instrument.stream.writer import StreamWriter

CODECS = ("none", "lz4", "zstd")


@dataclass(frozen=True)
class Sample:
    """A record to write: where it belongs, and its bytes."""

    site: str
    step: int
    data: bytes
    dtype: str = "float32"
    shape: tuple[int, ...] | None = None
    call: int = 0
    role: str = "mlp"
    full_shape: tuple[int, ...] | None = None

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return (len(self.data) // element_bytes(self.dtype),) if self.shape is None else self.shape

    @property
    def key(self) -> tuple[str, int, int]:
        return (self.site, self.step, self.call)


@dataclass
class DoneCounts:
    """How often ``done`` was called, by record."""

    counts: dict[Any, int] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def of(self, key: Any) -> Any:
        with self.lock:
            self.counts[key] = 0

        def done() -> None:
            with self.lock:
                self.counts[key] += 1

        return done


def put_all(writer: StreamWriter, samples: Iterable[Sample], done: DoneCounts | None = None) -> None:
    for sample in samples:
        site = writer.add_site(sample.site, sample.role)
        meta = RecordMeta(
            site, sample.step, sample.call, sample.dtype, sample.stored_shape, sample.full_shape
        )
        data = np.frombuffer(sample.data, np.uint8)
        writer.put(meta, data, None if done is None else done.of(sample.key))


def write(
    path: Path,
    samples: Sequence[Sample],
    *,
    codec: str = "zstd",
    summary: Mapping[str, Any] | None = None,
    seal_every: int = 0,
    metadata: Mapping[str, Any] | None = None,
    **options: Any,
) -> Path:
    """A whole file of ``samples``; with ``seal_every``, a block for so many records."""
    writer = StreamWriter(path, metadata=metadata or {"model": "tiny"}, codec=codec, **options)
    for start in range(0, len(samples), seal_every or max(1, len(samples))):
        put_all(writer, samples[start : start + (seal_every or len(samples))])
        writer.seal()
    writer.close(summary or {})
    return path


def contents(reader: StreamReader) -> dict[tuple[str, int, int], bytes]:
    """Every record that random access finds."""
    found = {}
    for site in reader.sites:
        for ref in reader.refs(site.id):
            found[site.name, ref.step, ref.call] = reader.read(ref).tobytes()
    return found


def floats(count: int, seed: int = 0, dtype: str = "bfloat16") -> bytes:
    """Bytes of normally distributed values."""
    values = np.random.default_rng(seed).standard_normal(count).astype(np.float32)
    if dtype == "bfloat16":
        return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return values.astype(dtype).tobytes()


def small_samples(steps: int = 4) -> list[Sample]:
    """Three sites, one of them an input, a few hundred bytes a step."""
    samples = []
    for step in range(steps):
        ids = np.arange(step, step + 6, dtype=np.int64).tobytes()
        samples.append(Sample("input_ids", step, ids, "int64", (2, 3), role="input"))
        samples.append(Sample("attn", step, floats(24, step), "bfloat16", (2, 3, 4), role="attention"))
        samples.append(Sample("mlp", step, floats(6, step, "float32"), "float32", (2, 3)))
    return samples
