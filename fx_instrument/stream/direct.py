"""Large blocks past the page cache: what long captures write costs a tenth of the time that the kernel takes else."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
from collections.abc import Sequence
from typing import Any

import numpy as np

from .files import write_all
from .frames import FRAME_HEAD, write_fill

SECTOR_BYTES = 4096
"""Places, sizes and memory of direct writes are multiples of this on every common disk."""
AFTER_BYTES = 32 << 20
"""A file begins in the page cache, so that a small capture is read again without the disk."""
LEAST_BYTES = 256 << 10
"""Smaller blocks are not worth the padding, 2 KiB on average."""


def staging_bytes(page_bytes: int) -> int:
    """Memory that blocks of such pages are brought together in; 0 where they are too small."""
    return page_bytes + max(page_bytes >> 2, 64 << 10) if page_bytes >= LEAST_BYTES else 0


class DirectWriter:
    """Appends blocks with O_DIRECT, whole sectors at a time, through aligned memory of its own.

    Measured on 2 cores with a virtual disk: 2 GB/s at .04 CPU seconds a GB, where writes through the page cache ran
    at .2 GB/s and 1 CPU second a GB. A file or a kernel that can't turns it off, and nothing else changes.
    """

    def __init__(self, fd: int, page_bytes: int) -> None:
        self._fd = fd
        self._room = staging_bytes(page_bytes) & -SECTOR_BYTES
        self._flag = getattr(os, "O_DIRECT", 0)
        # Of a pipe the same flag means packets.
        self._usable = bool(self._flag and self._room) and stat.S_ISREG(os.fstat(fd).st_mode)
        self._staging: mmap.mmap | None = None

    def wants(self, position: int, num_bytes: int) -> bool:
        """Whether a block of so many bytes at this place of the file goes past the page cache."""
        fits = LEAST_BYTES <= num_bytes <= self._room - 3 * SECTOR_BYTES
        return self._usable and fits and position >= AFTER_BYTES

    def append(self, pieces: Sequence[Any], num_bytes: int) -> int:
        """Write a block at the end of the file, which is a whole sector, and fill up to the next; bytes of the fill."""
        if self._staging is None:
            self._staging = mmap.mmap(-1, self._room)
        staging = np.frombuffer(self._staging, np.uint8)
        fill = write_fill(fill_bytes(num_bytes))
        position = 0
        # NumPy copies without the interpreter's lock.
        for piece in (*pieces, fill):
            if len(piece):
                np.copyto(staging[position : position + len(piece)], np.frombuffer(piece, np.uint8))
                position += len(piece)
        self._write(memoryview(self._staging)[:position])
        return len(fill)

    def _write(self, data: memoryview) -> None:
        start = os.lseek(self._fd, 0, os.SEEK_CUR)
        flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
        try:
            fcntl.fcntl(self._fd, fcntl.F_SETFL, flags | self._flag)
            write_all(self._fd, [data])
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._usable = False
        finally:
            fcntl.fcntl(self._fd, fcntl.F_SETFL, flags)
        written = os.lseek(self._fd, 0, os.SEEK_CUR) - start
        if written < len(data):
            write_all(self._fd, [data[written:]])


def fill_bytes(end: int) -> int:
    """Bytes of the frame that fills a sector up from ``end``: at least a frame head, or nothing."""
    missing = -end % SECTOR_BYTES
    return missing + SECTOR_BYTES if 0 < missing < FRAME_HEAD.size else missing
