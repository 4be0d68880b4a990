"""The framework as its users call it: the document's lines, and a clear error for each wrong turn."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from hooks import eager_values, same_bits
from models import PLAIN, TUPLES, Shape, make, tokens
from torch import nn

import fx_instrument
from fx_instrument import (
    AlreadyInstrumentedError,
    BufferTooSmallError,
    CaptureActiveError,
    CaptureFailedError,
    HookConfig,
    HookGranularity,
    InstrumentationConfig,
    InstrumentationError,
    InstrumentationFramework,
    NoSitesError,
    NotAStreamError,
    NotInstrumentedError,
    RewriteError,
    StreamError,
    analyze_activations,
    open_stream,
)
from fx_instrument.stream.writer import StreamWriter


def instrumented(model: nn.Module, backend: Any = "eager", **config: Any) -> InstrumentationFramework:
    framework = InstrumentationFramework(InstrumentationConfig(**config))
    framework.instrument_model(model, backend=backend)
    return framework


def test_the_five_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines of the documentation run as they stand on a plain module."""
    monkeypatch.chdir(tmp_path)
    model, input_ids = make(TUPLES), tokens(2, 6)
    framework = InstrumentationFramework(
        InstrumentationConfig(
            granularity=HookGranularity.ATTENTION_ONLY,
            compression_algorithm="lz4",
            target_throughput_gbps=2.0,
            max_memory_gb=4.0,
        )
    )
    assert framework.instrument_model(model) is model
    with framework.capture_activations("output.stream"):
        model(input_ids)
    analysis = framework.analyze_activations("output.stream")
    assert set(analysis["sites"]) == {"layers.0.self_attn", "layers.1.self_attn"}
    assert analysis["metadata"]["config"]["compression_algorithm"] == "lz4"
    assert analysis["causal_graph"] is None and analysis["sae_features"] is None
    assert (tmp_path / "output.stream").stat().st_mode & 0o077 == 0


def test_nothing_is_recorded_outside_a_block(tmp_path: Path) -> None:
    """Only calls inside the block are steps; the next block starts a file of its own."""
    model, ids = make(PLAIN), tokens(1, 4)
    framework = instrumented(model)
    with torch.no_grad():
        model(ids)
        for name, count in (("a", 1), ("b", 2)):
            with framework.capture_activations(tmp_path / name) as capture:
                for _ in range(count):
                    model(ids)
            model(ids)
            assert capture.report.steps == count and capture.report.records == 4 * count
            with open_stream(tmp_path / name) as stream:
                assert stream.num_steps == count


def test_the_report(tmp_path: Path) -> None:
    """The report is live inside the block and final after it; it agrees with the file."""
    model, ids = make(PLAIN), tokens(2, 8)
    framework = instrumented(model, target_throughput_gbps=3.0)
    opened = framework.capture_activations(tmp_path / "o.stream")
    with pytest.raises(CaptureActiveError, match="not begun"):
        _ = opened.report
    with torch.no_grad(), opened as capture:
        model(ids)
        assert capture.report.steps == 1
    report = capture.report
    assert report.raw_bytes == 4 * 2 * 8 * 16 * 4
    assert report.stored_bytes == (tmp_path / "o.stream").stat().st_size
    assert report.target_gbps == 3.0 and report.achieved_gbps > 0 and report.duration_s > 0
    assert 0 < report.peak_buffer_bytes <= 1e9
    with open_stream(tmp_path / "o.stream") as stream:
        assert len(stream) == report.records == 4
    assert capture.report == report


def test_call_order_errors(tmp_path: Path) -> None:
    """Each step out of order names the call that is missing."""
    framework = InstrumentationFramework()
    model, ids = make(PLAIN), tokens(1, 3)
    with pytest.raises(NotInstrumentedError, match="call instrument_model"):
        framework.capture_activations(tmp_path / "o.stream")
    with pytest.raises(NotInstrumentedError):
        framework.restore(model)
    with pytest.raises(NotInstrumentedError):
        framework.backend()
    framework.instrument_model(model, backend="eager")
    with framework.capture_activations(tmp_path / "o.stream"):
        with (
            pytest.raises(CaptureActiveError, match="open already"),
            framework.capture_activations(tmp_path / "p"),
        ):
            pass
        with pytest.raises(CaptureActiveError, match="leave its block"):
            framework.restore(model)
        model(ids)
    assert not (tmp_path / "p").exists()
    with pytest.raises(NotInstrumentedError, match="not the model"):
        framework.restore(make(PLAIN))


