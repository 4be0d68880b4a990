"""open_stream: what a reader gets back is what was captured, bit for bit."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from written import write_stream

from fx_instrument.activations import open_stream
from fx_instrument.config import HookConfig
from fx_instrument.errors import (
    CorruptStreamError,
    InstrumentationError,
    MissingRecordError,
    TruncatedStreamError,
)
from fx_instrument.sampling import positions

ATTN, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.int8, torch.bool)


def values(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 3).to(dtype)


@pytest.fixture
def steps():
    """A prefill of 5 tokens and two decode steps, batch 2, hidden 8."""
    return [
        {
            ATTN: values(2, tokens, 8, seed=2 * n),
            MLP: values(2, tokens, 8, dtype=torch.bfloat16, seed=2 * n + 1),
        }
        for n, tokens in enumerate((5, 1, 1))
    ]


@pytest.mark.parametrize("codec", ["none", "lz4", "zstd"])
def test_every_record_comes_back_bit_for_bit(tmp_path, steps, codec):
    with open_stream(write_stream(tmp_path / "a.stream", steps, codec=codec)) as stream:
        assert [(site.name, site.role) for site in stream.sites] == [(ATTN, "attention"), (MLP, "mlp")]
        assert (len(stream), stream.num_steps, stream.damage) == (6, 3, [])
        for step, wanted in enumerate(steps):
            for site, expected in wanted.items():
                found = stream.read(site, step)
                assert found.dtype == expected.dtype
                assert torch.equal(found, expected)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 5), max_size=4),
    dtype=st.sampled_from(DTYPES),
    codec=st.sampled_from(["none", "lz4", "zstd"]),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_dtype_round_trips(tmp_path_factory, shape, dtype, codec, seed):
    """Scalars and empty tensors too."""
    tensor = values(*shape, dtype=dtype, seed=seed)
    path = write_stream(tmp_path_factory.mktemp("any") / "a.stream", [{"site": tensor}], codec=codec)
    with open_stream(path) as stream:
        record = stream["site"][0]
        assert (tuple(record.shape), record.dtype) == (tuple(shape), dtype)
        assert torch.equal(record.tensor(), tensor)
        widened = tensor.float() if dtype == torch.bfloat16 else tensor
        np.testing.assert_array_equal(record.numpy(), widened.numpy())
        assert record.numpy().dtype == widened.numpy().dtype


def test_every_bit_pattern_of_bfloat16_survives(tmp_path):
    """NaN payloads, infinities and subnormals are values like any other."""
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    with open_stream(write_stream(tmp_path / "a.stream", [{MLP: bits.view(torch.bfloat16)}])) as stream:
        assert torch.equal(stream.read(MLP, 0).view(torch.int16), bits)


def test_a_site_is_a_sequence_of_records_in_order(tmp_path, steps):
    with open_stream(write_stream(tmp_path / "a.stream", steps)) as stream:
        records = stream[MLP]
        assert len(records) == 3
        assert [record.step for record in records] == [0, 1, 2]
        assert [record.step for record in records[1:]] == [1, 2]
        assert records[-1].step == 2
        assert records[0].site == MLP
        assert records[0].full_shape == records[0].shape == (2, 5, 8)
        assert records[0].positions() is None
        with pytest.raises(IndexError):
            records[3]


def test_an_unknown_site_is_an_empty_sequence(tmp_path, steps):
    with open_stream(write_stream(tmp_path / "a.stream", steps)) as stream:
        assert list(stream["model.layers.0.mlpp"]) == []
        assert "model.layers.0.mlpp" not in stream
        assert MLP in stream
        with pytest.raises(ValueError, match=r"near it are .*'model\.layers\.0\.mlp'"):
            stream["model.layers.0.mlpp"].cat()
        with pytest.raises(IndexError, match=r"no site of .*near it are .*'model\.layers\.0\.mlp'"):
            stream["model.layers.0.mlpp"][0]


def test_what_a_site_does_not_have(tmp_path, steps):
    """Errors say what there is, and of a part of the records nothing of other sites."""
    with open_stream(write_stream(tmp_path / "a.stream", steps)) as stream:
        with pytest.raises(IndexError, match=rf"record 3 of '{MLP}': there are 3 here"):
            stream[MLP][3]
        with pytest.raises(ValueError, match=rf"nothing to join of '{MLP}': there are 0 here"):
            stream[MLP][3:].cat()
        with pytest.raises(TypeError, match="got one"):
            stream.steps(MLP)
    with pytest.raises(ValueError, match="an empty one"):
        open_stream("")


def test_cat_joins_along_the_tokens(tmp_path, steps):
    with open_stream(write_stream(tmp_path / "a.stream", steps)) as stream:
        for site in (ATTN, MLP):
            assert torch.equal(stream[site].cat(), torch.cat([step[site] for step in steps], dim=1))
            assert torch.equal(stream[site][1:].cat(), torch.cat([step[site] for step in steps[1:]], dim=1))


def test_cat_joins_rows_vectors_and_scalars(tmp_path):
    made = [{"rows": values(n + 1, 4), "vector": values(n + 2), "scalar": values()} for n in range(3)]
    with open_stream(write_stream(tmp_path / "a.stream", made)) as stream:
        assert torch.equal(stream["rows"].cat(), torch.cat([step["rows"] for step in made]))
        assert torch.equal(stream["vector"].cat(), torch.cat([step["vector"] for step in made]))
        assert torch.equal(stream["scalar"].cat(), torch.stack([step["scalar"] for step in made]))


def test_cat_says_which_records_do_not_fit(tmp_path):
    path = write_stream(tmp_path / "a.stream", [{MLP: values(2, 3, 4)}, {MLP: values(1, 3, 4)}])
    with open_stream(path) as stream, pytest.raises(ValueError, match=r"\(2, 3, 4\).*\(1, 3, 4\)"):
        stream[MLP].cat()


def test_calls_of_a_step_are_told_apart(tmp_path):
    shared = [values(2, 4, seed=n) for n in range(3)]
    with open_stream(write_stream(tmp_path / "a.stream", [{MLP: shared}, {MLP: shared[:1]}])) as stream:
        assert [(record.step, record.call) for record in stream[MLP]] == [(0, 0), (0, 1), (0, 2), (1, 0)]
        assert torch.equal(stream.read(MLP, 0, call=2), shared[2])
        with pytest.raises(MissingRecordError, match="called 3 times"):
            stream.read(MLP, 0, call=3)


def test_a_missing_record_is_a_key_error_that_says_what_there_is(tmp_path, steps):
    with open_stream(write_stream(tmp_path / "a.stream", steps)) as stream:
        with pytest.raises(KeyError, match=r"near it are .*'model\.layers\.0\.mlp'"):
            stream.read("model.layers.0.mpl", 0)
        with pytest.raises(KeyError, match="3 records, of steps 0 to 2"):
            stream.read(MLP, 7)
        with pytest.raises(KeyError, match="holds 3, counted from 0"):
            stream.inputs(3)
        with pytest.raises(TypeError, match="name of a site"):
            stream[0]


def test_inputs_are_there_by_name_and_are_no_sites(tmp_path, steps):
    inputs = [
        {"input_ids": torch.arange(10).reshape(2, 5), "attention_mask": torch.ones(2, 5, dtype=torch.int64)},
        {"input_ids": torch.tensor([[7], [8]])},
    ]
    with open_stream(write_stream(tmp_path / "a.stream", steps, inputs=inputs)) as stream:
        assert {site.name for site in stream.sites} == {ATTN, MLP}
        assert len(stream) == 6
        assert len(list(stream)) == 6
        for step, wanted in enumerate(inputs):
            found = stream.inputs(step)
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        assert stream.inputs(2) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sampled_records_know_their_positions(tmp_path, dtype):
    sampling = HookConfig(sampling_rate=0.1, seed=5)
    made = [{MLP: values(2, tokens, 16, dtype=dtype, seed=tokens)} for tokens in (7, 1)]
    with open_stream(write_stream(tmp_path / "a.stream", made, sampling=sampling)) as stream:
        for record, step in zip(stream[MLP], made, strict=True):
            full = step[MLP]
            places = record.positions()
            assert places.dtype == torch.int64
            assert places.tolist() == positions(full.numel(), 0.1, 5).tolist()
            assert record.full_shape == full.shape
            assert record.shape == (max(1, round(0.1 * full.numel())),)
            assert torch.equal(record.tensor(), full.reshape(-1)[places])
        assert torch.equal(stream[MLP].cat(), torch.cat([record.tensor() for record in stream[MLP]]))


def test_positions_given_out_are_the_callers_own(tmp_path):
    path = write_stream(tmp_path / "a.stream", [{MLP: values(8, 8)}], sampling=HookConfig(sampling_rate=0.2))
    with open_stream(path) as stream:
        stream[MLP][0].positions().zero_()
        assert stream[MLP][0].positions()[-1] > 0


@pytest.mark.parametrize("codec", ["none", "lz4", "zstd"])
def test_tensors_outlive_the_stream_and_may_be_written(tmp_path, steps, codec):
    path = write_stream(tmp_path / "a.stream", steps, codec=codec)
    before = path.read_bytes()
    stream = open_stream(path)
    tensors = [record.tensor() for record in stream]
    arrays = [record.numpy() for record in stream]
    stream.close()
    del stream
    gc.collect()
    for tensor, array in zip(tensors, arrays, strict=True):
        tensor += 1
        array += 1
        assert torch.equal(tensor.float(), torch.from_numpy(array).to(tensor.dtype).float())
    assert path.read_bytes() == before


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_a_closed_stream_reads_nothing_more(tmp_path, steps, codec):
    """Also not of pages that were read before; a record that an iteration gave holds its bytes."""
    with open_stream(write_stream(tmp_path / "a.stream", steps, codec=codec)) as stream:
        held, record = next(iter(stream)), stream[ATTN][1]
        record.tensor()
        expected = stream.read(held.site, held.step)
    for ask in (
        record.tensor,
        lambda: record.tensor(copy=False),
        lambda: stream[ATTN],
        lambda: stream.read(ATTN, 0),
        lambda: list(stream),
        stream.verify,
    ):
        with pytest.raises(ValueError, match=r"a\.stream is closed"):
            ask()
    assert torch.equal(held.tensor(), expected)


def test_writing_into_a_tensor_does_not_change_what_is_read_next(tmp_path, steps):
    with open_stream(write_stream(tmp_path / "a.stream", steps)) as stream:
        stream.read(ATTN, 0).zero_()
        for record in stream:
            record.tensor().zero_()
        assert torch.equal(stream.read(ATTN, 0), steps[0][ATTN])


def test_iterating_reaches_every_record_once(tmp_path, steps):
    with open_stream(write_stream(tmp_path / "a.stream", steps)) as stream:
        seen = {(record.site, record.step): record.tensor() for record in stream}
        assert len(seen) == 6
        assert all(torch.equal(seen[site, n], step[site]) for n, step in enumerate(steps) for site in step)


def test_a_file_without_an_index_needs_recover(tmp_path, steps):
    path = write_stream(tmp_path / "a.stream", steps, finish=False)
    with pytest.raises(TruncatedStreamError, match="recover"):
        open_stream(path)
    with open_stream(path, recover=True) as stream:
        assert len(stream) == 6
        assert torch.equal(stream.read(MLP, 2), steps[2][MLP])


def test_a_stream_without_records_is_a_stream(tmp_path):
    with open_stream(write_stream(tmp_path / "a.stream", [])) as stream:
        assert (len(stream), stream.num_steps, stream.sites, list(stream)) == (0, 0, (), [])
        assert stream


def test_what_is_no_stream_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        open_stream(tmp_path / "missing.stream")
    for content in (b"", b"x", b"not a stream at all" * 100):
        path = tmp_path / "other.stream"
        path.write_bytes(content)
        with pytest.raises(InstrumentationError):
            open_stream(path)


def test_reading_without_a_copy_shares_the_file_and_never_changes_it(tmp_path, steps):
    """copy=False gives tensors over the mapped file where values lie in it, the same values everywhere else."""
    for codec in ("none", "zstd"):
        path = write_stream(tmp_path / f"{codec}.stream", steps, codec=codec)
        before = path.read_bytes()
        stream = open_stream(path)
        for site in (ATTN, MLP):
            for step, record in enumerate(stream[site]):
                shared = record.tensor(copy=False)
                assert torch.equal(shared, steps[step][site])
                assert shared.dtype == steps[step][site].dtype
                again = stream.record(site, step).tensor(copy=False)
                assert (again.data_ptr() == shared.data_ptr()) == (codec == "none")
                array = record.numpy(copy=False)
                assert not array.flags.writeable
                assert np.array_equal(array, record.numpy())
        kept = stream[ATTN][0].tensor(copy=False)
        stream.close()
        assert torch.equal(kept, steps[0][ATTN])
        kept.zero_()
        assert path.read_bytes() == before


def test_reading_without_a_copy_still_finds_a_flipped_bit(tmp_path, steps):
    path = write_stream(tmp_path / "a.stream", steps, codec="none")
    data = bytearray(path.read_bytes())
    place = bytes(data).index(steps[0][ATTN].numpy().tobytes()[:64])
    data[place] ^= 1
    path.write_bytes(data)
    with open_stream(path) as stream, pytest.raises(CorruptStreamError, match="checksum"):
        stream[ATTN][0].tensor(copy=False)
