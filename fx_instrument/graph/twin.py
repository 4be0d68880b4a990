"""A model's twin, to trace and compile beside the model itself: its own modules, the same parameters."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any

import numpy as np
import torch
import torch._dynamo
from torch import nn
from torch._C._dynamo import eval_frame
from torch._dynamo import convert_frame, pgo
from torch._dynamo.guards import DeletedGuardManagerWrapper
from torch._dynamo.utils import counters

from ..errors import InstrumentationError
from .marker import take_token
from .state import WriteWatch, put_back, storage_of, tensors_in

_COPIED_BYTES = 64 << 20
"""Buffers and other tensors (statistics, tables, caches) up to this are copied without asking who writes to them."""


@dataclass(frozen=True, slots=True)
class Twin:
    """A copy of a model's modules, without our hooks, and what it holds of its own."""

    module: nn.Module
    own: tuple[Any, ...]
    """All that was copied: tensors, containers, objects."""

    def as_before(self) -> contextlib.AbstractContextManager[None]:
        """A block after which all that it holds is as it was, so that the next call starts where this one did."""
        return put_back(self.own)


def make_twin(model: nn.Module, is_ours: Callable[[object], bool], written: Collection[int] = ()) -> Twin:
    """A copy of ``model``'s modules that shares its parameters, without the hooks that ``is_ours`` knows.

    Shared, too, are large tensors of any kind, and those that look into a parameter. The storages at the addresses
    ``written`` are copied, whatever lies in them. Hooks, compiled code and state of the model itself stay as they are,
    whatever is done with the twin, but for writes to what is shared.

    Raises:
        InstrumentationError: the model holds something that can't be copied.
    """
    memo: dict[int, Any] = {}
    shared = set()
    for tensor in _shared(model):
        storage = storage_of(tensor)
        if storage is None or storage.data_ptr() not in written:
            memo[id(tensor)] = tensor if isinstance(tensor, nn.Parameter) else _alias(tensor)
            shared.add(id(tensor))
    for tensor in tensors_in(model):
        if id(tensor) not in memo and not tensor.is_leaf:
            # copy.deepcopy refuses what was computed with gradients.
            memo[id(tensor)] = tensor.detach().clone().requires_grad_(tensor.requires_grad)
    try:
        twin = copy.deepcopy(model, memo)
    except Exception as error:
        raise InstrumentationError(
            f"{type(model).__name__} can't be copied, and its twin is what would be traced: {error}; plan and verify "
            f"need a model whose modules copy.deepcopy takes"
        ) from error
    for module in twin.modules():
        take_token(module)
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if is_ours(hook)]:
                del hooks[key]
                for flags in (module._forward_hooks_with_kwargs, module._forward_pre_hooks_with_kwargs):
                    flags.pop(key, None)
    # Under its own id the memo keeps the originals.
    own = tuple(value for key, value in memo.items() if key not in shared and key != id(memo))
    return Twin(twin, own)


def _alias(tensor: torch.Tensor) -> torch.Tensor:
    """The same values in another object: who sets its memory or its flags does so for the twin alone."""
    alias = tensor.detach().requires_grad_(tensor.requires_grad)
    vars(alias).update(vars(tensor))
    return alias


def written_by(
    model: nn.Module,
    is_ours: Callable[[object], bool],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> frozenset[int]:
    """Which of the storages that a twin would share a call writes to, by address; found by running it once, eagerly.

    Parameters alone are no reason to: what writes to those in a forward call writes to the model's.
    """
    shared = list(_shared(model))
    if all(isinstance(tensor, nn.Parameter) for tensor in shared):
        return frozenset()
    storages = {found.data_ptr(): found for found in map(storage_of, shared) if found is not None}
    twin = make_twin(model, is_ours)
    with same_random_state(), WriteWatch(storages) as watch:
        call: Callable[..., Any] = twin.module._call_impl
        call(*copied(tuple(args)), **copied(dict(kwargs)))
    written: frozenset[int] = watch.written
    return written


def _shared(model: nn.Module) -> Iterator[torch.Tensor]:
    """Parameters, what looks into their memory, and large tensors."""
    tensors = list(tensors_in(model))
    found = {id(tensor): storage_of(tensor) for tensor in tensors}
    addresses = {
        storage.data_ptr()
        for tensor in tensors
        if isinstance(tensor, nn.Parameter) and (storage := found[id(tensor)]) is not None
    }
    for tensor in tensors:
        storage = found[id(tensor)]
        is_large = storage is not None and storage.nbytes() > _COPIED_BYTES
        if (
            isinstance(tensor, nn.Parameter)
            or is_large
            or (storage is not None and storage.data_ptr() in addresses)
        ):
            yield tensor


def copied(arguments: Any) -> Any:
    """The arguments of a call, copied where a call may change them (tensors, caches)."""
    if isinstance(arguments, torch.Tensor):
        return arguments.detach().clone().requires_grad_(arguments.requires_grad)
    if isinstance(arguments, dict) and type(arguments) is dict:
        return {name: copied(value) for name, value in arguments.items()}
    if type(arguments) in (tuple, list):
        return type(arguments)(copied(value) for value in arguments)
    try:
        return copy.deepcopy(arguments)
    except Exception:
        return arguments  # what can't be copied is no tensor and no cache of tensors


@contextlib.contextmanager
def same_random_state() -> Iterator[None]:
    """Give every random state (Python, NumPy, torch on all devices in use) back as it was."""
    devices = list(range(torch.cuda.device_count())) if _uses_cuda() else []
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Compile inside the block, and leave Dynamo as it was: no entry, no count and no note of sizes stays.

    Dynamo keeps all three by code object, which the twin shares with the model: the lengths seen here would make
    the model's first compile a dynamic one, and entries would count against its recompile limit.
    """
    compiled: dict[tuple[int, int], tuple[CodeType, set[int]]] = {}
    notes = copy.deepcopy(pgo._CODE_STATE)
    counts = {name: counter.copy() for name, counter in counters.items()}

    def note(code: CodeType, new_code: CodeType) -> CodeType | None:
        region = _region()
        if (id(code), region) not in compiled:
            there = {id(entry.guard_manager) for entry in _entries(code, region)}
            compiled[id(code), region] = (code, there)
        return None

    handle = convert_frame.register_bytecode_hook(note)
    try:
        with torch._dynamo.config.patch(
            automatic_dynamic_local_pgo=False, automatic_dynamic_remote_pgo=False
        ):
            yield
    finally:
        handle.remove()
        for (_, region), (code, there) in compiled.items():
            for entry in _entries(code, region):
                manager: Any = entry.guard_manager
                if id(manager) not in there and manager.extra_state is not None:
                    manager.extra_state.invalidate(entry, DeletedGuardManagerWrapper("the twin's entry"))
        pgo._CODE_STATE = notes
        counters.clear()
        for name, counter in counts.items():
            counters[name].update(counter)


def _region() -> int:
    """Where Dynamo keeps what it compiles now; torch 2.11 has one place for all."""
    current = getattr(eval_frame, "get_eval_frame_isolate_recompiles_id", None)
    return current() if current is not None else -1


def _entries(code: CodeType, region: int) -> list[Any]:
    of_region = getattr(eval_frame, "_get_cache_entries_for_region", None)
    entries = (
        of_region(code, region) if of_region is not None else eval_frame._debug_get_cache_entry_list(code)
    )
    return list(entries)


def _uses_cuda() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