def test_instrumenting_twice() -> None:
    """The same model twice, by two frameworks, and a second model for one framework are refused with advice."""
    model = make(PLAIN)
    framework = instrumented(model)
    with pytest.raises(AlreadyInstrumentedError, match="instruments a Decoder already"):
        framework.instrument_model(model)
    with pytest.raises(AlreadyInstrumentedError, match="second framework"):
        framework.instrument_model(make(PLAIN))
    other = InstrumentationFramework()
    with pytest.raises(AlreadyInstrumentedError, match="restore"):
        other.instrument_model(model)
    framework.restore(model)
    other.instrument_model(model, backend="eager")
    assert other.sites and not framework.sites


def test_bad_arguments(tmp_path: Path) -> None:
    model = make(PLAIN)
    framework = instrumented(model)
    with pytest.raises(ValueError, match="'r'"):
        framework.capture_activations(tmp_path / "o", mode="r")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'wait'"):
        framework.capture_activations(tmp_path / "o", on_full="wait")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="path"):
        framework.capture_activations(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"nn\.Module"):
        InstrumentationFramework().instrument_model("gpt2")  # type: ignore[type-var]
    with pytest.raises(TypeError, match="InstrumentationConfig"):
        InstrumentationFramework({"granularity": 1})  # type: ignore[arg-type]
    with pytest.raises(NoSitesError):
        InstrumentationFramework().instrument_model(nn.Linear(2, 2))
    with pytest.raises(NoSitesError, match="near misses"):
        hooks = HookConfig(target_layers=["layer.*.mlp"])
        InstrumentationFramework(InstrumentationConfig(hook_config=hooks)).instrument_model(make(PLAIN))
    with pytest.raises(TypeError, match="does not compile"):
        InstrumentationFramework().instrument_model(make(PLAIN), backend=None, dynamic=True)


def test_bad_paths(tmp_path: Path) -> None:
    """Paths fail as Python's own open does, before the model runs, and the framework can be used again."""
    model, ids = make(PLAIN), tokens(1, 3)
    framework = instrumented(model)
    (tmp_path / "there").write_bytes(b"precious")
    for path, mode, error in [
        (tmp_path / "there", "x", FileExistsError),
        (tmp_path / "no" / "such" / "folder", "w", FileNotFoundError),
        (tmp_path, "w", IsADirectoryError),
    ]:
        with pytest.raises(error), framework.capture_activations(path, mode=mode):  # type: ignore[arg-type]
            raise AssertionError("the block must not be entered")
    assert (tmp_path / "there").read_bytes() == b"precious"
    with framework.capture_activations(tmp_path / "there"):
        model(ids)
    with open_stream(tmp_path / "there") as stream:
        assert len(stream) == 4


