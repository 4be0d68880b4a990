"""Files as the writer needs them: opened without harm to readers of the old one, written in whole."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # not POSIX
    fcntl = None  # type: ignore[assignment]

_IOV_MAX = 1000
"""The kernel takes 1024 pieces a call."""


def open_file(path: os.PathLike[str] | str, mode: str) -> tuple[int, int | None]:
    """A new private file, and the one that it replaces, still open.

    Mode "w" puts a new file in the place of the old one instead of truncating it: a reader that has the old one
    mapped would die of SIGBUS. The old file's blocks are freed when its descriptor is closed, which takes the
    kernel .3 s a GB: a thread that nothing waits for may do it.

    Raises:
        BlockingIOError: another writer has the file open, in this process or another.
    """
    flags = os.O_WRONLY | os.O_CREAT | getattr(os, "O_CLOEXEC", 0)
    if mode == "x":
        return _locked(os.open(path, flags | os.O_EXCL, 0o600), path), None
    while True:
        fd = _locked(os.open(path, flags, 0o600), path)
        status = os.fstat(fd)
        if status.st_nlink or not stat.S_ISREG(status.st_mode):
            break
        os.close(fd)  # another writer put its own file there between the two lines
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
        return _locked(os.open(real, flags | os.O_EXCL, 0o600), path), fd
    except BaseException:
        os.close(fd)
        raise


def lock_file(fd: int, path: os.PathLike[str] | str) -> None:
    """Keep other writers out of a regular file; the lock goes with ``close_file``, or with the process.

    Raises:
        BlockingIOError: another writer has it; two ranks of a training run with one path between them, say.
    """
    if fcntl is None or not stat.S_ISREG(os.fstat(fd).st_mode):
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BlockingIOError(
            errno.EWOULDBLOCK,
            "another capture is writing this file; give each process (each rank) a path of its own",
            os.fspath(path),
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
            raise  # else a file system without locks


def check_in_place(path: Path, inode: int) -> None:
    """FileNotFoundError if the file that is being written is no longer at ``path``: what is written goes with it."""
    try:
        found = path.stat().st_ino
    except FileNotFoundError:
        raise FileNotFoundError(f"the file {path} was deleted while it was written") from None
    if found != inode:
        raise FileNotFoundError(f"the file {path} was replaced while it was written")


def close_file(fd: int) -> None:
    """Close a file that ``lock_file`` locked; processes forked meanwhile hold the descriptor, not the lock."""
    if fcntl is not None:
        with contextlib.suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_UN)
    os.close(fd)


def remove_begun(fd: int, path: os.PathLike[str] | str) -> None:
    """Take away the file that ``open_file`` began, as long as it is locked; pipes and devices stay."""
    with contextlib.suppress(OSError):
        if stat.S_ISREG(os.fstat(fd).st_mode):
            Path(path).resolve().unlink()


def _locked(fd: int, path: os.PathLike[str] | str) -> int:
    try:
        lock_file(fd, path)
    except BaseException:
        os.close(fd)
        raise
    return fd


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


def pwrite_all(fd: int, data: bytes, offset: int) -> None:
    """Write at ``offset``, not at the file's position; OSError as the kernel says, with what came before written."""
    while data:
        written = os.pwrite(fd, data, offset)
        if written <= 0:
            raise OSError(errno.EIO, "a write stored nothing")
        data, offset = data[written:], offset + written


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
