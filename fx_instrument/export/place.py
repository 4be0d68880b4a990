"""Where an export goes, and what of an earlier one is there."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from ..stream.mapped import begins_as_stream


def made_before(path: Path, *, sharded: bool) -> list[Path]:
    """What there is of an earlier export: the file or folder itself, and an index and shards."""
    files = [path]
    if sharded:
        shard = re.compile(rf"{re.escape(path.stem)}-\d{{5,}}-of-\d{{5,}}{re.escape(path.suffix)}")
        files += [index_of(path), *(near for near in path.parent.glob("*") if shard.fullmatch(near.name))]
    return [file for file in files if os.path.lexists(file)]


def check_replaceable(path: Path, *, is_folder: bool) -> None:
    """Raise FileExistsError for what no export made: the output may have been forgotten, and be the last input."""
    if path.is_dir():
        names = {inside.name for inside in path.iterdir()}
        if not is_folder or (names and not names & {"zarr.json", ".zgroup"}):
            raise FileExistsError(
                f"{path} is a folder that no export to this format made; nothing was overwritten"
            )
    elif path.is_file() and begins_as_stream(path):
        raise FileExistsError(f"{path} holds captured values; overwrite replaces earlier exports only")


def index_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.index.json")


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
