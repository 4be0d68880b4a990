"""A harvest by several processes: what is whole is known by its inputs' ids, what is not is run again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from models import PLAIN, make, tokens

from fx_instrument import InstrumentationConfig, InstrumentationError, InstrumentationFramework, open_stream
from fx_instrument.errors import CorruptStreamError, NotAStreamError
from fx_instrument.harvest import MANIFEST, Harvest, collect, finished_ids
from fx_instrument.stream.reader import StreamReader
from fx_instrument.stream.records import RecordMeta
from fx_instrument.stream.writer import StreamWriter


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def instrumented() -> tuple[torch.nn.Module, InstrumentationFramework]:
    model = make(PLAIN)
    framework = InstrumentationFramework(InstrumentationConfig(max_memory_gb=0.05))
    framework.instrument_model(model, backend="eager")
    return model, framework


def test_files_and_manifest(tmp_path: Path) -> None:
    """Each harvest has a private file; the manifest names rows and ids; the folder reads as one stream."""
    model, framework = instrumented()
    folder = tmp_path / "h"
    assert finished_ids(folder) == set()
    for part in range(2):
        with Harvest(framework, folder, name=f"rank-{part}") as harvest:
            for step in range(3):
                ids = [f"{part}-{step}-{row}" for row in range(4)]
                with harvest.batch(ids):
                    model(tokens(4, 5, seed=step))
            with pytest.raises(InstrumentationError, match="no forward call"), harvest.batch(["x"]):
                pass
            with pytest.raises(TimeoutError, match="still being written"):
                collect(folder, timeout_s=0)
    expected = {f"{part}-{step}-{row}" for part in range(2) for step in range(3) for row in range(4)}
    assert finished_ids(folder) == expected
    files = collect(folder)
    lines = [json.loads(line) for line in (folder / MANIFEST).read_text().splitlines()]
    assert [(line["file"], line["rows"], line["steps"]) for line in lines] == [(f.file, 12, 3) for f in files]
    assert [file.file.startswith(f"rank-{part}-") for part, file in enumerate(files)] == [True, True]
    assert files[0].ids[4:6] == ("0-1-0", "0-1-1")
    assert all(path.stat().st_mode & 0o077 == 0 for path in (folder, *folder.iterdir()))
    with open_stream(folder) as stream:
        assert stream.num_steps == 6 and len(stream) == 6 * 2 * PLAIN.depth


def test_an_error_inside_a_batch(tmp_path: Path) -> None:
    """A batch that failed is not noted, the others of its file are."""
    model, framework = instrumented()
    with pytest.raises(RuntimeError, match="mine"), Harvest(framework, tmp_path / "h") as harvest:
        with pytest.raises(TypeError, match="got one"), harvest.batch("ab"):
            pass
        with harvest.batch(["a"]):
            model(tokens(1, 3))
        with harvest.batch(["b"]):
            model(tokens(1, 3))
            raise RuntimeError("mine")
    assert finished_ids(tmp_path / "h") == {"a"}
    with pytest.raises(ValueError, match="name"):
        Harvest(framework, tmp_path / "h", name="../x")


@pytest.mark.parametrize("damage", ["zeros at the end", "a block", "zeros all through"])
def test_a_machine_that_lost_power(tmp_path: Path, damage: str) -> None:
    """A file without an index that holds zeros or a damaged block does not keep the others from being collected."""
    model, framework = instrumented()
    folder = tmp_path / "h"
    for name in ("a", "b"):
        with Harvest(framework, folder, name=name) as harvest, harvest.batch([name]):
            model(tokens(1, 4))
    (path,) = folder.glob("a-*.stream")
    with StreamReader(path) as reader:
        block = reader.segments[0].block_offsets[-1]
    raw = path.read_bytes()
    if damage == "zeros at the end":
        raw = raw[:block] + bytes(4096)
    elif damage == "a block":
        raw = raw[:-1].replace(raw[block : block + 64], bytes(64))
    else:
        raw = bytes(len(raw))
    path.write_bytes(raw)
    with pytest.raises((CorruptStreamError, NotAStreamError)):
        open_stream(path)
    assert finished_ids(folder) == {"b"}
    assert [file.ids for file in collect(folder)] == [("b",)]
    assert finished_ids(folder) == {"b"}
    if damage != "zeros all through":
        open_stream(folder).close()


def test_a_killed_process(tmp_path: Path) -> None:
    """What had reached the file of a killed process is kept, as whole batches; collecting ends its file."""
    script = """
        import os, sys, time
        from pathlib import Path
        sys.path.insert(0, sys.argv[2])
        import torch
        from fx_instrument import open_stream
        from test_harvest import instrumented
        from models import tokens
        from fx_instrument.harvest import Harvest
        model, framework = instrumented()

        def is_stored():
            # Inputs have a page of their own, which may be written later than the first values.
            if harvest._capture.report.stored_bytes < 500_000:
                return False
            (path,) = Path(sys.argv[1]).glob("*.stream")
            with open_stream(path, recover=True) as stream:
                return bool(stream.num_steps and stream.inputs(0))

        with torch.no_grad(), Harvest(framework, sys.argv[1]) as harvest:
            for batch in range(60):
                with harvest.batch([f"{batch}-{row}" for row in range(8)]):
                    model(tokens(8, 32, seed=batch))
                if batch == 50:
                    while not is_stored():
                        time.sleep(0.01)
                    print("ready", flush=True)
            time.sleep(600)
    """
    folder = tmp_path / "h"
    command = [sys.executable, "-c", textwrap.dedent(script), str(folder), str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        finally:
            os.kill(process.pid, signal.SIGKILL)
            process.wait(60)
    done = finished_ids(folder)
    assert done and len(done) % 8 == 0
    assert done == {f"{batch}-{row}" for batch in range(len(done) // 8) for row in range(8)}
    (file,) = collect(folder)
    assert set(file.ids) == done == finished_ids(folder)
    model = make(PLAIN)
    with open_stream(folder) as stream:
        step = file.steps - 1
        assert torch.equal(stream.inputs(step)["input_ids"], tokens(8, 32, seed=step))
        captured = stream.read("layers.1.mlp", step)
    seen: list[torch.Tensor] = []
    model.layers[1].mlp.register_forward_hook(lambda module, args, output: seen.append(output))
    model(tokens(8, 32, seed=step))
    assert torch.equal(captured, seen[0])


@pytest.mark.slow
def test_two_ranks(tmp_path: Path) -> None:
    """Under torchrun each process writes a file of its rank, and the folder reads as one stream of both."""
    script = tmp_path / "job.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import os, sys
            sys.path.insert(0, {str(Path(__file__).parent)!r})
            import torch
            from models import tokens
            from test_harvest import instrumented
            from fx_instrument.harvest import Harvest
            rank = int(os.environ["RANK"])
            model, framework = instrumented()
            with torch.no_grad(), Harvest(framework, sys.argv[1], name=f"rank-{{rank}}") as harvest:
                for step in range(3):
                    with harvest.batch([f"{{rank}}-{{step}}"]):
                        model(tokens(1, 4, seed=10 * rank + step))
            """
        )
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    folder = tmp_path / "h"
    subprocess.run([*command, str(script), str(folder)], check=True, timeout=300)
    assert [file.ids for file in collect(folder)] == [("0-0", "0-1", "0-2"), ("1-0", "1-1", "1-2")]
    with open_stream(folder) as stream:
        assert stream.ranks == (0, 1) and len(stream) == 2 * 3 * 2 * PLAIN.depth
        for rank in stream.ranks:
            for step in range(3):
                ids = stream.inputs(step, rank=rank)["input_ids"]
                assert torch.equal(ids, tokens(1, 4, seed=10 * rank + step))


def test_a_killed_process_whose_site_runs_several_times(tmp_path: Path) -> None:
    """A step that lacks later values of a site is not whole; nor is the only step of a file, of which nobody knows."""

    def write(name: str, steps: list[int]) -> None:
        writer = StreamWriter(tmp_path / f"{name}.stream", metadata={}, codec="none", mode="x")
        site = writer.add_site("shared", "attention")
        for step, num_calls in enumerate(steps):
            for call in range(num_calls):
                value = np.full(10, call, np.float32)
                writer.put(RecordMeta(site, step, call, "float32", (10,)), value.view(np.uint8))
        writer.finish()
        writer.abandon()
        notes = [{"steps": [n, n + 1], "rows": 1, "ids": [f"{name}-{n}"]} for n in range(len(steps))]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(note) + "\n" for note in notes))

    write("a", [3, 3, 1])
    write("b", [2])
    assert finished_ids(tmp_path) == {"a-0", "a-1"}
    assert {one for file in collect(tmp_path) for one in file.ids} == {"a-0", "a-1"} == finished_ids(tmp_path)
