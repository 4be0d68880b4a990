"""One model through everything that coverage means: eager hooks, traced without us, instrumented, compared bit by bit.

What is compared with what:

- *eager*: values that forward hooks see in the eager model.
- *traced*: the model compiled with aot_eager, no hooks: whether Dynamo traces it at all, its graphs, its outputs.
- *traced hooks*: the same with hooks that Dynamo traces. Only where *traced* differs from *eager* already: its values
  then say what a captured value must be, bit for bit.
- *captured*: the model instrumented with aot_eager, and its file read back.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from hooks import eager_values, first_tensor, same_bits
from torch import nn
from torch._dynamo import lookup_backend

from fx_instrument import HookConfig, InstrumentationConfig, InstrumentationFramework, open_stream
from fx_instrument.graph.roles import Role, find_roles

Run = Callable[[nn.Module], Any]
Values = dict[tuple[str, int, int], torch.Tensor]


@dataclass(frozen=True)
class Subject:
    """A model and the ways to run it."""

    name: str
    family: str
    make: Callable[[], nn.Module]
    """Equal weights at every call, in evaluation mode."""
    runs: Mapping[str, Run]
    """Name of a way to run it -> function of the model; what it returns is compared too."""
    fallbacks: Mapping[str, tuple[str, Run]] = field(default_factory=dict)
    """For a way that does not run eagerly: another, under its own name."""
    globs: tuple[str, ...] | None = None
    """Sites by name; None: by role, and every layer must have its own."""


@dataclass
class RunResult:
    verdict: str = ""
    """equal | traced differs | unfused | not eager | not traced | failed"""
    reason: str = ""
    graphs: int = 0
    captured_graphs: int = 0
    breaks: int = 0
    records: int = 0
    eager_records: int = 0
    largest_difference: float = 0.0
    """Of an eager and a traced value, relative to the largest eager one; 0 where traced equals eager."""


@dataclass
class Result:
    """What ``check`` found; plain values."""

    name: str
    family: str
    model: str = ""
    verdict: str = ""
    """equal | traced differs | unfused | not eager | not traced | no sites | incomplete | failed"""
    reason: str = ""
    parameters: int = 0
    layers: int = 0
    sites: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)
    """Role -> name of its first site."""
    one_role_layers: dict[str, str] = field(default_factory=dict)
    """Layer -> its only role, where it has but one."""
    runs: dict[str, RunResult] = field(default_factory=dict)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def check(subject: Subject) -> Result:
    """Run ``subject`` every way, and say whether every value is there and right."""
    result = Result(subject.name, subject.family)
    started = time.perf_counter()
    try:
        with quiet():
            _check(subject, result)
    except Exception as error:
        result.verdict, result.reason = "failed", _reason(error)
    result.seconds = round(time.perf_counter() - started, 1)
    return result


def _check(subject: Subject, result: Result) -> None:
    try:
        model = subject.make()
    except Exception as error:
        result.verdict, result.reason = "not eager", f"does not build: {_reason(error)}"
        return
    result.model = type(model).__name__
    result.parameters = sum(parameter.numel() for parameter in model.parameters())
    config = InstrumentationConfig(
        compression_algorithm="none", hook_config=HookConfig(target_layers=subject.globs)
    )
    roles = find_roles(model)
    if not roles and subject.family == "vision" and _is_convolutional(model):
        result.verdict, result.reason = "no sites", "convolutions, neither attention nor MLPs"
        return
    for name, role in roles.items():
        result.sites[role] = result.sites.get(role, 0) + 1
        result.examples.setdefault(role, name)
    ran: set[str] = set()
    for name, run in subject.runs.items():
        result.runs[name] = _check_run(subject, config, run, ran)
        if result.runs[name].verdict == "not eager" and name in subject.fallbacks:
            other, run = subject.fallbacks[name]
            result.runs[other] = _check_run(subject, config, run, ran)
    if subject.globs is None:
        missing = _missing(model, roles, ran, result)
        if missing and ran:
            result.verdict, result.reason = "incomplete", missing
            return
    _conclude(result)


def _is_convolutional(model: nn.Module) -> bool:
    """Whether it convolves over images; said of models in which no attention and no MLP was found."""
    return any(parameter.dim() == 4 for parameter in model.parameters())


def _conclude(result: Result) -> None:
    order = ["failed", "unfused", "traced differs", "equal", "not traced", "not eager"]
    verdicts = [run.verdict for run in result.runs.values()]
    result.verdict = min(verdicts, key=order.index)
    result.reason = "; ".join(
        f"{name}: {run.reason or run.verdict}"
        for name, run in result.runs.items()
        if run.verdict != "equal" or run.reason
    )


def _check_run(subject: Subject, config: InstrumentationConfig, run: Run, ran: set[str]) -> RunResult:
    result = RunResult()
    model = subject.make()
    names = [site.name for site in _sites_of(model, config)]
    try:
        torch.manual_seed(1)
        with _record_calls(model, ran), torch.no_grad():
            expected = eager_values(model, names, run)
        torch.manual_seed(1)
        output = first_tensor(run(subject.make()))
    except Exception as error:
        result.verdict, result.reason = "not eager", _reason(error)
        return result
    graphs = Graphs()
    model = subject.make()
    model.compile(backend=graphs)
    try:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        torch.manual_seed(1)
        traced = first_tensor(run(model))
    except Exception as error:
        result.verdict, result.reason = "not traced", _reason(error)
        return result
    result.graphs = graphs.count
    result.breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
    try:
        captured, captured_output, report, result.captured_graphs = _capture(subject, config, run)
    except Exception as error:
        result.verdict, result.reason = "failed", _reason(error)
        return result
    result.records, result.eager_records = report.records, report.eager_records
    _compare(
        subject,
        run,
        names,
        result,
        Observed(expected, output),
        Observed({}, traced),
        Observed(captured, captured_output),
    )
    return result


def _compare(
    subject: Subject,
    run: Run,
    names: list[str],
    result: RunResult,
    eager: Observed,
    traced: Observed,
    captured: Observed,
) -> None:
    """The verdict of one way to run: ``captured`` must equal ``eager``, or what tracing alone makes of it."""
    result.verdict, result.reason = "equal", ""
    reference = Observed(eager.values, traced.output)
    if (
        not same_bits(eager.output, traced.output)
        or _first_difference(eager.values, captured.values)
        or not same_bits(traced.output, captured.output)
    ):
        # Either tracing, or hooks alone, change numbers, or we do: traced hooks that are not ours tell.
        hooked = _traced_hooks(subject, names, run)
        result.largest_difference = _largest_difference(eager.values, hooked.values)
        if not same_bits(hooked.output, traced.output):
            result.verdict = "unfused"
            result.reason = "any forward hook switches a fused kernel off; equal to a model with other hooks"
        elif result.largest_difference or not same_bits(eager.output, traced.output):
            result.verdict = "traced differs"
            result.reason = f"traced without us differs from eager by up to {result.largest_difference:.1e}"
        reference = hooked
    difference = _first_difference(reference.values, captured.values)
    if difference:
        result.verdict, result.reason = "failed", difference
    elif not same_bits(reference.output, captured.output):
        result.verdict, result.reason = "failed", "the model's output changes when captured"
    elif result.captured_graphs != result.graphs and result.verdict != "unfused":
        result.verdict = "failed"
        result.reason = f"{result.graphs} graphs uncaptured, {result.captured_graphs} captured"


def _sites_of(model: nn.Module, config: InstrumentationConfig) -> Any:
    from fx_instrument.graph.sites import choose_sites

    return choose_sites(model, config)


def _capture(
    subject: Subject, config: InstrumentationConfig, run: Run
) -> tuple[Values, torch.Tensor, Any, int]:
    torch._dynamo.reset()
    model, graphs = subject.make(), Graphs()
    framework = InstrumentationFramework(config)
    framework.instrument_model(model, backend=graphs)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "output.stream"
        torch.manual_seed(1)
        with framework.capture_activations(path) as capture:
            output = first_tensor(run(model))
        values: Values = {}
        with open_stream(path) as stream:
            for site in stream.sites:
                for record in stream[site.name]:
                    values[site.name, record.step, record.call] = record.tensor()
    framework.restore(model)
    return values, output, capture.report, graphs.count


def _traced_hooks(subject: Subject, names: list[str], run: Run) -> Observed:
    """What hooks see that Dynamo traces with the model: they append to a list, no part of this package."""
    torch._dynamo.reset()
    model = subject.make()
    values: Values = {}
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    step = -1

    def hook_of(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            seen[name].append(first_tensor(output).detach().clone())

        return hook

    for name in names:
        model.get_submodule(name).register_forward_hook(hook_of(name))
    model.compile(backend="aot_eager")
    call_model = model._compiled_call_impl
    assert call_model is not None

    def collect() -> None:
        for name, tensors in seen.items():
            values.update({(name, step, call): tensor for call, tensor in enumerate(tensors)})
            tensors.clear()

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal step
        step += 1
        output = call_model(*args, **kwargs)
        collect()
        return output

    model._compiled_call_impl = counted
    torch.manual_seed(1)
    with torch._dynamo.config.patch(recompile_limit=64):  # type: ignore[no-untyped-call]
        output = first_tensor(run(model))
    step += 1
    collect()
    return Observed(values, output)


@dataclass(frozen=True)
class Observed:
    """Values of sites and the model's output, of one way to run it."""

    values: Values
    output: torch.Tensor


