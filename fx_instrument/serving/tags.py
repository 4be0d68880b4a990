"""Whose rows a forward call computes: request ids and token positions, noted with each recorded step.

What is stored is what ``fx_instrument.requests`` reads. A record of (batch, tokens, hidden) counts as batch x tokens
rows, batch row by batch row.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import operator
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ..mask_columns import padding_before, step_columns
from ..requests import (
    MAX_REQUEST_ROWS,
    NEW_INPUT,
    NO_REQUEST,
    ROWS_INPUT,
    TOKENS_INPUT,
    encode_new,
    encode_rows,
)

log = logging.getLogger(__name__)


class NamedRun(NamedTuple):
    """Rows of one request in a forward call, as a row source tells of them: a plain tuple of three or more will do."""

    request_id: str
    """As the client knows it; "" stands for padding."""
    position: int
    """Of the first row's token in its sequence."""
    num_rows: int
    num_prompt_tokens: int | None = None
    """None: not known."""
    sequence: Hashable = None
    """Equal in all runs of a request, and different in those of another one with the same id; None: not known."""


RowSource = Callable[[], Sequence[NamedRun | tuple[Any, ...]] | None]
_KNOWN = 10_000
"""So many ids of a row source keep their number from one forward call to the next."""


class Tag:
    """One request id: the number that stands for it in files, and where its sequence is."""

    def __init__(self, request_id: str) -> None:
        self.id = request_id
        # Drawn, not counted: files of several processes, read as one, must not share a number.
        self.number = secrets.randbits(62)
        self.next_position: int | None = 0
        """Of the next call's first token, while every call of the sequence was seen; None: only its inputs can tell."""
        self.num_tokens = 0
        """Behind the last token that ran."""
        self.prompt_tokens: int | None = None
        """As far as is known by now."""
        self.gives_positions = False
        """A call of the sequence said where its tokens are."""

    def begins_again(self, position: int, num_tokens: int) -> bool:
        """Whether a call of these tokens begins another sequence, which happens to have the same id.

        One that runs all tokens so far and the one behind them goes on without a cache, or after its engine gave up
        what it had computed.
        """
        return position == 0 and self.num_tokens not in (0, num_tokens - 1)

    def sees(self, position: int, num_tokens: int, *, is_piece: bool) -> None:
        """A call of these tokens begins: what that says of the prompt's length.

        The first call has the prompt, whole unless the call says that it is a piece, or more than one token follows
        right behind.
        """
        if position == self.num_tokens == 0:
            self.prompt_tokens = None if is_piece else num_tokens
        elif position == self.num_tokens == self.prompt_tokens and (num_tokens > 1 or is_piece):
            self.prompt_tokens = None
        elif 0 < position < self.num_tokens == self.prompt_tokens:
            # Some of what the first call had is computed again: drafts that came with the prompt, and were rejected.
            self.prompt_tokens = None

    def lose_position(self) -> None:
        """Nobody saw what a forward call computed."""
        self.next_position = None
        if self.num_tokens == self.prompt_tokens:
            # It may have been more of the prompt.
            self.prompt_tokens = None

    @property
    def told(self) -> tuple[int, int | None]:
        """What a file needs to be told again once it has changed."""
        return self.number, self.prompt_tokens

    def entry(self) -> dict[str, Any]:
        """What a file says of the request."""
        # A client may use an id twice; this one is the request's own.
        engine_id = f"{self.id}-{self.number & 0xFFFFFFFF:08x}"
        return {
            "number": self.number,
            "id": self.id,
            "engine_id": engine_id,
            "prompt_tokens": self.prompt_tokens,
        }


TaggedRun = tuple[Tag | None, int, int]
"""Whose rows (None: nobody's), token position of the first one, number of rows."""


