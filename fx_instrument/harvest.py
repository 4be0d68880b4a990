"""Harvesting a dataset with several processes: a stream file and a manifest each, resumable, read as one.

    folder/
      worker-0-3f9a2c61.stream     what that process captured
      worker-0-3f9a2c61.jsonl      a line a batch: {"steps": [0, 1], "rows": 8, "ids": ["doc-0", ...]}
      manifest.jsonl               a line a file, once the harvest is collected

A process that is started again takes a new file. What counts as done is read from the files themselves: a batch whose
values did not all reach its file is run again.
"""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from .activations import ActivationStream, open_stream
from .capture_block import Capture
from .errors import CorruptStreamError, InstrumentationError, TruncatedStreamError
from .framework import InstrumentationFramework
from .repair import recover_stream

MANIFEST = "manifest.jsonl"


@dataclass(frozen=True)
class HarvestedFile:
    """One file of a harvest, as ``manifest.jsonl`` has it."""

    file: str
    """Its name in the folder."""
    rows: int
    """How many inputs it holds, those whose values are whole only."""
    steps: int
    ids: tuple[str, ...]
    """Of the inputs, in the order of their rows: step by step, and within a step by batch row."""


class Harvest:
    """One process' part of a harvest: captures into a file of its own and notes which inputs lie in it.

        with Harvest(framework, "activations", name=f"rank-{rank}") as harvest:
            for ids, batch in batches:
                with harvest.batch(ids):
                    model(**batch)

    Args:
        framework: has an instrumented model; the file is captured as its configuration says, and loses nothing.
        folder: shared by all processes (on one machine, or a network disk); made private to this user.
        name: who writes, such as a rank; part of the file's name, which a random part makes unique.
    """

    def __init__(
        self, framework: InstrumentationFramework, folder: str | os.PathLike[str], *, name: str = "worker"
    ) -> None:
        if not name or not all(letter.isalnum() or letter in "-_." for letter in name) or name[0] == ".":
            raise ValueError(f"name must be letters, digits, '-', '_' and '.', got {name!r}")
        self.folder = Path(folder)
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path = self.folder / f"{name}-{uuid.uuid4().hex[:8]}.stream"
        self._capture: Capture = framework.capture_activations(self.path, mode="x")
        self._lines: Any = None

    def __enter__(self) -> Harvest:
        self._capture.__enter__()
        notes = self.path.with_suffix(".jsonl")
        self._lines = os.fdopen(os.open(notes, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._capture.__exit__(kind, error, trace)
        finally:
            self._lines.close()

    def close(self) -> None:
        """End the file, where no ``with`` block does."""
        self.__exit__(None, None, None)

    @contextlib.contextmanager
    def batch(self, ids: Sequence[str]) -> Iterator[None]:
        """The forward calls inside are of these inputs, a batch row each; noted once the block ends without error.

        Raises:
            InstrumentationError: nothing was captured inside the block.
        """
        first = self._capture.report.steps
        yield
        end = self._capture.report.steps
        if end == first:
            raise InstrumentationError(
                f"the batch of {len(ids)} inputs made no forward call of the instrumented model"
            )
        line = {"steps": [first, end], "rows": len(ids), "ids": [str(one) for one in ids]}
        self._lines.write(json.dumps(line) + "\n")
        self._lines.flush()


def finished_ids(folder: str | os.PathLike[str]) -> set[str]:
    """Ids of the inputs whose values lie whole in a file of ``folder``; empty if there is no such folder.

    Also of files that are still written or whose writer was killed.
    """
    return {one for found in _files(Path(folder)) for one in found.ids}


def collect(folder: str | os.PathLike[str]) -> list[HarvestedFile]:
    """End what was left without an index, and write ``manifest.jsonl``: a line a file, with its rows and their ids.

    To be called when all processes are done. Files that hold nothing whole are left out, and left alone.
    """
    folder = Path(folder)
    for stream, _ in _pairs(folder):
        with contextlib.suppress(TruncatedStreamError, CorruptStreamError):
            try:
                open_stream(stream).close()
            except TruncatedStreamError:
                recover_stream(stream)
    files = [found for found in _files(folder) if found.rows]
    part = folder / f".{MANIFEST}.part"
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(asdict(found)) + "\n" for found in files)
    part.replace(folder / MANIFEST)
    return files


def _pairs(folder: Path) -> Iterable[tuple[Path, Path]]:
    notes = [path for path in sorted(folder.glob("*.jsonl")) if path.name != MANIFEST]
    return [(path.with_suffix(".stream"), path) for path in notes if path.with_suffix(".stream").exists()]


def _files(folder: Path) -> Iterator[HarvestedFile]:
    for path, notes in _pairs(folder):
        try:
            stream = open_stream(path, recover=True)
        except (TruncatedStreamError, CorruptStreamError):
            continue
        with stream:
            ids: list[str] = []
            steps = 0
            for first, end, of in _batches(notes):
                if _is_whole(stream, range(first, end)):
                    ids += of
                    steps += end - first
            yield HarvestedFile(path.name, len(ids), steps, tuple(ids))


def _batches(notes: Path) -> Iterator[tuple[int, int, list[str]]]:
    for line in notes.read_text(encoding="utf-8").splitlines():
        try:
            batch = json.loads(line)
        except ValueError:
            return  # the last line of a process that was killed
        yield batch["steps"][0], batch["steps"][1], batch["ids"]


def _is_whole(stream: ActivationStream, steps: range) -> bool:
    summary = stream.metadata.get("summary") or {}
    if summary and not summary.get("failed") and not stream.damage:
        # Ended as it should be: what a module did not record, it did not return.
        return steps.stop <= stream.num_steps
    return all(stream.find(site.name, step) is not None for step in steps for site in stream.sites)
