"""What captures into one file said of themselves outlives a kill of the next one, a full disk, and a repair."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from stream_files import CODECS, Sample, contents, floats, put_all, small_samples, write

from fx_instrument import CorruptStreamError, open_stream, recover_stream
from fx_instrument import repair as repair_module
from fx_instrument.repair import check_file
from fx_instrument.stream import files as files_module
from fx_instrument.stream import resume as resume_module
from fx_instrument.stream.reader import StreamReader
from fx_instrument.stream.writer import StreamWriter

FIRST = {"num_steps": 7, "duration_s": 2.5, "dropped_records": {"mlp": 4}}


class Killed(BaseException):
    """In the place of SIGKILL: nothing that the writer does runs any more."""


class Dying:
    """Changes to the file until ``left`` bytes are written, a change without bytes counting as one; then ``error``."""

    def __init__(self, patch: pytest.MonkeyPatch, left: int, error: BaseException) -> None:
        self.left, self.error = left, error
        patched = {**vars(os), "pwrite": self._pwrite, "ftruncate": self._ftruncate}
        patch.setattr(files_module, "os", SimpleNamespace(**patched))
        patch.setattr(resume_module, "os", SimpleNamespace(**patched))

    def _pwrite(self, fd: int, data: Any, offset: int) -> int:
        part = bytes(data)[: self.left]
        if not part:
            raise self.error
        self.left -= os.pwrite(fd, part, offset)
        return len(part)

    def _ftruncate(self, fd: int, size: int) -> None:
        if isinstance(self.error, Killed):
            if not self.left:
                raise self.error
            self.left -= 1
        os.ftruncate(fd, size)


def append(path: Path, samples: list[Sample], summary: dict[str, Any], codec: str = "zstd") -> None:
    writer = StreamWriter(path, metadata={}, codec=codec, mode="a", num_workers=1)
    put_all(writer, samples)
    writer.close(summary)


def begin(path: Path, codec: str = "zstd") -> None:
    StreamWriter(path, metadata={}, codec=codec, mode="a", num_workers=1).abandon()


def two_captures(path: Path, codec: str = "zstd") -> list[dict[str, Any]]:
    write(path, small_samples(2), codec=codec, summary=FIRST)
    second = {"num_steps": 9, "duration_s": 1.0}
    append(path, [Sample("mlp", 7, floats(3), "bfloat16")], second, codec)
    return [FIRST, second]


def told(path: Path, *, recover: bool) -> tuple[list[dict[str, Any]], int, Any]:
    with StreamReader(path, recover=recover) as reader:
        (part,) = reader.parts
        return list(part.summaries), reader.num_steps, contents(reader)


@pytest.mark.parametrize("codec", CODECS)
def test_an_append_that_is_killed_takes_no_summary_with_it(tmp_path: Path, codec: str) -> None:
    """Whichever byte was the last one written: summaries, steps and records are read, repaired and appended to."""
    path = tmp_path / "a.stream"
    summaries = two_captures(path, codec)
    data = path.read_bytes()
    _, steps, records = told(path, recover=False)
    assert steps == 9
    left, died = 0, True
    while died:
        path.write_bytes(data)
        with pytest.MonkeyPatch.context() as patch:
            Dying(patch, left, Killed())
            try:
                begin(path, codec)
            except Killed:
                pass
            else:
                died = False
        assert told(path, recover=True) == (summaries, steps, records), left
        if left % 50 == 0 or not died:
            killed = path.read_bytes()
            assert recover_stream(path)["records"] == sum(site != "input_ids" for site, _, _ in records)
            found = told(path, recover=False)
            assert found[1:] == (steps, records)
            assert [
                {**summary, **known} for summary, known in zip(found[0], summaries, strict=False)
            ] == found[0][:2]
            path.write_bytes(killed)
            append(path, [Sample("mlp", steps, floats(3), "bfloat16")], {"n": 3}, codec)
            found = told(path, recover=False)
            assert (found[0], found[1]) == ([*summaries, {"n": 3}], steps + 1)
        left += 1 if left < 64 else 9
    assert left > 400


def test_a_killed_capture_behind_others_leaves_their_summaries(tmp_path: Path) -> None:
    """Killed with blocks of its own in the file, the third capture has no summary, and the others have theirs."""
    path = tmp_path / "a.stream"
    summaries = two_captures(path)
    writer = StreamWriter(path, metadata={}, codec="zstd", mode="a", num_workers=1)
    assert writer.first_step == 9
    put_all(writer, [Sample("new", 9, floats(3), "bfloat16")])
    writer.finish()
    writer.abandon()
    found, steps, records = told(path, recover=True)
    assert (found, steps) == (summaries, 10) and ("new", 9, 0) in records
    with open_stream(path, recover=True) as stream:
        assert stream.parts[0].summaries == tuple(summaries)


def test_each_summary_is_kept_once_before_the_index(tmp_path: Path) -> None:
    """Of many captures, each killed or not, a file grows by the last summary, not by all of them."""
    path = tmp_path / "a.stream"
    for number in range(6):
        begin(path)
        append(path, [Sample("mlp", number, floats(3), "bfloat16")], {"own": f"summary {number}"})
        begin(path)
    begin(path)
    data = path.read_bytes()
    for number in range(6):
        assert data.count(b'"summary %d"' % number) == 1
    append(path, [], {"own": "last"})
    found, steps, _ = told(path, recover=False)
    assert [summary["own"] for summary in found] == [*(f"summary {number}" for number in range(6)), "last"]
    assert steps == 6


def test_a_repaired_file_has_the_summaries_of_all_captures(tmp_path: Path) -> None:
    """Repairing a damaged block costs its records, not what earlier captures said."""
    path = tmp_path / "a.stream"
    summaries = two_captures(path)
    with StreamReader(path) as reader:
        block = reader._block(0, 0)
    data = bytearray(path.read_bytes())
    data[block.payload_start + 20] ^= 1
    path.write_bytes(data)
    assert recover_stream(path)["rewritten"]
    found, steps, _ = told(path, recover=False)
    assert found[:-1] == summaries[:-1] and steps == 9
    assert found[-1].items() >= summaries[-1].items() and found[-1]["recovered"]


def test_a_disk_that_is_full_at_an_append_leaves_the_file_whole(tmp_path: Path) -> None:
    """ENOSPC before the new capture begins: every byte is as it was."""
    path = tmp_path / "a.stream"
    two_captures(path)
    data = path.read_bytes()
    for room in (0, 100):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError) as raised:
            Dying(patch, room, OSError(errno.ENOSPC, "No space left on device"))
            begin(path)
        assert raised.value.errno == errno.ENOSPC
        assert path.read_bytes() == data


def test_sites_that_only_the_index_named_outlive_a_killed_append(tmp_path: Path) -> None:
    """With the frame of sites damaged, the index alone names them: an append that is killed keeps their names."""
    path = write(tmp_path / "a.stream", small_samples(1))
    data = bytearray(path.read_bytes())
    data[data.index(b"FXSITES") + 40] ^= 1
    path.write_bytes(data)
    before = told(path, recover=False)[2]
    begin(path)
    assert told(path, recover=True)[2] == before


def test_a_kill_before_the_end_is_cut_off_tells_nothing_twice(tmp_path: Path) -> None:
    """The frame in the index's place and its copy are both there: one of them counts, and nothing was lost."""
    path = tmp_path / "a.stream"
    write(path, small_samples(), seal_every=1, summary=FIRST)
    size = path.stat().st_size
    with pytest.MonkeyPatch.context() as patch:
        # All bytes of the two frames, and not the change behind them.
        dying = Dying(patch, 1 << 40, Killed())
        patch.setattr(resume_module, "os", SimpleNamespace(**{**vars(os), "ftruncate": _killed}))
        with pytest.raises(Killed):
            begin(path)
    assert dying.left < 1 << 40 and path.stat().st_size > size
    assert told(path, recover=True)[0] == [FIRST]
    with open_stream(path, recover=True) as stream:
        assert stream.damage == []
    append(path, small_samples(1), FIRST)
    with open_stream(path) as stream:
        assert stream.verify() == [] == stream.damage
    assert told(path, recover=False)[0] == [FIRST, FIRST]


