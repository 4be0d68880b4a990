"""The models that are measured: the real SmolLM2-135M, and toys of any depth on random weights."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from fx_instrument.demo.smollm import load_model

TOY_WIDTH = 256


def smollm(dtype: torch.dtype, device: str) -> tuple[nn.Module, Any]:
    """The model and its tokenizer."""
    model, tokenizer = load_model(dtype)
    model.config.use_cache = False
    return model.to(device), tokenizer


def toy(dtype: torch.dtype, device: str, *, depth: int = 4, width: int = TOY_WIDTH) -> nn.Module:
    """A Llama of ``depth`` layers on random weights; a hundredth of SmolLM2's work a token at 4 layers."""
    import transformers

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            num_hidden_layers=depth,
            hidden_size=width,
            intermediate_size=2 * width,
            num_attention_heads=max(1, width // 32),
            num_key_value_heads=max(1, width // 32),
            vocab_size=1000,
            max_position_embeddings=4096,
            use_cache=False,
        )
        model: nn.Module = transformers.LlamaForCausalLM(config).to(device, dtype).eval()
    return model


def duplicate(model: nn.Module) -> nn.Module:
    """A model of its own with the same weights in the same memory, so that no variant has a colder cache."""
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def compile_alone(model: nn.Module, **options: Any) -> Callable[..., Any]:
    """``torch.compile`` of the model's call, with Dynamo entries that no other variant shares.

    Dynamo keeps compiled code by code object, which all copies of a model share, and does not guard on hooks: a
    hooked copy would run the plain one's code. Instrumented models are compiled the same way.
    """
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        compiled: Callable[..., Any] = torch.compile(model._call_impl, isolate_recompiles=True, **options)
        return compiled
    call = model._call_impl

    def own(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    own.__code__ = own.__code__.replace(co_name=f"call_{id(own)}")
    return cast("Callable[..., Any]", torch.compile(own, **options))


def call_through(model: nn.Module, call: Callable[..., Any]) -> None:
    """Make ``model(...)``, and so ``model.generate(...)``, run ``call``, as ``Module.compile`` does."""
    model.__dict__["_compiled_call_impl"] = call


def site_names(model: nn.Module) -> list[str]:
    """Attention and MLP of every layer, in the order in which they run."""
    layers = len(model.model.layers)  # type: ignore[arg-type, union-attr]
    return [f"model.layers.{layer}.{part}" for layer in range(layers) for part in ("self_attn", "mlp")]
