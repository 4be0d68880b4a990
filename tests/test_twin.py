"""`plan` and `verify` leave what a model holds as it is, whatever its forward call does to it."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from fx_instrument import InstrumentationConfig, InstrumentationFramework
from fx_instrument.graph import twin as twin_room
from fx_instrument.graph.attach import is_ours
from fx_instrument.graph.state import put_back
from fx_instrument.graph.twin import make_twin, written_by


@dataclass(slots=True)
class Slotted:
    keys: torch.Tensor
    length: int = 0


class Cached(nn.Module):
    """Adds its input to a cache that lies where ``kind`` says, and gives what is in there."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.attn, self.mlp = nn.Linear(4, 4), nn.Linear(4, 4)
        self.kind = kind
        cache = torch.arange(32.0).reshape(8, 4) / 32
        if kind == "buffer":
            self.register_buffer("cache", cache)
        elif kind == "attribute":
            self.cache = cache
        elif kind == "list":
            self.cache = [cache]
        elif kind == "dict":
            self.cache = {"deep": (cache,)}
        elif kind == "slots":
            self.cache = Slotted(cache)
        elif kind == "computed":
            self.cache = nn.Parameter(cache) * 1.0
        elif kind == "of a parameter":
            self.whole = nn.Parameter(torch.ones(10, 4))
            self.cache = self.whole.detach()[1:9]
        self.table = torch.ones(8, 4)

    def where(self) -> torch.Tensor:
        if self.kind == "list":
            return self.cache[0]
        if self.kind == "dict":
            return self.cache["deep"][0]
        return self.cache.keys if self.kind == "slots" else self.cache

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        cache = self.where()
        if self.kind == "computed":
            self.cache = cache + 1
        else:
            cache[:3] += x
        return self.mlp(self.attn(x) + self.where()[:3] * self.table[:3])


class Counting(nn.Module):
    """Its output depends on how often it ran, by a number, a list and a tensor of another shape."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = nn.Linear(4, 4), nn.Linear(4, 4)
        self.calls = 0
        self.seen = [torch.ones(3, 4)]
        self.last: dict[str, Any] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.seen.append(x * self.calls)
        self.last["x"] = x
        return self.mlp(self.attn(x) + sum(self.seen))


KINDS = ["buffer", "attribute", "list", "dict", "slots", "computed", "of a parameter"]


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def instrumented(model: nn.Module) -> InstrumentationFramework:
    framework = InstrumentationFramework(InstrumentationConfig())
    framework.instrument_model(model, backend="aot_eager")
    return framework


@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
@pytest.mark.parametrize("kind", KINDS)
def test_caches_stay_as_they_are(kind: str, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever a model keeps what its forward writes to: it is the same object with the same bits, and certified."""
    if large:
        monkeypatch.setattr(twin_room, "_COPIED_BYTES", 16)
    model = Cached(kind)
    framework = instrumented(model)
    cache, table = model.where(), model.table
    before = cache.detach().clone()
    weights = copy.deepcopy(model.state_dict())
    framework.plan(model, torch.ones(3, 4))
    assert model.where() is cache and torch.equal(cache, before)
    found = framework.verify(model, torch.ones(3, 4))
    assert found.ok, found.problems
    assert model.where() is cache and torch.equal(cache, before) and model.table is table
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_counts_and_lists_stay_as_they_are() -> None:
    """Numbers, lists and dicts that a forward call changes are those of before in each run, and in the model."""
    model = Counting()
    framework = instrumented(model)
    (first,) = seen = model.seen
    framework.plan(model, torch.ones(3, 4))
    found = framework.verify(model, torch.ones(3, 4))
    assert found.ok, found.problems
    assert model.calls == 0 and model.seen is seen and seen[0] is first and len(seen) == 1
    assert model.last == {} and torch.equal(first, torch.ones(3, 4))


def test_large_tensors_are_copied_only_if_they_are_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a large cache and a large table the twin copies the cache, and looks at the table's own memory."""
    monkeypatch.setattr(twin_room, "_COPIED_BYTES", 16)
    model = Cached("dict")
    before = model.where().clone()
    written = written_by(model, is_ours, (torch.ones(3, 4),), {})
    assert written == {model.where().untyped_storage().data_ptr()}
    assert torch.equal(model.where(), before)
    twin: Any = make_twin(model, is_ours, written).module
    assert twin.table is not model.table and twin.table.data_ptr() == model.table.data_ptr()
    assert twin.where().data_ptr() != model.where().data_ptr()
    assert twin.mlp.weight is model.mlp.weight


def test_models_without_large_tensors_run_no_more_often() -> None:
    """Nothing is run to see who writes where all but parameters is small."""
    model = Cached("list")
    model.forward = None  # type: ignore[assignment]
    assert written_by(model, is_ours, (torch.ones(3, 4),), {}) == frozenset()


def test_a_call_that_fails_leaves_large_tensors_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written before a forward call raised is undone."""
    monkeypatch.setattr(twin_room, "_COPIED_BYTES", 16)
    model = Cached("attribute")
    before = model.where().clone()
    framework = instrumented(model)
    model.mlp.forward = None  # type: ignore[assignment]
    with pytest.raises(TypeError):
        framework.plan(model, torch.ones(3, 4))
    assert torch.equal(model.where(), before)


def test_everything_a_block_changed_is_put_back() -> None:
    """Values, shapes and memory of tensors, items of containers, attributes of objects, states of generators."""
    tensor, base = torch.arange(6.0), torch.ones(1, 3)
    expanded = base.expand(2, 3)
    sparse = torch.eye(3).to_sparse()
    items, names, queue = [tensor], {"a"}, deque([1, 2])
    slotted = Slotted(tensor, 3)
    model = nn.Linear(2, 2)
    generator = torch.Generator().manual_seed(5)
    state = generator.get_state()
    memory = tensor.data_ptr()
    with put_back([tensor, expanded, sparse, items, names, queue, slotted, model, generator]):
        tensor += 1
        tensor.set_(torch.zeros(2))
        base += 1
        sparse *= 2
        items.append(tensor)
        names.clear()
        queue.append(3)
        slotted.length = 9
        model.extra = 1  # type: ignore[assignment]
        torch.rand(3, generator=generator)
    assert torch.equal(tensor, torch.arange(6.0)) and tensor.data_ptr() == memory
    assert torch.equal(expanded, torch.ones(2, 3)) and torch.equal(sparse.to_dense(), torch.eye(3))
    assert len(items) == 1 and names == {"a"} and list(queue) == [1, 2] and slotted.length == 3
    assert not hasattr(model, "extra") and torch.equal(generator.get_state(), state)