class Graphs:
    """aot_eager that counts the graphs it is given."""

    def __init__(self) -> None:
        self.count = 0
        self._compile = lookup_backend("aot_eager")
        self.__name__ = "aot_eager"

    def __call__(self, gm: Any, example_inputs: Any, **kwargs: Any) -> Any:
        self.count += 1
        return self._compile(gm, example_inputs, **kwargs)


@contextlib.contextmanager
def _record_calls(model: nn.Module, ran: set[str]) -> Iterator[None]:
    """Names of the modules that run, added to ``ran``."""
    handles = [
        module.register_forward_pre_hook(lambda module, args, name=name: ran.add(name))
        for name, module in model.named_modules()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _missing(model: nn.Module, roles: Mapping[str, Role], ran: set[str], result: Result) -> str:
    """What the layers that ran lack: an attention or MLP while weights of theirs belong to none of their sites.

    A layer is an item of a list that is in no other layer and no site. It may have one role only (Mamba's have no
    MLP) if all its matrices are the site's own, or stand before a site that is itself a bare projection.
    """
    problems = []
    for name, layer in _layers(model, roles):
        if name not in ran:
            continue
        result.layers += 1
        if name in roles:
            continue
        inside = {site: role for site, role in roles.items() if site.startswith(f"{name}.")}
        kinds = set(inside.values())
        if kinds == {"attention", "mlp"}:
            continue
        unexplained = [
            weight
            for weight, parameter in layer.named_parameters()
            if parameter.dim() >= 2
            and not any(f"{name}.{weight}".startswith(f"{site}.") for site in inside)
            and not any(word in weight.lower() for word in ("norm", "embed", "bias"))
        ]
        if not kinds and unexplained:
            problems.append(f"{name} has no site ({', '.join(unexplained[:3])})")
        elif len(unexplained) == 1 and all(
            f"{site}.weight" in dict(model.named_parameters()) for site in inside
        ):
            result.one_role_layers[name] = next(iter(kinds))
        elif unexplained:
            problems.append(
                f"{name} has {' '.join(kinds)} only; {', '.join(unexplained[:4])} belong to no site"
            )
        elif kinds:
            result.one_role_layers[name] = next(iter(kinds))
    return "; ".join(problems[:3])


def _layers(model: nn.Module, roles: Mapping[str, Role]) -> Iterator[tuple[str, nn.Module]]:
    outer: list[str] = []
    for name, module in model.named_modules():
        parent = name.rpartition(".")[0]
        if not name or not isinstance(model.get_submodule(parent), nn.ModuleList):
            continue
        if any(name.startswith(f"{o}.") for o in (*outer, *roles)):
            continue
        if isinstance(module, nn.ModuleList) or not _has_projections(module):
            continue
        outer.append(name)
        if not isinstance(module, (nn.Linear, nn.Embedding)):
            yield name, module


def _has_projections(module: nn.Module) -> bool:
    """Has matrices beside those of convolutions: patch embeddings and feature extractors are no such layers."""
    return any(
        parameter.dim() >= 2
        for child in module.modules()
        if not isinstance(child, nn.modules.conv._ConvNd)
        for parameter in child.parameters(recurse=False)
    )


def _first_difference(expected: Values, captured: Values) -> str:
    lost, extra = expected.keys() - captured.keys(), captured.keys() - expected.keys()
    if lost or extra:
        first = min(lost or extra)
        return f"{len(lost)} records lost, {len(extra)} too many (site {first[0]}, step {first[1]}, call {first[2]})"
    for key, value in expected.items():
        if not same_bits(value, captured[key]):
            got = captured[key]
            detail = f"{tuple(got.shape)} {got.dtype} for {tuple(value.shape)} {value.dtype}"
            if value.shape == got.shape:
                detail = f"by up to {(value.double() - got.double()).abs().max().item():.1e}"
            return f"site {key[0]}, step {key[1]}, call {key[2]} differs: {detail}"
    return ""


def _largest_difference(expected: Values, traced: Values) -> float:
    worst = 0.0
    for key in expected.keys() & traced.keys():
        left, right = expected[key].double(), traced[key].double()
        if left.shape != right.shape:
            return float("inf")
        if left.numel():
            scale = max(left.abs().max().item(), 1e-30)
            worst = max(worst, (left - right).abs().max().item() / scale)
    return worst


def _reason(error: BaseException) -> str:
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return text[:300] + where


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        previous = logging.root.manager.disable
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(previous)