def test_resuming(tmp_path: Path) -> None:
    """Mode "a" goes on with a file: steps from where it ended, sampling as it was, a killed file recovered first."""
    model, ids = make(PLAIN), tokens(1, 3)
    path = tmp_path / "o.stream"
    framework = instrumented(model, compression_algorithm="lz4")
    for _ in range(2):
        with framework.capture_activations(path, mode="a") as capture:
            model(ids)
            model(ids)
        assert capture.report.steps == 2 and capture.report.records == 8
    with open_stream(path) as stream:
        assert stream.num_steps == 4 and len(stream) == 16
        assert [record.step for record in stream["layers.0.mlp"]] == [0, 1, 2, 3]
    path.write_bytes(path.read_bytes()[:-40])
    with framework.capture_activations(path, mode="a"):
        model(ids)
    with open_stream(path) as stream:
        assert stream.num_steps == 5 and len(stream) == 20
    framework.restore(model)
    before = path.read_bytes()
    for config in ({"compression_algorithm": "zstd"}, {"granularity": HookGranularity.SAMPLED_SLICES}):
        other = instrumented(model, **{"compression_algorithm": "lz4", **config})
        with pytest.raises(ValueError, match=r"codec|sampling"), other.capture_activations(path, mode="a"):
            pass
        other.restore(model)
    assert path.read_bytes() == before
    # As converted packets are, which know no model.
    StreamWriter(path, metadata={"model": None}, codec="lz4").close({})
    other = instrumented(model, compression_algorithm="lz4")
    with pytest.raises(ValueError, match="model"), other.capture_activations(path, mode="a"):
        pass


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("backend", ["eager", "inductor", None])
def test_samples_of_nothing(tmp_path: Path, backend: str | None, dynamic: bool | None) -> None:
    """Samples are 1-D, those of an empty value too; a file of both reads as one."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    sampled = HookGranularity.SAMPLED_SLICES
    hooks = HookConfig(target_layers=["0"], sampling_rate=0.5)
    framework = InstrumentationFramework(InstrumentationConfig(granularity=sampled, hook_config=hooks))
    framework.instrument_model(model, backend=backend, **({"dynamic": dynamic} if backend else {}))
    with torch.no_grad(), framework.capture_activations(tmp_path / "s.stream"):
        for shape in ((0, 4, 8), (2, 0, 8), (2, 4, 8)):
            model(torch.zeros(shape))
    with open_stream(tmp_path / "s.stream") as stream:
        shapes = [(tuple(record.tensor().shape), record.full_shape) for record in stream["0"]]
    assert shapes == [((0,), (0, 4, 8)), ((0,), (2, 0, 8)), ((32,), (2, 4, 8))]


def test_files_that_are_no_streams(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_stream(tmp_path / "none")
    for content in (b"", b"hello", b"PK\x03\x04" * 100):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(StreamError):
            open_stream(tmp_path / "file")
        with pytest.raises(StreamError):
            analyze_activations(tmp_path / "file")
    (tmp_path / "text").write_bytes(b"not a stream at all, just some text that is long enough" * 10)
    with pytest.raises(NotAStreamError):
        open_stream(tmp_path / "text")


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_the_users_exception_stays_the_users(tmp_path: Path, error: type[BaseException]) -> None:
    """An exception or Ctrl-C inside the block passes through; what was captured before is whole on disk."""
    model, ids = make(PLAIN), tokens(1, 3)
    framework = instrumented(model)
    with pytest.raises(error), framework.capture_activations(tmp_path / "o.stream"):
        model(ids)
        raise error
    with open_stream(tmp_path / "o.stream") as stream:
        assert len(stream) == 4
    with framework.capture_activations(tmp_path / "again.stream"):
        model(ids)


def test_a_failing_forward_keeps_the_steps_before(tmp_path: Path) -> None:
    """A model that raises loses its own call only."""
    model, ids = make(PLAIN), tokens(1, 3)
    framework = instrumented(model)
    with framework.capture_activations(tmp_path / "o.stream") as capture:
        model(ids)
        with pytest.raises(IndexError):
            model(ids + 1000)
        model(ids)
    assert capture.report.steps == 3
    with open_stream(tmp_path / "o.stream") as stream:
        assert [record.step for record in stream["layers.0.mlp"]] == [0, 2]


def test_a_step_larger_than_the_buffer(tmp_path: Path) -> None:
    """The error names both sizes; nothing of the step is recorded, and smaller steps still are."""
    model = make(PLAIN)
    framework = instrumented(model, max_memory_gb=0.005)
    with torch.no_grad(), framework.capture_activations(tmp_path / "o.stream") as capture:
        model(tokens(1, 4))
        with pytest.raises(BufferTooSmallError, match=r"captures 4096000 bytes.*max_memory_gb=0.005"):
            model(tokens(16, 1000))
        model(tokens(1, 4))
    assert capture.report.records == 8
    with open_stream(tmp_path / "o.stream") as stream:
        assert len(stream) == 8


def test_a_bound_below_the_writers_own_need(tmp_path: Path) -> None:
    """A bound that not even the writer fits in is refused before a file is made."""
    framework = instrumented(make(PLAIN), max_memory_gb=0.001)
    with (
        pytest.raises(BufferTooSmallError, match="writer alone"),
        framework.capture_activations(tmp_path / "o"),
    ):
        pass
    assert not (tmp_path / "o").exists()


def test_more_than_the_buffer_flows_through(tmp_path: Path) -> None:
    """Under "stall" a small buffer slows the model down and loses nothing; under "drop" the losses are counted."""
    model = make(PLAIN)
    framework = instrumented(model, max_memory_gb=0.005)
    inputs = [tokens(8, 400, seed=seed) for seed in range(30)]
    with torch.no_grad(), framework.capture_activations(tmp_path / "s.stream") as capture:
        for ids in inputs:
            model(ids)
    assert capture.report.records == 120 and capture.report.dropped_records == 0
    assert capture.report.peak_buffer_bytes <= 5_000_000
    with open_stream(tmp_path / "s.stream") as stream:
        assert len(stream) == 120
    with torch.no_grad(), framework.capture_activations(tmp_path / "d.stream", on_full="drop") as capture:
        for ids in inputs:
            model(ids)
    report = capture.report
    assert report.records + report.dropped_records == 120
    with open_stream(tmp_path / "d.stream") as stream:
        assert len(stream) == report.records
        assert stream.num_steps == 30
    assert sum(analyze_activations(tmp_path / "d.stream")["metadata"]["dropped_records"].values()) == (
        report.dropped_records
    )


def test_a_full_disk_reaches_the_caller(tmp_path: Path) -> None:
    """A write that fails is raised when the block is left; the model's results stand, the file reads up to there."""
    script = """
        import resource, signal, sys
        sys.path[:0] = [{tests!r}]
        import torch
        from models import PLAIN, make, tokens
        from fx_instrument import *
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        model = make(PLAIN)
        framework = InstrumentationFramework(InstrumentationConfig(compression_algorithm="none", max_memory_gb=0.01))
        framework.instrument_model(model, backend="eager")
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, resource.RLIM_INFINITY))
        results = []
        try:
            with torch.no_grad(), framework.capture_activations({path!r}):
                for seed in range(60):
                    results.append(model(tokens(4, 100, seed=seed)))
        except CaptureFailedError as failure:
            assert isinstance(failure.__cause__, OSError), repr(failure.__cause__)
            assert len(results) == 60
            print("caught", failure)
    """
    path = str(tmp_path / "o.stream")
    text = textwrap.dedent(script).format(tests=str(Path(__file__).parent), path=path)
    done = subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, timeout=300, check=False
    )
    assert "caught" in done.stdout, done.stderr
    with pytest.raises(StreamError):
        open_stream(path)
    with open_stream(path, recover=True) as stream:
        assert 0 < len(stream) < 240


