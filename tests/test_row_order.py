"""Rows of values that have tokens before sequences, or none for tokens: whose they are, and which are padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from stream_files import put_all, small_samples
from tiny_llm import tiny_causal_lm
from torch import nn

from fx_instrument import (
    HookConfig,
    InstrumentationConfig,
    InstrumentationFramework,
    Recorder,
    analyze_activations,
    open_stream,
)
from fx_instrument.export import export_stream
from fx_instrument.row_order import order_of, reads_tokens
from fx_instrument.stream.writer import StreamWriter


@pytest.mark.parametrize(
    "rows, batch, tokens, order",
    [
        ((2, 7), 2, 7, "batch first"),
        ((14,), 2, 7, "batch first"),
        ((1, 14), 2, 7, "batch first"),
        ((7, 2), 2, 7, "tokens first"),
        ((7, 1), 1, 7, "batch first"),
        ((1, 4), 4, 1, "batch first"),
        ((3, 3), 3, 3, "batch first"),
        ((2, 7, 4), 2, 7, None),
        ((4, 7, 2), 8, 7, None),
        ((2,), 2, 7, None),
    ],
)
def test_the_order_of_rows(rows: tuple[int, ...], batch: int, tokens: int, order: str | None) -> None:
    assert order_of(rows, batch, tokens) == order


def test_parts_that_read_something_else() -> None:
    assert reads_tokens("model.language_model.layers.0.mlp") and not reads_tokens(
        "model.vision_tower.layers.0.mlp"
    )


class TokensFirst(nn.Module):
    """An encoder as torch makes it unless told otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        made: torch.Tensor = self.encoder(self.embed(input_ids.T))
        return made


@pytest.mark.parametrize("length", [7, 2])
def test_tokens_before_sequences(tmp_path: Path, length: int) -> None:
    """Each request has its own rows; in a step of as many sequences as tokens, as another of its steps shows."""
    torch.manual_seed(0)
    model = TokensFirst().eval()
    framework = InstrumentationFramework(InstrumentationConfig(max_memory_gb=0.05))
    framework.instrument_model(model, backend="eager")
    ids = torch.randint(2, 64, (2, length))
    recorder = Recorder(framework, tmp_path / "r", min_free_bytes=0)
    with torch.no_grad(), recorder, recorder.request(["a", "b"]):
        model(input_ids=ids)
        model(input_ids=ids[:, :1])
    with open_stream(tmp_path / "r") as stream:
        for site in (one.name for one in framework.sites):
            whole = torch.cat([stream.read(site, 0), stream.read(site, 1)])
            for number, name in enumerate("ab"):
                assert torch.equal(stream.request(name)[site].tensor(), whole[:, number])


def test_padding_of_tokens_before_sequences(tmp_path: Path) -> None:
    model = TokensFirst().eval()
    framework = InstrumentationFramework(InstrumentationConfig(max_memory_gb=0.05))
    framework.instrument_model(model, backend="eager")
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    with torch.no_grad(), framework.capture_activations(tmp_path / "f.stream"):
        model(input_ids=torch.randint(2, 64, (2, 5)), attention_mask=mask)
    sites = analyze_activations(tmp_path / "f.stream")["sites"]
    with open_stream(tmp_path / "f.stream") as stream:
        for name, site in sites.items():
            kept = stream.read(name, 0).transpose(0, 1)[mask.bool()].double()
            assert site["tokens"] == 8 and site["mean"] == pytest.approx(kept.mean().item())


