"""With strict_numerics the compiled model's outputs are, bit for bit, those of the model without captures."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hooks import eager_values, same_bits
from models import PLAIN, TUPLES, Shape, make, tokens
from torch import fx, nn
from torch._dynamo import lookup_backend

from fx_instrument import (
    HookConfig,
    HookGranularity,
    InstrumentationConfig,
    InstrumentationFramework,
    RewriteError,
    open_stream,
)
from fx_instrument.graph import strict
from fx_instrument.graph.strict import kernels


class Compiler:
    """A compiler of one's own (aot_eager inside): nothing is known of its kernels; counts what it compiles."""

    def __init__(self) -> None:
        self.num_outputs: list[int] = []

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.num_outputs.append(len(gm.graph.output_node().args[0]))
        return lookup_backend("aot_eager")(gm, inputs)


def strictly(model: nn.Module, backend: Any, globs: Sequence[str] | None = None, **more: Any) -> Any:
    hook_config = HookConfig(target_layers=globs, sampling_rate=0.1)
    framework = InstrumentationFramework(
        InstrumentationConfig(strict_numerics=True, hook_config=hook_config, **more)
    )
    framework.instrument_model(model, backend=backend)
    return framework


CASES: dict[str, tuple[Shape, list[str] | None, bool]] = {
    "attention and MLP": (PLAIN, None, True),
    "blocks and norms": (PLAIN, ["layers.*", "layers.*.norm?"], False),
    "mixtures": (Shape(experts=4, depth=1), ["layers.*.mlp"], False),
}


