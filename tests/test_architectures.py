"""Architectures that others wrote, small: every layer has its sites, and every value is what an eager hook sees."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("transformers")

from architectures.check import check
from architectures.subjects import all_subjects

SUBJECTS = {f"{subject.family}.{subject.name}": subject for subject in all_subjects()}

# One of each kind: no MLP module, in-place change, mixture with a router, no attention weights, torch's own.
FAST = ["causal.opt", "causal.falcon", "causal.mixtral", "masked.fnet", "others.nn.MultiheadAttention"]

SLOW = [
    "causal.mixtral",
    "causal.llama",
    "causal.gpt2",
    "causal.bloom",
    "causal.jamba",
    "causal.jetmoe",
    "causal.lfm2_moe",
    "causal.nemotron_h",
    "causal.rwkv",
    "causal.xlnet",
    "causal.deepseek_v3",
    "causal.gpt_oss",
    "causal.qwen3_moe",
    "causal.gemma3_text",
    "masked.bert",
    "masked.squeezebert",
    "seq2seq.t5",
    "seq2seq.bart",
    "vision.vit",
    "vision.clip",
    "vision.swinv2",
    "audio.whisper",
    "others.nn.TransformerEncoder",
    "others.nn.Transformer",
]


@pytest.mark.parametrize("name", FAST)
def test_one_call(name: str) -> None:
    """One forward call, captured bit for bit, in as many graphs as without capture."""
    subject = replace(SUBJECTS[name], runs={"forward": SUBJECTS[name].runs["forward"]})
    result = check(subject)
    assert result.verdict in ("equal", "traced differs"), result
    assert result.runs["forward"].records


@pytest.mark.parametrize(
    ("name", "globs"),
    [
        ("causal.mixtral", ("model.layers.*.mlp", "model.layers.*.mlp.gate")),
        pytest.param("causal.gpt_oss", ("**.mlp.router",), marks=pytest.mark.slow),
        # Behind a graph break the attention's router, no site, runs first and shares its graph.
        pytest.param("causal.jetmoe", ("**.mlp.router.layer",), marks=pytest.mark.slow),
    ],
)
def test_routers(name: str, globs: tuple[str, ...]) -> None:
    """A router is chosen by name, beside the output of its mixture; its value is a row of logits a token."""
    subject = replace(SUBJECTS[name], runs={"forward": SUBJECTS[name].runs["forward"]}, globs=globs)
    result = check(subject)
    assert result.verdict in ("equal", "traced differs"), result
    assert result.runs["forward"].records == 2 * len(globs)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_every_way_to_run(name: str) -> None:
    """Forward calls and generation with a cache; encoders, decoders, vision and code that is not Hugging Face's."""
    result = check(SUBJECTS[name])
    assert result.verdict in ("equal", "traced differs", "unfused"), result
    assert all(run.records for run in result.runs.values() if run.verdict != "not eager"), result
