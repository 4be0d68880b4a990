"""A model of cost: added seconds a step = bytes x a + sites x b + c, fitted to what was measured, and held against
runs that the fit did not see."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np


@dataclass(frozen=True)
class Point:
    """One measured workload with capture."""

    label: str
    bytes_per_step: float
    sites_per_step: float
    base_seconds: float
    """Of a step without capture."""
    added_seconds: float
    """Of a step by capture: CPU of all threads, which is the wall clock where no core is idle."""


@dataclass(frozen=True)
class CostModel:
    """Coefficients, none negative: more captured never costs less."""

    seconds_per_byte: float
    seconds_per_site: float
    seconds_per_step: float

    def added(self, point: Point) -> float:
        return (
            point.bytes_per_step * self.seconds_per_byte
            + point.sites_per_step * self.seconds_per_site
            + self.seconds_per_step
        )


def fit(points: Sequence[Point]) -> CostModel:
    """Least squares of the error relative to the step's own time, over coefficients that are not negative.

    With three coefficients every set of those that are not zero can be tried, so no solver is needed.

    Raises:
        ValueError: fewer than four points.
    """
    if len(points) < 4:
        raise ValueError(f"a fit of three coefficients needs at least 4 points, got {len(points)}")
    rows = np.array([[p.bytes_per_step, p.sites_per_step, 1.0] for p in points])
    added = np.array([p.added_seconds for p in points])
    weights = 1 / np.array([p.base_seconds for p in points])
    # Columns of like size keep the solution well conditioned.
    scale = rows.max(axis=0)
    best, least = np.zeros(3), float(np.sum((added * weights) ** 2))
    for size in (1, 2, 3):
        for chosen in itertools.combinations(range(3), size):
            columns = list(chosen)
            part, *_ = np.linalg.lstsq(
                rows[:, columns] / scale[columns] * weights[:, None], added * weights, rcond=None
            )
            if (part < 0).any():
                continue
            found = np.zeros(3)
            found[columns] = part / scale[columns]
            error = float(np.sum(((rows @ found - added) * weights) ** 2))
            if error < least:
                best, least = found, error
    return CostModel(*map(float, best))


def against(model: CostModel, points: Sequence[Point]) -> list[dict[str, float | str]]:
    """Each point with what the model says: ratios to the step without capture."""
    return [
        {
            **asdict(point),
            "predicted_added_seconds": model.added(point),
            "measured_ratio": 1 + point.added_seconds / point.base_seconds,
            "predicted_ratio": 1 + model.added(point) / point.base_seconds,
        }
        for point in points
    ]
