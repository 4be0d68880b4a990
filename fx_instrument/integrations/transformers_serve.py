"""``transformers serve`` in this process: record the model that it loaded, request by request.

    serve = Serve(force_model=folder, device="cpu", non_blocking=True)
    framework = InstrumentationFramework(config)
    framework.instrument_model(served_model(serve), dynamic=True)
    recorder = Recorder(framework, "recordings")
    tag_requests(serve, recorder)
    recorder.start()

A request's id is its ``x-request-id`` header, or what the server made up and sends back in it. With continuous batching
a forward call mixes requests; which rows are whose is read from the batch that the engine is about to run.

The server has no public way to its model and its generation managers: this file knows their names in transformers 5.
"""

from __future__ import annotations

import contextvars
import itertools
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import InstrumentationError
from ..serving import Recorder

# So many ids are told apart where they come again.
_KNOWN = 10_000


def served_model(serve: Any) -> Any:
    """The model that a ``transformers.cli.serve.Serve`` has loaded (``force_model=...``).

    Raises:
        InstrumentationError: it has loaded none, or several, or is of a release that keeps them elsewhere.
    """
    loaded = list(_part(serve, "_model_manager", "loaded_models").values())
    if len(loaded) != 1:
        raise InstrumentationError(
            f"the server has loaded {len(loaded)} models: start it with force_model=..., so that one stays"
        )
    return loaded[0].model


def tag_requests(serve: Any, recorder: Recorder) -> None:
    """Have each recorded forward call say whose rows it computes.

    Generation one by one runs in one thread: it is given the request's context. Of continuous batching with
    asynchronous batches (the default with CUDA graphs), steps are recorded without ids.

    Raises:
        InstrumentationError: the server is of a release that names its parts otherwise.
    """
    state = _part(serve, "_generation_state")
    get_manager: Callable[..., Any] = _part(state, "get_manager")
    _part(state, "_cb_manager")
    wrapped: dict[int, Any] = {}

    def get_tagging_manager(*arguments: Any, **named: Any) -> Any:
        manager = get_manager(*arguments, **named)
        if id(manager) not in wrapped and hasattr(manager, "_thread"):
            wrapped[id(manager)] = manager
            _give_context(manager, recorder)
        return manager

    state.get_manager = get_tagging_manager
    sequences = _Sequences()
    recorder.set_row_source(lambda: _rows_of_batch(state, sequences))


def _give_context(manager: Any, recorder: Recorder) -> None:
    """Run a manager's generation in the context of the request that asked for it."""
    generate, stream, thread = manager.generate_non_streaming, manager.generate_streaming, manager._thread
    submit, async_submit = thread.submit, thread.async_submit

    async def generate_tagged(
        model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str, **more: Any
    ) -> Any:
        with recorder.request(request_id):
            return await generate(model, processor, inputs, gen_config, request_id, **more)

    def stream_tagged(
        model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str, **more: Any
    ) -> Any:
        with recorder.request(request_id):
            return stream(model, processor, inputs, gen_config, request_id, **more)

    manager.generate_non_streaming, manager.generate_streaming = generate_tagged, stream_tagged
    thread.submit = lambda fn, *args, **kwargs: submit(contextvars.copy_context().run, fn, *args, **kwargs)
    thread.async_submit = lambda fn, *args, **kwargs: async_submit(
        contextvars.copy_context().run, fn, *args, **kwargs
    )


class _Sequences:
    """Numbers the requests of continuous batching: an id may come again, and one request may have several states."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, tuple[weakref.ref[Any], int]] = OrderedDict()
        self._numbers = itertools.count()

    def number_of(self, state: Any) -> int:
        """The number of the request that an engine's state belongs to.

        For a request that gave its cache away and is computed again the engine makes a new state, whose tokens begin
        with the true prompt.
        """
        name = state.request_id
        known = self._known.get(name)
        if known is not None and (known[0]() is state or state._true_initial_tokens):
            number = known[1]
        else:
            number = next(self._numbers)
        self._known[name] = (weakref.ref(state), number)
        self._known.move_to_end(name)
        if len(self._known) > _KNOWN:
            self._known.popitem(last=False)
        return number


def _rows_of_batch(state: Any, sequences: _Sequences) -> Sequence[tuple[str, int, int, int, int]] | None:
    """What the batch computes that continuous batching is about to run, as ``Recorder.set_row_source`` takes it."""
    engine = getattr(state._cb_manager, "_cb", None)
    batch = getattr(getattr(engine, "batch_processor", None), "inputs_and_outputs", None)
    scheduled = getattr(batch, "requests_in_batch", None)
    if not scheduled:
        return None
    rows = []
    for one in scheduled:
        request, count = one.state, one.query_length
        num_prompt_tokens = request._true_initial_tokens or len(request.initial_tokens)
        # The engine has counted the rows in already when it runs them.
        first = request.position_offset - count
        rows.append((str(request.request_id), first, count, num_prompt_tokens, sequences.number_of(request)))
    return rows


def _part(whole: Any, *names: str) -> Any:
    for name in names:
        if not hasattr(whole, name):
            raise InstrumentationError(
                f"{type(whole).__name__} has no {name}: this transformers is of another release than 5.23, which the "
                f"integration was written for; instrument the model itself and record it without request ids"
            )
        whole = getattr(whole, name)
    return whole
