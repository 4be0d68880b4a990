"""fx-instrument: what scripts and people rely on, run as a process would run it."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from written import write_stream

pytest.importorskip("click")
pytest.importorskip("rich")

from fx_instrument.activations import open_stream
from fx_instrument.cli import run
from fx_instrument.cli.options import print_lost
from fx_instrument.stream.writer import StreamWriter
from fx_instrument.version import __version__

ATTN, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"


@pytest.fixture
def stream_file(tmp_path):
    made = [
        {ATTN: torch.full((2, tokens, 8), 1.5), MLP: torch.arange(2.0 * tokens * 8).reshape(2, tokens, 8)}
        for tokens in (4, 1, 1)
    ]
    return write_stream(tmp_path / "a.stream", made, inputs=[{"input_ids": torch.arange(8).reshape(2, 4)}])


def call(capsys, *arguments):
    """Exit code and standard output."""
    code = run([str(argument) for argument in arguments])
    return code, capsys.readouterr().out


def call_json(capsys, *arguments):
    code, out = call(capsys, *arguments, "--json")

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return code, json.loads(out, parse_constant=refuse)


def test_info_says_what_the_file_holds(capsys, stream_file):
    code, out = call(capsys, "info", stream_file)
    assert code == 0
    for word in ("Tiny", "2 (1 attention, 1 mlp)", "zstd", "full_tensor", "input_ids"):
        assert word in out
    code, found = call_json(capsys, "info", stream_file)
    assert (code, found["records"], found["steps"]) == (0, 6, 3)
    assert found["sites"] == [
        {"name": ATTN, "role": "attention"},
        {"name": MLP, "role": "mlp"},
    ]


def test_stats_are_those_of_the_analysis(capsys, stream_file):
    code, found = call_json(capsys, "stats", stream_file, "--site", "*.mlp")
    assert code == 0
    assert list(found["sites"]) == [MLP]
    assert found["sites"][MLP]["max"] == 63
    code, out = call(capsys, "stats", stream_file)
    assert code == 0
    assert ATTN in out
    assert "kurtosis" in out


def test_head_shows_the_first_records_in_order_of_steps(capsys, stream_file):
    code, found = call_json(capsys, "head", stream_file, "-n", 3, "--values", 2)
    assert code == 0
    assert [(row["step"], row["site"], row["values"]) for row in found] == [
        (0, ATTN, [1.5, 1.5]),
        (0, MLP, [0.0, 1.0]),
        (1, ATTN, [1.5, 1.5]),
    ]
    assert call(capsys, "head", stream_file)[0] == 0


def test_info_of_a_file_that_is_mostly_what_it_says_of_itself(capsys, tmp_path):
    out = call(capsys, "info", write_stream(tmp_path / "a.stream", [{MLP: torch.ones(1)}]))[1]
    assert "x larger" in out and "smaller" not in out


@pytest.mark.parametrize("command", ["info", "stats", "head"])
def test_control_characters_of_a_file_reach_no_terminal(capsys, tmp_path, command):
    name = "evil\x1b[31m\x1b]0;t\x07[bold].mlp"
    out = call(capsys, command, write_stream(tmp_path / "a.stream", [{name: torch.ones(2, 3)}]))[1]
    assert "\x1b" not in out and "\x07" not in out
    assert command == "info" or r"evil\x1b[31m\x1b]0;t\x07[bold]" in out


@pytest.mark.parametrize("command", ["info", "verify", "recover", "head"])
def test_a_pipe_is_no_stream(capsys, tmp_path, command):
    """Nothing waits for whoever might write into it."""
    os.mkfifo(tmp_path / "a.stream")
    assert run([command, str(tmp_path / "a.stream")]) == 3
    assert "is no regular file" in capsys.readouterr().err.replace("\n", " ")


def test_head_writes_what_json_lacks_as_text(capsys, tmp_path):
    path = write_stream(tmp_path / "a.stream", [{MLP: torch.tensor([math.nan, math.inf, 1.0])}])
    assert call_json(capsys, "head", path)[1][0]["values"] == ["nan", "inf", 1.0]


def test_verify_finds_a_flipped_bit_and_a_cut(capsys, stream_file):
    assert call(capsys, "verify", stream_file)[0] == 0
    whole = stream_file.read_bytes()
    with open_stream(stream_file) as stream:
        records = len(stream)
    damaged = bytearray(whole)
    place = next(i for i in range(len(whole) // 3, len(whole)) if whole[i])
    damaged[place] ^= 4
    stream_file.write_bytes(damaged)
    code, found = call_json(capsys, "verify", stream_file)
    assert (code, found["ok"]) == (1, False)
    assert found["problems"]
    stream_file.write_bytes(whole[:-1])
    code, found = call_json(capsys, "verify", stream_file)
    assert (code, found["ok"], found["readable_records"]) == (1, False, records)
    assert [problem["offset"] is None for problem in found["problems"]] == [False]
    assert call(capsys, "verify", stream_file)[0] == 1


def test_verify_goes_on_behind_what_is_no_stream(capsys, stream_file):
    """Of several files each is named, whatever comes before it."""
    cut, other = stream_file.with_name("cut.stream"), stream_file.with_name("text.stream")
    cut.write_bytes(stream_file.read_bytes()[:-1])
    other.write_text("a text")
    code = run(["verify", str(other), str(cut), str(stream_file)])
    said = capsys.readouterr()
    out = said.out.replace("\n", "")
    assert code == 3 and "a stream begins with" in said.err
    assert f"{stream_file.name}: whole" in out and "damaged:" in out and "recover=True" not in out
    code, found = call_json(capsys, "verify", other, cut, stream_file)
    assert (code, found["ok"], [result["ok"] for result in found["files"]]) == (3, False, [False, True])
    assert [failure["file"] for failure in found["failed"]] == [str(other)]


def test_recover_makes_a_cut_file_whole_in_its_place(capsys, stream_file):
    with open_stream(stream_file) as stream:
        expected = {(record.site, record.step): record.tensor() for record in stream}
        ids = stream.inputs(0)["input_ids"]
    stream_file.write_bytes(stream_file.read_bytes()[:-1])
    assert call(capsys, "info", stream_file)[0] == 1
    assert call(capsys, "info", stream_file, "--recover")[0] == 0
    code, found = call_json(capsys, "recover", stream_file)
    assert (code, found["records"], found["steps"], found["rewritten"]) == (0, 6, 3, True)
    assert call(capsys, "verify", stream_file)[0] == 0
    with open_stream(stream_file) as stream:
        assert stream.metadata["model"] == {"class": "Tiny"}
        assert stream.metadata["summary"]["recovered"] is True
        for (site, step), tensor in expected.items():
            assert torch.equal(stream.read(site, step), tensor)
        assert torch.equal(stream.inputs(0)["input_ids"], ids)
    before = stream_file.read_bytes()
    code, found = call_json(capsys, "recover", stream_file)
    assert (code, found["rewritten"], stream_file.read_bytes()) == (0, False, before)
    assert [file.name for file in stream_file.parent.iterdir()] == ["a.stream"]


@pytest.mark.parametrize("command", [["stats"], ["head"], ["export"]])
def test_what_recover_passes_over_is_said(capsys, stream_file, command):
    """On standard error, so that what a script reads stays what it was."""
    whole = [*command, str(stream_file), *(["a.npz"] if command == ["export"] else [])]
    whole = [str(stream_file.with_name(part)) if part == "a.npz" else part for part in whole]
    assert run([*whole, "--json"]) == 0 and "missing" not in capsys.readouterr().err
    stream_file.write_bytes(stream_file.read_bytes()[:-1])
    again = ["--overwrite"] if command == ["export"] else []
    assert run([*whole, "--json", "--recover", *again]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)
    assert f"missing: {stream_file}:" in said.err and "recover=True" not in said.err


def test_of_many_gaps_the_first_are_said(capsys):
    gaps = [{"file": "a", "offset": n, "num_bytes": 1, "reason": f"reason {n}."} for n in range(13)]
    print_lost(gaps)
    said = capsys.readouterr().err
    assert "reason 9." in said and "reason 10." not in said and "3 more gaps" in said


def test_recover_into_another_file_leaves_the_first_alone(capsys, stream_file, tmp_path):
    cut = stream_file.read_bytes()[:-1]
    stream_file.write_bytes(cut)
    assert call(capsys, "recover", stream_file, "-o", tmp_path / "b.stream")[0] == 0
    assert stream_file.read_bytes() == cut
    assert call(capsys, "verify", tmp_path / "b.stream")[0] == 0
    assert call(capsys, "recover", stream_file, "-o", tmp_path / "b.stream")[0] == 2


def test_recover_leaves_alone_what_a_capture_writes(capsys, tmp_path):
    files = [write_stream(tmp_path / name, [{MLP: torch.ones(1, 4, 8)}]) for name in ("a.stream", "c.stream")]
    for file in files:
        file.write_bytes(file.read_bytes()[:-1])
    writer = StreamWriter(tmp_path / "b.stream", metadata={}, codec="zstd")
    inode = (tmp_path / "b.stream").stat().st_ino
    assert run(["recover", str(tmp_path / "b.stream")]) == 5
    assert "another capture is writing this file" in capsys.readouterr().err
    code, found = call_json(capsys, "recover", tmp_path)
    assert code == 5 and [result["rewritten"] for result in found["files"]] == [True, True]
    (failed,) = found["failed"]
    assert failed["file"] == str(tmp_path / "b.stream") and "is writing this file" in failed["reason"]
    assert run(["recover", str(tmp_path)]) == 5
    out, err = capsys.readouterr()
    assert out.count("whole already") == 2 and str(tmp_path / "b.stream") in err
    assert (tmp_path / "b.stream").stat().st_ino == inode
    writer.close({})
    assert call(capsys, "recover", tmp_path)[0] == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.stream", "b.stream", "c.stream"]


def test_recover_goes_on_after_a_file_that_holds_nothing(capsys, stream_file):
    stream_file.write_bytes(stream_file.read_bytes()[:-1])
    (stream_file.parent / "0.stream").touch()
    code, found = call_json(capsys, "recover", stream_file.parent)
    assert (code, len(found["files"]), len(found["failed"])) == (1, 1, 1)
    assert call(capsys, "verify", stream_file)[0] == 0


def test_export_by_suffix_and_glob(capsys, stream_file, tmp_path):
    code, found = call_json(capsys, "export", stream_file, tmp_path / "a.npz", "--site", "*.mlp")
    assert (code, found["files"]) == (0, [str(tmp_path / "a.npz")])
    with np.load(tmp_path / "a.npz") as arrays:
        assert arrays[f"{MLP}/1/0"].shape == (2, 1, 8)
        assert f"{ATTN}/1/0" not in arrays
    assert call(capsys, "export", stream_file, tmp_path / "a.npz")[0] == 2
    assert call(capsys, "export", stream_file, tmp_path / "a.npz", "--overwrite")[0] == 0
    assert call(capsys, "export", stream_file, tmp_path / "a.csv")[0] == 2
    assert call(capsys, "export", stream_file, tmp_path / "b.npz", "--site", "nothing*")[0] == 2


def test_exit_codes_tell_what_went_wrong(capsys, tmp_path):
    (tmp_path / "other").write_bytes(b"no stream " * 10)
    (tmp_path / "empty").write_bytes(b"")
    assert call(capsys, "info", tmp_path / "missing")[0] == 2
    assert call(capsys, "info", tmp_path / "other")[0] == 3
    assert call(capsys, "verify", tmp_path / "empty")[0] == 1
    assert call(capsys, "frobnicate")[0] == 2
    assert call(capsys, "--version") == (0, f"fx-instrument, version {__version__}\n")


@pytest.mark.parametrize(
    "command", [[], ["info"], ["stats"], ["verify"], ["recover"], ["export"], ["head"], ["demo"]]
)
def test_every_command_explains_itself(capsys, command):
    code, out = call(capsys, *command, "--help")
    assert code == 0
    assert "Usage: fx-instrument" in out
    assert "--help" in out


def test_the_module_runs_as_a_program(stream_file):
    done = subprocess.run(
        [sys.executable, "-m", "fx_instrument", "info", str(stream_file), "--json"],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["records"] == 6


def test_without_the_cli_extra_the_program_says_what_to_install(monkeypatch, capsys):
    from fx_instrument import __main__

    monkeypatch.delitem(sys.modules, "fx_instrument.cli", raising=False)
    monkeypatch.setitem(sys.modules, "click", None)
    assert __main__.main() == 4
    assert "pip install 'fx_instrument[cli]'" in capsys.readouterr().err
