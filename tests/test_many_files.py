"""Several stream files read as one: ranks beside each other, files of a rank one after the other."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from written import write_stream

from fx_instrument import analyze_activations, export_stream, open_stream
from fx_instrument.config import HookConfig
from fx_instrument.errors import CorruptStreamError, MissingRecordError, NotAStreamError, TruncatedStreamError
from fx_instrument.repair import recover_stream
from fx_instrument.sampling import positions

ATTN, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"


def values(seed, tokens=3):
    return torch.randn((2, tokens, 8), generator=torch.Generator().manual_seed(seed))


def steps(first, count, sites=(ATTN, MLP)):
    return [{site: values(10 * (first + n) + i) for i, site in enumerate(sites)} for n in range(count)]


def ids(seed):
    return {"input_ids": torch.arange(6).reshape(2, 3) + seed}


@pytest.fixture
def two_ranks(tmp_path):
    """Three steps of two processes that run beside each other."""
    folder = tmp_path / "run"
    folder.mkdir()
    for rank in (0, 1):
        write_stream(
            folder / f"{1 - rank}.stream",
            steps(100 * rank, 3),
            inputs=[ids(100 * rank + n) for n in range(3)],
            rank=rank,
            world=2,
            codec=("zstd", "none")[rank],
        )
    return folder


def test_ranks_are_beside_each_other(two_ranks):
    """A step has one number in all ranks; records say theirs, and reading needs it where it is not clear."""
    with open_stream(two_ranks) as stream:
        assert (stream.num_steps, len(stream), stream.ranks, stream.path) == (3, 12, (0, 1), str(two_ranks))
        assert [(r.step, r.rank) for r in stream[MLP]] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
        assert [(part.rank, part.world, part.first_step) for part in stream.parts] == [(0, 2, 0), (1, 2, 0)]
        for rank in (0, 1):
            expected = [step[MLP] for step in steps(100 * rank, 3)]
            assert torch.equal(stream.read(MLP, 2, rank=rank), expected[2])
            assert torch.equal(stream[MLP].cat(rank=rank), torch.cat(expected, dim=1))
            assert torch.equal(stream.inputs(1, rank=rank)["input_ids"], ids(100 * rank + 1)["input_ids"])
        with pytest.raises(ValueError, match=r"ranks 0, 1; say which: rank="):
            stream.read(MLP, 2)
        with pytest.raises(ValueError, match=r"ranks 0, 1"):
            stream.inputs(0)
        with pytest.raises(ValueError, match=r"cat\(rank="):
            stream[MLP].cat()
        with pytest.raises(MissingRecordError, match="ranks 0, 1"):
            stream.read(MLP, 2, rank=7)
        assert {(r.site, r.step, r.rank) for r in stream} == {
            (site, step, rank) for site in (ATTN, MLP) for step in range(3) for rank in (0, 1)
        }


def test_files_of_a_rank_go_on_in_time(tmp_path):
    """Whatever their names: the file that was begun first is read first, and steps go on in the next."""
    names = ["b.stream", "c.stream", "a.stream"]
    first = 0
    for number, (name, count) in enumerate(zip(names, (2, 3, 1), strict=True)):
        write_stream(tmp_path / name, steps(first, count), created_ns=1000 + number)
        first += count
    for source in (tmp_path, [tmp_path / "a.stream", str(tmp_path / "b.stream"), tmp_path / "c.stream"]):
        with open_stream(source) as stream:
            assert (stream.num_steps, stream.ranks) == (6, (0,))
            assert [(Path(p.path).name, p.first_step, p.num_steps) for p in stream.parts] == [
                ("b.stream", 0, 2), ("c.stream", 2, 3), ("a.stream", 5, 1)
            ]  # fmt: skip
            assert [record.step for record in stream[ATTN]] == list(range(6))
            assert torch.equal(stream[ATTN].cat(), torch.cat([s[ATTN] for s in steps(0, 6)], dim=1))
            assert all(torch.equal(stream.read(MLP, n), step[MLP]) for n, step in enumerate(steps(0, 6)))
            assert [record.step for record in stream if record.site == MLP] == list(range(6))
            assert stream.verify() == []


def test_stages_that_hold_other_sites_need_no_rank(tmp_path):
    """Where each process holds its own layers, a site and a step say enough."""
    write_stream(tmp_path / "0.stream", steps(0, 2, (ATTN,)), rank=0, world=2, inputs=[ids(0), ids(1)])
    write_stream(tmp_path / "1.stream", steps(0, 2, (MLP,)), rank=1, world=2)
    with open_stream([tmp_path / "0.stream", tmp_path / "1.stream"]) as stream:
        assert [site.name for site in stream.sites] == [ATTN, MLP]
        assert (stream.num_steps, stream[ATTN][1].rank, stream[MLP][1].rank) == (2, 0, 1)
        assert stream.read(MLP, 1).shape == stream[MLP].cat()[:, 3:].shape
        assert torch.equal(stream.inputs(1)["input_ids"], ids(1)["input_ids"])


def test_joined_files_read_as_the_files_do(tmp_path, two_ranks):
    """`cat` of the files gives the same records, steps and ranks as a list of them, in either order."""
    parts = sorted(two_ranks.iterdir())
    for number, order in enumerate((parts, parts[::-1])):
        joined = tmp_path / f"{number}.stream"
        joined.write_bytes(b"".join(part.read_bytes() for part in order))
        with open_stream(joined) as one, open_stream(parts) as many:
            assert [(r.site, r.step, r.rank) for r in one] == [(r.site, r.step, r.rank) for r in many]
            assert all(torch.equal(a.tensor(), b.tensor()) for a, b in zip(one, many, strict=True))
            assert (one.num_steps, len(one)) == (many.num_steps, len(many))


def test_a_folder_holds_its_streams_only(tmp_path, two_ranks):
    """Other files, hidden files and folders are left out; a stream with another suffix is not."""
    (two_ranks / "manifest.json").write_text("{}")
    (two_ranks / ".a.stream").write_bytes(b"unfinished")
    (two_ranks / "below").mkdir()
    write_stream(two_ranks / "more.bin", steps(7, 1), rank=2, world=3)
    with open_stream(two_ranks) as stream:
        assert stream.ranks == (0, 1, 2)
    empty = tmp_path / "nothing"
    empty.mkdir()
    (empty / "notes.txt").write_text("notes")
    with pytest.raises(NotAStreamError, match="none of the 1 files"):
        open_stream(empty)
    with pytest.raises(ValueError, match="at least one"):
        open_stream([])
    with pytest.raises(ValueError, match="named twice"):
        open_stream([two_ranks, two_ranks / "0.stream"])
    with pytest.raises(FileNotFoundError):
        open_stream([two_ranks, tmp_path / "missing.stream"])


def test_damage_names_its_file(two_ranks):
    """One bad file of several: an error that names it, or with recover what is whole of all of them."""
    cut = two_ranks / "0.stream"
    cut.write_bytes(cut.read_bytes()[:-1])
    (two_ranks / "killed.stream").write_bytes(b"")
    with pytest.raises(TruncatedStreamError, match=r"0\.stream"):
        open_stream(two_ranks)
    with open_stream(two_ranks, recover=True) as stream:
        assert len(stream) == 12
        assert sorted(Path(lost.file).name for lost in stream.damage) == ["0.stream", "killed.stream"]
    with pytest.raises(TruncatedStreamError, match="empty"):
        open_stream(two_ranks / "killed.stream", recover=True)


def test_a_repaired_file_keeps_its_place(tmp_path):
    """Repairing the first file of a rank does not make it the last."""
    write_stream(tmp_path / "a.stream", steps(0, 2), rank=3, world=4, finish=False)
    write_stream(tmp_path / "b.stream", steps(2, 2), rank=3, world=4)
    recover_stream(tmp_path / "a.stream")
    with open_stream(tmp_path) as stream:
        assert stream.ranks == (3,)
        assert all(torch.equal(stream.read(MLP, n), step[MLP]) for n, step in enumerate(steps(0, 4)))


def test_analysis_is_of_all_files(two_ranks):
    """Statistics, sizes and drops are those of all files; the padding of a rank is its own."""
    found = analyze_activations(two_ranks)
    everything = torch.cat([step[MLP].flatten() for rank in (0, 1) for step in steps(100 * rank, 3)]).double()
    assert found["sites"][MLP]["records"] == 6
    assert found["sites"][MLP]["mean"] == pytest.approx(float(everything.mean()), rel=1e-12)
    metadata = found["metadata"]
    assert (metadata["steps"], metadata["records"], metadata["duration_s"]) == (3, 12, 0.5)
    assert [part["rank"] for part in metadata["parts"]] == [0, 1]
    assert metadata["stored_bytes"] == sum(file.stat().st_size for file in two_ranks.iterdir())


def test_padding_goes_by_the_rank(tmp_path):
    """The mask that leaves rows out is that of the record's own process."""
    made = torch.ones((1, 2, 4))
    made[0, 1] = 9
    for rank, mask in ((0, [[1, 1]]), (1, [[1, 0]])):
        write_stream(
            tmp_path / f"{rank}.stream",
            [{MLP: made}],
            inputs=[{"input_ids": torch.tensor([[1, 2]]), "attention_mask": torch.tensor(mask)}],
            rank=rank,
        )
    found = analyze_activations(tmp_path)["sites"][MLP]
    assert (found["tokens"], found["mean"]) == (3, pytest.approx(11 / 3))


