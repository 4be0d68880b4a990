"""Exported programs capture too: in this process, after save and load, and compiled by AOTInductor."""

from __future__ import annotations

import copy
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hooks import eager_values, same_bits
from models import PLAIN, TUPLES, Shape, make, tokens
from torch import nn

from fx_instrument import (
    AlreadyInstrumentedError,
    BufferTooSmallError,
    HookConfig,
    HookGranularity,
    InstrumentationConfig,
    InstrumentationFramework,
    NoSitesError,
    NotInstrumentedError,
    open_stream,
)
from fx_instrument.capture.session import Session
from fx_instrument.graph import exported_call
from fx_instrument.sampling import positions

if torch.__version__.startswith(("2.11.", "2.12.")):
    # Of named ones they derive min(4 * tokens, 8 * tokens) == 4 * tokens in grouped-query attention, and take that for
    # a violation of "tokens".
    BATCH = TOKENS = torch.export.Dim.DYNAMIC
else:
    BATCH, TOKENS = torch.export.Dim("batch", min=2), torch.export.Dim("tokens", min=2)
SHAPES = ({0: BATCH, 1: TOKENS},)
SAMPLED = InstrumentationConfig(HookGranularity.SAMPLED_SLICES, hook_config=HookConfig(sampling_rate=0.05))


def export(model: nn.Module, **options: Any) -> Any:
    return torch.export.export(model, (tokens(2, 5),), dynamic_shapes=SHAPES, **options)


def check(
    path: Path, model: nn.Module, framework: Any, inputs: list[torch.Tensor], exact: bool = True
) -> None:
    """The file holds what eager hooks see of these forward calls, and their inputs."""

    def run(module: nn.Module) -> None:
        for ids in inputs:
            module(ids)

    with torch.no_grad():
        expected = eager_values(model, [site.name for site in framework.sites], run)
    sampled = framework.config.granularity is HookGranularity.SAMPLED_SLICES
    with open_stream(path) as stream:
        assert stream.num_steps == len(inputs) and len(stream) == len(expected)
        for (name, step, call), value in expected.items():
            record = next(r for r in stream[name] if (r.step, r.call) == (step, call))
            assert record.full_shape == tuple(value.shape)
            if sampled:
                hooks = framework.config.hook_config
                where = positions(value.numel(), hooks.sampling_rate, hooks.seed)
                assert np.array_equal(record.positions(), where)
                value = value.flatten()[torch.from_numpy(where)]
            if exact:
                assert same_bits(record.tensor(), value), (name, step, call)
            else:
                torch.testing.assert_close(record.tensor(), value, rtol=1e-5, atol=1e-5)
        for step, ids in enumerate(inputs):
            (stored,) = stream.inputs(step).values()
            assert torch.equal(stored, ids)


@pytest.mark.parametrize("shape", [PLAIN, TUPLES, Shape(experts=3)], ids=["plain", "in place", "mixture"])
@pytest.mark.parametrize("config", [InstrumentationConfig(), SAMPLED], ids=["whole", "sampled"])
def test_a_programs_module_captures(tmp_path: Path, shape: Shape, config: InstrumentationConfig) -> None:
    """Inside a block ``program.module()`` delivers what eager hooks see, at new sizes; outputs are the original's."""
    model = make(shape)
    framework = InstrumentationFramework(config)
    program = framework.instrument_exported(export(model))
    assert [site.name for site in framework.sites] == [
        f"layers.{layer}.{name}" for layer in (0, 1) for name in ("self_attn", "mlp")
    ]
    assert [site.role for site in framework.sites] == ["attention", "mlp"] * 2
    module = program.module()
    inputs = [tokens(2, 5), tokens(3, 9, seed=1), tokens(3, 9, seed=2)]
    with torch.no_grad():
        before = module(inputs[1])
        with framework.capture_activations(tmp_path / "o.stream") as capture:
            outputs = [module(ids) for ids in inputs]
        assert same_bits(before, outputs[1])
        for ids, output in zip(inputs, outputs, strict=True):
            assert same_bits(output, model(ids))
    assert capture.report.steps == 3 and capture.report.records == 12
    check(tmp_path / "o.stream", model, framework, inputs)


def test_globs_choose_sites_and_signatures_give_outputs(tmp_path: Path) -> None:
    """Any module by name; where the export preserved a module's signature its first output is the value."""
    model = make(TUPLES)
    config = InstrumentationConfig(
        hook_config=HookConfig(target_layers=["layers.*", "layers.0.self_attn", "lm_head"])
    )
    framework = InstrumentationFramework(config)
    program = export(model, preserve_module_call_signature=("layers.0.self_attn", "layers.1"))
    module = framework.instrument_exported(program).module()
    ids = tokens(2, 4)
    with torch.no_grad(), framework.capture_activations(tmp_path / "o.stream"):
        module(ids)
    assert [site.name for site in framework.sites] == [
        "layers.0",
        "layers.0.self_attn",
        "layers.1",
        "lm_head",
    ]
    check(tmp_path / "o.stream", model, framework, [ids])


