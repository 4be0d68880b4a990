"""export_stream: other libraries read back every bit."""

from __future__ import annotations

import builtins
import importlib
import json
import math
import shutil
import sys

import numpy as np
import pytest
import torch
from written import write_stream

from fx_instrument.activations import open_stream
from fx_instrument.config import HookConfig
from fx_instrument.errors import InstrumentationError, MissingPackageError
from fx_instrument.export import export_stream

ATTN, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"


def values(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


IDS = [torch.arange(6).reshape(2, 3), torch.tensor([[7], [8]])]


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn], ids=str)
def written(request, tmp_path):
    """Two sites, prefill and decode, input ids; with infinities and NaN where the dtype has them."""
    made = []
    for step, tokens in enumerate((3, 1)):
        special = values(2, tokens, 4, seed=step)
        special[0, 0, :3] = torch.tensor([math.nan, math.inf, -0.0])
        made.append(
            {ATTN: special.to(request.param), MLP: values(2, tokens, 4, dtype=request.param, seed=step + 9)}
        )
    return write_stream(tmp_path / "a.stream", made, inputs=[{"input_ids": ids} for ids in IDS]), made


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.contiguous().view(torch.uint8).reshape(-1).tolist()


def same(found: torch.Tensor, expected: torch.Tensor):
    """Bit for bit, after a cast back from the dtype that the format used."""
    assert bits(found.reshape(expected.shape).to(expected.dtype)) == bits(expected)


def test_safetensors_holds_the_captured_dtype(tmp_path, written):
    library = pytest.importorskip("safetensors")
    path, made = written
    with open_stream(path) as stream:
        (file,) = export_stream(stream, tmp_path / "a.safetensors")
    with library.safe_open(file, "pt") as found:
        assert set(found.keys()) == {f"{site}/{n}/0" for site in (ATTN, MLP) for n in (0, 1)} | {
            "inputs/0/input_ids",
            "inputs/1/input_ids",
        }
        for n, step in enumerate(made):
            for site, expected in step.items():
                tensor = found.get_tensor(f"{site}/{n}/0")
                assert tensor.dtype == expected.dtype
                same(tensor, expected)
            assert torch.equal(found.get_tensor(f"inputs/{n}/input_ids"), IDS[n])
        description = json.loads(found.metadata()["fx_instrument"])
        assert description["stream"]["model"] == {"class": "Tiny"}
        assert description["sites"][1] == {"name": MLP, "role": "mlp"}


def test_safetensors_splits_into_shards_with_an_index(tmp_path):
    library = pytest.importorskip("safetensors.torch")
    made = [{MLP: values(1, 16, 16, seed=n)} for n in range(5)]
    with open_stream(write_stream(tmp_path / "a.stream", made)) as stream:
        files = export_stream(stream, tmp_path / "a.safetensors", shard_bytes=2048)
    assert [file.name for file in files] == [
        "a-00001-of-00003.safetensors",
        "a-00002-of-00003.safetensors",
        "a-00003-of-00003.safetensors",
        "a.safetensors.index.json",
    ]
    weight_map = json.loads(files[-1].read_text())["weight_map"]
    for n, step in enumerate(made):
        name = f"{MLP}/{n}/0"
        assert torch.equal(library.load_file(tmp_path / weight_map[name])[name], step[MLP])