def test_captures_without_a_record_that_say_the_same(tmp_path: Path) -> None:
    """Each of them counts."""
    path = tmp_path / "a.stream"
    write(path, small_samples(), seal_every=1, summary=FIRST)
    for _ in range(3):
        append(path, [], FIRST)
    assert told(path, recover=False)[0] == [FIRST] * 4
    path.write_bytes(path.read_bytes()[:-1])
    assert len(told(path, recover=True)[0]) == 3


def _killed(fd: int, size: int) -> None:
    raise Killed


@pytest.mark.parametrize("which", [1, 4], ids=["in the middle", "the last"])
def test_going_on_tells_what_was_lost_before(tmp_path: Path, which: int) -> None:
    """A damaged block of a whole file is skipped, or cut off, and either way the file says so for good."""
    path = tmp_path / "a.stream"
    write(path, [Sample("m", step, floats(500, step)) for step in range(5)], seal_every=1)
    with StreamReader(path) as reader:
        place = int(reader.segments[0].block_offsets[which]) + 400
    damaged = bytearray(path.read_bytes())
    damaged[place] ^= 1
    path.write_bytes(damaged)
    for count in (5, 6):
        append(path, [Sample("m", count, floats(500, 9))], {})
        with open_stream(path) as stream:
            assert len(stream) == count and len(stream.damage) == len(stream.verify()) == 1
        with open_stream(path, recover=True) as stream:
            assert len(stream) == count and len(stream.damage) == 1


