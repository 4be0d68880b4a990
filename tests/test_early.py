"""Values that are handed over inside the graph: which graphs, when, once, and counted until the graph lets go."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hooks import eager_values, same_bits
from hypothesis import given
from hypothesis import strategies as st
from models import PLAIN, TUPLES, Shape, make, tokens
from test_capture import A, HeldWriter, session
from test_serving import steps_in
from torch import fx, nn
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache, run_and_get_code
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fx_instrument import (
    HookConfig,
    HookGranularity,
    InstrumentationConfig,
    InstrumentationFramework,
    Recorder,
    open_stream,
)
from fx_instrument.capture.budget import HostBudget
from fx_instrument.capture.drain import RECORD_OVERHEAD_BYTES
from fx_instrument.capture.session import Session
from fx_instrument.graph import early
from fx_instrument.graph.marker import tap
from fx_instrument.graph.rewrite import insert_captures

OP = "torch.ops.fx_instrument.hand_over"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs of any size hand over early."""
    monkeypatch.setattr(early, "FROM_BYTES", 1)


@pytest.fixture
def came(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each delivery of a session, whether it came from within a graph."""
    found: list[bool] = []
    deliver = Session.deliver

    def noting(self: Session, ticket: Any, *rest: Any) -> None:
        found.append(early._thread.taker is not None)
        deliver(self, ticket, *rest)

    monkeypatch.setattr(Session, "deliver", noting)
    return found


def instrumented(model: nn.Module, **options: Any) -> InstrumentationFramework:
    config = options.pop("config", InstrumentationConfig())
    framework = InstrumentationFramework(config)
    framework.instrument_model(model, **options)
    return framework


def code_of(model: nn.Module, *ids: torch.Tensor) -> str:
    with torch.no_grad():
        _, codes = run_and_get_code(model, *ids)
    return "\n".join(codes)


def test_the_last_product_runs_after_the_hand_over(small: None, came: list[bool]) -> None:
    """Inductor leaves the op where the last value is there: the head's product comes behind it."""
    model, ids = make(PLAIN), tokens(2, 8)
    framework = instrumented(model)
    with (
        framework.capture_activations(None) as capture,
        torch._inductor.config.patch(force_disable_caches=True),
    ):
        code = code_of(model, ids)
    calls = re.findall(rf"^\s*(?:\w+ = )?(extern_kernels\.\w+|{OP})", code, re.M)
    assert calls.count(OP) == 1 and calls[-2] == OP, calls
    assert came == [True] and capture.report.records == 4


def test_small_values_are_delivered_when_the_graph_has_returned(came: list[bool]) -> None:
    """Below the bound there is no op in the graph."""
    model, ids = make(PLAIN), tokens(2, 8)
    framework = instrumented(model)
    with framework.capture_activations(None) as capture:
        assert OP not in code_of(model, ids)
    assert came == [False] and capture.report.records == 4


def test_the_bound_counts_all_values_of_a_graph() -> None:
    """4 MiB of values, of a size that is known or was seen; none on a device; none without a hint."""
    bound = early.FROM_BYTES // 4
    assert early.is_worthwhile([torch.empty(bound // 2)] * 2)
    assert not early.is_worthwhile([torch.empty(bound // 2), torch.empty(bound // 2 - 1)])
    assert not early.is_worthwhile([])
    with FakeTensorMode():
        assert not early.is_worthwhile([torch.empty(bound), torch.empty(bound, device="cuda")])
    with FakeTensorMode(shape_env=(sizes := ShapeEnv())):
        assert not early.is_worthwhile([torch.empty(bound), torch.empty(sizes.create_unbacked_symint())])

    seen: list[bool] = []

    def inner(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        (value,) = gm.graph.output_node().args[0]
        seen.append(early.is_worthwhile([value.meta["example_value"]]))
        return gm

    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    for rows in (bound, bound - 1):
        torch._dynamo.reset()
        torch.compile(double, backend=inner, dynamic=True)(torch.zeros(rows))
    assert seen == [True, False]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_graph_with_an_argument_on_a_device_gets_no_op(small: None, device: str) -> None:
    """Whatever it captures: a CUDA graph takes no Python."""
    graph = fx.Graph()
    value, token, other = (graph.placeholder(name) for name in ("value", "token", "other"))
    mark = graph.call_function(tap, (value, token))
    graph.output((mark, other))
    with FakeTensorMode():
        for node, where in ((value, "cpu"), (token, "cpu"), (other, device), (mark, "cpu")):
            node.meta["example_value"] = torch.empty(8, device=where)
    gm = fx.GraphModule({}, graph)
    rewritten = insert_captures(gm, lambda mark, index: True, None, hand_over=True)
    assert rewritten is not None and len(rewritten.planned) == 1
    assert rewritten.hands_over is (device == "cpu")


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_other_compilers_get_no_op(small: None, came: list[bool], backend: str) -> None:
    model, ids = make(PLAIN), tokens(2, 8)
    framework = instrumented(model, backend=backend)
    with torch.no_grad(), framework.capture_activations(None):
        model(ids)
    assert came == [False]


def test_samples_are_delivered_when_the_graph_has_returned(small: None, came: list[bool]) -> None:
    model, ids = make(PLAIN), tokens(2, 8)
    config = InstrumentationConfig(HookGranularity.SAMPLED_SLICES, hook_config=HookConfig(sampling_rate=0.2))
    framework = instrumented(model, config=config)
    with torch.no_grad(), framework.capture_activations(None) as capture:
        model(ids)
    assert came == [False] and capture.report.records == 4


@pytest.mark.parametrize("shape", [PLAIN, TUPLES, Shape(experts=3)])
def test_the_file_is_the_same(
    tmp_path: Path, came: list[bool], shape: Shape, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Early or late: the same records with the same bits, over lengths and several calls; outputs as well."""
    inputs = [tokens(2, length) for length in (8, 8, 5, 11)]
    found = []
    for bound in (1, 1 << 40):
        torch._dynamo.reset()
        monkeypatch.setattr(early, "FROM_BYTES", bound)
        model, path = make(shape), tmp_path / f"{bound}.stream"
        framework = instrumented(model)
        with torch.no_grad(), framework.capture_activations(path):
            outputs = [model(ids) for ids in inputs]
        with open_stream(path) as stream:
            keys = [(site.name, r.step, r.call) for site in stream.sites for r in stream[site.name]]
            records = {key: stream.read(*key) for key in keys}
        found.append((outputs, records))
    assert came == [True] * 4 + [False] * 4
    (early_outputs, early_records), (late_outputs, late_records) = found
    assert all(same_bits(a, b) for a, b in zip(early_outputs, late_outputs, strict=True))
    assert early_records.keys() == late_records.keys() and len(early_records) == 4 * len(framework.sites)
    assert all(same_bits(value, late_records[key]) for key, value in early_records.items())


def test_with_the_wrapper_in_cpp(small: None, came: list[bool]) -> None:
    """Inductor's C++ around the kernels calls the op, too."""
    model, ids = make(PLAIN), tokens(2, 8)
    plain = torch.compile(copy.deepcopy(model))
    framework = instrumented(model, options={"cpp_wrapper": True})
    with torch.no_grad(), framework.capture_activations(None) as capture:
        assert same_bits(model(ids), plain(ids))
    assert came == [True] and capture.report.records == 4


def test_what_changes_a_value_later_does_not_reach_it(tmp_path: Path, small: None, came: list[bool]) -> None:
    """In-place changes behind a site, and the caller's of an output that is a site itself."""
    model, ids = make(Shape(in_place=True)), tokens(2, 8)
    reference = copy.deepcopy(model)
    config = InstrumentationConfig(hook_config=HookConfig(target_layers=["layers.*.mlp", "lm_head"]))
    framework = instrumented(model, config=config)
    with torch.no_grad(), framework.capture_activations(tmp_path / "o.stream"):
        logits = model(ids)
        kept = logits.clone()
        logits.zero_()
    values = eager_values(reference, [site.name for site in framework.sites], lambda m: m(ids))
    with open_stream(tmp_path / "o.stream") as stream:
        assert same_bits(stream.read("lm_head", 0), kept)
        for key, value in values.items():
            torch.testing.assert_close(stream.read(*key), value, rtol=1e-5, atol=1e-5)
    assert came == [True]


def test_training_captures_once(small: None, came: list[bool]) -> None:
    """The op is in the forward graph alone, and gradients are those without it."""
    ids = tokens(2, 6)
    plain, model = make(TUPLES).train(), make(TUPLES).train()
    torch.compile(plain)(ids).square().sum().backward()
    framework = instrumented(model)
    with framework.capture_activations(None) as capture:
        model(ids).square().sum().backward()
    assert came == [True] and capture.report.records == 4
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) is (theirs.grad is None)
        assert ours.grad is None or same_bits(ours.grad, theirs.grad)


def test_caches_take_graphs_with_the_op(small: None, came: list[bool]) -> None:
    """FX-graph and AOTAutograd caches give them back, and they still hand over."""

    def run() -> dict[str, int]:
        torch._dynamo.reset()
        counters.clear()
        model = make(PLAIN)
        framework = instrumented(model)
        with torch.no_grad(), framework.capture_activations(None):
            model(tokens(2, 5))
        return {**counters["aot_autograd"], **counters["inductor"]}

    with fresh_cache():
        first, second = run(), run()
        with torch._functorch.config.patch(enable_autograd_cache=False):
            third = run()
    assert first.get("autograd_cache_miss") == 1 and not first.get("autograd_cache_bypass")
    assert second.get("autograd_cache_hit") == 1 and not second.get("autograd_cache_miss")
    assert third.get("fxgraph_cache_hit") == 1 and not third.get("fxgraph_cache_miss")
    assert came == [True] * 3


@pytest.mark.parametrize("globs", [None, ["layers.*", "layers.*.norm?"]])
def test_strict_numerics(small: None, came: list[bool], globs: list[str] | None) -> None:
    """The op is no kernel: a graph that was left as it is runs once; one of its own hands over, too."""
    model, ids = make(PLAIN, torch.bfloat16), tokens(4, 24)
    plain = torch.compile(copy.deepcopy(model))
    config = InstrumentationConfig(strict_numerics=True, hook_config=HookConfig(target_layers=globs))
    framework = instrumented(model, config=config)
    with torch.no_grad():
        found = framework.verify(model, ids)
        assert found.ok and found.num_graphs_apart == (1 if globs else 0), str(found)
        with framework.capture_activations(None) as capture:
            assert same_bits(model(ids), plain(ids))
    assert came == [True] and capture.report.records == len(framework.sites)


class Failing(nn.Module):
    """Asks its caller, behind the sites, whether to fail."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        return self.inner(ids)[0].index_select(0, where)


def test_a_graph_that_fails_behind_its_values(
    tmp_path: Path, small: None, came: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller gets the error, what was handed over stays captured, all room comes back, and the next call works."""
    model, ids = Failing(make(PLAIN)), tokens(1, 8)
    framework = instrumented(model)
    path = tmp_path / "o.stream"
    sessions: list[Session] = []
    returned = Session.returned
    monkeypatch.setattr(
        Session, "returned", lambda self, ticket: (sessions.append(self), returned(self, ticket))
    )
    with torch.no_grad(), framework.capture_activations(path) as capture:
        model(ids, torch.tensor([3]))
        with pytest.raises(Exception, match="out of"):
            model(ids, torch.tensor([99]))
        model(ids, torch.tensor([3]))
    assert came == [True] * 3 and capture.report.records == 12
    assert len(sessions) == 3
    assert all(one._budget.held_bytes == one._budget._still_held == 0 for one in sessions)
    with open_stream(path) as stream:
        assert same_bits(stream.read("inner.layers.0.mlp", 0), stream.read("inner.layers.0.mlp", 2))


def test_a_server_records_early_values(tmp_path: Path, small: None, came: list[bool]) -> None:
    """Through a recorder whose files rotate, from threads at once: each call's values lie in one file, whole."""
    model = make(PLAIN)
    framework = instrumented(model)
    folder = tmp_path / "recordings"
    ids = [tokens(1, 8, seed=seed) for seed in range(3)]
    wrong: list[int] = []
    with torch.no_grad(), Recorder(framework, folder, min_free_bytes=0) as recorder:
        expected = [model(one) for one in ids]

        def serve(number: int) -> None:
            with torch.no_grad():
                for _ in range(30):
                    if not same_bits(model(ids[number]), expected[number]):
                        wrong.append(number)

        with ThreadPoolExecutor(3) as pool:
            served = pool.map(serve, range(3))
            recorder.rotate()
            list(served)
    report = recorder.report
    assert not wrong and all(came) and len(came) == 93
    assert (report.steps, report.records, report.dropped_records) == (93, 93 * 4, 0)
    assert report.files >= 2 and steps_in(folder) == 93


@given(
    st.lists(
        st.tuples(st.sampled_from(["acquire", "hold", "release", "let_go"]), st.integers(1, 40)), max_size=60
    )
)
def test_held_bytes_stay_counted_until_the_graph_lets_go(moves: list[tuple[str, int]]) -> None:
    """In any order: what is held or not yet released is counted, within the bound; at the end nothing is."""
    budget = HostBudget(100)
    runs: list[list[Any]] = []  # [bytes, released, held]

    def alive() -> int:
        return sum(n for n, released, held in runs if held or not released)

    for move, amount in moves:
        running = [run for run in runs if run[2]]
        stored = [run for run in runs if not run[1]]
        if move == "acquire" and budget.acquire(amount, wait=False):
            runs.append([amount, False, False])
        elif move == "hold" and stored and not stored[-1][2]:
            stored[-1][2] = True
            budget.hold(stored[-1][0])
        elif move == "release" and stored:
            stored[amount % len(stored)][1] = True
            budget.release(stored[amount % len(stored)][0])
        elif move == "let_go" and running:
            running[amount % len(running)][2] = False
            budget.let_go(running[amount % len(running)][0])
        assert alive() <= budget.held_bytes <= 100
    for num_bytes, released, held in runs:
        if held:
            budget.let_go(num_bytes)
        if not released:
            budget.release(num_bytes)
    assert budget.held_bytes == 0


def test_a_session_counts_values_that_their_graph_still_holds() -> None:
    """Stored at once, but the room is free only when the graph has returned; a graph that failed has none."""
    opened = session(HeldWriter(), limit=3 * (100 + RECORD_OVERHEAD_BYTES))
    ticket = opened.reserve([A], 100, early=True)
    opened.deliver(ticket, [A], [torch.ones(25)], None)
    opened._drain.end()
    assert opened._budget.held_bytes == 100 + RECORD_OVERHEAD_BYTES
    opened.returned(ticket)
    assert opened._budget.held_bytes == 0
    ticket = opened.reserve([A], 100, early=True)
    opened.cancel(ticket)
    opened.returned(ticket)
    assert opened._budget.held_bytes == 0
    opened.close()
