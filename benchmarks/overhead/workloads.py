"""What the models are asked to do: prefill, decode with a static or a dynamic cache, generate end to end."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

KINDS = ("prefill", "decode-static", "decode-dynamic", "generate")


@dataclass(frozen=True)
class Workload:
    """``steps`` forward calls (prefill) or new tokens (decode, generate) at ``batch`` prompts of ``length`` tokens."""

    kind: str
    batch: int
    length: int
    steps: int

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")

    @property
    def name(self) -> str:
        return f"{self.kind} {self.batch}x{self.length}"

    @property
    def rows(self) -> int:
        """Token vectors that every site gives."""
        if self.kind == "prefill":
            return self.batch * self.length * self.steps
        if self.kind == "generate":
            return self.batch * (self.length + self.steps - 1)
        return self.batch * self.steps

    @property
    def tokens(self) -> int:
        """What tokens/s counts: tokens read in prefill, tokens made elsewhere."""
        return self.rows if self.kind == "prefill" else self.batch * self.steps

    @property
    def calls(self) -> int:
        """Forward calls of the model."""
        return self.steps


Run = Callable[[Any], torch.Tensor]


class Bench:
    """A workload on a model: prompts and, for decoding, the cache as the prefill leaves it, made once."""

    def __init__(self, workload: Workload, model: Any) -> None:
        self.workload = workload
        device = next(model.parameters()).device
        generator = torch.Generator().manual_seed(0)
        # A prefill each its own: what compresses because a call has the values of the one before is nobody's saving.
        prompts = workload.steps if workload.kind == "prefill" else 1
        shape = (prompts, workload.batch, workload.length)
        self._prompts = torch.randint(0, model.config.vocab_size, shape, generator=generator).to(device)
        self.ids = self._prompts[0]
        self._cache: Any = None
        self._static: Any = None
        self._next = self.ids[:, -1:]
        if workload.kind.startswith("decode"):
            self._cache, self._next = self._prefill(model)

    def _prefill(self, model: Any) -> tuple[Any, torch.Tensor]:
        from transformers import DynamicCache, StaticCache

        workload = self.workload
        if workload.kind == "decode-static":
            cache: Any = StaticCache(config=model.config, max_cache_len=workload.length + workload.steps)
        else:
            cache = DynamicCache(config=model.config)
        with torch.inference_mode(False), torch.no_grad():
            logits = model(self.ids, past_key_values=cache, use_cache=True).logits
        return cache, logits[:, -1:].argmax(-1)

    def ready(self, steps: int | None = None) -> Run:
        """A run that starts from the same state as every other; making it is not part of the timing.

        Args:
            steps: so many instead of the workload's, of prefill and decode.
        """
        workload = self.workload
        steps = steps or workload.steps
        if workload.kind == "prefill":
            return lambda model: self._run_prefill(model, steps)
        if workload.kind == "generate":
            return self._run_generate
        cache = self._static_cache() if workload.kind == "decode-static" else copy.deepcopy(self._cache)
        return lambda model: self._run_decode(model, cache, steps)

    def _static_cache(self) -> Any:
        """One cache for all runs, as the prefill left it: CUDA graphs hold its address, and would be recorded anew."""
        if self._static is None:
            self._static = copy.deepcopy(self._cache)
        with torch.inference_mode(False), torch.no_grad():
            for mine, kept in zip(self._static.layers, self._cache.layers, strict=True):
                mine.keys.copy_(kept.keys)
                mine.values.copy_(kept.values)
                mine.cumulative_length.copy_(kept.cumulative_length)
        return self._static

    def _run_prefill(self, model: Any, steps: int) -> torch.Tensor:
        for step in range(steps):
            prompt = self._prompts[step % len(self._prompts)]
            logits: torch.Tensor = model(prompt, use_cache=False).logits
        return logits

    def _run_decode(self, model: Any, cache: Any, steps: int) -> torch.Tensor:
        token, kept = self._next, []
        first = self.workload.length
        for step in range(steps):
            position = torch.full((self.workload.batch, 1), first + step, device=token.device)
            logits = model(token, past_key_values=cache, position_ids=position, use_cache=True).logits
            token = logits[:, -1:].argmax(-1)
            # The next replay of a CUDA graph writes over this one's outputs.
            kept.append(logits.clone())
        return torch.cat(kept, 1)

    def _run_generate(self, model: Any) -> torch.Tensor:
        tokens: torch.Tensor = model.generate(
            self.ids,
            max_new_tokens=self.workload.steps,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            use_cache=True,
        )
        return tokens
