"""A stream's records in the formats of other libraries, bit for bit, with memory bounded by one shard or record."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ..activations import ActivationStream
from .arrays import to_npz, to_safetensors, to_zarr
from .place import check_replaceable, made_before, remove
from .rows import to_arrow
from .selection import Progress, Selection

FORMATS = {
    ".safetensors": "safetensors",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".npz": "npz",
    ".zarr": "zarr",
}


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
        FileNotFoundError: the folder of ``output`` is missing.
        MissingPackageError: the format's library is not installed.
    """
    path = Path(output)
    chosen = format if format is not None else FORMATS.get(path.suffix)
    if chosen not in FORMATS.values():
        raise ValueError(
            f"format must be one of {', '.join(FORMATS.values())}, or the name end in one of {', '.join(FORMATS)}; "
            f"got format={format!r} and {path.name!r}"
        )
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} to export into")
    for site in sites or ():
        if site not in stream:
            raise ValueError(f"no site {site!r} to export; {stream.near_sites(site)}")
    earlier = made_before(path, sharded=chosen == "safetensors")
    if earlier and not overwrite:
        raise FileExistsError(f"{earlier[0]} exists already; overwrite replaces it")
    for file in earlier:
        check_replaceable(file, is_folder=chosen == "zarr")
    wanted = frozenset(sites) if sites is not None else frozenset(site.name for site in stream.sites)
    tracked = Selection(stream, wanted, progress)
    if chosen == "safetensors":
        return to_safetensors(tracked, path, shard_bytes, earlier)
    part = path.with_name(f".{path.name}.part")
    remove(part)
    try:
        if chosen in ("parquet", "arrow"):
            to_arrow(tracked, part, as_parquet=chosen == "parquet")
        elif chosen == "npz":
            to_npz(tracked, part)
        else:
            to_zarr(tracked, part)
    except BaseException:
        remove(part)
        raise
    remove(path)
    part.rename(path)
    return [path]
