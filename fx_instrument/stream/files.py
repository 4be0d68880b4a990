"""Files as the writer needs them: opened without harm to readers of the old one, written in whole."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from pathlib import Path
from typing import Any

_IOV_MAX = 1000
"""The kernel takes 1024 pieces a call."""


def open_file(path: os.PathLike[str] | str, mode: str) -> tuple[int, int | None]:
    """A new private file, and the one that it replaces, still open.

    Mode "w" puts a new file in the place of the old one instead of truncating it: a reader that has the old one
    mapped would die of SIGBUS. The old file's blocks are freed when its descriptor is closed, which takes the
    kernel .3 s a GB: a thread that nothing waits for may do it.
    """
    flags = os.O_WRONLY | os.O_CREAT | getattr(os, "O_CLOEXEC", 0)
    if mode == "x":
        return os.open(path, flags | os.O_EXCL, 0o600), None
    fd = os.open(path, flags, 0o600)
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or not status.st_size:
        return fd, None
    real = Path(path).resolve()
    try:
        real.unlink()
    except OSError:
        # The folder may not be ours to change: then the old file's memory is the new one's.
        os.ftruncate(fd, 0)
        return fd, None
    try:
        return os.open(real, flags | os.O_EXCL, 0o600), fd
    except BaseException:
        os.close(fd)
        raise


def write_all(fd: int, views: list[memoryview]) -> None:
    """Append the pieces; OSError as the kernel says, with what came before written."""
    position = 0
    while position < len(views):
        written = os.writev(fd, views[position : position + _IOV_MAX])
        if written <= 0:
            raise OSError(errno.EIO, "a write stored nothing")
        while position < len(views) and written >= len(views[position]):
            written -= len(views[position])
            position += 1
        if written:
            views[position] = views[position][written:]


def _find_sync_file_range() -> Any:
    try:
        found = ctypes.CDLL(None, use_errno=True).sync_file_range
    except (OSError, AttributeError):
        return None
    found.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return found


_sync_file_range = _find_sync_file_range()
_SYNC_FILE_RANGE_WRITE = 2


def start_writeback(fd: int, offset: int, num_bytes: int) -> None:
    """Have the kernel begin to bring these bytes of a file to its disk, without waiting for it.

    What ``sync`` has to wait for at the end is then a fifth (8 ms instead of 40 after 88 MB). Where it can't be
    done, nothing is.
    """
    if _sync_file_range is not None:
        _sync_file_range(fd, offset, num_bytes, _SYNC_FILE_RANGE_WRITE)


def sync(fd: int) -> None:
    """Bring the file to its disk, where it lies on one."""
    try:
        os.fsync(fd)
    except OSError as error:
        # A pipe or a device has nothing to sync.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EROFS):
            raise