@pytest.mark.parametrize("config", [InstrumentationConfig(), SAMPLED], ids=["whole", "sampled"])
def test_a_program_from_a_file(tmp_path: Path, config: InstrumentationConfig) -> None:
    """Saved, and loaded by another process that knows nothing of the model, it still names its sites."""
    model = make(TUPLES)
    program = InstrumentationFramework(config).instrument_exported(export(model))
    torch.export.save(program, tmp_path / "program.pt2")
    script = f"""
        import sys
        sys.path[:0] = [{str(Path(__file__).parent)!r}]
        import torch
        from models import tokens
        from fx_instrument import *
        config = InstrumentationConfig(
            HookGranularity({config.granularity.value!r}), hook_config=HookConfig(sampling_rate=0.05)
        )
        framework = InstrumentationFramework(config)
        module = framework.attach_exported(torch.export.load({str(tmp_path / "program.pt2")!r}).module())
        with torch.no_grad():
            plain = module(tokens(3, 8))
            with framework.capture_activations({str(tmp_path / "o.stream")!r}):
                captured = module(tokens(3, 8))
        assert isinstance(plain, torch.Tensor) and torch.equal(plain, captured)
        print([site.name for site in framework.sites])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    framework = InstrumentationFramework(config)
    framework.instrument_exported(export(model))
    assert done.stdout.strip() == str([site.name for site in framework.sites])
    check(tmp_path / "o.stream", model, framework, [tokens(3, 8)])


@pytest.mark.slow
@pytest.mark.parametrize("config", [InstrumentationConfig(), SAMPLED], ids=["whole", "sampled"])
def test_aot_inductor(tmp_path: Path, config: InstrumentationConfig) -> None:
    """Compiled into a package and loaded again, at a batch and length that the export did not see."""
    from torch._inductor import aoti_compile_and_package, aoti_load_package

    model = make(PLAIN)
    framework = InstrumentationFramework(config)
    program = framework.instrument_exported(export(model))
    with torch.no_grad():
        package = aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        other = InstrumentationFramework(config)
        run = other.attach_exported(aoti_load_package(package))
        assert other.sites == framework.sites
        ids = tokens(4, 11)
        torch.testing.assert_close(run(ids), model(ids), rtol=1e-5, atol=1e-5)
        with other.capture_activations(tmp_path / "o.stream") as capture:
            run(ids)
            run(ids)
        assert capture.report.records == 8
    check(tmp_path / "o.stream", model, other, [ids, ids], exact=False)


def test_bounds_and_failures(tmp_path: Path) -> None:
    """A step larger than the buffer is refused, with the size known before it runs the second time; calls go on."""
    model = make(PLAIN)
    framework = InstrumentationFramework(InstrumentationConfig(max_memory_gb=0.005))
    module = framework.instrument_exported(export(model)).module()
    with torch.no_grad(), framework.capture_activations(tmp_path / "o.stream") as capture:
        for _ in range(2):
            with pytest.raises(BufferTooSmallError, match="4096000 bytes"):
                module(tokens(16, 1000))
        module(tokens(2, 4))
        with pytest.raises(IndexError):
            module(tokens(2, 4) + 1000)
        module(tokens(2, 4))
    assert capture.report.records == 8
    with open_stream(tmp_path / "o.stream") as stream:
        assert {record.step for record in stream["layers.0.mlp"]} == {2, 4}


class Chosen(nn.Module):
    """Its MLP sees as many rows as ``keep`` has ones."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        return self.mlp(x[torch.nonzero(keep).squeeze(-1)]).sum()


def chosen_rows(max_memory_gb: float) -> tuple[Any, InstrumentationFramework]:
    config = InstrumentationConfig(max_memory_gb=max_memory_gb, hook_config=HookConfig(target_layers=["mlp"]))
    framework = InstrumentationFramework(config)
    program = torch.export.export(Chosen(), (torch.randn(20000, 64), rows(3)))
    return framework.instrument_exported(program).module(), framework


def rows(count: int) -> torch.Tensor:
    keep = torch.zeros(20000, dtype=torch.bool)
    keep[:count] = True
    return keep