def test_a_site_that_is_called_something_else_in_another_file(tmp_path: Path) -> None:
    """One name is one site, whatever its role in each file."""
    for name, role, steps in (("a", "mlp", 3), ("b", "other", 2)):
        writer = StreamWriter(tmp_path / f"{name}.stream", metadata={}, codec="zstd", num_workers=1)
        writer.add_site("m", role)
        put_all(writer, [Sample("m", step, floats(50, step), role=role) for step in range(steps)])
        writer.close({"num_steps": steps})
    with open_stream(tmp_path) as stream:
        assert [(site.name, site.role) for site in stream.sites] == [("m", "mlp")]
        assert len(stream) == len(stream["m"]) == len(list(stream)) == 5


def test_a_site_that_is_called_something_else_in_the_next_capture(tmp_path: Path) -> None:
    """In one file, too."""
    path = tmp_path / "a.stream"
    write(path, [Sample("m", 0, floats(50))])
    append(path, [Sample("m", 1, floats(50), role="other")], {})
    with open_stream(path) as stream:
        assert [(site.name, site.role) for site in stream.sites] == [("m", "mlp")]
        assert len(stream) == len(stream["m"]) == len(list(stream)) == 2


def test_repairing_a_link_repairs_its_file(tmp_path: Path) -> None:
    path, link = tmp_path / "a.stream", tmp_path / "link.stream"
    write(path, small_samples(), seal_every=1)
    path.write_bytes(path.read_bytes()[:-1])
    link.symlink_to(path)
    recover_stream(link)
    assert link.is_symlink()
    with open_stream(path) as stream:
        assert stream.verify() == []


def test_a_repair_that_fails_leaves_other_files_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is there under a name like that of its output is not its own; what a killed one left is in nobody's way."""
    path, output, other = tmp_path / "a.stream", tmp_path / "out.stream", tmp_path / "out.stream.part"
    for name in "bc":
        write(tmp_path / f"{name}.stream", small_samples(), seal_every=1)
    path.write_bytes(b"".join((tmp_path / f"{name}.stream").read_bytes() for name in "bc"))
    path.write_bytes(path.read_bytes()[:-1])
    other.write_text("mine")
    with monkeypatch.context() as patch:
        patch.setattr(repair_module, "_copy_segment", _fails)
        with pytest.raises(OSError, match="no room"):
            recover_stream(path, output)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "a.stream",
        "b.stream",
        "c.stream",
        other.name,
    ]
    (tmp_path / ".out.stream.part").write_text("left behind")
    values = [sample for sample in small_samples() if sample.role != "input"]
    assert recover_stream(path, output)["records"] == 2 * len(values)
    assert other.read_text() == "mine"


def _fails(*_: object) -> None:
    raise OSError(errno.ENOSPC, "no room")


def test_a_byte_too_many_is_damage(tmp_path: Path) -> None:
    """The index then points beside the file's beginning, and the file is a stream all the same."""
    path = tmp_path / "a.stream"
    write(path, small_samples(), seal_every=1)
    whole = path.read_bytes()
    path.write_bytes(whole[:200] + b"\0" + whole[200:])
    with pytest.raises(CorruptStreamError, match="where none does"):
        open_stream(path)
    assert not check_file(path)["ok"]
