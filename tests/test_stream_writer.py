"""The writer's side: who is told when, what failures do, what a kill leaves."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stream_files import CODECS, DoneCounts, Sample, contents, floats, put_all, small_samples, write

from fx_instrument.errors import CaptureFailedError, TruncatedStreamError
from fx_instrument.stream import files as files_module
from fx_instrument.stream.memory import plan_memory
from fx_instrument.stream.reader import StreamReader
from fx_instrument.stream.records import RecordMeta
from fx_instrument.stream.writer import StreamWriter


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("num_workers", [1, 3])
def test_done_is_called_once_for_each_record(tmp_path: Path, codec: str, num_workers: int) -> None:
    """After close every record's memory was given back exactly once, large and empty ones too."""
    done = DoneCounts()
    writer = StreamWriter(
        tmp_path / "a.stream", metadata={}, codec=codec, num_workers=num_workers, page_bytes=4096
    )
    samples = [
        Sample(site, step, floats(size, step), "bfloat16", (size,))
        for step in range(20)
        for site, size in (("a", 16), ("b", 9000), ("c", 0), ("d", 2048))
    ]
    put_all(writer, samples, done)
    writer.seal()
    writer.close({})
    assert len(done.counts) == 80 and set(done.counts.values()) == {1}
    assert writer.num_records == 80 and writer.raw_bytes == sum(len(s.data) for s in samples)
    assert writer.stored_bytes == (tmp_path / "a.stream").stat().st_size
    with StreamReader(tmp_path / "a.stream") as reader:
        assert contents(reader) == {s.key: s.data for s in samples}


def test_blocks_are_in_order_with_many_workers(tmp_path: Path) -> None:
    """However fast the workers are, blocks lie in the order in which pages were sealed."""
    writer = StreamWriter(tmp_path / "a.stream", metadata={}, codec="zstd", num_workers=4)
    rng = random.Random(1)
    for step in range(60):
        put_all(writer, [Sample("a", step, floats(rng.choice([10, 100_000]), step), "bfloat16")])
        writer.seal()
    writer.close({})
    with StreamReader(tmp_path / "a.stream") as reader:
        assert [ref.step for ref, _ in reader.scan()] == list(range(60))
        sequences = [reader._block(0, number).header.sequence for number in range(60)]
        assert sequences == list(range(60))


def test_seal_leaves_young_pages(tmp_path: Path) -> None:
    """`seal(older_than_s)` hands over old pages only; `seal()` all of them."""
    done = DoneCounts()
    writer = StreamWriter(None, metadata={}, codec="none", num_workers=1)
    put_all(writer, small_samples(1), done)
    writer.seal(older_than_s=3600)
    assert set(done.counts.values()) == {0}
    writer.seal()
    writer.close({})
    assert set(done.counts.values()) == {1}


def test_null_sink_counts_what_a_file_would_hold(tmp_path: Path) -> None:
    """Without a path everything happens but the file, and the bytes are counted as if there were one."""
    path = write(tmp_path / "a.stream", small_samples(), num_workers=1)
    writer = StreamWriter(None, metadata={"model": "tiny"}, codec="zstd", num_workers=1)
    put_all(writer, small_samples())
    writer.close({})
    assert abs(writer.stored_bytes - path.stat().st_size) <= 64
    assert list(tmp_path.iterdir()) == [path]


def test_summary_and_metadata_must_be_json(tmp_path: Path) -> None:
    """Metadata that is no JSON is an error of the constructor, before a file is touched."""
    with pytest.raises(TypeError):
        StreamWriter(tmp_path / "a.stream", metadata={"a": object()}, codec="none")
    assert not (tmp_path / "a.stream").exists()
    writer = StreamWriter(tmp_path / "a.stream", metadata={}, codec="none")
    with pytest.raises(CaptureFailedError):
        writer.close({"a": object()})


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"codec": "gzip"}, "codec must be"),
        ({"codec": "none", "mode": "r"}, "mode must be"),
        ({"codec": "none", "page_bytes": 5 << 20}, "page_bytes must be"),
        ({"codec": "none", "num_workers": 0}, "num_workers must be"),
    ],
)
def test_bad_arguments_are_value_errors(tmp_path: Path, options: dict[str, Any], match: str) -> None:
    """Arguments out of range are named, and no file is made."""
    with pytest.raises(ValueError, match=match):
        StreamWriter(tmp_path / "a.stream", metadata={}, **options)
    assert not list(tmp_path.iterdir())


def test_a_record_that_contradicts_itself_is_refused() -> None:
    """Bytes that are not those of the shape, an unknown dtype and an unknown site are ValueErrors of put."""
    writer = StreamWriter(None, metadata={}, codec="none")
    site = writer.add_site("a", "mlp")
    data = np.zeros(8, np.uint8)
    for meta, match in [
        (RecordMeta(site, 0, 0, "float32", (3,)), "12 bytes, got 8"),
        (RecordMeta(site, 0, 0, "float31", (2,)), "dtype must be"),
        (RecordMeta(site + 1, 0, 0, "float32", (2,)), "was not added"),
    ]:
        with pytest.raises(ValueError, match=match):
            writer.put(meta, data)
    writer.close({})
    assert writer.num_records == 0


