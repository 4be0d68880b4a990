"""The models that coverage is measured on: transformers' by their mappings, and code of others."""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto

from .check import Run, Subject
from .foreign import foreign_models
from .shrink import EXCEPTIONS, VOCABULARY, small_config

BATCH, LENGTH, NEW_TOKENS = 2, 7, 3


def seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Equal weights at every call, and none left as zeros: a zero would hide a wrong value."""

    def build() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = make().eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.is_floating_point() and parameter.numel() and not parameter.any():
                        parameter.normal_(std=0.02)
        return model

    return build


def tokens(name: str, rows: int = BATCH, length: int = LENGTH) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randint(4, VOCABULARY - 8, (rows, length), generator=generator)


# Family -> the mappings of transformers.models.auto.modeling_auto that it is made of.
FAMILIES = {
    "causal": ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",),
    "masked": ("MODEL_FOR_MASKED_LM_MAPPING_NAMES",),
    "seq2seq": ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",),
    "vision": (
        "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
        "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES",
        "MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES",
    ),
    "audio": ("MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES", "MODEL_FOR_CTC_MAPPING_NAMES"),
}


def transformers_models(family: str) -> Iterator[Subject]:
    """Every model of a family's mappings, once."""
    models: dict[str, str] = {}
    for mapping in FAMILIES[family]:
        for model_type, class_name in getattr(modeling_auto, mapping).items():
            models.setdefault(model_type, class_name if isinstance(class_name, str) else class_name[0])
    for model_type, name in models.items():
        make = seeded(lambda model_type=model_type, name=name: build(model_type, name))
        rows = BATCH * EXCEPTIONS.get(model_type, {}).get("_rows", 1)
        ids = tokens(model_type, rows)
        runs: dict[str, Run] = {"forward": forward(ids)}
        if family in ("causal", "seq2seq"):
            runs["generate"] = generate(ids)
        fallbacks = {"generate": ("decode", decode(ids))} if family == "causal" else {}
        yield Subject(model_type, family, make, runs, fallbacks)


def build(model_type: str, class_name: str, **more: Any) -> nn.Module:
    if reason := EXCEPTIONS.get(model_type, {}).get("_skip"):
        raise RuntimeError(reason)
    model_class = getattr(transformers, class_name)
    config = small_config(model_type, **more)
    if not isinstance(config, model_class.config_class):
        config = config.get_text_config(decoder=True)
    # SDPA skips its mask in eager mode and builds it under tracing, which changes bits before any capture.
    for implementation in ("eager", None):
        try:
            return model_class._from_config(config, attn_implementation=implementation)
        except (ValueError, TypeError):
            if implementation is None:
                raise
    raise AssertionError


def forward(ids: torch.Tensor) -> Run:
    """One call without a KV cache, on what the model's signature and configuration say that it takes."""

    @torch.no_grad()
    def run(model: Any) -> Any:
        return model(**inputs_of(model, ids))

    return run


def generate(ids: torch.Tensor) -> Run:
    """Prefill and decode steps with the model's own cache, through ``generate``."""

    @torch.no_grad()
    def run(model: Any) -> Any:
        inputs = inputs_of(model, ids)
        for name in ("use_cache", "decoder_input_ids"):
            inputs.pop(name, None)
        length = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
        return model.generate(**inputs, do_sample=False, num_beams=1, use_cache=True, **length)

    return run


def decode(ids: torch.Tensor) -> Run:
    """Prefill and decode steps with a KV cache by hand, for a model whose ``generate`` does not run."""

    @torch.no_grad()
    def run(model: Any) -> Any:
        output = model(input_ids=ids, use_cache=True)
        for _ in range(NEW_TOKENS - 1):
            token = output.logits[:, -1:].argmax(-1).reshape(ids.shape[0], 1)
            output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        return output

    return run


def inputs_of(model: Any, ids: torch.Tensor) -> dict[str, Any]:
    config, takes = model.config, inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(5)
    inputs: dict[str, Any] = {}
    if "input_ids" in takes:
        inputs["input_ids"] = ids
        if "attention_mask" in takes:
            inputs["attention_mask"] = torch.ones(BATCH, ids.shape[1], dtype=torch.long)
    if "decoder_input_ids" in takes:
        inputs["decoder_input_ids"] = ids[:, :4]
    if "use_cache" in takes:
        inputs["use_cache"] = False
    if "pixel_values" in takes and (
        model.main_input_name == "pixel_values" or "vision" in str(config.to_dict())
    ):
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", 32)
        size = size if isinstance(size, (list, tuple)) else (size, size)
        shape: tuple[int, ...] = (BATCH, getattr(vision, "num_channels", 3), *size)
        if isinstance(getattr(vision, "num_frames", None), int):
            shape = (BATCH, vision.num_frames, *shape[1:])
        inputs["pixel_values"] = torch.randn(shape, generator=generator)
    if "pixel_values_videos" in takes:
        shape = (BATCH, config.frames_per_clip, 3, config.crop_size, config.crop_size)
        inputs["pixel_values_videos"] = torch.randn(shape, generator=generator)
    if "input_features" in takes and "input_ids" not in takes:
        bins = getattr(config, "num_mel_bins", getattr(config, "feature_size", 16))
        frames = 2 * getattr(config, "max_source_positions", 32)
        inputs["input_features"] = torch.randn(BATCH, bins, frames, generator=generator)
    if "input_values" in takes and "input_ids" not in takes:
        inputs["input_values"] = torch.randn(BATCH, 2000, generator=generator)
    if "pixel_values" in inputs and model.main_input_name == "pixel_values":
        inputs.pop("input_ids", None)
        inputs.pop("attention_mask", None)
    return inputs


def all_subjects() -> Iterator[Subject]:
    for family in FAMILIES:
        yield from transformers_models(family)
    yield from foreign_models()
