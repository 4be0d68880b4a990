"""Which token each row of a record belongs to, and which rows are padding, by the inputs of its step."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
import numpy.typing as npt

from .activations import ActivationStream, Record
from .mask_columns import position_columns, step_columns

# Inputs of this many bytes are kept. Pages hold the steps of a site together, so each site comes back to the same
# steps; int64 ids and 1-byte masks of 16 MiB are those of a million tokens and more.
CACHE_BYTES = 16 << 20


class TokenRows:
    """Matches the rows of records (all dimensions but the last, flattened) with the tokens of their step."""

    def __init__(self, stream: ActivationStream) -> None:
        self._stream = stream
        self._names = frozenset(stream.input_names)
        self._cache: OrderedDict[tuple[int, int], dict[str, npt.NDArray[Any]]] = OrderedDict()
        self._cached_bytes = 0

    def kept(self, record: Record) -> npt.NDArray[np.bool_] | None:
        """One bool a row of the module's output, False for padding; None: no padding, or none known.

        A 2-D mask is (batch, all tokens so far); with a KV cache the rows of a step are the mask's last columns.
        Where no mask tells, ``position_ids`` may. In a step with decoder inputs the decoder's modules go by the
        decoder's mask.
        """
        ids_name, mask_name = self._names_for(record)
        if self._names.isdisjoint((mask_name, "position_ids")) or len(record.full_shape) < 2:
            return None
        inputs = self._inputs(record)
        mask, ids, positions = inputs.get(mask_name), inputs.get(ids_name), inputs.get("position_ids")
        columns = None
        if mask is not None and mask.ndim == 2:
            tokens = _tokens_a_sequence(record, mask.shape[0], ids)
            if tokens is None or not 0 < tokens <= mask.shape[1]:
                return None
            columns = step_columns(mask, tokens)
        if columns is None and ids is not None and ids.ndim == 2 and positions is not None:
            told = positions.shape == ids.shape and _tokens_a_sequence(record, len(ids), ids) is not None
            columns = position_columns(positions) if told else None
        return None if columns is None or columns.all() else columns.reshape(-1)

    def token_ids(self, record: Record) -> npt.NDArray[np.int64] | None:
        """One token id a row of the module's output; None where rows and recorded ids don't match."""
        ids_name, _ = self._names_for(record)
        if ids_name not in self._names or len(record.full_shape) < 2:
            return None
        ids = self._inputs(record).get(ids_name)
        if ids is None or ids.ndim != 2 or _tokens_a_sequence(record, ids.shape[0], ids) is None:
            return None
        return ids.reshape(-1).astype(np.int64)

    def _names_for(self, record: Record) -> tuple[str, str]:
        if "decoder_input_ids" in self._names and "decoder" in record.site.split("."):
            return "decoder_input_ids", "decoder_attention_mask"
        return "input_ids", "attention_mask"

    def _inputs(self, record: Record) -> dict[str, npt.NDArray[Any]]:
        key = (record.rank, record.step)
        cached = self._cache.get(key)
        if cached is not None:
            self._cache.move_to_end(key)
            return cached
        inputs: dict[str, npt.NDArray[Any]] = {}
        for name, values in self._stream.inputs(record.step, rank=record.rank).items():
            array = values.numpy()
            # A byte an element is enough of an integer mask; boolean ones stay boolean.
            is_wide_mask = name.endswith("mask") and array.dtype != np.bool_
            inputs[name] = (array != 0).view(np.uint8) if is_wide_mask else array
        self._cache[key] = inputs
        self._cached_bytes += sum(values.nbytes for values in inputs.values())
        while self._cached_bytes > CACHE_BYTES and len(self._cache) > 1:
            _, evicted = self._cache.popitem(last=False)
            self._cached_bytes -= sum(values.nbytes for values in evicted.values())
        return inputs


def _tokens_a_sequence(record: Record, batch: int, ids: npt.NDArray[Any] | None) -> int | None:
    """How many rows of the record belong to each of ``batch`` sequences; None if they don't divide like that."""
    rows = record.full_shape[:-1]
    known = ids is not None and ids.ndim == 2 and ids.shape[0] == batch
    if len(rows) == 2 and rows[0] == batch:
        return None if known and ids is not None and ids.shape[1] != rows[1] else rows[1]
    # Rows of all sequences in one dimension, as some mixtures of experts have them. Only the ids can tell them from
    # (batch, hidden), a pooled output.
    if len(rows) == 1 and known and ids is not None and rows[0] == ids.size:
        return int(ids.shape[1])
    return None
