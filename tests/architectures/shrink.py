"""Small configurations of transformers' architectures: every size shrunk by the name of its field, no table of models.

A model keeps its make (which kinds of layers, grouped queries, experts, ...) and loses its size. What a name does not
tell (two fields that must fit each other in a way of that model alone) stands in ``exceptions.json``.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING

EXCEPTIONS: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "exceptions.json").read_text())

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 64, 4, 2, 16, 128
SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}

# (pattern of the field's name, size); the first that matches a positive integer field counts.
_SIZES: tuple[tuple[str, int], ...] = (
    (r"(.*_)?vocab(ulary)?_size(_.*)?|.*_vocab|.*vocab_size_base", VOCABULARY),
    (r"type_vocab_size|.*_types", 2),
    (r"num_(hidden_|encoder_|decoder_)?layers|n_layers?|(encoder|decoder)_layers|num_blocks|depth", 2),
    (r"num_layers_per_stack|num_mem_blocks", 2),
    (r".*(nextn_predict|mtp).*layers.*", 0),
    (r"(.*_)?(num_key_value_heads|num_kv_heads|n_kv_heads|num_query_groups)", KV_HEADS),
    (r"mamba_(n|num)_heads|num_mamba_heads", 8),
    (r"index_n_heads|.*linear_num_(key|value)_heads|.*linear_num_heads", HEADS),
    (r"(.*_)?(n|num)_heads?|(.*_)?(num_)?attention_heads", HEADS),
    (r"(qk_nope|qk_rope)_head_dim", 8),
    (r"mamba_d_head|mamba_headdim|mamba_head_dim", 8),
    (r"(mamba_)?expand", 1),
    (r".*head_dim|.*head_size|kv_channels|d_head|dim_head|d_kv", HEAD_DIM),
    (r"linear_(key|value)_head_dim", HEAD_DIM),
    (r"rotary_dim", 8),
    (r"num_experts_per_(tok|token)|moe_topk|moe_k|num_selected_experts|top_k_experts|moe_top_k", 2),
    (r"(.*_)?num(_local|_routed|_base)?_experts|n_routed_experts|moe_num_experts", 4),
    (r"zero_expert_num", 2),
    (r"(n|num_expert)_groups?", 2),
    (r"topk_group", 1),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (r".*(moe|expert|shared).*(intermediate|ffn).*", 32),
    (r".*(intermediate|ffn|feed_forward).*|d_inner|dff|dim_ff", 96),
    (r".*lora_rank|.*adapter_rank|laurel_rank|hc_lowrank|gated_norm_rank", 16),
    (r"mamba_d_ssm|.*lru_width", HIDDEN),
    (r".*(state_size|d_state)", 8),
    (r"time_step_rank|mamba_dt_rank", 4),
    (r"query_pre_attn_scalar", HEAD_DIM),
    (r"(.*_)?hidden_size_per_layer_input", 16),
    (
        r"(.*_)?(hidden_size|d_model|n_embd|emb_dim|embedding_(dim|size)|embed_dim|hidden_dim|encoder_dim)",
        HIDDEN,
    ),
    (r".*_embed_proj_dim|projection_dim|.*proj_size|dim_model_base|.*hidden_dim", HIDDEN),
    (
        r".*(sliding_window|window_size|local_attention|attention_window|attention_chunk_size|window_len)(_size)?",
        8,
    ),
    (r".*(chunk_size|chunk_length|block_size)", 8),
    (r"index_topk|index_topk_blocks", 4),
    (r"num_buckets|position_bias_num_buckets", 8),
    (r".*max_distance", 16),
    (
        r"(original_)?max_position_embeddings|n_positions|n_ctx|.*seq_len|context_length|max_.*positions|.*max_length",
        256,
    ),
    (r"mem_len|prompt_length|rel_extent", 16),
    (r"image_size", 32),
    (r"patch_size", 8),
    (r"num_mel_bins", 16),
)
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_blocks")
_PERIOD = re.compile(
    r".*(period|interval|every_n_layers|sparse_step|sliding_window_pattern|layer_group_size)"
)
_MOST_LAYERS = 8
# Left to be set by whoever makes a checkpoint; without it the default configuration does not build.
_UNSET = re.compile(r"head_dim|num_key_value_heads|num_experts_per_tok|n_routed_experts|attention_head_dim")


def small_config(model_type: str, **more: Any) -> Any:
    """A configuration of ``model_type`` that builds in a second: a few layers of every kind, 64 wide."""
    return _small(CONFIG_MAPPING[model_type], {**EXCEPTIONS.get(model_type, {}), **more})


def _small(config_class: type[Any], fixed: dict[str, Any]) -> Any:
    fixed = {key: value for key, value in fixed.items() if not key.startswith("_")}
    default = config_class(**fixed.pop("base", {}))
    fields = _own_fields(config_class)
    changes: dict[str, Any] = {}
    for name, value in fields.items():
        current = _get(default, name)
        if hasattr(current, "to_dict"):
            inner = fixed.pop(name, {})
            changes[name] = _small(type(current), {**EXCEPTIONS.get(current.model_type, {}), **inner})
        elif name.endswith(("_token_id", "_token_index")):
            changes[name] = SPECIAL_TOKENS.get(name, None if current is None else 3)
        elif re.fullmatch(r".*drop(out|_rate|path|_path_rate)?.*|.*pdrop|layerdrop|.*_jitter_noise", name):
            changes[name] = 0.0 if isinstance(current, float) else current
        elif value is not None and isinstance(current, int) and not isinstance(current, bool) and current > 0:
            changes[name] = _size(name, current)
        elif current is None and _UNSET.fullmatch(name):
            changes[name] = next(size for pattern, size in _SIZES if re.fullmatch(pattern, name))
    _keep_relations(default, changes)
    changes.update(_layers(default, fields, {**changes, **fixed}))
    changes.update(fixed)
    return config_class(
        **{k: v for k, v in changes.items() if v is not None or k in fixed or "token_id" in k}
    )


def _own_fields(config_class: type[Any]) -> dict[str, Any]:
    """Field -> default as written, None where the configuration derives it from others."""
    from transformers import PretrainedConfig

    base = set(PretrainedConfig.__dataclass_fields__) - {"eos_token_id", "bos_token_id", "pad_token_id"}
    return {
        name: getattr(config_class, name, None)
        if field.default_factory is None or not callable(field.default_factory)
        else field.default_factory()
        for name, field in config_class.__dataclass_fields__.items()
        if name not in base and field.init
    } | dict.fromkeys(getattr(config_class, "sub_configs", {}))


def _small_overrides(overrides: dict[str, Any]) -> dict[str, Any]:
    """What one layer has of its own, shrunk by the same rules."""
    small = {name: _size(name, v) if type(v) is int and v > 0 else v for name, v in overrides.items()}
    heads = overrides.get("num_attention_heads")
    if heads is not None and overrides.get("num_key_value_heads") == heads:
        small["num_key_value_heads"] = HEADS
    return small


def _get(config: Any, name: str) -> Any:
    """A field of a configuration; of one that differs from layer to layer, the value where none is given."""
    if getattr(config, "is_heterogeneous", False):
        if not config._hasattr_without_heterogeneous_validation(name):
            return None
        return config._getattr_without_heterogeneous_validation(name)
    return getattr(config, name, None)


def _size(name: str, current: int) -> int:
    if _PERIOD.fullmatch(name):
        return min(current, 2)
    if name.endswith("_offset"):
        return 1
    for pattern, size in _SIZES:
        if re.fullmatch(pattern, name):
            return min(current, size) if size else 0
    return HIDDEN if current > 512 and not name.endswith("_token_id") else current


def _keep_relations(default: Any, changes: dict[str, Any]) -> None:
    """One key head for all stays one; as many key heads as query heads stay as many."""
    for name in [n for n in changes if "key_value_heads" in n or n in ("num_kv_heads", "n_kv_heads")]:
        kv = _get(default, name)
        heads = _get(default, name.replace("key_value", "attention").replace("kv_", ""))
        if kv == 1:
            changes[name] = 1
        elif heads is not None and kv == heads:
            changes[name] = HEADS


def _layers(default: Any, fields: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """One layer of each kind that the default has, two at least: lists with an entry a layer are cut to those."""
    count_name = next((n for n in _LAYER_COUNTS if n in fields and isinstance(_get(default, n), int)), None)
    if count_name is None or changes.get(count_name, 2) == _get(default, count_name):
        return {}
    count = _get(default, count_name)
    lists = {
        name: value
        for name in {*fields, *vars(default)}
        if isinstance(value := _get(default, name), (list, tuple))
        and len(value) == count
        and not name.startswith("_")
    }
    spec = getattr(default, "_heterogeneity_spec", None)
    overrides = [spec.per_layer_overrides.get(index, {}) if spec else {} for index in range(count)]
    kinds: dict[str, int] = {}
    for index in range(count):
        kind = [lists[name][index] for name in sorted(lists)] + sorted(overrides[index])
        kinds.setdefault(repr(kind), index)
    indices = sorted(kinds.values())[:_MOST_LAYERS]
    for index in range(count):
        if len(indices) >= 2:
            break
        if index not in indices:
            indices = sorted([*indices, index])
    result: dict[str, Any] = {count_name: len(indices)}
    for name, value in lists.items():
        if name in fields:
            result[name] = [value[index] for index in indices]
    if spec:
        result["per_layer_config"] = {
            new: _small_overrides(overrides[old]) for new, old in enumerate(indices) if overrides[old]
        }
    return result