def test_sizes_that_depend_on_data_are_counted(tmp_path: Path) -> None:
    """Inputs of the same shapes with more to capture take their room, each time; what is larger than the bound is
    refused, and everything counted is given back."""
    module, framework = chosen_rows(0.04)
    x = torch.randn(20000, 64)
    with torch.no_grad(), framework.capture_activations(tmp_path / "o.stream") as capture:
        module(x, rows(3))
        module(x, rows(3))
        before = capture.report.peak_buffer_bytes
        for count in (20000, 3, 10000, 20000):
            module(x, rows(count))
        session = capture._session
        assert capture.report.peak_buffer_bytes >= before + (20000 - 3) * 256
    assert session._budget.held_bytes == 0
    with open_stream(tmp_path / "o.stream") as stream:
        assert [record.shape[0] for record in stream["mlp"]] == [3, 3, 20000, 3, 10000, 20000]
    module, framework = chosen_rows(0.006)
    with torch.no_grad(), framework.capture_activations(None) as capture:
        module(x, rows(3))
        with pytest.raises(BufferTooSmallError, match="5120000 bytes"):
            module(x, rows(20000))
        module(x, rows(3))
    assert capture.report.records == 2 and capture._session._budget.held_bytes == 0


@pytest.mark.parametrize("on_full", ["stall", "drop"])
def test_runs_of_sizes_that_depend_on_data_wait_for_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_full: Any
) -> None:
    """Many large runs behind small ones never take more than the bound; what is dropped is told."""
    held: list[int] = []
    deliver = Session.deliver

    def noted(session: Session, ticket: Any, sites: Any, values: Any, full_shapes: Any) -> None:
        assert ticket.dropped or ticket.num_bytes >= sum(value.nbytes for value in values)
        held.append(session._budget.held_bytes)
        deliver(session, ticket, sites, values, full_shapes)

    monkeypatch.setattr(Session, "deliver", noted)
    module, framework = chosen_rows(0.02)
    x = torch.randn(20000, 64)
    with torch.no_grad(), framework.capture_activations(tmp_path / "o.stream", on_full=on_full) as capture:
        for turn in range(12):
            module(x, rows(3 if turn % 3 == 0 else 20000))
    assert max(held) <= capture._session._budget.limit_bytes
    assert capture._session._budget.held_bytes == 0
    assert capture.report.records + capture.report.dropped_records == 12
    assert capture.report.raw_bytes > 5_000_000


def test_sizes_are_kept_for_so_many_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that runs for ever at ever new lengths keeps a bounded number of sizes."""
    monkeypatch.setattr(exported_call, "_KNOWN_SHAPES", 4)
    framework = InstrumentationFramework()
    module = framework.instrument_exported(export(make(PLAIN))).module()
    known: Any = module.forward
    with torch.no_grad(), framework.capture_activations(None) as capture:
        for length in range(2, 12):
            module(tokens(2, length))
            assert 1 <= len(known._sizes) <= 4
        module(tokens(2, 11))
    assert capture.report.records == 11 * 4


def test_copies_capture_too(tmp_path: Path) -> None:
    """``copy.deepcopy`` of a program or its module gives one with weights of its own that delivers as the original."""
    model = make(PLAIN)
    framework = InstrumentationFramework()
    program = framework.instrument_exported(export(copy.deepcopy(model)))
    module = program.module()
    copies = [copy.deepcopy(module), copy.deepcopy(copy.deepcopy(module)), copy.deepcopy(program).module()]
    ids = tokens(2, 5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        with framework.capture_activations(tmp_path / "o.stream"):
            for copied in copies:
                assert same_bits(copied(ids), model(ids))
        assert not module(ids).any()
    check(tmp_path / "o.stream", model, framework, [ids] * 3)


def test_what_is_refused() -> None:
    """Programs without sites or captures, another sampling, a framework that has a model, and no program at all."""
    model = make(PLAIN)
    program = export(model)
    framework = InstrumentationFramework()
    with pytest.raises(TypeError, match="ExportedProgram"):
        framework.instrument_exported(model)  # type: ignore[arg-type]
    with pytest.raises(NoSitesError):
        framework.instrument_exported(torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),)))
    with pytest.raises(NotInstrumentedError, match="no captures"):
        framework.attach_exported(program.module())
    with pytest.raises(TypeError, match="aoti_load_package"):
        framework.attach_exported(model)
    instrumented = framework.instrument_exported(program)
    with pytest.raises(ValueError, match="captures already"):
        framework.instrument_exported(instrumented)
    with pytest.raises(ValueError, match="whole tensors"):
        InstrumentationFramework(SAMPLED).attach_exported(instrumented.module())
    with pytest.raises(AlreadyInstrumentedError):
        framework.instrument_model(copy.deepcopy(model), backend="eager")
    framework.restore(instrumented)
    framework.instrument_model(model, backend="eager")
    with pytest.raises(AlreadyInstrumentedError, match="second framework"):
        framework.instrument_exported(program)
