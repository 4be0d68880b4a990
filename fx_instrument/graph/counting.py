"""Counting a model's forward calls: around the compiled call, or by hooks where the user compiles."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch._dynamo.exc import BackendCompilerFailed

from ..errors import IncompleteCaptureWarning, InstrumentationError
from .gate import Gate
from .marker import (
    INTEGER_DTYPES,
    Marker,
    hook,
    is_exporting,
    is_plain,
    is_recomputing,
    step_begin,
    step_end,
    unwrapped,
)

is_dynamo_compiling = torch.compiler.is_dynamo_compiling


class CountedCall:
    """A compiled forward call that tells the open capture where a step begins and ends; stands outside the graph.

    Args:
        eager: runs calls that make a static cache of their own; None compiles them too. Made in a CUDA graph, the cache
            would lie in memory that the graph's next run overwrites.
        mixes_threads: this torch may take one thread's variant for another's, so that is warned of.
    """

    __slots__ = (
        "_capturing",
        "_eager",
        "_gate",
        "_idle",
        "_input_names",
        "_marker",
        "_mine",
        "_mixes_threads",
    )

    def __init__(
        self,
        idle: Callable[..., Any],
        capturing: Callable[..., Any],
        marker: Marker,
        gate: Gate,
        input_names: Sequence[str],
        eager: Callable[..., Any] | None,
        *,
        mixes_threads: bool,
    ) -> None:
        self._eager = eager
        self._mixes_threads = mixes_threads
        self._gate = gate
        self._mine = gate.mine
        self._idle = idle
        self._capturing = capturing
        self._marker = marker
        self._input_names = input_names

    @hook
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling():
            # Inside a function that the user compiles: the model runs as Python, in its own compiled graphs.
            torch._dynamo.graph_break("fx_instrument: an instrumented model runs its own compiled graphs")
        # All that an idle call costs; Gate says why it is enough.
        gate = self._gate
        try:
            turn = self._mine.turn
        except AttributeError:
            turn = gate.turn()
        turn.depth += 1
        try:
            if gate.switching:
                gate.wait(turn)
            eager = self._eager
            if eager is not None and not makes_cache(args, kwargs):
                eager = None
            if self._marker.sink is None:
                return (eager or self._idle)(*args, **kwargs)
            # Dynamo looks at frames only where a callback is set; keeping it from that takes microseconds.
            capture = self._capture if get_eval_frame_callback() is None else self._capture_unseen
            return capture(args, kwargs, eager or self._capturing)
        except BackendCompilerFailed as failure:
            # Dynamo wraps whatever a backend raises; what this package says reaches the caller as it was said.
            inner = failure.inner_exception
            if isinstance(inner, InstrumentationError):
                raise inner from None
            raise
        finally:
            turn.depth -= 1
            if gate.switching:
                gate.left()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _capture_unseen(self, args: Any, kwargs: Any, call: Callable[..., Any]) -> Any:
        """``_capture``, in calls from compiled code: Dynamo would compile what it runs."""
        return self._capture(args, kwargs, call)

    def _capture(self, args: Any, kwargs: Any, call: Callable[..., Any]) -> Any:
        marker = self._marker
        sink = marker.sink
        if sink is None or is_exporting() or is_recomputing():
            # No forward call of its own: what is exported does not run, what is recomputed ran before.
            return call(*args, **kwargs)
        if self._mixes_threads and self._gate.others_are_in():
            self._mixes_threads = False
            warnings.warn(
                f"several threads run this model at once in a capture, and torch {torch.__version__} may run one "
                f"thread's graph without captures for another, or crash: values may be missing; call it from one "
                f"thread, or use torch 2.13 or newer",
                IncompleteCaptureWarning,
                stacklevel=3,
            )
        calls = marker.calls
        calls.begin(sink, checked(integer_inputs(self._input_names, args, kwargs)))
        try:
            result = call(*args, **kwargs)
            marker.witness.completed = True
            return result
        finally:
            calls.end(sink)


def makes_cache(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call makes the memory of a static cache that it is given, as transformers' do in their first call."""
    return any(
        getattr(value, "is_compileable", False) and not getattr(value, "is_initialized", True)
        for value in (*args, *kwargs.values())
    )


class BeginStep:
    def __init__(self, marker: Marker, input_names: Sequence[str]) -> None:
        self._marker = marker
        self._input_names = input_names

    @hook
    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self._marker.capturing or is_exporting():
            return
        if torch.compiler.is_dynamo_compiling():
            inputs = integer_inputs(self._input_names, args, kwargs)
            step_begin(tuple(inputs), *inputs.values())
        else:
            self._begin(args, kwargs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _begin(self, args: Any, kwargs: Any) -> None:
        sink = self._marker.sink
        if sink is not None and not is_recomputing():
            self._marker.calls.begin(sink, checked(integer_inputs(self._input_names, args, kwargs)))


class EndStep:
    """Called with None for the output where an exception cut the call off, outside compiled code."""

    def __init__(self, marker: Marker) -> None:
        self._marker = marker

    @hook
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self._marker.capturing or is_exporting():
            return
        if torch.compiler.is_dynamo_compiling():
            step_end()
        else:
            self._end(output is not None)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _end(self, completed: bool) -> None:
        sink = self._marker.sink
        if sink is not None and not is_recomputing():
            self._marker.calls.end(sink)
            self._marker.witness.completed |= completed


def positional_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the parameters of ``forward`` that can be given by position."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(p.name for p in inspect.signature(model.forward).parameters.values() if p.kind in kinds)


def checked(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those of the inputs that the file can hold."""
    found = {}
    for name, value in inputs.items():
        value = unwrapped(value, "the input", name)
        if is_plain(value):
            found[name] = value
    return found


def integer_inputs(
    names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """The integer and boolean tensors of at most two dimensions among a call's arguments, by name.

    Of a 4-D attention mask (batch, heads or 1, queries, keys), as static caches make it, the last query's row, as int8:
    which keys it sees tells which tokens are padding, at a fraction of the size. Of several masks, one for each kind of
    layer, that of full attention: in others a window hides tokens, too.
    """
    named = {**dict(zip(names, args, strict=False)), **kwargs} if args else kwargs
    inputs = {}
    for name, value in named.items():
        if isinstance(value, dict) and name.endswith("attention_mask"):
            value = value.get("full_attention")
        if not isinstance(value, torch.Tensor):
            continue
        if value.dim() <= 2:
            if value.dtype in INTEGER_DTYPES:
                inputs[name] = value
        elif value.dim() == 4 and name.endswith("attention_mask") and value.shape[2] > 0:
            row = value[:, 0, -1]
            inputs[name] = (row == 0 if row.is_floating_point() else row != 0).view(torch.int8)
    return inputs