def test_sums_of_drops_and_the_longest_duration(tmp_path):
    """Two files of a rank take as long as both together, ranks as long as the longest."""
    for name, rank, seconds, dropped in (("a", 0, 1.0, {MLP: 1}), ("b", 0, 2.0, {MLP: 2}), ("c", 1, 2.5, {})):
        write_stream(
            tmp_path / f"{name}.stream",
            steps(0, 1),
            rank=rank,
            summary={"duration_s": seconds, "dropped_records": dropped, "stalled_seconds": 0.5},
        )
    metadata = analyze_activations(tmp_path)["metadata"]
    assert (metadata["duration_s"], metadata["dropped_records"]) == (3.0, {MLP: 3})
    assert metadata["stalled_seconds"] == 1.5


@pytest.mark.parametrize("suffix", ["npz", "safetensors", "zarr", "parquet"])
def test_export_tells_ranks_apart(tmp_path, two_ranks, suffix):
    """Each record of each rank is in the export, under a name of its own."""
    pytest.importorskip({"npz": "numpy", "parquet": "pyarrow"}.get(suffix, suffix))
    output = tmp_path / f"a.{suffix}"
    with open_stream(two_ranks) as stream:
        export_stream(stream, output)
    expected = {rank: steps(100 * rank, 3)[2][MLP] for rank in (0, 1)}
    if suffix == "parquet":
        import pyarrow.parquet

        rows = pyarrow.parquet.read_table(output).to_pylist()
        found = {
            rank: [r["values"] for r in rows if (r["rank"], r["step"], r["site"]) == (rank, 2, MLP)]
            for rank in (0, 1)
        }
        for rank, tensor in expected.items():
            assert torch.equal(torch.tensor(found[rank]).reshape(tensor.shape), tensor)
        return
    if suffix == "npz":
        arrays = np.load(output)
    elif suffix == "safetensors":
        import safetensors.numpy

        arrays = safetensors.numpy.load_file(output)
    else:
        import zarr

        arrays = zarr.open_group(str(output), mode="r")
    for rank, tensor in expected.items():
        name = f"rank{rank}/{MLP}/2{'.' if suffix == 'zarr' else '/'}0"
        assert np.array_equal(arrays[name][...], tensor.numpy())
        assert np.array_equal(arrays[f"rank{rank}/inputs/0/input_ids"][...], ids(100 * rank)["input_ids"])


