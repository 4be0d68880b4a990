"""Formats that hold an array for each record: safetensors, NumPy, Zarr."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .libraries import require
from .place import index_of, remove
from .selection import Selection


def to_safetensors(selection: Selection, path: Path, shard_bytes: int, earlier: Sequence[Path]) -> list[Path]:
    library = require("safetensors.torch", "safetensors")
    if shard_bytes <= 0:
        raise ValueError(f"shard_bytes must be greater than 0, got {shard_bytes!r}")
    if lacking := selection.dtypes() & {torch.complex32, torch.complex128}:
        raise ValueError(f"safetensors has no {', '.join(sorted(map(str, lacking)))}; export to npz or zarr")
    metadata = {"fx_instrument": selection.description()}
    shards: list[tuple[Path, list[str]]] = []
    held: dict[str, torch.Tensor] = {}
    num_bytes = total_bytes = 0

    def put(name: str, tensor: torch.Tensor) -> None:
        nonlocal num_bytes, total_bytes
        if held and num_bytes + tensor.nbytes > shard_bytes:
            flush()
        held[name] = tensor
        num_bytes += tensor.nbytes
        total_bytes += tensor.nbytes

    def flush() -> None:
        nonlocal num_bytes
        part = path.with_name(f".{path.name}.{len(shards)}.part")
        shards.append((part, list(held)))
        library.save_file(held, part, metadata=metadata)
        held.clear()
        num_bytes = 0

    try:
        for record in selection:
            put(selection.array_name(record), record.tensor())
            if (positions := selection.new_positions(record)) is not None:
                put(*positions)
        for name, tensor in selection.inputs():
            put(name, tensor)
        if held or not shards:
            flush()
        # Shards of an earlier export that this one doesn't replace would be taken for its own.
        for file in earlier:
            remove(file)
        if len(shards) == 1:
            shards[0][0].rename(path)
            return [path]
        files = []
        weight_map = {}
        for number, (part, names) in enumerate(shards, 1):
            file = path.with_name(f"{path.stem}-{number:05d}-of-{len(shards):05d}{path.suffix}")
            part.rename(file)
            files.append(file)
            weight_map.update(dict.fromkeys(names, file.name))
        index = index_of(path)
        described = {"metadata": {"total_size": total_bytes, **metadata}, "weight_map": weight_map}
        index.write_text(json.dumps(described))
        return [*files, index]
    finally:
        for part, _ in shards:
            remove(part)


def to_npz(selection: Selection, path: Path) -> None:
    # numpy.savez wants all arrays at once; its file is a zip of .npy members, which can be written one by one.
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:

        def put(name: str, values: npt.NDArray[Any]) -> None:
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, values, allow_pickle=False)

        dtypes = {}
        full_shapes = {}
        for record in selection:
            name = selection.array_name(record)
            put(name, record.numpy())
            dtypes[name] = str(record.dtype).removeprefix("torch.")
            if record.is_sampled:
                full_shapes[name] = list(record.full_shape)
            if (positions := selection.new_positions(record)) is not None:
                put(positions[0], positions[1].numpy())
        for name, tensor in selection.inputs():
            put(name, tensor.numpy())
        description = json.loads(selection.description())
        description.update(dtypes=dtypes, full_shapes=full_shapes)
        put("__metadata__", np.array(json.dumps(description)))


def to_zarr(selection: Selection, path: Path) -> None:
    zarr = require("zarr", "zarr")
    root = zarr.open_group(str(path), mode="w")
    root.attrs["fx_instrument"] = json.loads(selection.description())
    for record in selection:
        values = record.numpy()
        array = root.create_array(selection.array_name(record, "."), shape=values.shape, dtype=values.dtype)
        if values.size:
            array[...] = values
        array.attrs.update(
            step=record.step,
            call=record.call,
            rank=record.rank,
            dtype=str(record.dtype).removeprefix("torch."),
            full_shape=list(record.full_shape),
        )
        if (positions := selection.new_positions(record)) is not None:
            root.create_array(positions[0], data=positions[1].numpy())
    for name, tensor in selection.inputs():
        root.create_array(name, data=tensor.numpy())