class Sound(nn.Module):
    """A mask of samples, an eighth as many rows."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Linear(8, 4)

    def forward(self, samples: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.mlp(samples.unflatten(1, (-1, 8)))
        return made


def test_a_mask_of_samples_is_none_of_rows(tmp_path: Path) -> None:
    framework = InstrumentationFramework(InstrumentationConfig(max_memory_gb=0.05))
    model = framework.instrument_model(Sound(), backend="eager")
    mask = torch.ones(2, 80, dtype=torch.int64)
    mask[0, 40:] = 0
    with torch.no_grad(), framework.capture_activations(tmp_path / "f.stream"):
        model(torch.randn(2, 80), mask)
    assert analyze_activations(tmp_path / "f.stream")["sites"]["mlp"]["tokens"] == 20


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.q_norm = nn.Embedding(64, 12), nn.LayerNorm(3)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.q_norm(self.embed(input_ids).unflatten(-1, (4, 3)))
        return made


def test_padding_of_rows_of_heads(tmp_path: Path) -> None:
    config = InstrumentationConfig(max_memory_gb=0.05, hook_config=HookConfig(target_layers=["q_norm"]))
    framework = InstrumentationFramework(config)
    model = framework.instrument_model(Heads(), backend="eager")
    with torch.no_grad(), framework.capture_activations(tmp_path / "f.stream"):
        model(torch.randint(2, 64, (2, 5)), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]))
    assert analyze_activations(tmp_path / "f.stream")["sites"]["q_norm"]["tokens"] == 8 * 4


def encoder_decoder() -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.T5Config(
        d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=64, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("beams", [1, 3])
def test_a_decoder_does_not_go_by_its_encoders_inputs(tmp_path: Path, beams: int) -> None:
    """Labels as long as the inputs, or beams, of which the mask has a row each: padding is the encoder's own."""
    pytest.importorskip("pyarrow")
    import pyarrow.parquet

    model = encoder_decoder()
    framework = InstrumentationFramework(InstrumentationConfig(max_memory_gb=0.05))
    framework.instrument_model(model, backend="eager")
    ids, mask = torch.randint(2, 64, (2, 7)), torch.ones(2, 7, dtype=torch.int64)
    ids[0, 4:] = mask[0, 4:] = 0
    path = tmp_path / "f.stream"
    with torch.no_grad(), framework.capture_activations(path):
        if beams == 1:
            model(input_ids=ids, attention_mask=mask, labels=torch.randint(2, 64, (2, 7)))
        else:
            model.generate(ids, attention_mask=mask, num_beams=beams, max_new_tokens=2, do_sample=False)
    tokens = {name: site["tokens"] for name, site in analyze_activations(path)["sites"].items()}
    assert {count for name, count in tokens.items() if name.startswith("encoder")} == {11}
    if beams == 1:
        assert {count for name, count in tokens.items() if name.startswith("decoder")} == {14}
        with open_stream(path) as stream:
            export_stream(stream, tmp_path / "f.parquet")
        rows = pyarrow.parquet.read_table(tmp_path / "f.parquet").to_pylist()
        assert {row["token_id"] is None for row in rows if row["site"].startswith("decoder")} == {True}
        assert {row["token_id"] is None for row in rows if row["site"].startswith("encoder")} == {False}


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_padding_in_front_of_every_sequence(tmp_path: Path, dtype: torch.dtype) -> None:
    """A mask of two dimensions is what it says, whatever its dtype."""
    model = tiny_causal_lm("llama")
    framework = InstrumentationFramework(InstrumentationConfig(max_memory_gb=0.05))
    framework.instrument_model(model, backend="eager")
    ids = torch.randint(2, 30, (1, 7))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1]]).to(dtype)
    with (
        torch.no_grad(),
        Recorder(framework, tmp_path / "r", min_free_bytes=0) as recorder,
        recorder.request("a"),
    ):
        model(input_ids=ids, attention_mask=mask)
    with open_stream(tmp_path / "r") as stream:
        assert stream.inputs(0)["attention_mask"].dtype == dtype
        assert stream.request("a").token_ids() == dict(enumerate(ids[0, 2:].tolist()))
    assert {site["tokens"] for site in analyze_activations(tmp_path / "r")["sites"].values()} == {5}


@pytest.mark.parametrize("glob", ["model.layers.[10-11].mlp", "model.layers.[!0-12].mlp"])
def test_a_class_of_characters_is_no_range(glob: str) -> None:
    with pytest.raises(ValueError, match="class of single characters"):
        HookConfig(target_layers=[glob])
    HookConfig(target_layers=["model.layers.[0-3].mlp", "model.layers.1[0-1].mlp"])


@pytest.mark.parametrize("model", [None, "a name", {}])
def test_files_that_describe_no_model(tmp_path: Path, model: Any) -> None:
    path = tmp_path / "f.stream"
    writer = StreamWriter(path, metadata={"model": model}, codec="none", num_workers=1)
    put_all(writer, small_samples())
    writer.close({})
    assert analyze_activations(path)["metadata"]["model"] == model
