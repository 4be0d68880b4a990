"""Stream files mapped into memory, and the order in which several are read as one."""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import CorruptStreamError, NotAStreamError, StreamError, TruncatedStreamError
from .payload import EMPTY_LZ4_FRAME, EMPTY_ZSTD_FRAME
from .read_ahead import ReadAhead
from .records import Damage
from .recovery import recover_segments
from .segments import Segment, empty_frame_at, open_segments, read_prolog

AnyPath = str | os.PathLike[str]
SUFFIX = ".stream"
_MAX_STEPS = 1 << 62


@dataclass(slots=True)
class MappedFile:
    """A file, its bytes, and what it holds; made by ``map_file``."""

    path: str
    map: mmap.mmap
    data: memoryview
    segments: list[Segment]
    """In the order of the file."""
    damage: list[Damage]

    def error(self, error: StreamError) -> StreamError:
        return type(error)(f"{self.path}: {error}")

    def forget(self, start: int, end: int) -> None:
        """Let the kernel take back the mapped pages of ``[start, end)``; looked at again, they come from the file."""
        start -= start % mmap.PAGESIZE
        if hasattr(mmap, "MADV_DONTNEED"):
            self.map.madvise(mmap.MADV_DONTNEED, start, end - start)

    def verify(self) -> list[Damage]:
        """Verify every checksum of the file, and the index against the blocks; empty if all is well."""
        recovery = recover_segments(self.data, ReadAhead(self.map))
        damage = list(recovery.damage)
        for segment, walked in zip(self.segments, recovery.segments, strict=False):
            if not damage and segment.block_offsets.tolist() != walked.block_offsets.tolist():
                damage.append(Damage(segment.offset, segment.length, "the index lists other blocks"))
        return [replace(lost, file=self.path) for lost in damage]

    def close(self) -> None:
        """Unmap the file, or let go of it where arrays still look into it."""
        try:
            self.data.release()
            self.map.close()
        except BufferError:
            # Zero-copy arrays hold the map; it goes with the last of them.
            return


def map_file(path: AnyPath, *, recover: bool) -> MappedFile:
    """The file, mapped, with its segments found; errors as of ``StreamReader``, none of which leaves it open."""
    name = os.fspath(path)
    mode = Path(name).stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        # Opening a pipe would wait for whoever writes into it; a folder is refused by Python itself.
        raise NotAStreamError(f"{name} is no regular file")
    with Path(name).open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if not size:
            raise TruncatedStreamError(f"{name} is empty: not even a prolog was written")
        # Private memory: whoever writes into a tensor that shares it changes neither the file nor crashes.
        mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
    found = MappedFile(name, mapped, memoryview(mapped).toreadonly(), [], [])
    try:
        if recover:
            recovery = recover_segments(found.data, ReadAhead(mapped))
            found.segments, damage = recovery.segments, recovery.damage
        else:
            found.segments = open_segments(found.data)
            damage = [lost for segment in found.segments for lost in segment.damage]
    except StreamError as error:
        found.close()
        raise found.error(error) from None
    found.damage = [replace(lost, file=name) for lost in damage]
    return found


def map_files(paths: Sequence[AnyPath], *, recover: bool) -> tuple[list[MappedFile], list[Damage]]:
    """Each file mapped; with ``recover``, files of which nothing can be read are damage, unless all are."""
    files: list[MappedFile] = []
    unreadable: list[Damage] = []
    first_error: StreamError | None = None
    try:
        for path in paths:
            try:
                files.append(map_file(path, recover=recover))
            except StreamError as error:
                if not recover or len(paths) == 1:
                    raise
                first_error = first_error or error
                unreadable.append(Damage(0, Path(path).stat().st_size, str(error), os.fspath(path)))
        if not files and first_error is not None:
            raise first_error
    except BaseException:
        for file in files:
            file.close()
        raise
    return files, unreadable


@dataclass(frozen=True, slots=True)
class PlacedSegment:
    """A segment among all that are read as one."""

    file: MappedFile
    segment: Segment
    first_step: int
    """Its own step 0 is this step of the whole: the steps of its rank's earlier segments come before."""

    @property
    def rank(self) -> int:
        return self.segment.prolog.rank


def place_segments(files: Sequence[MappedFile]) -> list[PlacedSegment]:
    """The segments of all files as they are read: by rank, each rank's by time of creation.

    Ranks run beside each other, so a step has the same number in all of them; segments of one rank go on where the
    one before ended.
    """
    found = [(file, segment) for file in files for segment in file.segments]
    # The sort is stable: where clocks tell nothing, the order given decides.
    found.sort(key=lambda pair: (pair[1].prolog.rank, pair[1].prolog.created_ns))
    placed: list[PlacedSegment] = []
    for file, segment in found:
        first_step = 0
        if placed and placed[-1].rank == segment.prolog.rank:
            first_step = placed[-1].first_step + placed[-1].segment.num_steps
            if first_step > _MAX_STEPS:
                raise CorruptStreamError(f"{placed[-1].file.path}: the file says it has {first_step} steps")
        placed.append(PlacedSegment(file, segment, first_step))
    return placed


def stream_files(source: AnyPath | Sequence[AnyPath]) -> list[str]:
    """The files that a path, a folder, or a sequence of either stand for.

    Of a folder: the files in it, not in folders below, that end in ``.stream`` or begin as a stream does; hidden
    ones are left out. In the order of their names.

    Raises:
        FileNotFoundError: no such file or folder.
        NotAStreamError: a folder without a stream.
        ValueError: an empty sequence or name, or a file that is named twice.
    """
    if isinstance(source, (str, os.PathLike)):
        source = [source]
    files: list[str] = []
    for entry in source:
        if not os.fspath(entry):
            raise ValueError("expected the name of a stream file or folder, got an empty one")
        files += _files_of_folder(Path(entry)) if Path(entry).is_dir() else [os.fspath(entry)]
    if not files:
        raise ValueError("expected at least one stream file, got an empty sequence")
    seen: set[str] = set()
    for file in files:
        real = os.path.realpath(file)
        if real in seen:
            raise ValueError(f"{file} is named twice; its records would come twice")
        seen.add(real)
    return files


def _files_of_folder(folder: Path) -> list[str]:
    entries = sorted(
        entry for entry in folder.iterdir() if entry.is_file() and not entry.name.startswith(".")
    )
    found = [str(entry) for entry in entries if entry.suffix == SUFFIX or begins_as_stream(entry)]
    if not found:
        raise NotAStreamError(f"{folder}: none of the {len(entries)} files in this folder is a stream")
    return found


def begins_as_stream(path: Path) -> bool:
    """Whether a file that can be read begins as a stream does, be it damaged, cut or of a later version."""
    try:
        with path.open("rb") as file:
            start = file.read(max(len(EMPTY_ZSTD_FRAME), len(EMPTY_LZ4_FRAME)) + (64 << 10))
    except OSError:
        return False
    if not empty_frame_at(memoryview(start), 0):
        return False
    try:
        read_prolog(memoryview(start), 0)
    except NotAStreamError:
        return False
    except StreamError:
        return True
    return True
