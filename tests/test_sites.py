"""Which modules are found: by structure on architectures that no one here wrote, and by globs."""

from __future__ import annotations

import pytest
import torch
from models import PLAIN, SHARED, Shape, make
from torch import nn

from fx_instrument import HookConfig, HookGranularity, InstrumentationConfig, NoSitesError
from fx_instrument.graph.roles import find_roles
from fx_instrument.graph.sites import choose_sites


def names(model: nn.Module, *globs: str) -> list[str]:
    config = InstrumentationConfig(hook_config=HookConfig(target_layers=globs or None))
    return [site.name for site in choose_sites(model, config)]


def test_granularities_choose_roles() -> None:
    model = make(Shape(depth=2))
    attention = [f"layers.{i}.self_attn" for i in range(2)]
    mlp = [f"layers.{i}.mlp" for i in range(2)]
    both = [name for pair in zip(attention, mlp, strict=True) for name in pair]
    for granularity, expected in [
        (HookGranularity.FULL_TENSOR, both),
        (HookGranularity.SAMPLED_SLICES, both),
        (HookGranularity.ATTENTION_ONLY, attention),
        (HookGranularity.MLP_ONLY, mlp),
    ]:
        assert [site.name for site in choose_sites(model, InstrumentationConfig(granularity))] == expected


def test_experts_are_no_sites_of_their_own() -> None:
    """A mixture's value is its module's; the expert stack inside it is no stack of layers without sites."""
    assert set(find_roles(make(Shape(depth=1, experts=3)))) == {"layers.0.self_attn", "layers.0.mlp"}


ARCHITECTURES = {
    "llama": ("layers.{}.self_attn", "layers.{}.mlp"),
    "gpt2": ("h.{}.attn", "h.{}.mlp"),
    "opt": ("decoder.layers.{}.self_attn", "decoder.layers.{}.fc2"),
    "bloom": ("h.{}.self_attention", "h.{}.mlp"),
    "falcon": ("h.{}.self_attention", "h.{}.mlp"),
    "mixtral": ("layers.{}.self_attn", "layers.{}.mlp"),
    "bert": ("encoder.layer.{}.attention", "encoder.layer.{}.output.dense"),
    "xlm": ("attentions.{}", "ffns.{}"),
    "ctrl": ("h.{}.multi_head_attention", "h.{}.ffn"),
    "rwkv": ("blocks.{}.attention", "blocks.{}.feed_forward"),
    "mamba": ("layers.{}.mixer",),
    "recurrent_gemma": ("layers.{}.temporal_block", "layers.{}.mlp_block"),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_architectures(architecture: str) -> None:
    """One attention and one MLP a layer, in architectures of quite different make."""
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(architecture)
    for name in ("num_hidden_layers", "n_layer", "n_layers"):
        if hasattr(config, name):
            setattr(config, name, 2)
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config)
    expected = {pattern.format(layer) for pattern in ARCHITECTURES[architecture] for layer in range(2)}
    assert set(find_roles(model)) == expected


@pytest.mark.parametrize("architecture", ["mamba", "mamba2", "rwkv", "llama", "deepseek_v3", "jamba"])
def test_the_whole_model_is_no_site(architecture: str) -> None:
    """A model whose own name or class says "mamba" or "moe" is not taken for one: sites lie in its layers."""
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(architecture)
    for name in ("num_hidden_layers", "n_layer", "n_layers"):
        if hasattr(config, name):
            setattr(config, name, 2)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    roles = find_roles(model)
    assert len(roles) == (2 if architecture.startswith("mamba") else 4)
    assert all(".0." in name or ".1." in name for name in roles)


ODD_LAYERS: dict[str, tuple[str, str, set[str]]] = {
    # Residual streams are mixed around attention and MLP, by modules that go by their names.
    "deepseek_v4": ("DeepseekV4Model", "layers.0.", {"self_attn", "mlp"}),
    "qwen4_exp_text": ("Qwen4ExpTextModel", "layers.1.", {"self_attn", "mlp"}),
    # Norms scaled by an MLP of their own.
    "axk2": ("AXK2Model", "layers.0.", {"self_attn", "mlp"}),
    # An attention in a wrapper of its own, beside the projections that are the MLP.
    "mpnet": ("MPNetModel", "encoder.layer.0.", {"attention.attn", "output.dense"}),
    # A modulation in attention's place.
    "focalnet": ("FocalNetModel", "encoder.stages.0.layers.0.", {"modulation", "mlp"}),
    # A convolution named for the attention that it feeds; an MLP over neighbours.
    "seamless_m4t": ("SeamlessM4TModel", "speech_encoder.adapter.layers.0.", {"self_attn", "ffn"}),
    "seamless_m4t_v2": ("SeamlessM4Tv2Model", "t2u_model.model.decoder.layers.0.", {"self_attn", "conv2"}),
}


