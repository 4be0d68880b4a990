"""One segment of a file, appended to: prolog, blocks in the order in which they come, index."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence, Set
from typing import Any

from .blocks import BlockHeader
from .codec import empty_frame
from .direct import DirectWriter, fill_bytes
from .files import close_file, open_file, remove_begun, start_writeback, sync, write_all
from .frames import SEGMENT_ID_BYTES, Prolog, write_fill, write_sites
from .index import IndexRow, write_index
from .pages import Arranged
from .payload import LEAD_BYTES, EncodedPage
from .records import SiteEntry
from .resume import Resumed, resume_file


class SegmentWriter:
    """Writes one segment; no two calls at once, but for those of ``close_replaced``.

    Args:
        path: the file; None writes nowhere, and counts all the same.
        mode: "w" and "x" begin a file; "a" goes on where the last segment of an existing one has its last good block.
        prolog: of a segment that begins; ``prolog`` is that of the file where one is gone on with.
        page_bytes: the most raw bytes of a block.

    Raises on construction: TypeError for metadata that is no JSON; OSError as ``open`` does, or if the prolog can't be
    written, and then there is no file at the path; as ``resume_file`` does in mode "a".
    """

    def __init__(
        self, path: os.PathLike[str] | str | None, mode: str, prolog: Prolog, *, page_bytes: int
    ) -> None:
        self.prolog = prolog
        self.stored_bytes = self.raw_bytes = self.num_records = 0
        self.first_step = 0
        self.next_sequence = 0
        self.known_sites: Sequence[SiteEntry] = ()
        """Of the segment that is gone on with."""
        self.known_inputs: frozenset[int] = frozenset()
        self._sites_written = 0
        self._blocks: list[IndexRow] = []
        self._site_sets: dict[frozenset[int], frozenset[int]] = {}
        self._max_step = -1
        self._offset = 0
        self._resumed: Resumed | None = None
        self._fd: int | None = None
        self._replaced_fd: int | None = None
        self._replaced_lock = threading.Lock()
        # What is no JSON is refused before a file is touched.
        beginning = [empty_frame(prolog.codec), prolog.write()]
        if mode == "a" and path is not None:
            self._resume(path)
        if self._resumed is None:
            if path is not None:
                self._fd, self._replaced_fd = open_file(path, mode)
            try:
                self._write(beginning)
            except BaseException:
                if path is not None and self._fd is not None:
                    remove_begun(self._fd, path)
                self.close()
                raise
        self.id = self.prolog.uuid[:SEGMENT_ID_BYTES]
        self._direct = DirectWriter(self._fd, page_bytes) if self._fd is not None else None

    def _resume(self, path: os.PathLike[str] | str) -> None:
        resumed = resume_file(path, self.prolog.codec)
        if resumed is None:
            return
        self._resumed, self._fd, segment = resumed, resumed.fd, resumed.segment
        self.prolog, self._offset = segment.prolog, segment.offset
        self.stored_bytes = resumed.end
        self.first_step = segment.num_steps
        self._max_step = segment.num_steps - 1
        self.num_records, self.raw_bytes = segment.num_records, segment.raw_bytes
        self.known_sites, self.known_inputs = resumed.sites, frozenset(segment.inputs)
        self._sites_written = len(resumed.sites)
        self._blocks = list(resumed.blocks)
        self.next_sequence = resumed.next_sequence

    def write_block(
        self,
        header: BlockHeader,
        directory: bytes,
        encoded: EncodedPage,
        records: Arranged,
        *,
        sites: Sequence[SiteEntry],
        inputs: Set[int],
    ) -> int:
        """Append a block, and before it the ``sites`` that the file does not name yet; bytes of the block."""
        if len(sites) > self._sites_written:
            self._write([write_sites(sites[self._sites_written :], self.id)])
            self._sites_written = len(sites)
        direct = self._direct
        if direct is not None and direct.wants(self.stored_bytes, encoded.payload_bytes + len(directory)):
            self._write([write_fill(fill_bytes(self.stored_bytes))])
        else:
            direct = None
        offset = self.stored_bytes - self._offset
        head = header.write(directory, offset, LEAD_BYTES)
        num_bytes = len(head) + encoded.payload_bytes
        if direct is not None:
            self.stored_bytes += num_bytes + direct.append([head, *encoded.pieces], num_bytes)
        else:
            self._write([head, *encoded.pieces])
            if self._fd is not None:
                start_writeback(self._fd, self._offset + offset, num_bytes)
        found = records.sites()
        # Blocks mostly have the same sites: one set for all of them, 4 KiB for 60 sites.
        found = self._site_sets.setdefault(found, found)
        self._blocks.append(
            IndexRow(
                offset,
                header.min_step,
                header.max_step,
                num_bytes,
                header.num_rows,
                header.raw_bytes,
                found,
            )
        )
        self._max_step = max(self._max_step, header.max_step)
        num_records, raw_bytes = records.count(found & inputs)
        self.raw_bytes += raw_bytes
        self.num_records += num_records
        return num_bytes

    def write_end(
        self,
        summary: Mapping[str, Any],
        sites: Sequence[SiteEntry],
        earlier_summaries: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Append the index, and bring the file to the disk; ``earlier_summaries`` as of ``StreamWriter.close``."""
        resumed = self._resumed
        index = write_index(
            self.stored_bytes - self._offset,
            self._blocks,
            sites,
            segment_id=self.id,
            num_steps=max(int(summary.get("num_steps", 0)), self._max_step + 1, self.first_step),
            num_records=self.num_records,
            raw_bytes=self.raw_bytes,
            summary=summary,
            earlier_summaries=[*(resumed.earlier_summaries if resumed else ()), *earlier_summaries],
            damage=resumed.damage if resumed else (),
            incomplete=resumed.segment.incomplete if resumed else (),
        )
        self._write([index])
        if self._fd is not None:
            sync(self._fd)

    def close(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            close_file(fd)
        self.close_replaced()

    def close_replaced(self) -> None:
        """Let go of the file whose place this one took, which may take a while; from any thread, at any time."""
        with self._replaced_lock:
            fd, self._replaced_fd = self._replaced_fd, None
        if fd is not None:
            os.close(fd)

    def forked(self) -> None:
        """In a forked process: let go of the files, whose locks are the parent's."""
        for fd in (self._fd, self._replaced_fd):
            if fd is not None:
                os.close(fd)
        self._fd = self._replaced_fd = None

    def _write(self, pieces: Sequence[Any]) -> None:
        views = [memoryview(piece).cast("B") for piece in pieces if len(piece)]
        if self._fd is not None:
            write_all(self._fd, views)
        self.stored_bytes += sum(map(len, views))