def test_restore_gives_the_model_back() -> None:
    """After restore nothing of the framework is left: hooks, buffers, compiled call, state."""
    model, ids = make(PLAIN), tokens(1, 3)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    state = list(model.state_dict())
    framework = instrumented(model)
    assert list(model.state_dict()) == state
    with framework.capture_activations(None):
        model(ids)
    framework.restore(model)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert not any(module._forward_hooks for module in model.modules())
    assert framework.sites == ()
    framework.instrument_model(model, backend="eager")
    with framework.capture_activations(None) as capture:
        model(ids)
    assert capture.report.records == 4


def test_a_model_that_is_refused_stays_as_it_was() -> None:
    """A forward without a signature: nothing of ours is left in the model."""
    model = make(PLAIN)
    model.forward = dict.pop  # type: ignore[method-assign, assignment]
    with pytest.raises(ValueError, match="signature"):
        InstrumentationFramework().instrument_model(model, backend="eager")
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(name.startswith("_fx") for module in model.modules() for name in vars(module))


def test_a_model_compiled_before(tmp_path: Path) -> None:
    """A model that was compiled and called before is captured too; restore brings its compiled call back."""
    model, ids = make(PLAIN), tokens(1, 3)
    with torch.no_grad():
        model.compile(backend="aot_eager")
        before = model(ids)
        compiled = model._compiled_call_impl
        framework = instrumented(model, backend="aot_eager")
        with framework.capture_activations(tmp_path / "o.stream") as capture:
            assert same_bits(model(ids), before)
        assert capture.report.records == 4 and capture.report.eager_records == 0
        framework.restore(model)
        assert model._compiled_call_impl is compiled
        assert same_bits(model(ids), before)


def test_an_optimized_module(tmp_path: Path) -> None:
    """What torch.compile returned is taken too: calls of it and of the module inside it are captured."""
    model, ids = make(PLAIN), tokens(1, 3)
    optimized = torch.compile(model, backend="eager")
    framework = InstrumentationFramework()
    assert framework.instrument_model(optimized, backend="eager") is optimized
    assert all("_orig_mod" not in site.name for site in framework.sites)
    with torch.no_grad(), framework.capture_activations(tmp_path / "o.stream") as capture:
        optimized(ids)
        model(ids)
    assert capture.report.steps == 2 and capture.report.records == 8
    framework.restore(optimized)
    with torch.no_grad():
        optimized(ids)


def test_copies_are_plain_models(tmp_path: Path) -> None:
    """Deep copies and pickles of an instrumented model are plain models that work and can be instrumented."""
    model, ids = make(PLAIN), tokens(1, 3)
    framework = instrumented(model)
    with torch.no_grad():
        expected = model(ids)
        for duplicate in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            with framework.capture_activations(tmp_path / "o.stream") as capture:
                assert same_bits(duplicate(ids), expected)
            assert capture.report.records == 0
            other = instrumented(duplicate)
            with other.capture_activations(tmp_path / "p.stream") as capture:
                duplicate(ids)
            assert capture.report.records == 4


