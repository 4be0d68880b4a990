"""A model's twin, to trace and compile beside the model itself: its own modules, the same parameters."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable, Iterator
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

# Buffers that a forward call may change (statistics, caches) are copied; larger ones are weights in all but name.
_COPIED_BUFFER_BYTES = 64 << 20


def make_twin(model: nn.Module, is_ours: Callable[[object], bool]) -> nn.Module:
    """A copy of ``model``'s modules that shares its parameters, without the hooks that ``is_ours`` knows.

    Hooks, compiled code and state of the model itself stay as they are, whatever is done with the twin.

    Raises:
        InstrumentationError: the model holds something that can't be copied.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        buffers = {id(buffer) for buffer in module._buffers.values() if buffer is not None}
        for value in (*module._parameters.values(), *module._buffers.values(), *module.__dict__.values()):
            if not isinstance(value, torch.Tensor):
                continue
            small = value.layout is not torch.strided or value.nbytes <= _COPIED_BUFFER_BYTES
            if id(value) not in buffers or not small or value.requires_grad:
                memo[id(value)] = value
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
    return twin


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
