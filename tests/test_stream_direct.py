"""Blocks that go past the page cache are read as any others, and a file that can't take them is written as ever."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import second_reader
from stream_files import CODECS, Sample, contents, floats, write

from fx_instrument.stream import direct
from fx_instrument.stream.frames import FRAME_HEAD
from fx_instrument.stream.reader import StreamReader
from fx_instrument.stream.records import RecordMeta
from fx_instrument.stream.writer import StreamWriter

FILL = b"FXFILL\0\0"


@pytest.fixture
def from_the_first_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 8 KiB and more, from the beginning of the file on."""
    monkeypatch.setattr(direct, "AFTER_BYTES", 0)
    monkeypatch.setattr(direct, "LEAST_BYTES", 8 << 10)


def mixed_samples() -> list[Sample]:
    """Large and small pages in turn, so that blocks begin at any place within a sector."""
    sizes = [20_000, 30, 25_000, 25_001, 7, 31_000, 28_000]
    return [
        Sample(f"site {step % 2}", step, floats(size, step), "bfloat16", role="mlp")
        for step, size in enumerate(sizes)
    ]


EXPECTED = {sample.key: sample.data for sample in mixed_samples()}


@pytest.mark.usefixtures("from_the_first_byte")
@pytest.mark.parametrize("codec", CODECS)
def test_direct_blocks_are_read_as_any_others(tmp_path: Path, codec: str) -> None:
    """By index, by recovery without one, by the standard tools and by the reader written from the document."""
    path = write(tmp_path / "a.stream", mixed_samples(), codec=codec, seal_every=1, page_bytes=64 << 10)
    data = path.read_bytes()
    assert data.count(FILL) >= 4
    with StreamReader(path) as reader:
        assert contents(reader) == EXPECTED
        assert reader.verify() == [] == reader.damage
        assert reader.stored_bytes == len(data)
        assert {key[1:]: record[3] for key, record in second_reader.records(data).items()} == EXPECTED
    path.write_bytes(data[:-1])
    with StreamReader(path, recover=True) as reader:
        assert contents(reader) == EXPECTED
    path.write_bytes(data * 2)
    with StreamReader(path) as reader:
        assert reader.num_records == 2 * len(EXPECTED)
    tool = "zstd" if codec == "zstd" else "lz4"
    if shutil.which(tool) is not None:
        subprocess.run([tool, "-t", "-q", str(path)], check=True)


@pytest.mark.usefixtures("from_the_first_byte")
def test_a_cut_anywhere_leaves_the_blocks_before(tmp_path: Path) -> None:
    """Cut in a block, in what fills its sector or between: whole blocks come back, and the file is gone on with."""
    path = write(tmp_path / "a.stream", mixed_samples(), codec="zstd", seal_every=1, page_bytes=64 << 10)
    data = path.read_bytes()
    fills = [place for place in range(len(data)) if data.startswith(FILL, place)]
    cuts = {place + shift for place in fills for shift in (-9, -8, 0, 5, 60)} | set(
        range(1000, len(data), 9973)
    )
    counts = []
    for cut in sorted(cuts):
        path.write_bytes(data[:cut])
        with StreamReader(path, recover=True) as reader:
            before = contents(reader)
        counts.append(len(before))
        assert before.items() <= EXPECTED.items()
        writer = StreamWriter(path, metadata={}, codec="zstd", mode="a", page_bytes=64 << 10)
        site = writer.add_site("more", "mlp")
        more = np.frombuffer(floats(30_000, 9), np.uint8)
        writer.put(writer_meta(site, writer.first_step), more)
        writer.close({})
        with StreamReader(path) as reader:
            found = contents(reader)
            assert found.items() >= before.items() and len(found) == len(before) + 1
            assert reader.verify() == []
    assert counts == sorted(counts) and counts[-1] == len(EXPECTED)


def writer_meta(site: int, step: int) -> RecordMeta:
    return RecordMeta(site, step, 0, "bfloat16", (30_000,))


@pytest.mark.usefixtures("from_the_first_byte")
@pytest.mark.parametrize("where", ["flag", "write", "half"])
def test_a_file_that_takes_no_direct_writes_is_written_as_ever(
    tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flag refused, the write refused, or the write cut short and then refused: nothing is lost or doubled."""
    set_flags, writev = fcntl.fcntl, os.writev
    refused = 0

    def fcntl_(fd: int, command: int, argument: int = 0) -> int:
        nonlocal refused
        if command == fcntl.F_SETFL and argument & os.O_DIRECT:
            if where == "flag":
                refused += 1
                raise OSError(errno.EINVAL, "no direct writes here")
            # The file of the test may lie where there are none.
            argument &= ~os.O_DIRECT
            monkeypatch.setattr(os, "writev", refusing)
        elif command == fcntl.F_SETFL:
            monkeypatch.setattr(os, "writev", writev)
        return set_flags(fd, command, argument)

    def refusing(fd: int, views: list[memoryview]) -> int:
        nonlocal refused
        refused += 1
        if where == "half" and refused == 1:
            return writev(fd, [views[0][:5000]])
        raise OSError(errno.EINVAL, "no direct writes here")

    monkeypatch.setattr(fcntl, "fcntl", fcntl_)
    path = write(tmp_path / "a.stream", mixed_samples(), seal_every=1, page_bytes=64 << 10, num_workers=1)
    assert refused == (2 if where == "half" else 1)
    with StreamReader(path) as reader:
        assert contents(reader) == EXPECTED
        assert reader.verify() == []


def test_a_full_disk_is_an_error_past_the_page_cache_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, from_the_first_byte: None
) -> None:
    """What was written before is readable, and the writer says what went wrong."""
    writer = StreamWriter(
        tmp_path / "a.stream", metadata={}, codec="none", page_bytes=64 << 10, num_workers=1
    )
    site = writer.add_site("a", "mlp")
    data = np.frombuffer(floats(30_000), np.uint8)
    for step in range(2):
        writer.put(writer_meta(site, step), data)
        writer.seal()
    while writer.num_records < 2:
        assert writer.failure is None
    real = os.writev

    def full(fd: int, views: list[memoryview]) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "writev", full)
    writer.put(writer_meta(site, 2), data)
    with pytest.raises(Exception, match="No space left"):
        writer.close({})
    monkeypatch.setattr(os, "writev", real)
    with StreamReader(tmp_path / "a.stream", recover=True) as reader:
        assert reader.num_records == 2


def test_small_captures_stay_in_the_page_cache(tmp_path: Path) -> None:
    """A file below 32 MiB has no padding at all."""
    path = write(tmp_path / "a.stream", mixed_samples(), codec="none")
    assert FILL not in path.read_bytes()


@pytest.mark.parametrize("end", [0, 1, 4072, 4073, 4095, 4096, 12345])
def test_what_fills_a_sector_is_a_frame_or_nothing(end: int) -> None:
    """Never less than a frame head, and never more than a sector and a head."""
    size = direct.fill_bytes(end)
    assert (end + size) % direct.SECTOR_BYTES == 0
    assert size == 0 or FRAME_HEAD.size <= size < direct.SECTOR_BYTES + FRAME_HEAD.size
