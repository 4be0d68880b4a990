"""Harvesting a dataset with several processes: a stream file and a manifest each, resumable, read as one.

    folder/
      worker-0-3f9a2c61.stream     what that process captured
      worker-0-3f9a2c61.jsonl      a line a batch: {"steps": [0, 1], "rows": 8, "ids": ["doc-0", ...]}
      manifest.jsonl               a line a file, once the harvest is collected

A process that is started again takes a new file. What counts as done is read from the files themselves: a batch whose
values did not all reach its file is run again. A process holds a lock on its manifest as long as it writes, so that
its file is judged once it has ended (or died).
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

from .activations import ActivationStream, open_stream
from .errors import CorruptStreamError, InstrumentationError, NotAStreamError, TruncatedStreamError
from .forks import track
from .framework import InstrumentationFramework
from .repair import recover_stream
from .stream.files import close_file, write_all

MANIFEST = "manifest.jsonl"
# A killed process leaves a file that is cut; a machine that lost power one with zeros, at its end or all through.
_DAMAGED = (TruncatedStreamError, CorruptStreamError, NotAStreamError)


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
        self._capture = framework.capture_activations(self.path, mode="x")
        self._notes_fd: int | None = None
        self._turn = threading.Lock()

    def __enter__(self) -> Harvest:
        notes = self.path.with_suffix(".jsonl")
        fd = self._notes_fd = os.open(notes, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        track(self)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            self._capture.__enter__()
        except BaseException:
            self._close_notes()
            notes.unlink()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._capture.__exit__(kind, error, trace)
        finally:
            self._close_notes()

    def _close_notes(self) -> None:
        fd, self._notes_fd = self._notes_fd, None
        if fd is not None:
            close_file(fd)

    def forked(self) -> None:
        """In a forked process: nothing is captured or noted, and the lock on the notes is the parent's."""
        fd, self._notes_fd = self._notes_fd, None
        if fd is not None:
            os.close(fd)
        self._turn = threading.Lock()

    def close(self) -> None:
        """End the file, where no ``with`` block does."""
        self.__exit__(None, None, None)

    @contextlib.contextmanager
    def batch(self, ids: Sequence[str]) -> Iterator[None]:
        """The forward calls inside are of these inputs, a batch row each; noted once the block ends without error.

        Raises:
            TypeError: a single id was given.
            InstrumentationError: nothing was captured inside the block.
        """
        if isinstance(ids, str):
            raise TypeError(f"batch takes the ids of its inputs, got one: batch([{ids!r}])")
        # Steps are told apart by their number, so batches of several threads take turns.
        with self._turn:
            first = self._capture.report.steps
            yield
            end = self._capture.report.steps
            if self._notes_fd is None:
                return  # in a forked process
            if end == first:
                raise InstrumentationError(
                    f"the batch of {len(ids)} inputs made no forward call of the instrumented model"
                )
            line = {"steps": [first, end], "rows": len(ids), "ids": [str(one) for one in ids]}
            write_all(self._notes_fd, [memoryview(json.dumps(line).encode() + b"\n")])


def finished_ids(folder: str | os.PathLike[str], *, timeout_s: float = 60.0) -> set[str]:
    """Ids of the inputs whose values lie whole in a file of ``folder``; empty if there is no such folder.

    Of a process that was killed, those that had reached its file.

    Args:
        timeout_s: how long to wait for processes that are ending their files.

    Raises:
        TimeoutError: a process writes still.
    """
    return {one for found in _files(Path(folder), timeout_s) for one in found.ids}


def collect(folder: str | os.PathLike[str], *, timeout_s: float = 60.0) -> list[HarvestedFile]:
    """End what was left without an index, and write ``manifest.jsonl``: a line a file, with its rows and their ids.

    To be called when the processes are done. Files that hold nothing whole are left out, and left alone.

    Args:
        timeout_s: how long to wait for processes that are ending their files.

    Raises:
        TimeoutError: a process writes still.
    """
    folder = Path(folder)
    for path, _ in _pairs(folder, timeout_s):
        try:
            open_stream(path).close()
        except _DAMAGED:
            with contextlib.suppress(*_DAMAGED):
                recover_stream(path)
    files = [found for found in _files(folder, timeout_s) if found.rows]
    part = folder / f".{MANIFEST}.part"
    with os.fdopen(
        os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8"
    ) as lines:
        lines.writelines(json.dumps(asdict(found)) + "\n" for found in files)
    part.replace(folder / MANIFEST)
    return files


def _pairs(folder: Path, timeout_s: float) -> Iterator[tuple[Path, Path]]:
    """Each stream file whose process has ended, with its notes."""
    deadline_s = time.monotonic() + timeout_s
    for notes in sorted(folder.glob("*.jsonl")):
        stream = notes.with_suffix(".stream")
        if notes.name == MANIFEST or not stream.exists():
            continue
        with notes.open(encoding="utf-8") as opened:
            while not _try_lock(opened):
                if time.monotonic() >= deadline_s:
                    raise TimeoutError(
                        f"{stream} is still being written: a process holds the lock of {notes.name}"
                    )
                time.sleep(0.05)
        yield stream, notes


def _try_lock(opened: IO[str]) -> bool:
    try:
        fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _files(folder: Path, timeout_s: float) -> Iterator[HarvestedFile]:
    for path, notes in _pairs(folder, timeout_s):
        try:
            stream = open_stream(path, recover=True)
        except _DAMAGED:
            continue  # nothing reached the file before the process or the machine ended
        with stream:
            ids: list[str] = []
            steps = 0
            is_whole = _whole_steps(stream)
            for first, end, of in _batches(notes):
                if all(map(is_whole, range(first, end))):
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


def _whole_steps(stream: ActivationStream) -> Callable[[int], bool]:
    """Whether all values of a step are in the file."""
    summary = stream.metadata.get("summary") or {}
    if summary and not (summary.get("failed") or summary.get("recovered") or stream.damage):
        # Ended as it should be: what a module did not record, it did not return.
        return lambda step: step < stream.num_steps
    counts = [collections.Counter(record.step for record in stream[site.name]) for site in stream.sites]
    most_common = [count.most_common(2) for count in counts]

    def is_whole(step: int) -> bool:
        if step >= stream.num_steps or len(stream.inputs(step)) < len(stream.input_names):
            return False
        for count, common in zip(counts, most_common, strict=True):
            # Of a site that runs several times a step the last values may be lost: as many as in any other step are
            # all. Where there is no other step nobody knows, and the batch is better run again.
            others = [num for other, num in common if other != step]
            if not others or count[step] < others[0]:
                return False
        return True

    return is_whole
