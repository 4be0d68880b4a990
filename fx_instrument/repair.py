"""A whole file from a damaged one: every record that can be read, written anew with an index."""

from __future__ import annotations

import itertools
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from .errors import CorruptStreamError, TruncatedStreamError
from .stream.files import check_in_place, close_file, lock_file
from .stream.reader import StreamReader
from .stream.records import Damage, RecordMeta
from .stream.refs import RecordRef
from .stream.writer import StreamWriter

# Bytes read but not yet written; the writer takes over what it is given and never blocks.
MAX_PENDING_BYTES = 64 << 20


def recover_stream(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write every readable record of ``path`` into a file that opens without ``recover``; say what was lost.

    Args:
        path: a stream file, cut short or damaged; a whole one is left as it is.
        output: the repaired file, which must not exist; None puts it in the place of ``path``, in one step, once it
            is complete.
        progress: called with (records done, records in all).

    Returns:
        ``file``, ``records``, ``steps``, ``damage`` (offset, num_bytes and reason of what was passed over),
        ``rewritten`` (False if there was nothing to repair).

    Raises:
        FileNotFoundError, NotAStreamError, TruncatedStreamError: nothing can be read.
        FileExistsError: ``output`` exists.
        BlockingIOError: without ``output``, a file that a capture still writes.
        UnsupportedStreamError: a newer format.
        CaptureFailedError: the new file could not be written; ``path`` is as it was.
    """
    source = Path(path)
    if output is not None:
        if Path(output).exists():
            raise FileExistsError(f"{output} exists already")
        return _recover(source, Path(output), str(output), progress)
    # A link stays one: the file that it names is what is damaged.
    source = Path(os.path.realpath(source))
    # Held until the new file is in its place: what a capture still writes is not taken away from under it.
    fd = os.open(source, os.O_RDWR if os.access(source, os.W_OK) else os.O_RDONLY)
    try:
        lock_file(fd, source)
        check_in_place(source, os.fstat(fd).st_ino)
        target = source.with_name(f".{source.name}.recovering")
        target.unlink(missing_ok=True)
        found = _recover(source, target, os.fspath(path), progress, always=False)
        if found["rewritten"]:
            target.replace(source)
    finally:
        close_file(fd)
    return found


def _recover(
    source: Path,
    target: Path,
    name: str,
    progress: Callable[[int, int], None] | None,
    *,
    always: bool = True,
) -> dict[str, Any]:
    """What ``recover_stream`` returns, of the file ``name``; ``target`` is made if need be, or ``always``."""
    with StreamReader(source, recover=True) as reader:
        damage = [
            {"offset": int(gap.offset), "num_bytes": int(gap.num_bytes), "reason": gap.reason}
            for gap in reader.damage
        ]
        whole = not damage and all(segment.whole for segment in reader.segments)
        found = {
            "file": name,
            "records": reader.num_records,
            "steps": reader.num_steps,
            "damage": damage,
            "rewritten": always or not whole,
        }
        if found["rewritten"]:
            # Left by a recovery that was killed.
            _part_of(target).unlink(missing_ok=True)
            try:
                _copy(reader, target, damage, progress)
            except BaseException:
                target.unlink(missing_ok=True)
                _part_of(target).unlink(missing_ok=True)
                raise
    return found


def check_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Every byte of a stream file against its checksums.

    Returns:
        ``file``, ``ok``, ``readable_records``, ``problems`` (file, offset, num_bytes and reason of each; offset and
        size are None of the file as a whole).

    Raises:
        FileNotFoundError, NotAStreamError, UnsupportedStreamError: there is no stream to check.
    """
    name = os.fspath(path)
    problems: list[dict[str, Any]] = []
    records = 0
    try:
        with StreamReader(name) as reader:
            problems += map(_problem, reader.verify())
            records = reader.num_records
    except (TruncatedStreamError, CorruptStreamError) as error:
        problems.append({"file": name, "offset": None, "num_bytes": None, "reason": str(error)})
    if problems:
        try:
            with StreamReader(name, recover=True) as reader:
                damage = [_problem(gap) for gap in reader.damage]
                # What kept the file from being opened is told once, with its place.
                problems = [
                    problem
                    for problem in problems
                    if problem["offset"] is not None
                    or not any(lost["reason"] in problem["reason"] for lost in damage)
                ]
                problems += [lost for lost in damage if lost not in problems]
                records = reader.num_records
        except (TruncatedStreamError, CorruptStreamError):
            records = 0
    return {"file": name, "ok": not problems, "readable_records": records, "problems": problems}


def _problem(gap: Damage) -> dict[str, Any]:
    return {
        "file": gap.file,
        "offset": int(gap.offset),
        "num_bytes": int(gap.num_bytes),
        "reason": gap.reason,
    }


def _copy(
    reader: StreamReader,
    target: Path,
    damage: list[dict[str, Any]],
    progress: Callable[[int, int], None] | None,
) -> None:
    """Each segment written anew; of several, one after the other, as ``cat`` would join them."""
    is_input = {site.id: site.role == "input" for site in reader.sites}
    done = 0

    def counted(records: Iterator[tuple[RecordRef, Any]]) -> Iterator[tuple[RecordRef, Any]]:
        nonlocal done
        for ref, data in records:
            yield ref, data
            done += not is_input[ref.site_id]
            if progress is not None:
                progress(done, reader.num_records)

    groups = itertools.groupby(counted(reader.scan()), key=lambda found: found[0].segment)
    number, records = next(groups, (None, iter(())))
    for segment in range(len(reader.segments)):
        part = target if segment == 0 else _part_of(target)
        mine = records if number == segment else iter(())
        _copy_segment(reader, segment, mine, part, damage)
        if number == segment:
            number, records = next(groups, (None, iter(())))
        if part is not target:
            with part.open("rb") as source, target.open("ab") as joined:
                shutil.copyfileobj(source, joined, 1 << 20)
            part.unlink()


def _part_of(target: Path) -> Path:
    return target.with_name(f".{target.name.removeprefix('.')}.part")


def _copy_segment(
    reader: StreamReader,
    segment: int,
    records: Iterator[tuple[RecordRef, Any]],
    target: Path,
    damage: list[dict[str, Any]],
) -> None:
    found, part = reader.segments[segment], reader.parts[segment]
    # Of when it was captured, not of when it was repaired: files of a rank are read in that order.
    writer = StreamWriter(
        target,
        metadata=found.prolog.metadata,
        codec=found.prolog.codec,
        mode="x",
        rank=part.rank,
        world=part.world,
        created_ns=part.created_ns,
    )
    try:
        names = {(site.name, site.role): writer.add_site(site.name, site.role) for site in found.sites}
        ids = {
            site.id: names[site.name, site.role] for site in reader.sites if (site.name, site.role) in names
        }
        pending = Pending()
        for ref, data in records:
            pending.add(len(data))
            step = ref.step - part.first_step
            meta = RecordMeta(ids[ref.site_id], step, ref.call, ref.dtype, ref.shape, ref.full_shape)
            writer.put(meta, data, partial(pending.remove, len(data)))
            if pending.is_full:
                writer.seal()
                pending.wait()
    except BaseException:
        writer.abandon()
        raise
    summary = {**found.summary, "num_steps": found.num_steps, "recovered": True, "damage": damage}
    writer.close(summary, earlier_summaries=found.earlier_summaries)


class Pending:
    """Counts the bytes that the writer holds."""

    def __init__(self) -> None:
        self._bytes = 0
        self._changed = threading.Condition()

    @property
    def is_full(self) -> bool:
        return self._bytes > MAX_PENDING_BYTES

    def add(self, num_bytes: int) -> None:
        with self._changed:
            self._bytes += num_bytes

    def remove(self, num_bytes: int) -> None:
        with self._changed:
            self._bytes -= num_bytes
            self._changed.notify_all()

    def wait(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._bytes <= MAX_PENDING_BYTES)
