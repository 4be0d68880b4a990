"""What a stream says: where it comes from, and how the values of each site are distributed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .activations import ActivationStream, Record, StreamSource, open_stream
from .stream.records import Damage, StreamPart
from .token_rows import TokenRows

NUM_TOP_CHANNELS = 10
# Values are widened to float64 this many at a time: 256 KiB, which stays in a core's cache, and below the size at
# which torch would wake its threads for the conversion (3x slower in wall time on two busy cores).
CHUNK_ELEMENTS = 1 << 15
# A sampled record may say that it is of a tensor as wide as it likes. Its channels are told apart up to the larger of
# this width and so many times its values.
MAX_SAMPLED_WIDTH = 1 << 20
MAX_WIDTH_A_VALUE = 64

Floats = npt.NDArray[np.float64]


def analyze_activations(
    path: StreamSource,
    *,
    recover: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """What stream files hold, and what the values of each of their sites look like, as plain JSON values.

    Every file is read once, front to back; memory grows with the number of sites and channels, not with the file.
    All sums are float64, merged with the formulas of Chan et al. and Pébay (Sandia report SAND2008-6212), so long
    files lose no digits.

    Args:
        path: a file that ``capture_activations`` wrote, or a folder or sequence of them, as ``open_stream`` takes.
        recover: as in ``open_stream``.
        progress: called with (records read, records in all) after each record.

    Returns:
        ``metadata``: file, parts (path, rank, first_step, steps, records of each file), codec, config, model,
        backend, versions, steps, records, raw_bytes, stored_bytes, ratio, duration_s (of the rank that took
        longest), achieved_gbps, dropped_records (by site), stalled_seconds, eager_records, damage. What only a
        finished capture knows is None in a recovered file; config, model and versions are those of the first file.

        ``sites``: by name, in the order of the file's table: role, records, tokens (rows along the last dimension),
        shape (of the module's output; None where it varies), dtype, mean, std (population), min, max,
        mean_token_norm and max_token_norm (L2), zero_fraction, nonfinite (count; left out of everything else),
        excess_kurtosis, top_channels (pairs of channel and mean absolute value, largest first; none where
        the width varies, or is over 2**20 and over 64 times the values of a sampled record). What is not defined (no
        finite value, a constant, norms of sampled tokens), or leaves float64's range on the way, is None.

        Tokens that the step's ``attention_mask`` marks as padding are left out of all of these but ``records``.

        ``causal_graph``, ``sae_features``: None; they are not computed yet.

    Raises:
        FileNotFoundError, StreamError: as ``open_stream``.
    """
    with open_stream(path, recover=recover) as stream:
        token_rows = TokenRows(stream)
        statistics = {site.name: SiteStatistics(site.role) for site in stream.sites}
        for done, record in enumerate(stream, 1):
            statistics[record.site].add(record, token_rows.kept(record))
            if progress is not None:
                progress(done, len(stream))
        return {
            "metadata": describe(stream),
            "sites": {name: found.to_dict() for name, found in statistics.items()},
            "causal_graph": None,
            "sae_features": None,
        }


def describe(stream: ActivationStream) -> dict[str, Any]:
    """The ``metadata`` of ``analyze_activations``, without reading a record."""
    metadata = stream.metadata
    summary = _joined_summary(stream.parts)
    duration = summary["duration_s"]
    return {
        "file": stream.path,
        "parts": [
            {
                "file": part.path,
                "rank": part.rank,
                "first_step": part.first_step,
                "steps": part.num_steps,
                "records": part.num_records,
            }
            for part in stream.parts
        ],
        "codec": stream.codec,
        "config": metadata.get("config"),
        "model": metadata.get("model"),
        "backend": metadata.get("backend"),
        "versions": metadata.get("versions"),
        "steps": stream.num_steps,
        "records": len(stream),
        "raw_bytes": stream.raw_bytes,
        "stored_bytes": stream.stored_bytes,
        "ratio": stream.raw_bytes / stream.stored_bytes if stream.stored_bytes else None,
        "duration_s": duration,
        "achieved_gbps": stream.raw_bytes / duration / 1e9 if duration else None,
        "dropped_records": summary["dropped_records"],
        "stalled_seconds": summary["stalled_seconds"],
        "eager_records": summary["eager_records"],
        "damage": describe_damage(stream.damage),
    }


def _joined_summary(parts: Sequence[StreamPart]) -> dict[str, Any]:
    """The figures of all captures together; None where none says one."""
    summaries = [(part.rank, summary) for part in parts for summary in part.summaries]

    def known(name: str, kind: type | tuple[type, ...]) -> list[tuple[int, Any]]:
        return [(rank, found[name]) for rank, found in summaries if isinstance(found.get(name), kind)]

    durations: dict[int, float] = {}
    for rank, seconds in known("duration_s", (int, float)):
        durations[rank] = durations.get(rank, 0.0) + seconds
    joined: dict[str, Any] = {"duration_s": max(durations.values(), default=None)}
    for name in ("stalled_seconds", "eager_records"):
        counts = [count for _, count in known(name, (int, float))]
        joined[name] = sum(counts) if counts else None
    drops = [dropped for _, dropped in known("dropped_records", dict)]
    joined["dropped_records"] = None if not drops else {}
    for site, count in (item for dropped in drops for item in dropped.items()):
        joined["dropped_records"][site] = joined["dropped_records"].get(site, 0) + count
    return joined


def describe_damage(damage: Sequence[Damage]) -> list[dict[str, Any]]:
    """Each gap as plain JSON values: file, offset, num_bytes, reason."""
    return [
        {
            "file": gap.file,
            "offset": int(gap.offset),
            "num_bytes": int(gap.num_bytes),
            "reason": gap.reason,
        }
        for gap in damage
    ]


@dataclass
class Moments:
    """Count, mean and the second to fourth central moment sums of the values seen so far."""

    count: int = 0
    mean: float = 0.0
    m2: float = 0.0
    m3: float = 0.0
    m4: float = 0.0

    @classmethod
    def of(cls, values: Floats) -> Moments:
        if values.size == 0:
            return cls()
        mean = float(values.mean())
        deviation = values - mean
        squared = deviation * deviation
        # einsum, for BLAS would wake its threads too.
        return cls(
            values.size,
            mean,
            float(np.einsum("i,i->", deviation, deviation)),
            float(np.einsum("i,i->", squared, deviation)),
            float(np.einsum("i,i->", squared, squared)),
        )

    def merge(self, other: Moments) -> None:
        """Take in ``other``'s values; m4 goes first, for it needs the old m3 and m2, and so on down (Pébay 2008)."""
        a, b = self.count, other.count
        n = a + b
        if b == 0:
            return
        # Python's float raises where a power overflows; NumPy's gives infinity.
        delta = np.float64(other.mean) - self.mean
        self.m4 += float(
            other.m4
            + delta**4 * a * b * (a * a - a * b + b * b) / n**3
            + 6 * delta**2 * (a * a * other.m2 + b * b * self.m2) / n**2
            + 4 * delta * (a * other.m3 - b * self.m3) / n
        )
        self.m3 += float(
            other.m3 + delta**3 * a * b * (a - b) / n**2 + 3 * delta * (a * other.m2 - b * self.m2) / n
        )
        self.m2 += float(other.m2 + delta**2 * a * b / n)
        self.mean += float(delta * b / n)
        self.count = n


@dataclass
class SiteStatistics:
    """Accumulates what ``analyze_activations`` tells of one site."""

    role: str
    records: int = 0
    tokens: int = 0
    nonfinite: int = 0
    zeros: int = 0
    moments: Moments = field(default_factory=Moments)
    low: float = math.inf
    high: float = -math.inf
    num_norms: int = 0
    mean_norm: float = 0.0
    max_norm: float = 0.0
    dtypes: dict[str, None] = field(default_factory=dict)
    shape: list[int | None] | None = None
    channel_sums: Floats | None = None
    channel_counts: npt.NDArray[np.int64] | None = None
    has_fixed_width: bool = True

    # Squares and sums of large float64 values leave its range: to_dict says None for what comes of them.
    @np.errstate(over="ignore", invalid="ignore")
    def add(self, record: Record, kept_rows: npt.NDArray[np.bool_] | None) -> None:
        """Take in one record.

        Args:
            record: whole or sampled.
            kept_rows: which rows of the module's output are tokens; None: all.
        """
        self.records += 1
        self.dtypes.setdefault(str(record.dtype).removeprefix("torch."))
        self._widen_shape(record.full_shape)
        width = record.full_shape[-1] if record.full_shape else 1
        num_rows = math.prod(record.full_shape[:-1]) if width else 0
        self.tokens += num_rows if kept_rows is None else int(kept_rows.sum())
        if width == 0 or num_rows == 0:
            return
        values = record.tensor()
        if record.is_sampled and width > max(MAX_SAMPLED_WIDTH, MAX_WIDTH_A_VALUE * values.numel()):
            self._forget_channels()
        else:
            self._fit_channels(width)
        if values.is_complex():
            values = values.abs()
        if record.is_sampled:
            self._add_sampled(record, values, kept_rows, width)
        else:
            self._add_rows(values.reshape(num_rows, width), kept_rows)

    def _add_rows(self, rows: torch.Tensor, kept_rows: npt.NDArray[np.bool_] | None) -> None:
        rows_a_chunk = max(1, CHUNK_ELEMENTS // rows.shape[1])
        for start in range(0, rows.shape[0], rows_a_chunk):
            chunk: Floats = rows[start : start + rows_a_chunk].to(torch.float64).numpy()
            if kept_rows is not None:
                chunk = chunk[kept_rows[start : start + rows_a_chunk]]
            if chunk.size == 0:
                continue
            finite = np.isfinite(chunk)
            whole = bool(finite.all())
            self._add_values(chunk.reshape(-1) if whole else chunk[finite], chunk.size)
            norms = np.sqrt(np.einsum("ij,ij->i", chunk, chunk))
            self._add_norms(norms if whole else norms[finite.all(axis=1)])
            if self.channel_sums is not None and self.channel_counts is not None:
                magnitude = np.abs(chunk)
                self.channel_sums += magnitude.sum(axis=0) if whole else magnitude.sum(axis=0, where=finite)
                self.channel_counts += len(chunk) if whole else finite.sum(axis=0)

    def _add_sampled(
        self, record: Record, values: torch.Tensor, kept_rows: npt.NDArray[np.bool_] | None, width: int
    ) -> None:
        positions = record.positions()
        assert positions is not None, "a sampled record knows its positions"
        for start in range(0, len(values), CHUNK_ELEMENTS):
            chunk: Floats = values[start : start + CHUNK_ELEMENTS].to(torch.float64).numpy()
            places = positions[start : start + CHUNK_ELEMENTS].numpy()
            if kept_rows is not None:
                kept = kept_rows[places // width]
                chunk, places = chunk[kept], places[kept]
            finite = np.isfinite(chunk)
            num_values = chunk.size
            chunk, channels = chunk[finite], places[finite] % width
            self._add_values(chunk, num_values)
            if self.channel_sums is not None and self.channel_counts is not None:
                self.channel_sums += np.bincount(channels, weights=np.abs(chunk), minlength=width)
                self.channel_counts += np.bincount(channels, minlength=width)

    def _add_values(self, finite: Floats, num_values: int) -> None:
        self.nonfinite += num_values - finite.size
        if finite.size == 0:
            return
        self.moments.merge(Moments.of(finite))
        self.low = min(self.low, float(finite.min()))
        self.high = max(self.high, float(finite.max()))
        self.zeros += finite.size - int(np.count_nonzero(finite))

    def _add_norms(self, norms: Floats) -> None:
        if norms.size == 0:
            return
        self.num_norms += norms.size
        self.mean_norm += float((norms - self.mean_norm).sum()) / self.num_norms
        self.max_norm = max(self.max_norm, float(norms.max()))

    def _widen_shape(self, shape: torch.Size) -> None:
        if self.shape is None:
            self.shape = list(shape)
            return
        # Aligned at the last dimension: (batch, tokens, hidden) and (tokens, hidden) share hidden.
        rank = max(len(self.shape), len(shape))
        old = [None] * (rank - len(self.shape)) + self.shape
        new = [None] * (rank - len(shape)) + list(shape)
        self.shape = [a if a == b else None for a, b in zip(old, new, strict=True)]

    def _fit_channels(self, width: int) -> None:
        if self.channel_sums is None and self.has_fixed_width:
            self.channel_sums = np.zeros(width)
            self.channel_counts = np.zeros(width, np.int64)
        elif self.channel_sums is not None and len(self.channel_sums) != width:
            # A last dimension that varies is no channel dimension.
            self._forget_channels()

    def _forget_channels(self) -> None:
        self.has_fixed_width = False
        self.channel_sums = self.channel_counts = None

    def top_channels(self) -> list[list[int | float | None]]:
        """The channels of the largest mean absolute value: [channel, value], largest first."""
        if self.channel_sums is None or self.channel_counts is None:
            return []
        means = np.divide(
            self.channel_sums,
            self.channel_counts,
            out=np.full(len(self.channel_sums), -1.0),
            where=self.channel_counts > 0,
        )
        order = np.argsort(-means, kind="stable")[:NUM_TOP_CHANNELS]
        return [[int(channel), _finite(float(means[channel]))] for channel in order if means[channel] >= 0]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; None where nothing defines a number."""
        moments = self.moments
        some = moments.count > 0
        # The mean of equal values is off by a rounding: their deviations are noise, not a spread.
        m2 = moments.m2 if self.high > self.low else 0.0
        # The square leaves float64's range for spreads below 1e-80.
        kurtosis = moments.m4 * moments.count / (m2 * m2) - 3 if m2 * m2 > 0 else None
        # The sum of values near the end of float64's range leaves it.
        mean = moments.mean if self.high > self.low else self.low
        return {
            "role": self.role,
            "records": self.records,
            "tokens": self.tokens,
            "shape": self.shape,
            "dtype": ", ".join(self.dtypes) or None,
            "mean": _finite(mean),
            "std": _finite(math.sqrt(m2 / moments.count)) if some else None,
            "min": self.low if some else None,
            "max": self.high if some else None,
            "mean_token_norm": _finite(self.mean_norm) if self.num_norms else None,
            "max_token_norm": _finite(self.max_norm) if self.num_norms else None,
            "zero_fraction": self.zeros / moments.count if some else None,
            "nonfinite": self.nonfinite,
            "excess_kurtosis": None if kurtosis is None else _finite(kurtosis),
            "top_channels": self.top_channels(),
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