def test_each_file_knows_how_it_was_sampled(tmp_path):
    """Files of other rates and seeds give their own positions, and are refused by formats that hold one set."""
    hooks = [HookConfig(sampling_rate=0.25, seed=1), HookConfig(sampling_rate=0.25, seed=2)]
    for rank, sampling in enumerate(hooks):
        write_stream(tmp_path / f"{rank}.stream", [{MLP: values(5)}], sampling=sampling, rank=rank)
    with open_stream(tmp_path) as stream:
        for record, sampling in zip(stream[MLP], hooks, strict=True):
            assert record.positions().tolist() == positions(48, 0.25, sampling.seed).tolist()
            assert torch.equal(record.tensor(), values(5).flatten()[record.positions()])
        with pytest.raises(ValueError, match="different places"):
            export_stream(stream, tmp_path / "a.npz")


def test_the_command_line_takes_files_and_folders(capsys, two_ranks):
    """Every command that reads takes several files, or a folder."""
    pytest.importorskip("click")
    from fx_instrument.cli import run

    def call(*arguments):
        code = run([str(argument) for argument in arguments])
        return code, capsys.readouterr().out

    parts = sorted(two_ranks.iterdir())
    for source in ([two_ranks], parts):
        assert "2, of ranks 0, 1" in call("info", *source)[1]
        code, out = call("stats", *source, "--json")
        assert (code, json.loads(out)["sites"][MLP]["records"]) == (0, 6)
        code, out = call("head", *source, "--json")
        assert [row["rank"] for row in json.loads(out)[:4]] == [0, 1, 0, 1]
        code, out = call("verify", *source, "--json")
        assert (code, [file["ok"] for file in json.loads(out)["files"]]) == (0, [True, True])
        assert call("export", *source, two_ranks.parent / f"{len(source)}.npz")[0] == 0
    flipped = bytearray(parts[1].read_bytes())
    flipped[300] ^= 1
    parts[1].write_bytes(flipped)
    code, out = call("verify", two_ranks, "--json")
    assert (code, [file["ok"] for file in json.loads(out)["files"]]) == (1, [True, False])
    with pytest.raises(CorruptStreamError, match=parts[1].name):
        analyze_activations(two_ranks)


