"""A stream's records in the formats of other libraries, bit for bit, with memory bounded by one shard or record."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .activations import ActivationStream, Record, open_stream
from .analysis import describe
from .dtypes import widened
from .errors import MissingPackageError, NotAStreamError, StreamError
from .token_rows import TokenRows

FORMATS = {
    ".safetensors": "safetensors",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".npz": "npz",
    ".zarr": "zarr",
}
# Rows go to Parquet and Arrow in batches (row groups) of about this many bytes; a row's other columns, as Python
# objects, cost about the second number.
BATCH_BYTES = 32 << 20
ROW_OVERHEAD_BYTES = 256
Progress = Callable[[int, int], None]


def export_stream(
    stream: ActivationStream,
    output: str | os.PathLike[str],
    *,
    format: str | None = None,
    sites: Sequence[str] | None = None,
    overwrite: bool = False,
    shard_bytes: int = 1_000_000_000,
    progress: Progress | None = None,
) -> list[Path]:
    """Write the records into ``output`` and return the files (or the one folder) that were made.

    Values keep every bit: safetensors holds them in the captured dtype; the others, which lack bfloat16, float8
    and complex32, hold those as float32 and complex64, and ``dtype`` says what to cast back to.

    - safetensors, npz: one array a record, named ``SITE/STEP/CALL``; inputs as ``inputs/STEP/NAME``; of a stream
      of several ranks each behind ``rankN/``; sampled positions as ``positions/NUMEL``; everything else in the
      safetensors metadata, in npz under ``__metadata__``.
      Above ``shard_bytes`` safetensors becomes several files and an index, named as Hugging Face names them.
    - parquet, arrow (an IPC stream): one row a token, with site, role, rank, step, call, row, token_id, dtype,
      shape, full_shape and the vector ``values``; a sampled record is one row. For
      ``datasets.load_dataset("parquet", ...)`` and ``datasets.Dataset.from_file``.
    - zarr: a group of groups, ``SITE/STEP.CALL``, of several ranks behind ``rankN/``, with step, call, rank, dtype
      and full_shape as attributes.

    Args:
        stream: an open stream.
        output: file or, for zarr, folder; made under another name and renamed when whole.
        format: one of FORMATS' values; None takes it from the suffix.
        sites: names of the sites to export; None: all.
        overwrite: replace what is there.
        shard_bytes: the most that a safetensors file holds, and about what its making costs in memory.
        progress: called with (records done, records in all).

    Raises:
        ValueError: unknown format or site, values that have no common exact type (Parquet, Arrow), complex values
            where the format has none, files that were sampled in different ways.
        FileExistsError: ``output`` exists, or shards or an index of that name, and ``overwrite`` is False; or it is
            what no export made: a stream, or a folder other than a Zarr group's.
        MissingPackageError: the format's library is not installed.
    """
    path = Path(output)
    chosen = format if format is not None else FORMATS.get(path.suffix)
    if chosen not in FORMATS.values():
        raise ValueError(
            f"format must be one of {', '.join(FORMATS.values())}, or the name end in one of {', '.join(FORMATS)}; "
            f"got format={format!r} and {path.name!r}"
        )
    for site in sites or ():
        if site not in stream:
            raise ValueError(f"no site {site!r} to export; {stream.near_sites(site)}")
    earlier = _made_before(path, sharded=chosen == "safetensors")
    if earlier and not overwrite:
        raise FileExistsError(f"{earlier[0]} exists already; overwrite replaces it")
    for file in earlier:
        _check_replaceable(file, is_folder=chosen == "zarr")
    wanted = frozenset(sites) if sites is not None else frozenset(site.name for site in stream.sites)
    tracked = _Selection(stream, wanted, progress)
    if chosen == "safetensors":
        return _to_safetensors(tracked, path, shard_bytes, earlier)
    part = path.with_name(f".{path.name}.part")
    _remove(part)
    try:
        if chosen in ("parquet", "arrow"):
            _to_arrow(tracked, part, as_parquet=chosen == "parquet")
        elif chosen == "npz":
            _to_npz(tracked, part)
        else:
            _to_zarr(tracked, part)
    except BaseException:
        _remove(part)
        raise
    _remove(path)
    part.rename(path)
    return [path]


class _Selection:
    """The chosen records of a stream, counted as they pass."""

    def __init__(self, stream: ActivationStream, sites: frozenset[str], progress: Progress | None) -> None:
        self.stream = stream
        self.sites = [site for site in stream.sites if site.name in sites]
        everything = len(self.sites) == len(stream.sites)
        self.num_records = len(stream) if everything else sum(len(stream[site.name]) for site in self.sites)
        self._progress = progress
        self._positions: dict[str, torch.Tensor] = {}

    def __iter__(self) -> Iterator[Record]:
        """In the order of the file, which is read once."""
        names = {site.name for site in self.sites}
        done = 0
        for record in self.stream:
            if record.site in names:
                yield record
                done += 1
                if self._progress is not None:
                    self._progress(done, self.num_records)

    def inputs(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every recorded input, with the name of its array."""
        for rank in self.stream.ranks:
            for step in self.stream.input_steps():
                for name, tensor in self.stream.inputs(step, rank=rank).items():
                    yield f"{self._of_rank(rank)}inputs/{step}/{name}", tensor

    def dtypes(self) -> set[torch.dtype]:
        return {record.dtype for site in self.sites for record in self.stream[site.name]}

    def array_name(self, record: Record, separator: str = "/") -> str:
        """Name of a record's array."""
        return f"{self._of_rank(record.rank)}{record.site}/{record.step}{separator}{record.call}"

    def _of_rank(self, rank: int) -> str:
        return f"rank{rank}/" if len(self.stream.ranks) > 1 else ""

    def new_positions(self, record: Record) -> tuple[str, torch.Tensor] | None:
        """Name and positions of a sampled record, where no record had those before."""
        positions = record.positions()
        name = f"positions/{math.prod(record.full_shape)}"
        if positions is None:
            return None
        known = self._positions.setdefault(name, positions)
        if known is positions:
            return name, positions
        if not torch.equal(known, positions):
            raise ValueError("the files were sampled at different places; export them one by one")
        return None

    def description(self) -> str:
        """Everything that the arrays themselves don't say, as JSON."""
        sites = [{"name": site.name, "role": site.role} for site in self.sites]
        return json.dumps({"stream": describe(self.stream), "sites": sites})


