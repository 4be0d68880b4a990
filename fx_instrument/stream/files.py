"""Files as the writer needs them: opened without harm to readers of the old one, written in whole."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

_IOV_MAX = 1000
"""The kernel takes 1024 pieces a call."""


def open_file(path: os.PathLike[str] | str | None, mode: str) -> int | None:
    """A new private file, or None for the null sink.

    Mode "w" puts a new file in the place of the old one instead of truncating it: a reader that has the old one
    mapped would die of SIGBUS.
    """
    if path is None:
        return None
    flags = os.O_WRONLY | os.O_CREAT | getattr(os, "O_CLOEXEC", 0)
    if mode == "x":
        return os.open(path, flags | os.O_EXCL, 0o600)
    fd = os.open(path, flags, 0o600)
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or not status.st_size:
        return fd
    real = Path(path).resolve()
    try:
        real.unlink()
    except OSError:
        # The folder may not be ours to change: then the old file's memory is the new one's.
        os.ftruncate(fd, 0)
        return fd
    os.close(fd)
    return os.open(real, flags | os.O_EXCL, 0o600)


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


def sync(fd: int) -> None:
    """Bring the file to its disk, where it lies on one."""
    try:
        os.fsync(fd)
    except OSError as error:
        # A pipe or a device has nothing to sync.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EROFS):
            raise