def test_npz_is_read_by_numpy_without_pickle(tmp_path, written):
    path, made = written
    with open_stream(path) as stream:
        export_stream(stream, tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz", allow_pickle=False) as found:
        description = json.loads(str(found["__metadata__"]))
        for n, step in enumerate(made):
            for site, expected in step.items():
                name = f"{site}/{n}/0"
                assert description["dtypes"][name] == str(expected.dtype).removeprefix("torch.")
                same(torch.from_numpy(found[name]), expected)
            assert (found[f"inputs/{n}/input_ids"] == IDS[n].numpy()).all()


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_arrow_rows_are_tokens_with_their_ids(tmp_path, written, suffix):
    arrow = pytest.importorskip("pyarrow")
    path, made = written
    with open_stream(path) as stream:
        export_stream(stream, tmp_path / f"a.{suffix}")
    if suffix == "parquet":
        table = importlib.import_module("pyarrow.parquet").read_table(tmp_path / "a.parquet")
    else:
        with arrow.memory_map(str(tmp_path / "a.arrow")) as source:
            table = arrow.ipc.open_stream(source).read_all()
    rows = table.to_pylist()
    assert len(rows) == 2 * 2 * (3 + 1)
    for n, step in enumerate(made):
        for site, expected in step.items():
            found = sorted((r for r in rows if (r["site"], r["step"]) == (site, n)), key=lambda r: r["row"])
            assert [r["token_id"] for r in found] == IDS[n].reshape(-1).tolist()
            assert {r["dtype"] for r in found} == {str(expected.dtype).removeprefix("torch.")}
            assert {tuple(r["shape"]) for r in found} == {tuple(expected.shape)}
            same(torch.tensor([r["values"] for r in found], dtype=torch.float32), expected)


def test_hugging_face_datasets_reads_both(tmp_path):
    datasets = pytest.importorskip("datasets", exc_type=ImportError)
    tensor = values(2, 3, 4, dtype=torch.bfloat16)
    with open_stream(
        write_stream(tmp_path / "a.stream", [{MLP: tensor}], inputs=[{"input_ids": IDS[0]}])
    ) as stream:
        export_stream(stream, tmp_path / "a.parquet")
        export_stream(stream, tmp_path / "a.arrow")
    cache = str(tmp_path / "cache")
    for found in (
        datasets.load_dataset("parquet", data_files=str(tmp_path / "a.parquet"), cache_dir=cache)["train"],
        datasets.Dataset.from_file(str(tmp_path / "a.arrow")),
    ):
        same(torch.stack(list(found.with_format("torch")["values"])), tensor)
        assert list(found["token_id"]) == IDS[0].reshape(-1).tolist()


def test_zarr_holds_an_array_a_record(tmp_path, written):
    zarr = pytest.importorskip("zarr", minversion="3")
    path, made = written
    with open_stream(path) as stream:
        export_stream(stream, tmp_path / "a.zarr")
    root = zarr.open_group(str(tmp_path / "a.zarr"), mode="r")
    for n, step in enumerate(made):
        for site, expected in step.items():
            array = root[f"{site}/{n}.0"]
            assert (array.attrs["step"], array.attrs["dtype"]) == (
                n,
                str(expected.dtype).removeprefix("torch."),
            )
            same(torch.from_numpy(np.asarray(array[...])), expected)
    assert root.attrs["fx_instrument"]["sites"][0]["role"] == "attention"


@pytest.mark.parametrize("suffix", ["safetensors", "npz", "zarr", "parquet"])
def test_sampled_records_come_with_their_positions(tmp_path, suffix):
    tensor = values(2, 8, 8)
    path = write_stream(
        tmp_path / "a.stream", [{MLP: tensor}], sampling=HookConfig(sampling_rate=0.1, seed=2)
    )
    with open_stream(path) as stream:
        record = stream[MLP][0]
        expected, places = record.tensor(), record.positions()
        if suffix == "zarr":
            pytest.importorskip("zarr", minversion="3")
        file = tmp_path / f"a.{suffix}"
        export_stream(stream, file)
    if suffix == "safetensors":
        found = importlib.import_module("safetensors.torch").load_file(file)
        kept, where = found[f"{MLP}/0/0"], found["positions/128"]
    elif suffix == "npz":
        with np.load(file) as found:
            kept, where = torch.from_numpy(found[f"{MLP}/0/0"]), torch.from_numpy(found["positions/128"])
            assert json.loads(str(found["__metadata__"]))["full_shapes"] == {f"{MLP}/0/0": [2, 8, 8]}
    elif suffix == "zarr":
        root = importlib.import_module("zarr").open_group(str(file), mode="r")
        kept, where = torch.from_numpy(root[f"{MLP}/0.0"][...]), torch.from_numpy(root["positions/128"][...])
    else:
        (row,) = importlib.import_module("pyarrow.parquet").read_table(file).to_pylist()
        assert row["full_shape"] == [2, 8, 8]
        kept, where = torch.tensor(row["values"]), places
    assert torch.equal(kept, expected)
    assert torch.equal(where, places)


def test_only_the_chosen_sites_and_progress(tmp_path):
    seen = []
    made = [{ATTN: values(1, 2, 4), MLP: values(1, 2, 4)}] * 3
    with open_stream(write_stream(tmp_path / "a.stream", made)) as stream:
        export_stream(stream, tmp_path / "a.npz", sites=[MLP], progress=lambda *counts: seen.append(counts))
        with pytest.raises(ValueError, match=r"near it are .*'model\.layers\.0\.mlp'"):
            export_stream(stream, tmp_path / "b.npz", sites=["model.layers.0.mpl"])
    assert seen == [(1, 3), (2, 3), (3, 3)]
    with np.load(tmp_path / "a.npz") as found:
        assert not [name for name in found.files if name.startswith(ATTN)]
    assert not (tmp_path / "b.npz").exists()


def test_what_is_there_is_replaced_only_when_asked(tmp_path):
    with open_stream(write_stream(tmp_path / "a.stream", [{MLP: values(1, 2, 4)}])) as stream:
        for name in ("a.npz", "a.zarr", "a.safetensors"):
            if name == "a.zarr" and not importlib.util.find_spec("zarr"):
                continue
            export_stream(stream, tmp_path / name)
            with pytest.raises(FileExistsError, match="overwrite"):
                export_stream(stream, tmp_path / name)
            export_stream(stream, tmp_path / name, overwrite=True)
        with pytest.raises(ValueError, match="format must be one of"):
            export_stream(stream, tmp_path / "a.csv")
    assert not list(tmp_path.glob(".*.part"))


@pytest.mark.parametrize("name", ["o.npz", "o.zarr", "o.safetensors"])
def test_only_exports_are_overwritten(tmp_path, name):
    """A forgotten OUTPUT makes the last input one: neither a stream, nor a cut one, nor a folder of them is lost."""
    pytest.importorskip("zarr" if name == "o.zarr" else "safetensors")
    source = write_stream(tmp_path / "a.stream", [{MLP: values(1, 2, 4)}])
    whole = source.read_bytes()
    output, folder = tmp_path / name, tmp_path / "folder"
    folder.mkdir()
    (folder / "a.stream").write_bytes(whole)
    format = name[2:]
    with open_stream(source) as stream:
        for held in (whole, whole[:-1], whole[: len(whole) // 2]):
            output.write_bytes(held)
            with pytest.raises(FileExistsError, match="holds captured values"):
                export_stream(stream, output, overwrite=True)
            assert output.read_bytes() == held
        with pytest.raises(FileExistsError, match="holds captured values"):
            export_stream(stream, source, format=format, overwrite=True)
        with pytest.raises(FileExistsError, match="no export to this format made"):
            export_stream(stream, folder, format=format, overwrite=True)
        output.unlink()
        output.symlink_to(tmp_path / "nowhere")
        with pytest.raises(FileExistsError, match="overwrite replaces it"):
            export_stream(stream, output)
        output.unlink()
        for held in (b"", b"of an earlier export"):
            output.write_bytes(held)
            export_stream(stream, output, overwrite=True)
            if output.is_dir():
                shutil.rmtree(output)
    assert source.read_bytes() == whole and (folder / "a.stream").read_bytes() == whole


@pytest.mark.parametrize("dtype", [torch.complex32, torch.complex64, torch.complex128], ids=str)
def test_complex_values_are_kept_or_refused_before_anything_is_written(tmp_path, dtype):
    pytest.importorskip("safetensors")
    halves = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    parts = torch.where(halves.isfinite(), halves, 0).reshape(64, 512, 2)
    complex32 = torch.view_as_complex(parts)
    made = complex32 if dtype == torch.complex32 else complex32.to(torch.complex64).to(dtype)
    with open_stream(write_stream(tmp_path / "a.stream", [{MLP: made}])) as stream:
        read = stream[MLP][0].numpy()
        assert read.dtype == (np.complex128 if dtype == torch.complex128 else np.complex64)
        assert np.array_equal(np.stack([read.real, read.imag], -1), parts.to(torch.float64).numpy())
        export_stream(stream, tmp_path / "a.npz")
        with np.load(tmp_path / "a.npz") as found:
            assert found[f"{MLP}/0/0"].dtype == read.dtype and np.array_equal(found[f"{MLP}/0/0"], read)
        with pytest.raises(ValueError, match="Parquet and Arrow"):
            export_stream(stream, tmp_path / "a.parquet")
        if dtype == torch.complex64:
            export_stream(stream, tmp_path / "a.safetensors")
            return
        (tmp_path / "a.safetensors").write_bytes(b"of an earlier export")
        with pytest.raises(ValueError, match=f"safetensors has no .*{str(dtype).removeprefix('torch.')}"):
            export_stream(stream, tmp_path / "a.safetensors", overwrite=True)
    assert (tmp_path / "a.safetensors").read_bytes() == b"of an earlier export"


def test_shards_are_replaced_only_when_asked_and_then_all(tmp_path):
    """A later export has fewer shards, or none: nothing of the earlier one stays beside it."""
    pytest.importorskip("safetensors")
    (tmp_path / "a-notes-of-today.safetensors").write_text("of someone else")
    output = tmp_path / "a.safetensors"

    def there():
        return {
            file.name: file.read_bytes()
            for file in tmp_path.iterdir()
            if file.suffix in (".safetensors", ".json")
        }

    with open_stream(write_stream(tmp_path / "a.stream", [{MLP: values(1, 16, 16)}] * 5)) as stream:
        assert len(export_stream(stream, output, shard_bytes=1024)) == 6
        before = there()
        for shard_bytes in (1024, 2048, 1 << 20):
            with pytest.raises(FileExistsError, match="overwrite"):
                export_stream(stream, output, shard_bytes=shard_bytes)
            assert there() == before

        def stop(done, total):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            export_stream(stream, output, shard_bytes=2048, overwrite=True, progress=stop)
        assert there() == before
        for shard_bytes in (2048, 1 << 20):
            made = export_stream(stream, output, shard_bytes=shard_bytes, overwrite=True)
            assert set(there()) == {file.name for file in made} | {"a-notes-of-today.safetensors"}


def test_a_failed_export_leaves_nothing_behind(tmp_path):
    made = [{ATTN: values(1, 2, 4), MLP: torch.full((1, 2, 4), 1 << 60)}]
    with open_stream(write_stream(tmp_path / "a.stream", made)) as stream:
        with pytest.raises(ValueError, match="no one exact type"):
            export_stream(stream, tmp_path / "a.parquet")

        def stop(done, total):
            raise KeyboardInterrupt

        for name in ("a.npz", "a.safetensors"):
            with pytest.raises(KeyboardInterrupt):
                export_stream(stream, tmp_path / name, progress=stop)
    assert [file.name for file in tmp_path.iterdir()] == ["a.stream"]


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    with open_stream(write_stream(tmp_path / "a.stream", [{MLP: values(1, 2, 4)}])) as stream:
        for package, name in (("safetensors", "a.safetensors"), ("pyarrow", "a.parquet"), ("zarr", "a.zarr")):
            for module in [module for module in sys.modules if module.split(".")[0] == package]:
                monkeypatch.delitem(sys.modules, module)
            monkeypatch.setattr(importlib, "import_module", _without(package))
            with pytest.raises(MissingPackageError, match=rf"{package}.*fx_instrument\[export\]") as caught:
                export_stream(stream, tmp_path / name)
            assert isinstance(caught.value, InstrumentationError)
            assert isinstance(caught.value, ImportError)
    assert [file.name for file in tmp_path.iterdir()] == ["a.stream"]


def _without(package):
    def find(name, *arguments):
        if name.split(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return builtins.__import__(name, fromlist=["*"])

    return find


@pytest.mark.parametrize("suffix", ["safetensors", "npz", "zarr", "parquet", "arrow"])
def test_every_bit_pattern_survives(tmp_path, suffix):
    """All of bfloat16, NaN payloads among them, and records of nothing but negative zeros, bit for bit."""
    pytest.importorskip({"npz": "numpy", "parquet": "pyarrow", "arrow": "pyarrow"}.get(suffix, suffix))
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    made = [
        {MLP: bits.view(torch.bfloat16).reshape(1, 256, 256)},
        {MLP: torch.full((1, 2, 256), -0.0, dtype=torch.bfloat16)},
    ]
    output = tmp_path / f"a.{suffix}"
    with open_stream(write_stream(tmp_path / "a.stream", made)) as stream:
        export_stream(stream, output)
    for step, expected in enumerate(torch.stack(list(s.values())).reshape(-1) for s in made):
        if suffix == "safetensors":
            found = importlib.import_module("safetensors.torch").load_file(output)[f"{MLP}/{step}/0"]
            stored = found.reshape(-1).view(torch.int16)
        else:
            if suffix == "npz":
                values32 = np.load(output)[f"{MLP}/{step}/0"]
            elif suffix == "zarr":
                root = importlib.import_module("zarr").open_group(str(output), mode="r")
                values32 = np.asarray(root[f"{MLP}/{step}.0"][...])
            else:
                datasets = pytest.importorskip("datasets", exc_type=ImportError)
                if suffix == "parquet":
                    table = datasets.Dataset.from_parquet(str(output), cache_dir=str(tmp_path / "cache"))
                else:
                    table = datasets.Dataset.from_file(str(output))
                rows = table.filter(lambda row, step=step: row["step"] == step).with_format("numpy")
                values32 = np.stack(list(rows["values"]))
            assert values32.dtype == np.float32
            wide = np.ascontiguousarray(values32).reshape(-1).view(np.uint32)
            assert not (wide & 0xFFFF).any()
            stored = torch.from_numpy((wide >> 16).astype(np.uint16).view(np.int16))
        assert torch.equal(stored, expected.view(torch.int16))


def test_a_folder_that_is_missing_is_named(tmp_path):
    with (
        open_stream(write_stream(tmp_path / "a.stream", [{MLP: values(2, 2)}])) as stream,
        pytest.raises(FileNotFoundError, match=r"there is no folder .*missing to export into"),
    ):
        export_stream(stream, tmp_path / "missing" / "a.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["a.stream"]