def test_joined_and_many_files_are_repaired(capsys, tmp_path, two_ranks):
    """Repairing a joined file keeps its parts apart; a folder's files are repaired each in its place."""
    pytest.importorskip("click")
    from fx_instrument.cli import run

    parts = sorted(two_ranks.iterdir())
    joined = tmp_path / "joined.stream"
    first = bytearray(parts[0].read_bytes())
    first[-300] ^= 1
    joined.write_bytes(bytes(first) + parts[1].read_bytes()[:-1])
    with open_stream(joined, recover=True) as stream:
        expected = [(r.site, r.step, r.rank, r.tensor()) for r in stream]
        inputs = stream.inputs(2, rank=1)
    assert len(expected) == 12
    assert recover_stream(joined)["rewritten"]
    with open_stream(joined) as stream:
        assert [(part.rank, part.num_steps) for part in stream.parts] == [(0, 3), (1, 3)]
        found = [(r.site, r.step, r.rank, r.tensor()) for r in stream]
        assert [record[:3] for record in found] == [record[:3] for record in expected]
        assert all(torch.equal(a[3], b[3]) for a, b in zip(found, expected, strict=True))
        assert torch.equal(stream.inputs(2, rank=1)["input_ids"], inputs["input_ids"])
        assert stream.verify() == []
    assert not recover_stream(joined)["rewritten"]
    for part in parts:
        part.write_bytes(part.read_bytes()[:-1])
    assert run(["verify", str(two_ranks)]) == 1
    assert run(["recover", str(two_ranks), "-o", str(tmp_path / "x.stream")]) == 2
    assert run(["recover", str(two_ranks)]) == 0
    assert run(["verify", str(two_ranks)]) == 0
    assert sorted(two_ranks.iterdir()) == parts
