"""analyze_activations: its numbers are those of a float64 computation over the whole tensors at once."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from written import write_stream

from fx_instrument.analysis import CHUNK_ELEMENTS, Moments, analyze_activations
from fx_instrument.config import HookConfig
from fx_instrument.errors import NotAStreamError, TruncatedStreamError

SITE = "model.layers.0.mlp"
KEYS = {
    "role", "records", "tokens", "shape", "dtype", "mean", "std", "min", "max", "mean_token_norm", "max_token_norm",
    "zero_fraction", "nonfinite", "excess_kurtosis", "top_channels",
}  # fmt: skip


def values(*shape, dtype=torch.float32, seed=0, scale=3.0, shift=0.5):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale + shift).to(dtype)


def reference(rows: torch.Tensor) -> dict:
    """The statistics of (tokens, hidden), all at once, by torch in float64."""
    x = rows.double()
    norms = x.norm(dim=-1)
    deviation = x - x.mean()
    variance = deviation.square().mean()
    return {
        "mean": x.mean().item(),
        "std": x.std(correction=0).item(),
        "min": x.min().item(),
        "max": x.max().item(),
        "mean_token_norm": norms.mean().item(),
        "max_token_norm": norms.max().item(),
        "zero_fraction": (x == 0).double().mean().item(),
        "excess_kurtosis": (deviation.pow(4).mean() / variance**2 - 3).item(),
    }


def assert_close(found: dict, expected: dict):
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-10, abs=1e-12), name


def analyse(tmp_path, *arguments, **options):
    found = analyze_activations(write_stream(tmp_path / "a.stream", *arguments, **options))
    json.loads(json.dumps(found, allow_nan=False))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_statistics_equal_a_float64_computation_over_everything(tmp_path, dtype):
    """Prefill and decode, several records, more elements than one chunk holds."""
    made = [values(2, tokens, 96, dtype=dtype, seed=tokens) for tokens in (300, 1, 1)]
    made[0][0, :7] = 0
    assert made[0].numel() > CHUNK_ELEMENTS
    site = analyse(tmp_path, [{SITE: tensor} for tensor in made])["sites"][SITE]
    assert site.keys() == KEYS
    rows = torch.cat([tensor.reshape(-1, 96) for tensor in made])
    assert_close(site, reference(rows))
    assert (site["records"], site["tokens"], site["shape"]) == (3, 604, [2, None, 96])
    assert (site["dtype"], site["role"], site["nonfinite"]) == (str(dtype).removeprefix("torch."), "mlp", 0)
    means = rows.double().abs().mean(dim=0)
    order = means.argsort(descending=True, stable=True)[:10]
    assert [channel for channel, _ in site["top_channels"]] == order.tolist()
    assert [value for _, value in site["top_channels"]] == pytest.approx(means[order].tolist(), rel=1e-12)


def test_padding_is_left_out_and_the_mask_may_be_longer_than_the_step(tmp_path):
    """Left padding in the prefill; in decode steps the mask covers the cache too."""
    ids = torch.arange(10).reshape(2, 5)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    made = [values(2, 5, 8, seed=1), values(2, 1, 8, seed=2)]
    made[0][0, :2] = 1e6
    inputs = [
        {"input_ids": ids, "attention_mask": mask},
        {"input_ids": ids[:, :1], "attention_mask": torch.cat([mask, torch.tensor([[1], [1]])], dim=1)},
    ]
    site = analyse(tmp_path, [{SITE: tensor} for tensor in made], inputs=inputs)["sites"][SITE]
    rows = torch.cat([made[0][mask.bool()], made[1].reshape(-1, 8)])
    assert_close(site, reference(rows))
    assert site["tokens"] == 10


def test_padding_that_every_sequence_begins_with_is_left_out(tmp_path):
    """As padding to a fixed length gives; only a row of a 4-D mask, which is int8, may hide tokens otherwise."""
    made = values(2, 4, 8)
    mask = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])
    for step_mask, tokens in ((mask, 5), (mask.bool(), 5), (mask.to(torch.int8), 8)):
        inputs = [{"input_ids": torch.zeros(2, 4, dtype=torch.int64), "attention_mask": step_mask}]
        assert analyse(tmp_path, [{SITE: made}], inputs=inputs)["sites"][SITE]["tokens"] == tokens


def test_a_mask_of_a_decode_step_may_hide_its_own_token(tmp_path):
    """A sequence that ended while others go on."""
    made = values(2, 1, 4)
    inputs = [{"input_ids": torch.tensor([[1], [2]]), "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}]
    site = analyse(tmp_path, [{SITE: made}], inputs=inputs)["sites"][SITE]
    assert site["tokens"] == 1
    assert_close(site, reference(made[0]))


def test_rows_without_a_batch_dimension_follow_the_mask_too(tmp_path):
    """As mixtures of experts have them; a pooled output of as many rows as sequences keeps all."""
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    flat, pooled = values(6, 4), values(2, 4, seed=1)
    site = {SITE: flat, "pooler": pooled}
    inputs = [{"input_ids": torch.arange(6).reshape(2, 3), "attention_mask": mask}]
    found = analyse(tmp_path, [site], inputs=inputs)["sites"]
    assert_close(found[SITE], reference(flat[mask.reshape(-1).bool()]))
    assert_close(found["pooler"], reference(pooled))


def test_the_encoders_mask_is_not_the_decoders(tmp_path):
    decoder, encoder = values(2, 3, 4), values(2, 3, 4, seed=1)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    inputs = [
        {
            "input_ids": torch.arange(6).reshape(2, 3),
            "attention_mask": mask,
            "decoder_input_ids": torch.arange(6).reshape(2, 3),
        }
    ]
    found = analyse(
        tmp_path, [{"decoder.block.0.mlp": decoder, "encoder.block.0.mlp": encoder}], inputs=inputs
    )
    assert found["sites"]["decoder.block.0.mlp"]["tokens"] == 6
    assert found["sites"]["encoder.block.0.mlp"]["tokens"] == 3


def test_nonfinite_values_are_counted_and_left_out(tmp_path):
    made = values(4, 6, 16)
    made[0, 0, 3], made[1, 2, 5], made[3, 5, 0] = math.nan, math.inf, -math.inf
    site = analyse(tmp_path, [{SITE: made}])["sites"][SITE]
    assert site["nonfinite"] == 3
    finite = made[made.isfinite()].double()
    assert site["mean"] == pytest.approx(finite.mean().item(), rel=1e-12)
    assert site["std"] == pytest.approx(finite.std(correction=0).item(), rel=1e-12)
    assert site["max"] == finite.max().item()
    whole = made.reshape(-1, 16)[made.reshape(-1, 16).isfinite().all(dim=1)].double()
    assert site["mean_token_norm"] == pytest.approx(whole.norm(dim=-1).mean().item(), rel=1e-12)
    column = made.reshape(-1, 16)[:, 3]
    expected = column[column.isfinite()].double().abs().mean().item()
    assert dict(map(tuple, site["top_channels"])).get(3, expected) == pytest.approx(expected, rel=1e-12)


def test_what_is_not_defined_is_none(tmp_path):
    made = {
        "nan.mlp": torch.full((2, 3), math.nan),
        "constant.mlp": torch.full((50, 7), 0.1),
        "empty.mlp": torch.empty(0, 4),
        "scalar.mlp": torch.tensor(2.0),
        "flags.mlp": torch.tensor([[True, False]]),
        "tiny.mlp": torch.tensor([[1e-200, 2e-200]], dtype=torch.float64),
    }
    found = analyse(tmp_path, [made])["sites"]
    assert found["nan.mlp"]["mean"] is None
    assert found["nan.mlp"]["nonfinite"] == 6
    assert found["nan.mlp"]["top_channels"] == []
    assert found["constant.mlp"]["std"] == 0
    assert found["constant.mlp"]["excess_kurtosis"] is None
    assert (found["empty.mlp"]["records"], found["empty.mlp"]["tokens"], found["empty.mlp"]["mean"]) == (
        1,
        0,
        None,
    )
    assert (found["scalar.mlp"]["mean"], found["scalar.mlp"]["shape"]) == (2.0, [])
    assert found["flags.mlp"]["mean"] == 0.5
    assert found["tiny.mlp"]["excess_kurtosis"] is None


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_what_leaves_the_range_of_float64_is_none(tmp_path, dtype):
    """Squares, fourth powers and sums of large values; what is in range is told as ever."""
    largest = torch.finfo(torch.float64).max

    def rows(*values):
        return torch.tensor([values], dtype=torch.float64).to(dtype)

    made = [
        {"powers.mlp": rows(0, 0), "equal.mlp": rows(largest, largest), "far.mlp": rows(0, 1, largest)},
        {"powers.mlp": rows(1e80, 1e80), "equal.mlp": rows(largest, largest), "far.mlp": rows(0, 1, largest)},
    ]
    found = analyse(tmp_path, made)["sites"]
    powers, equal, far = (found[f"{name}.mlp"] for name in ("powers", "equal", "far"))
    assert (powers["mean"], powers["std"], powers["excess_kurtosis"]) == (5e79, 5e79, None)
    assert powers["max_token_norm"] == pytest.approx(2**0.5 * 1e80)
    assert (equal["mean"], equal["std"], equal["excess_kurtosis"]) == (largest, 0, None)
    assert equal["max_token_norm"] is None and equal["top_channels"] == [[0, None], [1, None]]
    assert (far["min"], far["max"], far["nonfinite"]) == (0, largest, 0)
    assert far["std"] is None and far["excess_kurtosis"] is None


@pytest.mark.parametrize("padded", [False, True])
def test_sampled_records_give_statistics_of_the_samples_by_channel(tmp_path, padded):
    sampling = HookConfig(sampling_rate=0.25, seed=3)
    full = values(2, 20, 8)
    mask = torch.ones(2, 20, dtype=torch.int64)
    if padded:
        mask[0, :9] = 0
    inputs = [{"input_ids": torch.zeros(2, 20, dtype=torch.int64), "attention_mask": mask}]
    path = write_stream(tmp_path / "a.stream", [{SITE: full}], inputs=inputs, sampling=sampling)
    site = analyze_activations(path)["sites"][SITE]
    from fx_instrument.activations import open_stream

    with open_stream(path) as stream:
        places = stream[SITE][0].positions()
    places = places[mask.reshape(-1).bool()[places // 8]]
    kept = full.reshape(-1)[places].double()
    assert site["mean"] == pytest.approx(kept.mean().item(), rel=1e-12)
    assert site["std"] == pytest.approx(kept.std(correction=0).item(), rel=1e-12)
    assert (site["tokens"], site["shape"]) == (int(mask.sum()), [2, 20, 8])
    assert site["mean_token_norm"] is None
    for channel, value in site["top_channels"]:
        assert value == pytest.approx(kept[places % 8 == channel].abs().mean().item(), rel=1e-12)
    assert len(site["top_channels"]) == 8


def test_metadata_says_where_the_file_comes_from(tmp_path):
    summary = {"dropped_records": {SITE: 2}, "stalled_seconds": 0.1, "eager_records": 1}
    found = analyse(tmp_path, [{SITE: values(2, 3, 4)}, {SITE: values(2, 1, 4)}], summary=summary)
    metadata = found["metadata"]
    assert (metadata["steps"], metadata["records"], metadata["raw_bytes"]) == (2, 2, 2 * 4 * 4 * 4)
    assert metadata["stored_bytes"] == (tmp_path / "a.stream").stat().st_size
    assert metadata["ratio"] == metadata["raw_bytes"] / metadata["stored_bytes"]
    assert metadata["file"] == str(tmp_path / "a.stream")
    assert metadata["config"]["compression_algorithm"] == "zstd"
    assert (metadata["model"], metadata["backend"]) == ({"class": "Tiny"}, "aot_eager")
    assert metadata["versions"]["torch"] == torch.__version__
    assert (metadata["duration_s"], metadata["achieved_gbps"]) == (0.5, 128 / 0.5 / 1e9)
    assert (metadata["dropped_records"], metadata["stalled_seconds"]) == ({SITE: 2}, 0.1)
    assert (metadata["eager_records"], metadata["damage"]) == (1, [])
    assert (found["causal_graph"], found["sae_features"]) == (None, None)


def test_a_cut_file_is_analysed_with_recover_only(tmp_path):
    path = write_stream(tmp_path / "a.stream", [{SITE: values(2, 3, 4)}], finish=False)
    with pytest.raises(TruncatedStreamError):
        analyze_activations(path)
    found = analyze_activations(path, recover=True)
    assert found["sites"][SITE]["tokens"] == 6
    assert found["metadata"]["duration_s"] is None
    (tmp_path / "other").write_bytes(b"something else entirely")
    with pytest.raises(NotAStreamError):
        analyze_activations(tmp_path / "other")


def test_the_random_state_is_not_touched(tmp_path):
    path = write_stream(tmp_path / "a.stream", [{SITE: values(4, 4)}], sampling=HookConfig(sampling_rate=0.5))
    torch.manual_seed(1)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    analyze_activations(path)
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()


def test_memory_does_not_grow_with_the_file(tmp_path):
    """Of Python and NumPy: 60 MB have the same peak as 20, which is more than the reader keeps of pages."""
    peaks = []
    for num_steps in (20, 60):
        step = {SITE: values(1, 256, 1024)}
        path = write_stream(tmp_path / f"{num_steps}.stream", [step] * num_steps)
        tracemalloc.start()
        analyze_activations(path)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + (1 << 20)


def test_progress_counts_records(tmp_path):
    seen = []
    path = write_stream(tmp_path / "a.stream", [{SITE: values(2, 3)}] * 3)
    analyze_activations(path, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.floats(-1e3, 1e3), max_size=20), min_size=1, max_size=6).filter(
        lambda parts: any(parts)
    ),
    st.floats(-1e6, 1e6),
)
def test_merged_moments_are_those_of_all_values(parts, shift):
    """In any grouping, empty groups too; the shift provokes the cancellation that naive sums suffer from."""
    parts = [np.array(part, np.float64) + shift for part in parts]
    merged = Moments()
    for part in parts:
        merged.merge(Moments.of(part))
    everything = Moments.of(np.concatenate(parts))
    deviation = np.concatenate(parts) - everything.mean
    scale = max(1.0, float(np.abs(deviation).max()))
    noise = 1e-9 * max(1.0, abs(shift))
    assert merged.count == everything.count
    assert merged.mean == pytest.approx(everything.mean, rel=1e-12, abs=noise)
    for power, name in ((2, "m2"), (3, "m3"), (4, "m4")):
        bound = merged.count * scale**power
        assert abs(getattr(merged, name) - (deviation**power).sum()) <= bound * noise


def test_resident_memory_does_not_grow_with_the_file(tmp_path):
    """Pages of the mapped file count too, so they are given back on the way."""
    step = {f"model.layers.{n}.mlp": values(1, 256, 1024, seed=n) for n in range(4)}
    path = write_stream(tmp_path / "a.stream", [step] * 48, codec="none")
    assert path.stat().st_size > 192 << 20
    program = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from memory import resident
from fx_instrument import analyze_activations
before = resident("VmHWM")
analyze_activations({str(path)!r})
print(resident("VmHWM") - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 96 << 20


def test_padding_of_a_real_generate_is_left_out(tmp_path):
    """The masks that transformers passes, prefill and cached decode, against eager hooks and the tokenizer's mask."""
    transformers = pytest.importorskip("transformers")
    from fx_instrument import InstrumentationConfig, InstrumentationFramework

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(2, 64, (3, 6))
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [1] * 6, [0, 1, 1, 1, 1, 1]])
    inputs = {"input_ids": ids.where(mask.bool(), 0), "attention_mask": mask}
    seen = []
    name = "model.layers.1.mlp"
    handle = model.get_submodule(name).register_forward_hook(
        lambda module, args, output: seen.append(output.clone())
    )
    model.generate(**inputs, max_new_tokens=4, do_sample=False)
    handle.remove()

    framework = InstrumentationFramework(InstrumentationConfig())
    framework.instrument_model(model, backend="aot_eager")
    with framework.capture_activations(tmp_path / "a.stream"):
        model.generate(**inputs, max_new_tokens=4, do_sample=False)
    framework.restore(model)
    site = framework.analyze_activations(tmp_path / "a.stream")["sites"][name]
    rows = torch.cat([seen[0][mask.bool()], *(output.reshape(-1, 32) for output in seen[1:])])
    assert (len(seen), site["tokens"], site["records"]) == (4, 14 + 3 * 3, 4)
    assert site["mean"] == pytest.approx(rows.double().mean().item(), rel=1e-4, abs=1e-7)
    assert site["std"] == pytest.approx(rows.double().std(correction=0).item(), rel=1e-5)
    assert site["max_token_norm"] == pytest.approx(rows.double().norm(dim=-1).max().item(), rel=1e-5)