class Request:
    """What runs inside one ``Recorder.request``; shared by the threads that serve it.

    Args:
        epoch: of the recorder, a number that each start changes; None while it is off.
    """

    def __init__(self, ids: Sequence[str], patience_s: float, *, epoch: int | None = 0) -> None:
        self.ids = tuple(ids)
        self.patience_s = patience_s
        self._epoch = epoch
        self._warned = False
        self.is_over = False
        """Its block was left; a task that was begun inside may still have its context."""
        self._num_running = 0
        self._is_mixed = False
        """Two forward calls ran at once, so which of them a later one follows nothing tells."""
        self._first_position: int | None = 0  # of sequences that are not known yet
        self._tags: dict[tuple[int, str], Tag] = {}  # two clients of one batch may use the same id
        self._lock = threading.Lock()

    def runs(self, inputs: Mapping[str, torch.Tensor], epoch: int = 0) -> list[TaggedRun]:
        """Whose rows the forward call with these inputs computes; empty where its inputs don't tell.

        The batch rows are those of the ids, and nobody's where the id is "", or where calls before were not seen and
        the inputs don't tell the positions. Several rows of one id (beams, or a batch in one request) are told apart
        as ``id#0``, ``id#1``, ...
        """
        with self._lock:
            if epoch != self._epoch:
                self._epoch = epoch
                self._lose_positions()
            if self._num_running and not self._is_mixed:
                self._is_mixed = True
                log.warning(
                    "a request runs two forward calls at once: its later rows are recorded without ids"
                )
            runs = [] if self._is_mixed else self._runs(inputs)
            if runs:
                self._num_running += 1
            else:
                self._lose_positions()
            return runs

    def ended(self) -> None:
        """A forward call that ``runs`` told the rows of is over."""
        with self._lock:
            self._num_running -= 1

    def _lose_positions(self) -> None:
        """Nobody saw what a forward call of this request computed."""
        self._first_position = None
        for tag in self._tags.values():
            tag.lose_position()

    def _runs(self, inputs: Mapping[str, torch.Tensor]) -> list[TaggedRun]:
        tokens = inputs.get(TOKENS_INPUT)
        if tokens is None or tokens.dim() != 2 or "decoder_input_ids" in inputs:
            return []
        batch, length = tokens.shape
        if batch % len(self.ids):
            if not self._warned:
                self._warned = True
                log.warning(
                    "a request of %d ids ran a batch of %d: its rows are recorded without ids",
                    len(self.ids),
                    batch,
                )
            return []
        each = batch // len(self.ids)
        names = (
            self.ids if each == 1 else [one and f"{one}#{index}" for one in self.ids for index in range(each)]
        )
        mask = inputs.get("attention_mask")
        if mask is not None and (mask.dim() != 2 or len(mask) != batch or not 0 < length <= mask.shape[1]):
            mask = None
        # One sequence alone is not padded; several are looked at, which makes the host wait for an accelerator.
        is_read = mask is not None and (batch > 1 or mask.device.type == "cpu")
        real = step_columns(mask.cpu().numpy(), length) if mask is not None and is_read else None
        positions = inputs.get("position_ids")
        gives_positions = positions is not None
        # Of a prompt that it runs in pieces, generate() cuts the positions of each out of those of all.
        is_piece = positions is not None and positions.shape == tokens.shape and positions.stride(0) > length
        if positions is not None and (positions.device.type != "cpu" or positions.shape != tokens.shape):
            positions = None
        found: list[TaggedRun] = []
        for row, name in enumerate(names):
            if not name:
                found.append((None, 0, length))
                continue
            left, right = 0, 0
            if real is not None:
                left, right = _padding(real[row])
            elif positions is not None:
                left = padding_before(positions[row].tolist())
            count = length - left - right
            tag = self._tags.get((row, name))
            if tag is None:
                tag = self._tags[row, name] = Tag(name)
                tag.next_position = self._first_position
            if tag.gives_positions and not gives_positions:
                # A call beside the sequence's own, as those without a condition that ``guidance_scale`` makes.
                found.append((None, 0, length))
                continue
            start = tag.next_position
            if positions is not None and count:
                first = int(positions[row, left])
                if int(positions[row, left + count - 1]) == first + count - 1:
                    # What stands before the first token is padding, whatever the mask says.
                    start = first if first >= 0 else None
            if start is not None and tag.begins_again(start, count):
                tag = self._tags[row, name] = Tag(name)
            tag.gives_positions |= gives_positions
            if start is not None and count:
                tag.sees(start, count, is_piece=is_piece)
            mine: TaggedRun = (None, 0, count) if start is None else (tag, start, count)
            found += [part for part in ((None, 0, left), mine, (None, 0, right)) if part[2]]
        return found


