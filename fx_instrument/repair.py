"""A whole file from a damaged one: every record that can be read, written anew with an index."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from .errors import UnsupportedStreamError
from .stream.reader import StreamReader
from .stream.records import RecordMeta
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
        UnsupportedStreamError: ``path`` is several streams in one file.
        CaptureFailedError: the new file could not be written; ``path`` is as it was.
    """
    source = Path(path)
    if output is not None and Path(output).exists():
        raise FileExistsError(f"{output} exists already")
    with StreamReader(source, recover=True) as reader:
        if len(reader.segments) > 1:
            raise UnsupportedStreamError(
                f"{source} holds {len(reader.segments)} streams, one after the other: recover the parts before joining"
            )
        damage = [
            {"offset": int(gap.offset), "num_bytes": int(gap.num_bytes), "reason": gap.reason}
            for gap in reader.damage
        ]
        found = {
            "file": str(source if output is None else output),
            "records": reader.num_records,
            "steps": reader.num_steps,
            "damage": damage,
            "rewritten": True,
        }
        if output is None and not damage and reader.segments[0].whole:
            return {**found, "rewritten": False}
        target = Path(output) if output is not None else source.with_name(f".{source.name}.recovering")
        if output is None:
            target.unlink(missing_ok=True)
        try:
            _copy(reader, target, damage, progress)
        except BaseException:
            target.unlink(missing_ok=True)
            raise
    if output is None:
        target.replace(source)
    return found


def _copy(
    reader: StreamReader,
    target: Path,
    damage: list[dict[str, Any]],
    progress: Callable[[int, int], None] | None,
) -> None:
    metadata = {name: value for name, value in reader.metadata.items() if name != "summary"}
    prolog = reader.segments[0].prolog
    # Of when it was captured, not of when it was repaired: files of a rank are read in that order.
    writer = StreamWriter(
        target,
        metadata=metadata,
        codec=reader.codec,
        mode="x",
        rank=prolog.rank,
        world=prolog.world,
        created_ns=prolog.created_ns,
    )
    try:
        ids = {site.id: writer.add_site(site.name, site.role) for site in reader.sites}
        is_input = {site.id: site.role == "input" for site in reader.sites}
        pending = _Pending()
        done = 0
        for ref, data in reader.scan():
            pending.add(len(data))
            meta = RecordMeta(ids[ref.site_id], ref.step, ref.call, ref.dtype, ref.shape, ref.full_shape)
            writer.put(meta, data, partial(pending.remove, len(data)))
            if pending.is_full:
                writer.seal()
                pending.wait()
            done += not is_input[ref.site_id]
            if progress is not None:
                progress(done, reader.num_records)
    except BaseException:
        writer.abandon()
        raise
    summary = dict(reader.metadata.get("summary") or {})
    writer.close({**summary, "num_steps": reader.num_steps, "recovered": True, "damage": damage})


class _Pending:
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
