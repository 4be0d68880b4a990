"""Formats that hold a row for each token: Parquet and Arrow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..dtypes import widened
from ..token_rows import TokenRows
from .libraries import require
from .selection import Selection

# Rows go to Parquet and Arrow in batches (row groups) of about this many bytes; a row's other columns, as Python
# objects, cost about the second number.
BATCH_BYTES = 32 << 20
ROW_OVERHEAD_BYTES = 256


def to_arrow(selection: Selection, path: Path, *, as_parquet: bool) -> None:
    arrow = require("pyarrow", "pyarrow")
    common = _common_dtype(selection)
    fields = {
        "site": arrow.string(),
        "role": arrow.string(),
        "rank": arrow.int64(),
        "step": arrow.int64(),
        "call": arrow.int64(),
        "row": arrow.int64(),
        "token_id": arrow.int64(),
        "dtype": arrow.string(),
        "shape": arrow.list_(arrow.int64()),
        "full_shape": arrow.list_(arrow.int64()),
        "values": arrow.list_(arrow.from_numpy_dtype(common)),
    }
    schema = arrow.schema(list(fields.items()), metadata={"fx_instrument": selection.description()})
    if as_parquet:
        # A dictionary of float values would be as long as the values.
        writer = require("pyarrow.parquet", "pyarrow").ParquetWriter(
            path, schema, compression="zstd", use_dictionary=["site", "role", "dtype"]
        )
    else:
        writer = require("pyarrow.ipc", "pyarrow").new_stream(path, schema)
    roles = {site.name: site.role for site in selection.sites}
    token_rows = TokenRows(selection.stream)
    columns: dict[str, list[Any]] = {name: [] for name in fields}
    widths: list[int] = []
    pending_bytes = 0

    def flush() -> None:
        nonlocal pending_bytes
        if not widths:
            return
        offsets = arrow.array(np.concatenate([[0], np.cumsum(widths)]).astype(np.int32))
        values = arrow.ListArray.from_arrays(offsets, arrow.array(np.concatenate(columns.pop("values"))))
        made = [arrow.array(columns[name], kind) for name, kind in fields.items() if name != "values"]
        writer.write_batch(arrow.record_batch([*made, values], schema=schema))
        columns.update({name: [] for name in fields})
        widths.clear()
        pending_bytes = 0

    with writer:
        for record in selection:
            flat = widened(record.tensor())
            # A sampled record, a vector, a scalar and an empty tensor are one row each.
            width = record.shape[-1] if len(record.shape) > 1 and flat.numel() else flat.numel()
            num_rows = flat.numel() // width if width else 1
            found_ids = None if record.is_sampled else token_rows.token_ids(record)
            token_ids = [None] * num_rows if found_ids is None else found_ids.tolist()
            values = flat.reshape(-1).numpy()
            rows_a_batch = max(1, BATCH_BYTES // (width * common.itemsize + ROW_OVERHEAD_BYTES))
            for start in range(0, num_rows, rows_a_batch):
                n = min(rows_a_batch, num_rows - start)
                columns["site"] += [record.site] * n
                columns["role"] += [roles[record.site]] * n
                columns["rank"] += [record.rank] * n
                columns["step"] += [record.step] * n
                columns["call"] += [record.call] * n
                columns["row"] += range(start, start + n)
                columns["token_id"] += token_ids[start : start + n]
                columns["dtype"] += [str(record.dtype).removeprefix("torch.")] * n
                columns["shape"] += [list(record.shape)] * n
                columns["full_shape"] += [list(record.full_shape)] * n
                columns["values"].append(values[start * width : (start + n) * width].astype(common))
                widths += [width] * n
                pending_bytes += n * (width * common.itemsize + ROW_OVERHEAD_BYTES)
                if pending_bytes >= BATCH_BYTES:
                    flush()
        flush()


def _common_dtype(selection: Selection) -> np.dtype[Any]:
    """The NumPy dtype that holds the values of every chosen record exactly."""
    dtypes = selection.dtypes()
    names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
    found = {widened(torch.empty(0, dtype=dtype)).numpy().dtype for dtype in dtypes} or {np.dtype(np.float32)}
    # Arrow's half floats are not readable everywhere; float32 holds them exactly.
    found = {np.dtype(np.float32) if dtype == np.float16 else dtype for dtype in found}
    common = np.result_type(*found)
    exact = all(np.can_cast(dtype, common, "safe") for dtype in found)
    # NumPy calls int64 -> float64 safe; above 2**53 it is not.
    exact = exact and not (common.kind == "f" and any(d.kind in "iu" and d.itemsize == 8 for d in found))
    if common.kind == "c" or not exact:
        raise ValueError(
            f"the chosen sites hold {names}, for which Parquet and Arrow have no one exact type; "
            f"choose other sites, or export to safetensors or npz"
        )
    return common
