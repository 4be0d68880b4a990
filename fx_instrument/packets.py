"""Files of llm-instrumentation, a hook-based recorder, made into streams.

Such a file is packets, one after the other: ``bytes of the name u16 · bytes of the data u32`` (big-endian), name,
data. The data are a tensor's bytes, as one zstd frame, one LZ4 frame, or as they are; what codec, dtype and shape
they have is not in the file. (Format as version 1.3.1 of that package writes it.)
"""

from __future__ import annotations

import os
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from .errors import CorruptStreamError, NotAStreamError, TruncatedStreamError
from .repair import Pending
from .stream.codec import unpack_any
from .stream.records import RecordMeta, element_bytes
from .stream.writer import StreamWriter

MAX_PACKET_BYTES = 1 << 30
_HEAD = struct.Struct("!HI")


class Packet(NamedTuple):
    """One tensor of such a file: what is known of it."""

    name: str
    data: bytes
    end: int
    """Where in the file it ends."""


def read_packets(path: str | os.PathLike[str]) -> Iterator[Packet]:
    """The packets of a file in order, their data decompressed.

    Raises:
        FileNotFoundError: there is no such file.
        NotAStreamError: the file does not begin with a packet.
        TruncatedStreamError: it ends inside a packet; those before have been given out.
        CorruptStreamError: a packet does not decode, or has more than 1 GiB.
    """
    with Path(path).open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        while (offset := file.tell()) < size:
            yield _read_packet(file, os.fspath(path), offset, size)


def _read_packet(file: BinaryIO, path: str, offset: int, size: int) -> Packet:
    head = file.read(_HEAD.size)
    name_bytes, data_bytes = _HEAD.unpack(head) if len(head) == _HEAD.size else (0, 0)
    end = offset + _HEAD.size + name_bytes + data_bytes
    if len(head) < _HEAD.size or end > size:
        kind = TruncatedStreamError if offset else NotAStreamError
        raise kind(f"{path}: the packet at byte {offset} needs bytes up to {end}, the file has {size}")
    try:
        name = file.read(name_bytes).decode()
    except UnicodeDecodeError:
        error_type = CorruptStreamError if offset else NotAStreamError
        raise error_type(f"{path}: the packet at byte {offset} has a name that is no text") from None
    try:
        data = unpack_any(file.read(data_bytes), MAX_PACKET_BYTES)
    except CorruptStreamError as error:
        raise CorruptStreamError(f"{path}: the packet at byte {offset}, of {name!r}: {error}") from None
    return Packet(name, data, end)


def convert_packets(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    dtype: str = "float16",
    width: int | None = None,
    codec: str = "zstd",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write the packets of an llm-instrumentation file as a stream that ``open_stream`` reads.

    A name is a site, of role "other"; its n-th packet is its value in step n. What was lost while recording is not
    known, so steps of different sites need not be those of one forward call.

    Args:
        path: the old file.
        output: the new one, which must not exist.
        dtype: of the values, as torch spells it; the old recorder stored float32 as float16.
        width: the size of the last dimension; the values become (tokens, width). None: one dimension.
        codec: of the new file.
        progress: called with (bytes read, bytes in all).

    Returns:
        ``file``, ``sites``, ``records``, and ``truncated``: what is wrong with the end of the old file, or None.

    Raises:
        ValueError: bytes of a packet are no whole elements, or no whole rows; the message names the packet.
        FileExistsError: ``output`` exists.
        As ``read_packets``; a cut end is no error.
    """
    element_size = element_bytes(dtype)
    size = Path(path).stat().st_size
    metadata = {"model": None, "backend": "llm-instrumentation", "source": Path(path).name}
    truncated: str | None = None
    packets = read_packets(path)
    first = next(packets, None)
    writer = StreamWriter(output, metadata=metadata, codec=codec, mode="x")
    counts: Counter[str] = Counter()
    pending = Pending()
    try:
        while first is not None:
            name, data, end = first
            num_values, rest = divmod(len(data), element_size)
            if rest or (width is not None and num_values % width):
                raise ValueError(
                    f"{name!r} packet {counts[name]} has {len(data)} bytes, no whole number of {dtype} values"
                    f"{f' in rows of {width}' if width is not None else ''}; choose another dtype or width"
                )
            shape = (num_values,) if width is None else (num_values // width, width)
            meta = RecordMeta(writer.add_site(name, "other"), counts[name], 0, dtype, shape)
            pending.add(len(data))
            writer.put(meta, np.frombuffer(data, np.uint8), partial(pending.remove, len(data)))
            if pending.is_full:
                writer.seal()
                pending.wait()
            counts[name] += 1
            if progress is not None:
                progress(end, size)
            try:
                first = next(packets, None)
            except TruncatedStreamError as error:
                truncated, first = str(error), None
        writer.close({"num_steps": max(counts.values(), default=0), "truncated": truncated})
    except BaseException:
        writer.abandon()
        Path(output).unlink(missing_ok=True)
        raise
    return {
        "file": os.fspath(output),
        "sites": len(counts),
        "records": sum(counts.values()),
        "truncated": truncated,
    }