@pytest.mark.parametrize("architecture", ODD_LAYERS)
def test_odd_layers(architecture: str) -> None:
    """What stands in attention's or an MLP's place is found, what only goes by their names is not."""
    transformers = pytest.importorskip("transformers")
    from architectures.shrink import small_config

    class_name, layer, expected = ODD_LAYERS[architecture]
    with torch.device("meta"):
        model = getattr(transformers, class_name)._from_config(small_config(architecture))
    roles = find_roles(model)
    assert {name.removeprefix(layer) for name in roles if name.startswith(layer)} == expected
    assert {roles[layer + name] for name in expected} == {"attention", "mlp"}


def test_what_scales_by_a_condition_is_no_attention() -> None:
    """FocalNet's modulation leads back to the width that it takes; a diffusion model's widens a condition."""

    def projections(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, width))

    parts = {"modulation": projections(8), "adaLN_modulation": projections(48), "mlp": projections(8)}
    assert find_roles(nn.ModuleList([nn.ModuleDict(parts)])) == {"0.modulation": "attention", "0.mlp": "mlp"}


def test_malformed_globs() -> None:
    with pytest.raises(ValueError, match=r"\[z-a\]"):
        names(make(PLAIN), "layers.[z-a].mlp")
    with pytest.raises(ValueError, match="lazy"):
        names(nn.Sequential(nn.LazyLinear(3)))


def test_encoder_decoder() -> None:
    """T5's wrappers of norm and residual are looked through; its cross attention is an attention too."""
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(num_layers=1, num_decoder_layers=1)
    with torch.device("meta"):
        roles = find_roles(transformers.T5Model(config))
    assert roles == {
        "encoder.block.0.layer.0.SelfAttention": "attention",
        "encoder.block.0.layer.1.DenseReluDense": "mlp",
        "decoder.block.0.layer.0.SelfAttention": "attention",
        "decoder.block.0.layer.1.EncDecAttention": "attention",
        "decoder.block.0.layer.2.DenseReluDense": "mlp",
    }


def test_torch_layers() -> None:
    """nn.TransformerEncoderLayer has no MLP module: its last projection stands for it."""
    roles = find_roles(nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, batch_first=True), 2))
    assert list(roles.items())[:2] == [("layers.0.self_attn", "attention"), ("layers.0.linear2", "mlp")]


def test_globs() -> None:
    """`*` stops at dots, `**` crosses them, `[0-3]` is a class; names come in module order, once."""
    model = make(Shape(depth=3))
    assert names(model, "layers.*.self_attn") == [f"layers.{i}.self_attn" for i in range(3)]
    assert names(model, "layers.[0-1]") == ["layers.0", "layers.1"]
    assert names(model, "layers.[!0-1]") == ["layers.2"]
    assert names(model, "**.down") == [f"layers.{i}.mlp.down" for i in range(3)]
    assert names(model, "lm_head", "layers.2", "layers.?") == ["layers.0", "layers.1", "layers.2", "lm_head"]


def test_glob_roles() -> None:
    """A site that a glob chooses has the role that it would have had, "block" for a layer, else "other"."""
    config = InstrumentationConfig(
        hook_config=HookConfig(target_layers=["layers.0", "layers.0.mlp", "layers.0.self_attn", "lm_head"])
    )
    roles = {site.name: site.role for site in choose_sites(make(PLAIN), config)}
    assert roles == {
        "layers.0": "block",
        "layers.0.self_attn": "attention",
        "layers.0.mlp": "mlp",
        "lm_head": "other",
    }


def test_shared_module_is_one_site() -> None:
    """A module with several names is one site, under the name that get_submodule takes first."""
    model = make(SHARED)
    assert names(model, "layers.*.mlp") == ["layers.0.mlp"]
    assert names(model, "layers.1.mlp") == ["layers.0.mlp"]


def test_nothing_found() -> None:
    """Errors show what was looked for, near misses, and containers that are never called."""
    with pytest.raises(NoSitesError, match=r"attn, attention.*Conv2d.*target_layers"):
        names(nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU()))
    with pytest.raises(
        NoSitesError, match=r"'layers\.\*\.attn' matches no module; near misses: 'layers\.\d\.self"
    ):
        names(make(PLAIN), "layers.*.attn")
    with pytest.raises(NoSitesError, match="only containers"):
        names(make(PLAIN), "layers")
    with pytest.raises(NoSitesError, match="'encoder'"):
        names(make(PLAIN), "layers.0", "encoder")