def test_opening_fails_as_python_does(tmp_path: Path) -> None:
    """Mode "x" refuses an existing file; a folder and a missing folder are Python's errors; files are private."""
    path = write(tmp_path / "a.stream", [])
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError):
        write(path, [], mode="x")
    with pytest.raises(IsADirectoryError):
        write(tmp_path, [])
    with pytest.raises(FileNotFoundError):
        write(tmp_path / "none" / "a.stream", [])
    write(tmp_path / "b.stream", [], mode="x")
    write(tmp_path / "c.stream", [], mode="a")
    link = tmp_path / "link.stream"
    link.symlink_to(path)
    write(link, small_samples(1))
    assert link.is_symlink() and len(contents(StreamReader(path))) == 3


def test_memory_is_what_was_asked_for() -> None:
    """The writer fits page size and workers into memory_bytes, and says what it will hold."""
    for memory_bytes in (4 << 20, 16 << 20, 100 << 20, 1 << 30):
        for num_workers in (None, 1):
            writer = StreamWriter(
                None, metadata={}, codec="zstd", memory_bytes=memory_bytes, num_workers=num_workers
            )
            assert writer.memory_bytes <= memory_bytes
            writer.close({})


def test_close_is_idempotent_and_abandon_after_it_does_nothing(tmp_path: Path) -> None:
    """A second close, or an abandon after it, leaves the file as it is."""
    writer = StreamWriter(tmp_path / "a.stream", metadata={}, codec="none")
    writer.close({"n": 1})
    writer.close({"n": 2})
    writer.abandon()
    with StreamReader(tmp_path / "a.stream") as reader:
        assert reader.metadata["summary"] == {"n": 1}


def test_abandon_gives_all_memory_back(tmp_path: Path) -> None:
    """Abandoning calls every done and leaves a file that recovery reads."""
    done = DoneCounts()
    writer = StreamWriter(tmp_path / "a.stream", metadata={}, codec="zstd")
    put_all(writer, small_samples(50), done)
    writer.abandon()
    assert set(done.counts.values()) == {1}
    with pytest.raises(TruncatedStreamError):
        StreamReader(tmp_path / "a.stream")
    with StreamReader(tmp_path / "a.stream", recover=True) as reader:
        assert contents(reader).items() <= {s.key: s.data for s in small_samples(50)}.items()


# -- failures ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["w", "x", "a"])
def test_a_file_that_can_not_be_begun_is_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """On a full disk nothing stays that is no stream: it would stand in the way of reading its folder."""

    def full(fd: int, buffers: list[Any]) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "a.stream"
    with monkeypatch.context() as patch:
        patch.setattr(files_module.os, "writev", full)
        with pytest.raises(OSError, match="No space left"):
            StreamWriter(path, metadata={}, codec="none", mode=mode)
    assert not list(tmp_path.iterdir())
    StreamWriter(path, metadata={}, codec="none", mode=mode).close({})
    StreamReader(path).close()


def test_a_pipe_that_takes_nothing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no regular file is not taken away."""

    def broken(fd: int, buffers: list[Any]) -> int:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    monkeypatch.setattr(files_module.os, "writev", broken)
    with pytest.raises(BrokenPipeError):
        StreamWriter(path, metadata={}, codec="none")
    os.close(reader)
    assert path.is_fifo()


def test_a_full_disk_is_told_and_costs_only_what_came_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a write fails, close raises with the OSError as its cause, all memory is given back, the file reads."""
    room = [20_000]
    real = os.writev

    def writev(fd: int, buffers: list[Any]) -> int:
        data = b"".join(bytes(buffer) for buffer in buffers)[: max(0, room[0])]
        if not data:
            raise OSError(errno.ENOSPC, "No space left on device")
        room[0] -= len(data)
        return real(fd, [data])

    monkeypatch.setattr(files_module.os, "writev", writev)
    done = DoneCounts()
    writer = StreamWriter(tmp_path / "a.stream", metadata={}, codec="none", num_workers=2)
    samples = [Sample("a", step, floats(1000, step), "bfloat16") for step in range(30)]
    for sample in samples:
        put_all(writer, [sample], done)
        writer.seal()
    with pytest.raises(CaptureFailedError, match="No space left") as failure:
        writer.close({})
    assert isinstance(failure.value.__cause__, OSError) and failure.value.__cause__.errno == errno.ENOSPC
    assert writer.failure is failure.value.__cause__
    assert set(done.counts.values()) == {1} and len(done.counts) == 30
    writer.close({})
    with StreamReader(tmp_path / "a.stream", recover=True) as reader:
        found = contents(reader)
        assert list(found.items()) == [(s.key, s.data) for s in samples[: len(found)]]
        assert 5 < len(found) == writer.num_records < 10
        assert len(reader.damage) == 1


