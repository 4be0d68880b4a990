"""Tiny models for the tests: plain, with a shared module, with tuple outputs and in-place changes; drawn ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


class Attention(nn.Module):
    """Causal attention with grouped queries; returns (output, None) as Hugging Face's do, or the output."""

    def __init__(self, width: int, heads: int, kv_heads: int, returns_tuple: bool) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.returns_tuple = heads, kv_heads, returns_tuple
        self.size = width // heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.kv_proj = nn.Linear(width, 2 * kv_heads * self.size, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, None]:
        batch, tokens, width = x.shape
        q = self.q_proj(x).view(batch, tokens, self.heads, self.size).transpose(1, 2)
        k, v = (
            self.kv_proj(x).view(batch, tokens, 2 * self.kv_heads, self.size).transpose(1, 2).chunk(2, dim=1)
        )
        groups = self.heads // self.kv_heads
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        scores = (q @ k.transpose(-1, -2)) * self.size**-0.5
        future = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).triu(1)
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        out = self.o_proj((weights @ v).transpose(1, 2).reshape(batch, tokens, width))
        return (out, None) if self.returns_tuple else out


class MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.nn.functional.gelu(self.up(x)))


class MoE(nn.Module):
    """Dense mixture: every expert runs, the router weighs them; returns (output, router weights)."""

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts)
        self.experts = nn.ModuleList(MLP(width) for _ in range(experts))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights = self.router(x).softmax(-1)
        out = sum(expert(x) * weights[..., index, None] for index, expert in enumerate(self.experts))
        assert isinstance(out, torch.Tensor)
        return out, weights


class Block(nn.Module):
    def __init__(self, shape: Shape, mlp: nn.Module | None = None) -> None:
        super().__init__()
        self.in_place = shape.in_place
        self.norm1, self.norm2 = nn.LayerNorm(shape.width), nn.LayerNorm(shape.width)
        self.self_attn = Attention(shape.width, shape.heads, shape.kv_heads, shape.returns_tuple)
        self.mlp = mlp or (MoE(shape.width, shape.experts) if shape.experts else MLP(shape.width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        attended = self.self_attn(self.norm1(x))
        attended = attended[0] if isinstance(attended, tuple) else attended
        x = x + attended
        out = self.mlp(self.norm2(x))
        out = out[0] if isinstance(out, tuple) else out
        if self.in_place:
            # As Falcon's `mlp_output += attention_output`: what was captured must be the value before.
            out += attended
        return x + out


@dataclass(frozen=True)
class Shape:
    """What a tiny decoder is made of."""

    depth: int = 2
    width: int = 16
    heads: int = 4
    kv_heads: int = 2
    experts: int = 0
    vocabulary: int = 37
    tied: bool = False
    shared_mlp: bool = False
    in_place: bool = False
    returns_tuple: bool = True


class Decoder(nn.Module):
    """A causal language model of ``Shape``; takes ``input_ids`` (batch, tokens), gives logits."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed = nn.Embedding(shape.vocabulary, shape.width)
        shared = MLP(shape.width) if shape.shared_mlp else None
        self.layers = nn.ModuleList(Block(shape, shared) for _ in range(shape.depth))
        self.lm_head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        if shape.tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        logits: torch.Tensor = self.lm_head(x)
        return logits


PLAIN = Shape(returns_tuple=False)
SHARED = Shape(shared_mlp=True)
TUPLES = Shape(in_place=True)


def make(shape: Shape = PLAIN, dtype: torch.dtype = torch.float32, seed: int = 0) -> Decoder:
    """A decoder with weights that ``seed`` chooses; the global random state stays as it is."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Decoder(shape).to(dtype).eval()


def compiled_by_user(model: nn.Module, backend: Any, route: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """What to call, after the user compiled the model one way or another, or not at all ("eager")."""
    if route == "torch.compile":
        return torch.compile(model, backend=backend)
    if route == "module.compile":
        model.compile(backend=backend)
    elif route == "regional":
        for layer in model.layers:
            layer.compile(backend=backend)
    else:
        assert route == "eager"
    return model


def tokens(batch: int, length: int, vocabulary: int = 37, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary, (batch, length), generator=generator)