class SourcedRows:
    """Rows that a batching engine tells of; its ids keep their numbers from call to call."""

    def __init__(self, source: RowSource) -> None:
        self._source = source
        self._tags: OrderedDict[tuple[str, Hashable], Tag] = OrderedDict()
        self._lock = threading.Lock()

    def runs(self) -> list[TaggedRun]:
        named = [_checked(NamedRun(*run)) for run in self._source() or ()]
        with self._lock:
            return [
                (self._tag(run) if run.request_id else None, run.position, run.num_rows)
                for run in named
                if run.num_rows
            ]

    def _tag(self, run: NamedRun) -> Tag:
        key = (run.request_id, run.sequence)
        tag = self._tags.get(key)
        if tag is None or (run.sequence is None and tag.begins_again(run.position, run.num_rows)):
            tag = self._tags[key] = Tag(run.request_id)
            if len(self._tags) > _KNOWN:
                self._tags.popitem(last=False)
        self._tags.move_to_end(key)
        tag.prompt_tokens = run.num_prompt_tokens
        return tag


def _checked(run: NamedRun) -> NamedRun:
    """The run, if ``fx_instrument.requests`` will read it: a single one that it refuses costs all requests of a folder.

    Raises:
        TypeError: the id is no string, or a number is no integer.
        ValueError: a position or count is negative, or above ``MAX_REQUEST_ROWS``.
    """
    if not isinstance(run.request_id, str):
        raise TypeError(f"a row source gives request ids as strings, got {run.request_id!r}")
    position, num_rows = operator.index(run.position), operator.index(run.num_rows)
    prompt = None if run.num_prompt_tokens is None else operator.index(run.num_prompt_tokens)
    if min(position, num_rows, prompt or 0) < 0 or max(position + num_rows, prompt or 0) > MAX_REQUEST_ROWS:
        raise ValueError(f"a row source gives positions and counts from 0 to {MAX_REQUEST_ROWS}, got {run!r}")
    return run._replace(position=position, num_rows=num_rows, num_prompt_tokens=prompt)


def ran(runs: Sequence[TaggedRun]) -> None:
    """The forward call of these runs succeeded: the next one goes on behind them."""
    for tag, position, count in runs:
        if tag is not None:
            tag.next_position = tag.num_tokens = position + count


def tagged(
    inputs: Mapping[str, torch.Tensor], runs: Sequence[TaggedRun], introduced: set[tuple[int, int | None]]
) -> tuple[dict[str, torch.Tensor], Collection[tuple[int, int | None]]]:
    """``inputs`` with the notes on ``runs``, and what this file is told of requests by them: what it was not told
    (``introduced``) before."""
    if not runs:
        return dict(inputs), ()
    numbered = [(NO_REQUEST if tag is None else tag.number, position, count) for tag, position, count in runs]
    noted = {**inputs, ROWS_INPUT: encode_rows(numbered)}
    new = {tag.told: tag.entry() for tag, _, _ in runs if tag is not None and tag.told not in introduced}
    if new:
        noted[NEW_INPUT] = encode_new(list(new.values()))
        introduced.update(new)
    return noted, new


def _padding(real: npt.NDArray[np.bool_]) -> tuple[int, int]:
    """How many tokens of a row are padding, on the left and on the right."""
    places = np.flatnonzero(real)
    if not len(places):
        return len(real), 0
    return int(places[0]), len(real) - 1 - int(places[-1])


_REQUESTS: contextvars.ContextVar[Mapping[object, Request]] = contextvars.ContextVar(
    "fx_instrument_requests", default=MappingProxyType({})
)
"""What each recorder serves in a context: two models of one process have a recorder each."""


def current_request(of: object) -> Request | None:
    """The request that this context serves with the recorder ``of``."""
    request = _REQUESTS.get().get(of)
    return None if request is None or request.is_over else request


@contextlib.contextmanager
def in_request(of: object, request: Request) -> Iterator[None]:
    """Forward calls in this context belong to ``request``, for the recorder ``of``."""
    token = _REQUESTS.set({**_REQUESTS.get(), of: request})
    try:
        yield
    finally:
        request.is_over = True
        # Raised in another context than was entered, as of a generator that a server resumes or closes elsewhere:
        # nothing was set here that is to be put back, and a response must not fail for it.
        with contextlib.suppress(ValueError):
            _REQUESTS.reset(token)
