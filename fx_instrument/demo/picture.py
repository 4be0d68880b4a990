"""Activation norms of one sequence as heat maps, layers by tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..activations import ActivationStream, Record
from ..errors import MissingPackageError

TITLES = {"attention": "Attention outputs", "mlp": "MLP outputs", "block": "Blocks", "other": "Modules"}


@dataclass(frozen=True)
class NormMap:
    """L2 norms of one role's outputs, float64 (sites, tokens), in the order of the model's layers."""

    role: str
    sites: tuple[str, ...]
    norms: npt.NDArray[np.float64]
    is_estimate: bool
    """Whether the norms are extrapolated from sampled elements."""


def norm_maps(stream: ActivationStream, sequence: int, columns: npt.NDArray[np.int64]) -> list[NormMap]:
    """One map a role, read back from the file.

    Args:
        stream: of a batched ``generate`` whose sites give (batch, tokens, hidden).
        sequence: row of the batch.
        columns: which of the sequence's tokens, counted over all steps (padding left out, for example).
    """
    maps = []
    for role in dict.fromkeys(site.role for site in stream.sites):
        sites = tuple(site.name for site in stream.sites if site.role == role)
        rows = []
        for name in sites:
            norms = np.concatenate([_token_norms(record) for record in stream[name]], axis=1)
            rows.append(norms[sequence, columns])
        sampled = any(stream[name][0].is_sampled for name in sites)
        maps.append(NormMap(role, sites, np.stack(rows), sampled))
    return maps


def _token_norms(record: Record) -> npt.NDArray[np.float64]:
    """Float64 (batch, tokens); of a sampled record sqrt(hidden * mean square of the token's samples)."""
    batch, tokens, hidden = record.full_shape
    values = record.tensor().double().numpy()
    positions = record.positions()
    if positions is None:
        return np.asarray(np.linalg.norm(values, axis=-1))
    token_of = positions.numpy() // hidden
    squares = np.bincount(token_of, weights=values**2, minlength=batch * tokens)
    counts = np.bincount(token_of, minlength=batch * tokens)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.sqrt(hidden * squares / counts).reshape(batch, tokens))


def draw(maps: Sequence[NormMap], tokens: Sequence[str], num_prompt: int, title: str, file: Path) -> None:
    """Write the maps, one under the other over the same tokens, as a PNG.

    Args:
        maps: of the same sequence.
        tokens: text of each column.
        num_prompt: how many of them are the prompt; the rest was generated.
        title: one line above.
        file: where to.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, NullFormatter
    except ModuleNotFoundError as missing:
        raise MissingPackageError(
            "the picture needs matplotlib: pip install 'fx_instrument[demo]'"
        ) from missing
    num_layers = max(len(found.sites) for found in maps)
    width = min(40.0, 3.2 + 0.19 * len(tokens))
    height = 1.9 + len(maps) * (0.7 + 0.125 * num_layers)
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(
        len(maps), 2, squeeze=False, sharey="row", gridspec_kw={"width_ratios": [max(8.0, width - 3.4), 1.0]}
    )
    colours = matplotlib.colormaps["magma"].with_extremes(bad="#dddddd")
    for (heat, profile), found in zip(axes, maps, strict=True):
        finite = found.norms[np.isfinite(found.norms) & (found.norms > 0)]
        # The outermost half percent would otherwise spend the scale on a few massive tokens.
        low, high = np.quantile(finite, [0.005, 0.995]) if finite.size else (0.1, 1.0)
        image = heat.imshow(
            np.ma.masked_invalid(np.where(found.norms > 0, found.norms, np.nan)),
            aspect="auto",
            interpolation="nearest",
            cmap=colours,
            norm=LogNorm(low, max(high, low * 1.01)),
            origin="lower",
        )
        estimate = ", estimated from sampled elements" if found.is_estimate else ""
        heat.set_title(
            f"{TITLES.get(found.role, found.role)}: L2 norm of each token{estimate}", loc="left", fontsize=11
        )
        heat.set_ylabel("layer")
        heat.set_yticks(range(0, len(found.sites), 5))
        heat.axvline(num_prompt - 0.5, color="#4fd1ff", linewidth=1.4)
        heat.set_xticks([])
        bar = figure.colorbar(image, ax=heat, pad=0.008, fraction=0.02, extend="both")
        bar.ax.tick_params(labelsize=8)
        _draw_profile(profile, found, num_prompt)
        profile.xaxis.set_major_locator(LogLocator(numticks=4))
        profile.xaxis.set_minor_formatter(NullFormatter())
    for text, place, side in (("prompt", num_prompt - 0.9, "right"), ("generated", num_prompt - 0.1, "left")):
        axes[0][0].text(place, num_layers - 0.2, text, ha=side, va="bottom", fontsize=9, color="#0072b2")
    bottom = axes[-1][0]
    bottom.set_xticks(range(len(tokens)), [_visible(token) for token in tokens], rotation=90, fontsize=7.5)
    bottom.tick_params(axis="x", length=2, pad=2)
    for label in bottom.get_xticklabels()[num_prompt:]:
        label.set_color("#0072b2")
    axes[0][1].legend(
        fontsize=7.5, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, handlelength=1.2
    )
    axes[-1][1].set_xlabel("median norm", fontsize=8)
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    figure.savefig(file, dpi=130)


def _draw_profile(axis: Any, found: NormMap, num_prompt: int) -> None:
    """Median norm of each layer over the prompt's and over the generated tokens."""
    layers = np.arange(len(found.sites))
    # The first token draws norms of its own (an attention sink), which are no example of the prompt's.
    prompt, generated = found.norms[:, 1:num_prompt], found.norms[:, num_prompt:]
    for label, norms, colour in (("prompt", prompt, "#444444"), ("generated", generated, "#0072b2")):
        if np.isfinite(norms).any(axis=1).all():
            axis.plot(np.nanmedian(norms, axis=1), layers, color=colour, linewidth=1.3, label=label)
    axis.set_xscale("log")
    axis.tick_params(labelsize=7.5, labelleft=False)
    axis.grid(True, linewidth=0.3)


def _visible(token: str) -> str:
    """The token's text with its white space made visible, no wider than an axis label may be."""
    text = token.replace("\n", "\u21b5").replace(" ", "\u00b7") or "\u2205"
    # matplotlib reads a pair of dollar signs as a formula.
    text = text.replace("$", r"\$")
    return text if len(text) <= 16 else f"{text[:15]}\u2026"
