"""Models that Hugging Face did not write: torch's own layers, litgpt, x-transformers.

litgpt and x-transformers are optional: ``pip install --no-deps litgpt lightning lightning-utilities torchmetrics
x-transformers einops einx loguru torch-einops-utils frozendict``. Where they are missing their rows say so.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from .check import Subject

WIDTH, HEADS, VOCABULARY = 32, 4, 128
IDS = torch.randint(0, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(0))
FLOATS = torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(0))


def foreign_models() -> Iterator[Subject]:
    def subject(name: str, make: Callable[[], nn.Module], *inputs: torch.Tensor, **more: Any) -> Subject:
        def run(model: Any) -> Any:
            with torch.no_grad():
                return model(*inputs)

        def build() -> nn.Module:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                return make().eval()

        return Subject(name, "others", build, {"forward": run}, **more)

    yield subject("nn.TransformerEncoder", lambda: _torch_encoder(True), FLOATS)
    yield subject("nn.TransformerEncoder, norm first", lambda: _torch_encoder(True, norm_first=True), FLOATS)
    yield subject("nn.TransformerEncoder, sequence first", lambda: _torch_encoder(False), FLOATS)
    yield subject("nn.Transformer", _torch_transformer, FLOATS, FLOATS[:, :4])
    yield subject("nn.MultiheadAttention", MultiheadBlock, FLOATS)
    yield subject("litgpt GPT (Llama)", _litgpt_llama, IDS)
    yield subject("litgpt GPT (Pythia)", _litgpt_pythia, IDS)
    yield subject("x-transformers TransformerWrapper", _x_decoder, IDS)
    yield subject("x-transformers ViTransformerWrapper", _x_vision, torch.randn(2, 3, 32, 32))


def _torch_encoder(batch_first: bool, **more: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 64, batch_first=batch_first, **more)
    return Around(nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first and not more))


def _torch_transformer() -> nn.Module:
    return Around(nn.Transformer(WIDTH, HEADS, 2, 2, 64, batch_first=True))


class Around(nn.Module):
    """A model of the user's around a layer of torch's, whose own ``forward`` Dynamo does not compile by itself."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.inner(*inputs))
        return logits


class MultiheadBlock(nn.Module):
    """Two layers with torch's attention, which returns a pair, and an MLP of a Sequential."""

    def __init__(self) -> None:
        super().__init__()
        attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        mlp = nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH))
        self.attention = nn.ModuleList(copy.deepcopy(attention) for _ in range(2))
        self.mlp = nn.ModuleList(copy.deepcopy(mlp) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for attention, mlp in zip(self.attention, self.mlp, strict=True):
            x = x + attention(x, x, x, need_weights=False)[0]
            x = x + mlp(x)
        return x


def _litgpt_llama() -> nn.Module:
    from litgpt.config import Config
    from litgpt.model import GPT

    sizes = {
        "n_layer": 2,
        "n_embd": WIDTH,
        "n_head": HEADS,
        "block_size": 32,
        "padded_vocab_size": VOCABULARY,
    }
    return GPT(Config.from_name("Llama-2-7b-hf", intermediate_size=64, n_query_groups=2, **sizes))


def _litgpt_pythia() -> nn.Module:
    from litgpt.config import Config
    from litgpt.model import GPT

    sizes = {
        "n_layer": 2,
        "n_embd": WIDTH,
        "n_head": HEADS,
        "block_size": 32,
        "padded_vocab_size": VOCABULARY,
    }
    return GPT(Config.from_name("pythia-14m", intermediate_size=64, **sizes))


def _x_decoder() -> nn.Module:
    from x_transformers import Decoder, TransformerWrapper

    layers = Decoder(dim=WIDTH, depth=2, heads=HEADS, attn_dim_head=8, rotary_pos_emb=True)
    return TransformerWrapper(num_tokens=VOCABULARY, max_seq_len=32, attn_layers=layers)


def _x_vision() -> nn.Module:
    from x_transformers import Encoder, ViTransformerWrapper

    layers = Encoder(dim=WIDTH, depth=2, heads=HEADS, attn_dim_head=8)
    return ViTransformerWrapper(image_size=32, patch_size=8, num_classes=10, attn_layers=layers)