def test_a_failing_done_reaches_the_caller() -> None:
    """An exception of a done callback is a failure of the capture, and the other callbacks are still called."""
    counts = DoneCounts()

    def fail() -> None:
        raise RuntimeError("pool is broken")

    writer = StreamWriter(None, metadata={}, codec="none", num_workers=1)
    site = writer.add_site("a", "mlp")
    for step in range(3):
        meta = RecordMeta(site, step, 0, "uint8", (2,))
        writer.put(meta, np.zeros(2, np.uint8), fail if step == 1 else counts.of(step))
        writer.seal()
    with pytest.raises(CaptureFailedError, match="pool is broken"):
        writer.close({})
    assert counts.counts == {0: 1, 2: 1}


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_no_thread_outlives_its_writer(tmp_path: Path) -> None:
    """Closing and abandoning end all threads and file descriptors of a writer."""
    before = threading.active_count(), open_files()
    for end in ("close", "abandon"):
        writer = StreamWriter(tmp_path / end, metadata={}, codec="lz4", num_workers=3)
        put_all(writer, small_samples())
        writer.close({}) if end == "close" else writer.abandon()
    assert (threading.active_count(), open_files()) == before


def run_python(code: str, *arguments: str) -> subprocess.Popen[bytes]:
    tests = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{tests}:{tests.parent}:{os.environ.get('PYTHONPATH', '')}"}
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
        env=environment,
    )


WRITES_UNTIL_KILLED = """
import os, sys
import numpy as np
from stream_files import floats
from fx_instrument.stream.records import RecordMeta
from fx_instrument.stream.writer import StreamWriter

def done():
    os.write(1, b".")

writer = StreamWriter(sys.argv[1], metadata={}, codec=sys.argv[2], num_workers=2)
site = writer.add_site("a", "mlp")
for step in range(1_000_000):
    data = np.frombuffer(floats(3000, step), np.uint8)
    writer.put(RecordMeta(site, step, 0, "bfloat16", (3000,)), data, done)
    writer.seal()
"""


@pytest.mark.parametrize("codec", CODECS)
def test_a_kill_loses_nothing_that_was_said_to_be_stored(tmp_path: Path, codec: str) -> None:
    """After `kill -9` at random moments every record whose done was called is in the file."""
    rng = random.Random(codec)
    path = tmp_path / "a.stream"
    for _ in range(2):
        process = run_python(WRITES_UNTIL_KILLED, str(path), codec)
        assert process.stdout is not None
        stored, enough = 0, rng.randrange(1, 400)
        while stored < enough:
            stored += len(process.stdout.read(enough - stored))
        process.send_signal(signal.SIGKILL)
        stored += len(process.communicate()[0])
        with StreamReader(path, recover=True) as reader:
            assert reader.num_records >= stored > 0
            refs = reader.refs(0)
            assert [ref.step for ref in refs] == list(range(len(refs)))
            for ref in refs[:: max(1, len(refs) // 20)]:
                assert reader.read(ref).tobytes() == floats(3000, ref.step)


FILLS_ITS_LIMIT = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
from stream_files import Sample, floats, write
from fx_instrument.errors import CaptureFailedError
from pathlib import Path
try:
    write(Path(sys.argv[1]), [Sample("a", n, floats(3000, n), "bfloat16") for n in range(99)], seal_every=1)
except CaptureFailedError as error:
    print(type(error.__cause__).__name__, error.__cause__.errno)
"""


def test_the_kernels_own_refusal_is_told(tmp_path: Path) -> None:
    """A file that may not grow further fails with the kernel's error, reads up to there, and is gone on with."""
    process = run_python(FILLS_ITS_LIMIT, str(tmp_path / "a.stream"))
    output, errors = process.communicate()
    assert output.decode().split() == ["OSError", str(errno.EFBIG)], errors
    with StreamReader(tmp_path / "a.stream", recover=True) as reader:
        kept = reader.num_records
        assert 8 < kept < 20
        assert all(reader.read(ref).tobytes() == floats(3000, ref.step) for ref in reader.refs(0))
    more = [Sample("a", 100 + n, floats(3000, 100 + n), "bfloat16") for n in range(9)]
    write(tmp_path / "a.stream", more, mode="a")
    with StreamReader(tmp_path / "a.stream") as reader:
        assert reader.num_records == kept + 9 and reader.verify() == []
        assert all(reader.read(ref).tobytes() == floats(3000, ref.step) for ref in reader.refs(0))


def test_a_higher_target_has_more_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as the rate takes, where half of the cores and the memory are enough for them."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(32)))
    room = 1 << 30

    def workers(target_gbps: float, memory_bytes: int = room) -> int:
        return plan_memory(memory_bytes, None, None, target_gbps * 1e9).num_workers

    assert [workers(target) for target in (1, 3, 8, 100)] == [4, 4, 10, 16]
    few = workers(8, 40 << 20)
    assert few < 10 and plan_memory(40 << 20, None, None, 8e9).total_bytes <= 40 << 20
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    assert workers(100) == 1
