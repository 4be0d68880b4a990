"""An engine that batches requests, on a small compiled model; and what eager hooks see in that model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from fx_instrument import InstrumentationConfig
from fx_instrument.engine_capture import EngineCapture

HIDDEN = 16
SITES = [f"layers.{i}.{kind}" for i in range(2) for kind in ("self_attn", "mlp")]


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(HIDDEN, 32)
        self.down = nn.Linear(32, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).relu())


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = Mixer()
        self.mlp = Mixer()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(x)
        out = self.mlp(x)
        # In place, as engines' fused norms do: the capture must have taken the value before.
        out += x
        return out


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, HIDDEN)
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return x


def capture_into(path: Path, config: InstrumentationConfig | None = None, **options: Any) -> EngineCapture:
    """An engine's capture with the defaults of these tests."""
    settings: dict[str, Any] = {"all_requests": True, "mode": "w", "drop": False, "max_stall_s": None}
    return EngineCapture(
        config or InstrumentationConfig(max_memory_gb=0.1), path, engine="test", **{**settings, **options}
    )


class Engine:
    """Batches chunks of requests into one flat, padded call, as inference engines do."""

    def __init__(
        self,
        path: Path,
        *,
        compiled: bool = True,
        config: Any = None,
        place: tuple[int, int] = (0, 1),
        first_number: int | None = None,
        elsewhere: dict[str, str] | None = None,
        **options: Any,
    ) -> None:
        self.capture = capture_into(path, config, **options)
        self.model = Model()
        self.graphs = 0
        if place[1] > 1:
            self.capture.take_rank(place[0])
        self.capture.attach(self.model, *place, first_number=first_number, elsewhere=elsewhere)
        self.run: Any = (
            torch.compile(self.model, backend=self._compile, dynamic=True) if compiled else self.model
        )
        self.prompts: dict[str, list[int]] = {}
        with torch.no_grad():
            self.run(torch.zeros(8, dtype=torch.int64))
        self.capture.check_fired(64)

    def _compile(self, gm: Any, inputs: Any) -> Any:
        self.graphs += 1
        return self.capture.compile(gm, inputs, "eager")

    def add(self, name: str, tokens: list[int], wish: Any = None, *, cached: int = 0) -> None:
        self.prompts[name] = tokens
        self.capture.begin_request(f"{name}-00", name, len(tokens), cached, wish)

    def step(self, batch: list[tuple[str, int, int]], padding: int = 3) -> torch.Tensor:
        ids = torch.tensor(
            [t for name, first, count in batch for t in self.prompts[name][first : first + count]]
        )
        scheduled = [(f"{name}-00", first, count) for name, first, count in batch]
        armed = self.capture.arm(scheduled)
        padded = torch.cat([ids, torch.zeros(padding, dtype=torch.int64)])
        with torch.no_grad():
            out: torch.Tensor = self.run(padded)
        if armed:
            self.capture.store(scheduled, padded.to(torch.int32))
        return out

    def expected(self, name: str) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        model = Model()
        for site in SITES:
            model.get_submodule(site).register_forward_hook(
                lambda module, args, out, site=site: found.__setitem__(site, out.clone())
            )
        with torch.no_grad():
            model(torch.tensor(self.prompts[name]))
        return found