@pytest.mark.parametrize("case", list(CASES))
def test_inductors_outputs_are_those_without_captures(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bf16: where kernels stay the same captures leave the one graph; elsewhere they get a run of their own."""
    shape, globs, is_same = CASES[case]
    apart = []
    original = strict.captures_alone
    monkeypatch.setattr(strict, "captures_alone", lambda rewritten: apart.append(1) or original(rewritten))
    model, ids = make(shape, torch.bfloat16), tokens(4, 24)
    reference, plain = copy.deepcopy(model), torch.compile(copy.deepcopy(model))
    framework = strictly(model, "inductor", globs)
    with torch.no_grad():
        expected = plain(ids)
        assert same_bits(model(ids), expected)
        with framework.capture_activations(tmp_path / "o.stream"):
            assert same_bits(model(ids), expected)
        assert same_bits(model(ids), expected)
        values = eager_values(reference, [site.name for site in framework.sites], lambda m: m(ids))
    assert bool(apart) is not is_same
    with open_stream(tmp_path / "o.stream") as stream:
        assert len(stream) == len(values)
        for key, value in values.items():
            torch.testing.assert_close(stream.read(*key), value, rtol=5e-2, atol=5e-2)


def test_with_cuda_graph_modes(tmp_path: Path) -> None:
    """mode="reduce-overhead" on a CPU: the outputs of the model compiled so without captures, over several inputs."""
    model = make(PLAIN, torch.bfloat16)
    reference = copy.deepcopy(model)
    plain = torch.compile(copy.deepcopy(model), mode="reduce-overhead")
    config = InstrumentationConfig(strict_numerics=True, hook_config=HookConfig(target_layers=["layers.*"]))
    framework = InstrumentationFramework(config)
    framework.instrument_model(model, mode="reduce-overhead")
    inputs = [tokens(4, 24, seed=seed) for seed in range(3)]
    with torch.no_grad():
        expected = [plain(ids).clone() for ids in inputs]
        with framework.capture_activations(tmp_path / "o.stream") as capture:
            assert all(same_bits(model(ids), out) for ids, out in zip(inputs, expected, strict=True))
        values = eager_values(reference, ["layers.0", "layers.1"], lambda m: [m(ids) for ids in inputs])
        assert framework.verify(model, inputs[0]).num_graphs_apart == 1
    assert capture.report.records == len(values) == 6 and capture.report.eager_records == 0
    with open_stream(tmp_path / "o.stream") as stream:
        for key, value in values.items():
            torch.testing.assert_close(stream.read(*key), value, rtol=5e-2, atol=5e-2)


def test_verify_says_so() -> None:
    """What verify finds without strict_numerics names the way out; with it, it says what that takes."""
    model, ids = make(PLAIN, torch.bfloat16), tokens(4, 24)
    config = InstrumentationConfig(hook_config=HookConfig(target_layers=["layers.*", "layers.*.norm?"]))
    with torch.no_grad():
        found = InstrumentationFramework(config).verify(model, ids)
    assert not found.ok and not found.outputs_bit_equal and found.max_output_difference > 0
    assert any("strict_numerics=True keeps them" in problem for problem in found.problems)
    framework = strictly(model, "inductor", ["layers.*", "layers.*.norm?"])
    with torch.no_grad():
        found = framework.verify(model, ids)
    assert found.ok and found.outputs_bit_equal and found.strict_numerics, str(found)
    assert found.num_graphs_apart == 1 and "a graph of their own" in str(found)


@pytest.mark.parametrize("granularity", [HookGranularity.FULL_TENSOR, HookGranularity.SAMPLED_SLICES])
def test_a_run_of_their_own_gives_the_same_values(tmp_path: Path, granularity: HookGranularity) -> None:
    """Captures that are computed apart are what eager hooks see, in-place changes, lengths and all."""
    model, compiler = make(TUPLES), Compiler()
    reference = copy.deepcopy(model)
    framework = strictly(model, compiler, granularity=granularity)
    inputs = [tokens(2, 5), tokens(2, 7), tokens(2, 9)]
    with torch.no_grad(), framework.capture_activations(tmp_path / "o.stream") as capture:
        outputs = [model(ids) for ids in inputs]
    assert capture.report.steps == 3 and capture.report.records == 12
    # Of each graph: without captures, with them, and the captures alone.
    assert compiler.num_outputs[:3] == [1, 5, 4]
    with torch.no_grad():
        assert all(same_bits(output, reference(ids)) for output, ids in zip(outputs, inputs, strict=True))
        expected = eager_values(
            reference, [site.name for site in framework.sites], lambda m: [m(ids) for ids in inputs]
        )
    with open_stream(tmp_path / "o.stream") as stream:
        for (name, step, call), value in expected.items():
            record = next(r for r in stream[name] if (r.step, r.call) == (step, call))
            if granularity is HookGranularity.SAMPLED_SLICES:
                value = value.flatten()[record.positions()]
            assert same_bits(record.tensor(), value)


class Filling(nn.Module):
    """Writes to one argument and reads another."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)

    def forward(self, x: torch.Tensor, whole: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        whole[: len(x)] = x
        return self.norm(part)


def test_arguments_that_overlap_are_refused(tmp_path: Path) -> None:
    """Written through one and read through the other, they could not be copied apart; beside each other they can."""
    model, x, cache = Filling(), torch.randn(4, 16), torch.randn(16, 16)
    framework = strictly(model, Compiler(), ["norm"])
    with torch.no_grad():
        with framework.capture_activations(tmp_path / "o.stream"):
            model(x, cache[:8], cache[8:12])
        torch._dynamo.reset()
        with framework.capture_activations(None):
            with pytest.raises(RewriteError, match="share memory that it writes to"):
                model(x, cache[:8], cache[2:6])
            model(x, cache[:8], cache[8:12])
        framework.restore(model)
        with open_stream(tmp_path / "o.stream") as stream:
            assert same_bits(stream.read("norm", 0), model.norm(cache[8:12]))


class Remembering(nn.Module):
    """Writes to a buffer, to an argument through a view, and to running statistics; then looks at what it wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = make(TUPLES)
        self.norm = nn.BatchNorm1d(16)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("seen", torch.zeros(4, 16))

    def forward(self, input_ids: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        x = self.drop(self.decoder.layers[0](self.decoder.embed(input_ids)))
        memory[0].add_(x.detach().sum(1)[0])
        self.seen.index_copy_(0, torch.tensor([1]), memory[:1] + 1)
        x = self.norm(x.flatten(0, 1)).view(x.shape) + self.seen[1] + memory[0]
        return self.decoder.layers[1](x)


def test_what_the_model_writes_is_written_once(tmp_path: Path) -> None:
    """Arguments, buffers, statistics, gradients and random state end as without captures."""
    ids = tokens(2, 5)

    def run(capture: bool) -> list[torch.Tensor]:
        torch._dynamo.reset()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            model = Remembering().train()
            memory = torch.zeros(3, 16)
            framework = strictly(model, Compiler())
            results = []
            for _ in range(2):
                if capture:
                    with framework.capture_activations(tmp_path / "o.stream") as opened:
                        output = model(ids, memory)
                    assert opened.report.records == 4
                else:
                    output = model(ids, memory)
                output.square().sum().backward()
                results.append(output.detach())
            state = [value.clone() for value in model.state_dict().values()]
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            return [*results, memory, *state, *gradients, torch.get_rng_state()]

    plain, captured = run(False), run(True)
    assert len(plain) == len(captured)
    assert all(same_bits(a, b) for a, b in zip(plain, captured, strict=True))


def test_kernels_are_compared_by_what_they_compute() -> None:
    """A buffer that may not be written over is no difference; another operation or library call is."""
    code = """
cpp_fused_add_0 = async_compile.cpp_pybinding(['float*', 'const float*'], r'''
#include <torch/csrc/inductor/cpp_prefix.h>
extern "C"  void  kernel(float* in_out_ptr0,
                       const float* in_ptr0)
{
    auto out_ptr0 = in_out_ptr0;
    auto tmp0 = in_out_ptr0[x0];
    auto tmp1 = in_ptr0[x0];
    out_ptr0[x0] = tmp0 + tmp1;
}
''')
    extern_kernels.mm(buf0, arg1, out=buf1)
"""
    apart = code.replace("in_out_ptr0,\n", "out_ptr1,\n").replace("= in_out_ptr0[x0]", "= in_ptr1[x0]")
    assert kernels(code) == kernels(apart.replace("    auto out_ptr0 = in_out_ptr0;\n", ""))
    assert sum(kernels(code).values()) == 2
    assert kernels(code) != kernels(code.replace("tmp0 + tmp1", "tmp0 * tmp1"))
    assert kernels(code) != kernels(code.replace("extern_kernels.mm", "extern_kernels.addmm"))


def test_the_option_is_checked() -> None:
    with pytest.raises(TypeError, match="strict_numerics must be a bool"):
        InstrumentationConfig(strict_numerics=1)  # type: ignore[arg-type]
    assert InstrumentationConfig(strict_numerics=True).to_dict()["strict_numerics"] is True
