"""What a model holds beside its parameters: found, put back after a call, and watched for what a call writes to."""

from __future__ import annotations

import contextlib
import copyreg
import types
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

_NO_STATE = (type, types.ModuleType, types.FunctionType, types.MethodType, str, bytes, int, float, complex)
_CONTAINERS = (list, tuple, set, frozenset, deque)


def tensors_in(model: nn.Module) -> Iterator[torch.Tensor]:
    """Parameters, buffers and other tensors that ``model`` holds, in containers and objects too; each once.

    What hooks and other callables hold is left out.
    """
    seen: set[int] = set()
    left: list[Any] = [model]
    while left:
        value = left.pop()
        if isinstance(value, _NO_STATE) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            yield value
            continue
        if callable(value) and not isinstance(value, nn.Module):
            continue
        if isinstance(value, dict):
            left += value.values()
        elif isinstance(value, _CONTAINERS):
            left += value
        left += vars(value).values() if hasattr(value, "__dict__") else ()
        left += _slots(value).values()


def storage_of(tensor: torch.Tensor) -> torch.UntypedStorage | None:
    """The memory that the values of ``tensor`` lie in; None where it is not one piece of its own."""
    if is_traceable_wrapper_subclass(tensor) or not torch._C._has_storage(tensor):
        return None
    storage = tensor.untyped_storage()
    return storage if storage.data_ptr() else None  # fake ones, and those without elements, lie nowhere


@contextlib.contextmanager
def put_back(objects: Collection[Any]) -> Iterator[None]:
    """Whatever the block changes in these tensors, containers and objects is undone in place at its end."""
    storages: dict[int, torch.UntypedStorage] = {}
    undo: list[Callable[[], object]] = []
    for found in objects:
        if isinstance(found, torch.Tensor):
            storage = storage_of(found)
            if storage is None:
                undo.append(partial(_copy_into, found, found.detach().clone()))
            else:
                storages[storage.data_ptr()] = storage
                undo.append(
                    partial(_lay_out, found, storage, found.storage_offset(), found.size(), found.stride())
                )
        elif not isinstance(found, _NO_STATE):
            undo += _undo(found)
    kept = [(storage, _copy_of(storage)) for storage in storages.values()]
    try:
        yield
    finally:
        for step in undo:
            step()
        for storage, values in kept:
            storage.copy_(values)


def _copy_of(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    copied: torch.UntypedStorage = storage.clone()  # type: ignore[no-untyped-call]
    return copied


def _undo(found: Any) -> Iterator[Callable[[], object]]:
    if isinstance(found, dict):
        yield partial(_refill, found, dict(found))
    elif isinstance(found, (list, deque)):
        yield partial(_replace_items, found, list(found))
    elif isinstance(found, set):
        yield partial(_replace_items, found, set(found))
    elif isinstance(found, np.ndarray):
        yield partial(np.copyto, found, found.copy())
    elif isinstance(found, torch.Generator):
        yield partial(found.set_state, found.get_state())
    if hasattr(found, "__dict__"):
        yield partial(_refill, vars(found), dict(vars(found)))
    for name, value in _slots(found).items():
        yield partial(object.__setattr__, found, name, value)


def _slots(found: Any) -> dict[str, Any]:
    names = copyreg._slotnames(type(found))  # type: ignore[attr-defined]
    return {name: getattr(found, name) for name in names if hasattr(found, name)}


def _refill(found: dict[Any, Any], before: Mapping[Any, Any]) -> None:
    missing = object()
    # Left alone where nothing changed: compiled code may look at a dict's version.
    if len(found) != len(before) or any(
        found.get(key, missing) is not value for key, value in before.items()
    ):
        found.clear()
        found.update(before)


def _replace_items(found: Any, before: Any) -> None:
    found.clear()
    (found.update if isinstance(found, set) else found.extend)(before)


@torch.no_grad()
def _copy_into(tensor: torch.Tensor, values: torch.Tensor) -> None:
    tensor.copy_(values)


@torch.no_grad()
def _lay_out(tensor: torch.Tensor, storage: torch.UntypedStorage, *geometry: Any) -> None:
    offset, size, stride = geometry
    same = (tensor.storage_offset(), tensor.size(), tensor.stride()) == geometry
    if not same or tensor.untyped_storage().data_ptr() != storage.data_ptr():
        tensor.set_(storage, offset, size, stride)


class WriteWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered, notes which of ``storages`` are written to; they are as before once it is left.

    Only what is written to is copied, before it is. Sees what runs as torch operations, each by its schema.
    """

    supports_higher_order_operators = True

    def __init__(self, storages: Mapping[int, torch.UntypedStorage]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._storages = storages
        self._before: dict[int, torch.UntypedStorage] = {}

    @property
    def written(self) -> frozenset[int]:
        """The addresses of those that were written to."""
        return frozenset(self._before)

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)  # type: ignore[no-untyped-call]
        for address, values in self._before.items():
            self._storages[address].copy_(values)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for value in pytree.tree_leaves(_written(func, args, kwargs)):
            storage = storage_of(value) if isinstance(value, torch.Tensor) else None
            address = storage.data_ptr() if storage is not None else 0
            if storage is not None and address in self._storages and address not in self._before:
                self._before[address] = _copy_of(storage)
        return func(*args, **kwargs)


def _written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    schema = getattr(func, "_schema", None)
    if schema is None:
        return [*args, *kwargs.values()]  # an operation on operations may write to any
    found = []
    for index, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found.append(args[index] if index < len(args) else kwargs.get(argument.name))
    return found