def test_a_model_changed_after_instrumenting() -> None:
    """Replaced modules, removed hooks and a second compile are named before a capture begins."""
    ids = tokens(1, 3)
    model = make(PLAIN)
    framework = instrumented(model)
    model.layers[0].mlp = make(PLAIN).layers[0].mlp
    with (
        pytest.raises(InstrumentationError, match=r"layers\.0\.mlp \(replaced\)"),
        framework.capture_activations(None),
    ):
        pass
    model = make(PLAIN)
    framework = instrumented(model)
    model.layers[1].mlp._forward_hooks.clear()
    with pytest.raises(InstrumentationError, match="hooks were removed"), framework.capture_activations(None):
        pass
    model = make(PLAIN)
    framework = instrumented(model)
    model.compile(backend="eager")
    with pytest.raises(InstrumentationError, match="compiled again"), framework.capture_activations(None):
        pass
    # New values of the same parameters are no change of the model.
    model = make(PLAIN)
    framework = instrumented(model)
    model.to(torch.float64)
    with torch.no_grad(), framework.capture_activations(None) as capture:
        model(ids)
    assert capture.report.records == 4


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Linear(4, 4)
        self.mlp = nn.Sequential(nn.Tanh(), nn.Linear(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.attn(x))


def test_a_module_of_an_instrumented_model(tmp_path: Path) -> None:
    """Instrumented by itself, and capturing while the idle model is traced: the model's call says what is wrong."""
    model = Layer()
    whole, part = (
        InstrumentationFramework(InstrumentationConfig(hook_config=HookConfig(target_layers=[name])))
        for name in ("attn", "0")
    )
    whole.instrument_model(model, backend="aot_eager")
    part.instrument_model(model.mlp, backend="aot_eager")
    with part.capture_activations(tmp_path / "part.stream"):
        model.mlp(torch.ones(1, 4))
        with pytest.raises(RewriteError, match="was instrumented by itself"):
            model(torch.ones(1, 4))


def test_the_users_own_hooks_go_on() -> None:
    """A forward hook of the user's that replaces an output is seen by the capture, whichever came first."""
    model, ids = make(PLAIN), tokens(1, 3)
    seen: list[int] = []
    model.layers[0].mlp.register_forward_hook(lambda module, args, output: output * 0)
    framework = instrumented(model)
    model.register_forward_hook(lambda module, args, output: seen.append(1))
    with torch.no_grad(), framework.capture_activations(None) as capture:
        model(ids)
    assert capture.report.records == 4 and seen == [1]


def test_no_compiler() -> None:
    """Without a C++ compiler Inductor on CPU is refused at once, naming g++ and the way out."""
    script = f"""
        import sys
        sys.path[:0] = [{str(Path(__file__).parent)!r}]
        from models import PLAIN, make
        from fx_instrument import *
        try:
            InstrumentationFramework().instrument_model(make(PLAIN))
        except MissingCompilerError as error:
            print(error)
    """
    environment = {**os.environ, "PATH": "/nonexistent"}
    environment.pop("CXX", None)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=False,
    )
    assert "g++" in done.stdout and 'backend="aot_eager"' in done.stdout, done.stderr


def test_progress_goes_to_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    model, ids = make(PLAIN), tokens(1, 3)
    framework = instrumented(model)
    with framework.capture_activations(None, progress=True):
        model(ids)
    captured = capfd.readouterr()
    assert "captured 1 steps, 4 records" in captured.err and captured.out == ""


def test_threads_share_a_model(tmp_path: Path) -> None:
    """Forward calls from several threads: every step has the rows of one call."""
    import threading

    model = make(Shape(depth=1))
    framework = instrumented(model, backend="aot_eager")
    inputs = [torch.full((1, 4), number) for number in range(12)]
    with torch.no_grad():
        model(inputs[0])
    with framework.capture_activations(tmp_path / "o.stream") as capture:
        model(inputs[0])

        def forward(mine: list[torch.Tensor]) -> None:
            with torch.no_grad():
                for ids in mine:
                    model(ids)

        threads = [threading.Thread(target=forward, args=(inputs[start::3],)) for start in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert capture.report.steps == 13
    with open_stream(tmp_path / "o.stream") as stream, torch.no_grad():
        framework.restore(model)
        assert len(stream) == 26
        for step in range(13):
            ids = stream.inputs(step)["input_ids"]
            expected = eager_values(model, ["layers.0.mlp"], lambda m, ids=ids: m(ids))
            assert same_bits(stream.read("layers.0.mlp", step), expected["layers.0.mlp", 0, 0])


def test_version() -> None:
    assert fx_instrument.__version__.count(".") == 2
    assert CaptureFailedError.__mro__[1] is InstrumentationError
