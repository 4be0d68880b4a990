"""Which token each row of a record belongs to, and which rows are padding, by the inputs of its step."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .activations import ActivationStream, Record
from .mask_columns import position_columns, step_columns
from .row_order import order_of, reads_tokens

# Inputs of this many bytes are kept. Pages hold the steps of a site together, so each site comes back to the same
# steps; int64 ids and 1-byte masks of 16 MiB are those of a million tokens and more.
CACHE_BYTES = 16 << 20


class TokenRows:
    """Matches the rows of records (all dimensions but the last, flattened) with the tokens of their step."""

    def __init__(self, stream: ActivationStream) -> None:
        self._stream = stream
        self._names = frozenset(stream.input_names)
        # What others wrote may describe its model in any way, or not at all.
        models = [part.metadata.get("model") for part in stream.parts]
        self._is_encoder_decoder = "decoder_input_ids" in self._names or any(
            isinstance(model, dict) and model.get("is_encoder_decoder") for model in models
        )
        self._cache: OrderedDict[tuple[int, int], dict[str, npt.NDArray[Any]]] = OrderedDict()
        self._cached_bytes = 0

    def kept(self, record: Record) -> npt.NDArray[np.bool_] | None:
        """One bool a row of the module's output, False for padding; None: no padding, or none known.

        A 2-D mask is (batch, all tokens so far); with a KV cache the rows of a step are the mask's last columns.
        Where no mask tells, ``position_ids`` may. An encoder's and a decoder's modules go by their own masks.
        """
        names = self._names_for(record)
        if names is None or self._names.isdisjoint((names[1], "position_ids")) or len(record.full_shape) < 2:
            return None
        inputs, rows = self._inputs(record), record.full_shape[:-1]
        ids, mask, positions = (_of_batch(inputs.get(name)) for name in (*names, "position_ids"))
        columns = None
        if mask is not None:
            if ids is None and len(rows) == 2:
                mask = _once_a_sequence(mask, rows[0])
            if ids is not None and len(ids) == len(mask):
                tokens: int | None = ids.shape[1]
            else:
                tokens = _tokens_without_ids(rows, mask, positions)
            if tokens is None or not 0 < tokens <= mask.shape[1]:
                return None
            columns = step_columns(mask, tokens)
        if columns is None and ids is not None and positions is not None and positions.shape == ids.shape:
            columns = position_columns(positions)
        if columns is None or columns.all():
            return None
        if len(rows) == 3 and rows[:2] == columns.shape and rows[2] != rows[1]:
            # A row for each head of each token.
            return np.repeat(columns.reshape(-1), rows[2])
        return _by_rows(columns, rows)

    def token_ids(self, record: Record) -> npt.NDArray[np.int64] | None:
        """One token id a row of the module's output; None where rows and recorded ids don't match."""
        names = self._names_for(record)
        if names is None or names[0] not in self._names or len(record.full_shape) < 2:
            return None
        ids = _of_batch(self._inputs(record).get(names[0]))
        found = None if ids is None else _by_rows(ids, record.full_shape[:-1])
        return None if found is None else found.astype(np.int64)

    def _names_for(self, record: Record) -> tuple[str, str] | None:
        """The inputs that a record's rows go by; None where they are no tokens, or nothing tells whose."""
        if not reads_tokens(record.site):
            return None
        if not self._is_encoder_decoder:
            return "input_ids", "attention_mask"
        part = next((part for part in record.site.split(".") if part.endswith(("encoder", "decoder"))), "")
        if part.endswith("encoder"):
            return "input_ids", "attention_mask"
        return ("decoder_input_ids", "decoder_attention_mask") if part else None

    def _inputs(self, record: Record) -> dict[str, npt.NDArray[Any]]:
        key = (record.rank, record.step)
        cached = self._cache.get(key)
        if cached is not None:
            self._cache.move_to_end(key)
            return cached
        inputs: dict[str, npt.NDArray[Any]] = {}
        for name, values in self._stream.inputs(record.step, rank=record.rank).items():
            array = values.numpy()
            # A byte an element is enough of a mask. One of int8 is a row of a 4-D one, which is another thing.
            is_wide_mask = name.endswith("mask") and array.dtype != np.int8
            inputs[name] = array != 0 if is_wide_mask else array
        self._cache[key] = inputs
        self._cached_bytes += sum(values.nbytes for values in inputs.values())
        while self._cached_bytes > CACHE_BYTES and len(self._cache) > 1:
            _, evicted = self._cache.popitem(last=False)
            self._cached_bytes -= sum(values.nbytes for values in evicted.values())
        return inputs


def _of_batch(values: npt.NDArray[Any] | None) -> npt.NDArray[Any] | None:
    """An input if it is (batch, tokens)."""
    return values if values is not None and values.ndim == 2 else None


def _once_a_sequence(mask: npt.NDArray[Any], num_sequences: int) -> npt.NDArray[Any]:
    """The mask of an encoder's sequences, of which each has several hypotheses in the batch that the mask is for."""
    beams, left = divmod(len(mask), max(1, num_sequences))
    if beams < 2 or left:
        return mask
    first = mask[::beams]
    return first if np.array_equal(np.repeat(first, beams, axis=0), mask) else mask


def _tokens_without_ids(
    rows: Sequence[int], mask: npt.NDArray[Any], positions: npt.NDArray[Any] | None
) -> int | None:
    """How many tokens each sequence has of which nothing but embeddings was given; None where nothing tells.

    Fewer rows than columns are those of a cache where the positions are of as many; of sound, the mask has samples.
    """
    if len(rows) != 2 or rows[0] != len(mask):
        return None
    told = rows[1] == mask.shape[1] or (positions is not None and positions.shape[1] == rows[1])
    return rows[1] if told else None


def _by_rows(values: npt.NDArray[Any], rows: Sequence[int]) -> npt.NDArray[Any] | None:
    """What is known of each token, (batch, tokens), for each row of a value; None where its rows are no tokens."""
    order = order_of(rows, *values.shape)
    if order is None:
        return None
    return (values if order == "batch first" else values.T).reshape(-1)
