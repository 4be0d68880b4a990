"""Dynamo's guards without those on this package's own hooks: a compiled variant is chosen before it is called.

Dynamo guards on whatever it read while tracing, our hooks and tokens included. With 8 sites the guards of an idle call
take 9.8 us and of a capturing one 11.1, where the plain model's take 7.4 to 8.2; filtered 8.3 and 8.4 to 8.9 (torch
2.13, ``GuardManager.check``, best of 9 on a busy machine). What they check is known: ``CountedCall`` calls the variant
that was traced for the state it is in, and whether hooks and modules are still those of the attachment is checked when
a block is entered.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import nn

GuardFilterFn = Callable[[Sequence[Any]], Sequence[bool]]

_HOOK = re.compile(r"(?:type\()?(.*?\._forward_hooks\[list\(dict\.keys\(.*?\._forward_hooks\)\)\[\d+\]\])")
_TOKEN = re.compile(r".*\._fx_instrument_(?:op_)?token$")
_PACKAGE = re.compile(r"G\['__import_fx_instrument_dot_")


class GuardFilter:
    """A ``guard_filter_fn`` for ``torch.compile`` that keeps all guards but those on one attachment's hooks.

    Only guards of frames that run the instrumented model itself are dropped. Behind graph breaks Dynamo shares the
    frames of modules of one class, and there a guard on a hook or token tells a marked module from another. Entries of
    another attachment are not looked into, with ``isolate_recompiles`` or without: Dynamo compares backends first. The
    marker's switch stays guarded: torch 2.11 keeps both variants together, and where threads call compiled models at
    once, torch 2.13 looks into the other's too (the region of ``isolate_recompiles`` is no thread's own): idle graphs
    would run in a block.

    Args:
        model: the instrumented model.
        hooks: the hooks that were installed in it.
        hook_ids: their keys in modules' dictionaries of hooks.
        user: the user's own ``guard_filter_fn``; what it drops is dropped.
    """

    def __init__(
        self,
        model: nn.Module,
        hooks: Collection[object],
        hook_ids: Collection[int],
        user: GuardFilterFn | None = None,
    ) -> None:
        self._model = model
        self._hooks = tuple(hooks)
        self._hook_ids = frozenset(hook_ids)
        self._user = user

    def __call__(self, guards: Sequence[Any]) -> list[bool]:
        keep = [True] * len(guards) if self._user is None else list(self._user(guards))
        if not any(guard.value is self._model for guard in guards):
            return keep
        # Names as "self._modules['mlp']._forward_hooks[list(dict.keys(...))[0]]"; a name in another form, of another
        # torch, is not recognised, and its guard stays.
        ours = {guard.name for guard in guards if any(guard.value is hook for hook in self._hooks)}
        return [kept and not self._is_ours(guard, ours) for kept, guard in zip(keep, guards, strict=True)]

    def _is_ours(self, guard: Any, ours: Collection[str]) -> bool:
        name = guard.name
        if "_forward_hooks" in name:
            if guard.guard_type == "DICT_NOT_CONTAINS":
                # One of ours is not always called and takes no keyword arguments; others' keys are others'.
                return _key(guard) in self._hook_ids
            hook = _HOOK.match(name)
            return hook is not None and hook[1] in ours and not name.endswith(".capturing")
        return _TOKEN.match(name) is not None or _PACKAGE.match(name) is not None


def _key(guard: Any) -> object:
    keywords: dict[str, object] = getattr(guard.orig_guard.create_fn, "keywords", {})
    return keywords.get("key")


def split_options(options: dict[str, Any] | None) -> tuple[GuardFilterFn | None, dict[str, Any] | None]:
    """``guard_filter_fn``, which is ``torch.compile``'s own, and the ``options`` that are the backend's."""
    if not options or "guard_filter_fn" not in options:
        return None, options
    rest = {name: value for name, value in options.items() if name != "guard_filter_fn"}
    return options["guard_filter_fn"], rest or None