def _to_safetensors(
    selection: _Selection, path: Path, shard_bytes: int, earlier: Sequence[Path]
) -> list[Path]:
    library = _require("safetensors.torch", "safetensors")
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
            _remove(file)
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
        index = _index_of(path)
        described = {"metadata": {"total_size": total_bytes, **metadata}, "weight_map": weight_map}
        index.write_text(json.dumps(described))
        return [*files, index]
    finally:
        for part, _ in shards:
            _remove(part)


def _to_npz(selection: _Selection, path: Path) -> None:
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


def _to_zarr(selection: _Selection, path: Path) -> None:
    zarr = _require("zarr", "zarr")
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


def _to_arrow(selection: _Selection, path: Path, *, as_parquet: bool) -> None:
    arrow = _require("pyarrow", "pyarrow")
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
        writer = _require("pyarrow.parquet", "pyarrow").ParquetWriter(
            path, schema, compression="zstd", use_dictionary=["site", "role", "dtype"]
        )
    else:
        writer = _require("pyarrow.ipc", "pyarrow").new_stream(path, schema)
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
            rows_a_batch = max(1, BATCH_BYTES // max(1, width * common.itemsize))
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


def _common_dtype(selection: _Selection) -> np.dtype[Any]:
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


def _made_before(path: Path, *, sharded: bool) -> list[Path]:
    """What there is of an earlier export: the file or folder itself, and an index and shards."""
    files = [path]
    if sharded:
        shard = re.compile(rf"{re.escape(path.stem)}-\d{{5,}}-of-\d{{5,}}{re.escape(path.suffix)}")
        files += [_index_of(path), *(near for near in path.parent.glob("*") if shard.fullmatch(near.name))]
    return [file for file in files if os.path.lexists(file)]


def _check_replaceable(path: Path, *, is_folder: bool) -> None:
    """Raise FileExistsError for what no export made: the output may have been forgotten, and be the last input."""
    if path.is_dir():
        names = {inside.name for inside in path.iterdir()}
        if not is_folder or (names and not names & {"zarr.json", ".zgroup"}):
            raise FileExistsError(
                f"{path} is a folder that no export to this format made; nothing was overwritten"
            )
    elif path.is_file() and path.stat().st_size:
        try:
            open_stream(path).close()
        except NotAStreamError:
            return
        except StreamError:
            # A stream that is damaged, still being written, or of a later version.
            pass
        raise FileExistsError(f"{path} holds captured values; overwrite replaces earlier exports only")


def _index_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.index.json")


def _require(module: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as missing:
        if missing.name is not None and re.match(rf"{package}(\.|$)", missing.name):
            raise MissingPackageError(
                f"this export needs the package {package}: pip install 'fx_instrument[export]'"
            ) from missing
        raise


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
