"""One table of a section: variants checked and measured on a workload."""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from . import measure, peers
from .counts import CompileCounts
from .variants import BASE, Variant
from .workloads import Bench, Workload

log = logging.getLogger(__name__)


COUNTS = tuple(f.name for f in fields(CompileCounts))
CHECKED = (*COUNTS, *(f.name for f in fields(measure.Checked) if f.name != "counts"), "note")


def ignore(*told: Any) -> None:
    """Nobody is told."""


@dataclass
class Options:
    """What the command line chose."""

    dtype: torch.dtype
    device: str
    rounds: int
    quick: bool
    full: bool = False
    """Every workload and section, however long it takes."""
    compile_options: dict[str, Any] = field(default_factory=dict)
    kinds: Sequence[str] = ()
    """Kinds of workload that the models run; chosen by ``full`` and ``quick`` if empty."""
    variants: Sequence[str] = ()
    """Only variants whose names hold one of these, beside the base; all if empty."""
    steps: int | None = None
    """Of a block of ``real``, ``toy`` and ``parts``; some that take a second or two if None."""
    ends: float | None = None
    """``time.monotonic`` from when on nothing new is begun."""
    say: Callable[[str], None] = ignore
    """Called with what is being done."""
    keep: Callable[[str, dict[str, Any]], None] = ignore
    """Called with a section that has more than before, so that a run that is cut off keeps it."""

    def to_json(self) -> str:
        """All but who is told, and when it ends."""
        told = ("say", "keep", "ends")
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in told}
        return json.dumps({**values, "dtype": str(self.dtype).removeprefix("torch.")})

    @property
    def is_over(self) -> bool:
        return self.ends is not None and time.monotonic() > self.ends

    @classmethod
    def from_json(cls, text: str) -> Options:
        values = {name: tuple(v) if isinstance(v, list) else v for name, v in json.loads(text).items()}
        return cls(**{**values, "dtype": getattr(torch, values["dtype"])})


def table(
    chosen: Sequence[Variant],
    workload: Workload,
    model: Any,
    options: Options,
    *,
    rounds: int | None = None,
    checked: dict[str, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Check every variant on a workload, measure all of them in interleaved rounds: a row each.

    Args:
        checked: rows of the same variants on the same workload: they are compiled, and what was found then is said
            again.
    """
    bench = Bench(workload, model)
    rows: dict[str, dict[str, Any]] = {}
    alive, reference = [], None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for variant in chosen:
            if variant.kinds and workload.kind not in variant.kinds:
                continue
            if checked is not None:
                rows[variant.name] = {key: checked[variant.name].get(key) for key in CHECKED}
                if "error" not in checked[variant.name]:
                    alive.append(variant)
                continue
            options.say(f"{workload.name}: compile and check {variant.name}")
            try:
                found, output = measure.check(variant, bench, folder, reference)
            except Exception as error:
                if variant.name == BASE:
                    raise
                log.warning("%s on %s: %r", variant.name, workload.name, error)
                rows[variant.name] = {"error": f"failed: {peers.first_line(error)}"}
                continue
            reference = output if reference is None else reference
            rows[variant.name] = {**measure.described(found), "note": variant.note}
            if variant.counts_of in rows:
                rows[variant.name].update({count: rows[variant.counts_of][count] for count in COUNTS})
            alive.append(variant)
        number = rounds or options.rounds
        done = iter(range(1, number * len(alive) + 1))
        say = options.say
        samples = measure.rounds(
            alive,
            bench,
            folder,
            number,
            lambda: say(f"{workload.name}: run {next(done)} of {number * len(alive)}"),
            lambda: options.is_over,
        )
    for variant in alive:
        row = rows[variant.name]
        row.update(measure.figures(samples, variant.name, bench))
        row["recompiles"] += sum(sample.graphs for sample in samples[variant.name])
    return {"workload": asdict(workload), "rounds": len(samples[BASE]), "variants": rows}
