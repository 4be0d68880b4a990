"""The ways to run a model that are compared, each on weights that all of them share."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from fx_instrument import (
    HookConfig,
    HookGranularity,
    InstrumentationConfig,
    InstrumentationFramework,
    open_stream,
)
from fx_instrument.capture.session import Session

from .hooks import MAX_MEMORY_BYTES, GoodHooks, TracedBuffers
from .models import call_through, compile_alone, duplicate, site_names

BASE = "compiled"
AGAIN = "compiled, once more"
"""The same again: how far two copies of one and the same code lie apart."""

Rows = Callable[[], int]
Block = contextlib.AbstractContextManager[Rows]


@dataclass
class Variant:
    """One way to run the model.

    ``run`` is what the workload calls. ``block(folder)`` is what is open while it runs and part of the timing; it
    yields a callable that counts, once the block is left, the token vectors that were kept (sampled: records).
    """

    name: str
    run: Any
    block: Callable[[Path], Block]
    expected: int = 0
    """Token vectors kept for each token vector that enters the model: the number of sites; 0 where nothing is kept."""
    note: str = ""
    counts_of: str = ""
    """The variant that runs the same compiled code before this one, and so has its compile counts."""
    kinds: Sequence[str] = field(default_factory=tuple)
    """Workload kinds that it can run; all if empty."""


@contextlib.contextmanager
def nothing(folder: Path) -> Iterator[Rows]:
    yield lambda: 0


@dataclass(frozen=True)
class Setup:
    """What a family of variants is built on."""

    model: Any
    sites: Sequence[str] = ()
    codec: str = "zstd"
    options: dict[str, Any] = field(default_factory=dict)
    """``torch.compile``'s, the same for every compiled variant."""
    tokenizer: Any = None

    def names(self) -> list[str]:
        return list(self.sites) or site_names(self.model)


def plain(setup: Setup) -> Variant:
    return Variant("eager", duplicate(setup.model), nothing)


def compiled(setup: Setup, name: str = BASE) -> Variant:
    model = duplicate(setup.model)
    call_through(model, compile_alone(model, **setup.options))
    return Variant(name, model, nothing)


def hooked(setup: Setup, *, compiled: bool) -> Variant:
    model = duplicate(setup.model)
    call: Callable[..., Any] = model._call_impl
    if compiled:
        call = compile_alone(model, **setup.options)
    hooks = GoodHooks(model, setup.names(), setup.codec, call)
    name = f"{'compiled' if compiled else 'eager'} + hooks, {_sink(setup, 'file')}"
    return Variant(name, model, _counting(hooks.block, row_bytes(model), _file("file")), len(setup.names()))


def traced_hooks(setup: Setup) -> list[Variant]:
    model = duplicate(setup.model)
    hooks = TracedBuffers(model, setup.names(), setup.codec, compile_alone(model, **setup.options))
    sites, first = len(setup.names()), "compiled + traced hooks, null sink"
    found = []
    for sink in ("null", "file"):
        block = _counting(hooks.block, row_bytes(model), _file(sink))
        name = f"compiled + traced hooks, {_sink(setup, sink)}"
        found.append(Variant(name, model, block, sites, counts_of="" if name == first else first))
    return found


def captured(setup: Setup, **config: Any) -> tuple[Any, InstrumentationFramework, InstrumentationConfig]:
    hook_config = HookConfig(target_layers=tuple(setup.sites)) if setup.sites else HookConfig()
    chosen = InstrumentationConfig(
        **{
            "max_memory_gb": MAX_MEMORY_BYTES / 1e9,
            "compression_algorithm": setup.codec,
            "hook_config": hook_config,
            **config,
        }
    )
    model = duplicate(setup.model)
    framework = InstrumentationFramework(chosen)
    framework.instrument_model(model, **setup.options)
    return model, framework, chosen


def ours(setup: Setup, *, codecs: Sequence[str] = (), name: str = "FX", **config: Any) -> list[Variant]:
    """Instrumented and idle, into the null sink, into a file with each codec: one model, one compile."""
    model, framework, chosen = captured(setup, **config)
    sites = len(framework.sites)
    found = [
        Variant(f"{name}, not capturing", model, nothing),
        Variant(f"{name}, null sink", model, _capturing(framework, chosen, None), sites),
    ]
    for codec in codecs or (setup.codec,):
        with_codec = dataclasses.replace(chosen, compression_algorithm=codec)
        block = _capturing(framework, with_codec, "fx.stream")
        found.append(Variant(f"{name}, {codec} file", model, block, sites, counts_of=f"{name}, null sink"))
    return found


def left_out(setup: Setup) -> list[Variant]:
    """Captures of which parts are left out: values thrown away once the graph has returned them; nothing compressed."""
    model, framework, chosen = captured(setup)
    plain = dataclasses.replace(chosen, compression_algorithm="none")
    into_nothing = _capturing(framework, plain, None)

    @contextlib.contextmanager
    def thrown_away(folder: Path) -> Iterator[Rows]:
        def cancel(session: Session, ticket: Any, delivery: Any) -> None:
            session.cancel(ticket)

        with mock.patch.object(Session, "_hand_over", cancel), into_nothing(folder):
            yield lambda: 0

    name, sites = "FX, null sink, uncompressed", len(framework.sites)
    return [
        Variant(name, model, into_nothing, sites),
        Variant("FX, values thrown away", model, thrown_away, counts_of=name),
    ]


def sampled(setup: Setup, rate: float) -> Variant:
    model, framework, chosen = captured(
        setup, granularity=HookGranularity.SAMPLED_SLICES, hook_config=HookConfig(sampling_rate=rate)
    )
    block = _capturing(framework, chosen, "sampled.stream")
    return Variant(f"FX, {rate:.1%} sampled, {setup.codec} file", model, block, len(framework.sites))


def _capturing(
    framework: InstrumentationFramework, config: InstrumentationConfig, file: str | None
) -> Callable[[Path], Block]:
    def open_capture(path: Path | None) -> Any:
        framework.config = config
        return framework.capture_activations(path)

    return _counting(open_capture, row_bytes(framework._attached("the benchmark").model), file)


def _counting(
    open_block: Callable[[Path | None], Any], row_bytes: int, file: str | None
) -> Callable[[Path], Block]:
    """A block whose rows are counted in its file; in the null sink, by the bytes that the writer stored."""

    @contextlib.contextmanager
    def block(folder: Path) -> Iterator[Rows]:
        path = None if file is None else folder / file
        with open_block(path) as held:
            # A StreamWriter counts itself; a Session and a Capture have a report. Both are final after the block.
            yield lambda: rows_in(path) if path else getattr(held, "report", held).raw_bytes // row_bytes

    return block


def row_bytes(model: Any) -> int:
    return int(model.config.hidden_size * next(model.parameters()).element_size())


def rows_in(path: Path) -> int:
    """Token vectors in a stream file: each record's whole value, whether all of it was kept or a sample."""
    total = 0
    with open_stream(path) as stream:
        for site in stream.sites:
            if site.role == "input":
                continue
            for record in stream[site.name]:
                shape = record.full_shape or record.shape
                rows = 1
                for size in shape[:-1]:
                    rows *= size
                total += rows
    return total


def _file(sink: str) -> str | None:
    return "hooks.stream" if sink == "file" else None


def _sink(setup: Setup, sink: str) -> str:
    return f"{setup.codec} file" if sink == "file" else "null sink"
