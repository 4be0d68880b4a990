"""The private folder of a recorder: numbered files, one owner, and how many of them are kept."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
import time
from collections.abc import Collection
from pathlib import Path

from ..stream.files import close_file

_NAME = re.compile(r"(\d{6,})-\d{8}T\d{6}Z\.stream")


class RecordingFolder:
    """A folder that only this user reads and only one recorder writes, with files ``000042-20261124T214158Z.stream``.

    The names hold a sequence number, which goes on where the files there end, and when the file was begun (UTC);
    nothing that a request says gets into them.

    Args:
        path: the folder; made private if it does not exist. Its parent must exist.
        max_files: keep so many files at most, and delete the oldest; None keeps all.
        max_bytes: keep so many bytes in files at most, and delete the oldest; None keeps all.

    Raises:
        PermissionError: the folder is another user's, a link, or open to other users.
        BlockingIOError: another recorder, of this or another process, owns the folder.
        OSError: as ``mkdir`` and ``open`` do.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, max_files: int | None = None, max_bytes: int | None = None
    ) -> None:
        self.path = Path(path).absolute()
        self._max_files = max_files
        self._max_bytes = max_bytes
        self._fd = -1
        self._open()

    def _open(self) -> None:
        with contextlib.suppress(FileExistsError):
            self.path.mkdir(mode=0o700)
        self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._check_private()
            self._lock()
        except BaseException:
            self.close()
            raise
        self._number = max((number for number, _ in self._files()), default=-1) + 1

    def _check_private(self) -> None:
        status = os.fstat(self._fd)
        if self.path.is_symlink():
            raise PermissionError(
                f"{self.path} is a link: activations go to a folder of their own, name that one"
            )
        if status.st_uid != os.geteuid():
            raise PermissionError(
                f"{self.path} belongs to user {status.st_uid}, this process runs as {os.geteuid()}: activations reveal "
                f"prompts, so they go to a folder of this user's own"
            )
        if status.st_mode & 0o077:
            raise PermissionError(
                f"{self.path} is open to other users (mode {stat.S_IMODE(status.st_mode):o}): activations reveal "
                f"prompts; run chmod 700 on it, or name a folder that does not exist yet"
            )

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(
                error.errno,
                "another recorder writes to this folder; give each process one of its own",
                str(self.path),
            ) from None

    def next_path(self) -> Path:
        """A name that is not taken yet, for the file that is begun now."""
        began = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        path = self.path / f"{self._number:06d}-{began}.stream"
        self._number += 1
        return path

    def check_there(self) -> None:
        """Raise FileNotFoundError if the folder that was opened is not the one at its path any more."""
        try:
            there = self.path.stat(follow_symlinks=False)
        except FileNotFoundError:
            raise FileNotFoundError(f"the folder {self.path} is gone") from None
        if self._fd < 0 or not os.path.samestat(there, os.fstat(self._fd)):
            raise FileNotFoundError(f"the folder {self.path} was replaced by another")

    def open_again(self) -> None:
        """Take the folder at the path, anew if the one that was opened is gone; errors as when made."""
        try:
            self.check_there()
        except FileNotFoundError:
            self.close()
            self._open()

    def free_bytes(self) -> int:
        """What an ordinary user may still write to the folder's disk."""
        disk = os.fstatvfs(self._fd)
        return disk.f_bavail * disk.f_frsize

    def prune(self, keep: Collection[Path]) -> list[Path]:
        """Delete the oldest files until what is left is within the limits; none of ``keep``, none that came after."""
        if self._max_files is None and self._max_bytes is None:
            return []
        sizes = {}
        for _, path in sorted(self._files()):
            with contextlib.suppress(FileNotFoundError):
                sizes[path] = path.stat().st_size
        deleted = []
        for path in list(sizes):
            few = self._max_files is None or len(sizes) <= self._max_files
            small = self._max_bytes is None or sum(sizes.values()) <= self._max_bytes
            if (few and small) or path in keep:
                break
            path.unlink(missing_ok=True)
            deleted.append(path)
            del sizes[path]
        return deleted

    def close(self) -> None:
        """Let another recorder have the folder."""
        if self._fd >= 0:
            close_file(self._fd)
            self._fd = -1

    def forked(self) -> None:
        """In a forked process: the folder is the parent's."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _files(self) -> list[tuple[int, Path]]:
        names = ((_NAME.fullmatch(path.name), path) for path in self.path.iterdir())
        return [(int(match[1]), path) for match, path in names if match is not None and path.is_file()]
