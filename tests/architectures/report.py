"""What the runs found, as a page to read."""

from __future__ import annotations

import collections
from typing import Any

TITLES = {
    "causal": "Causal language models",
    "masked": "Encoders (masked language models)",
    "seq2seq": "Encoder-decoders",
    "vision": "Vision",
    "audio": "Audio",
    "others": "Code that Hugging Face did not write",
}
GOOD = ("equal", "traced differs", "unfused")
LEFT_OUT = ("not eager", "not traced", "no sites")

HEAD = """# Which architectures are captured exactly

Written by `tests/architectures/run.py`; don't edit. Every model is built small from its configuration (64 wide, a
layer of each kind, float32, random weights, `attn_implementation="eager"` where there is one) and run four ways: eager
with forward hooks; compiled with `backend="aot_eager"` and nothing of this package; the same with other hooks, where
tracing alone changes bits; instrumented. A verdict is about all sites, all steps, and the model's output:

- **equal**: every captured value equals the eager hook's bit for bit; as many graphs as without capture.
- **traced differs**: the compiled model differs from the eager one before any capture (by so much, relative to the
  largest value of a site); captured values equal, bit for bit, what hooks see that are traced with the model.
- **unfused**: any forward hook switches a fused kernel of torch off, eager ones too; equal to the hooked model.
- **not eager**, **not traced**: the model does not run here without us; left out of the shares.
- **no sites**: a convolutional network, whose layers are neither attention nor MLPs; `instrument_model` refuses it and
  asks for `target_layers`; left out of the shares.
- **incomplete**, **failed**: what the reason says.

*One call*: a forward call without KV cache. *Generate*: prefill and decode steps with the model's own cache. Graphs
are those of the compiled model (the capturing one has as many); *breaks* are Dynamo's, without us. A record is one
value of one site in one step; *eager* ones ran behind a graph break. A layer is *complete* if it has an attention (or
the mixer in its place) and an MLP (or mixture of experts), or one of them and no other weights.

**Mixtures of experts.** transformers 5 keeps all experts of a layer in one module, so the site is the mixture's output
(role MLP). Routers are chosen by name, `HookConfig(target_layers=["model.layers.*.mlp.gate"])`; their value is the
first tensor that they return. Looked at in 16 families, that is the logits before top-k, (batch * tokens, experts), in
Mixtral, Qwen2 and Qwen3 MoE, DeepSeek V2 and V3, OLMoE, GLM-4 MoE, MiniMax, Ernie 4.5 MoE, HunYuan MoE (`mlp.gate`),
gpt-oss, Phi-MoE (`mlp.router`), Granite MoE (`block_sparse_moe.router`) and DBRX (`ffn.router`). Llama 4
(`feed_forward.router`) returns the chosen experts' scores, zeros elsewhere. JetMoE's router returns an index first:
choose the projection in it, `**.router.layer`.

**Attention without a module.** Where no module is an attention, `scaled_dot_product_attention` called in a module's own
forward is the site, `<module>.scaled_dot_product_attention`: the op's output, heads side by side. Globs that end
in that name choose it in any model (`model.layers.*.self_attn.scaled_dot_product_attention` where the code shows the
call, or spelt out). `framework.plan` shows such sites; `tests/test_ops.py` compares them with the op bit by bit. A call
behind a graph break, or in a module that is compiled by itself, is not captured, and the capture says so.
"""


def markdown(results: list[dict[str, Any]], order: list[tuple[str, str]]) -> str:
    """The page: for each family its shares, then a table in the order of the catalogue."""
    by_key = {(result["family"], result["name"]): result for result in results}
    known = [by_key[key] for key in order if key in by_key]
    parts = [HEAD, _versions(known)]
    families = [family for family in TITLES if any(result["family"] == family for result in known)]
    parts.append(
        "| | in the list | run here | run eagerly and traced | captured exactly | share of those |"
        "\n|---|---|---|---|---|---|"
    )
    for family in families:
        rows = [result for result in known if result["family"] == family]
        able = [result for result in rows if result["verdict"] not in LEFT_OUT]
        good = [result for result in able if result["verdict"] in GOOD]
        share = f"{100 * len(good) / len(able):.1f} %" if able else "-"
        listed = sum(1 for key in order if key[0] == family)
        parts[-1] += f"\n| {TITLES[family]} | {listed} | {len(rows)} | {len(able)} | {len(good)} | {share} |"
    for family in families:
        rows = [result for result in known if result["family"] == family]
        missing = sum(1 for key in order if key[0] == family) - len(rows)
        parts.append(f"## {TITLES[family]}")
        counts = collections.Counter(result["verdict"] for result in rows)
        parts.append(
            ", ".join(f"{verdict}: {count}" for verdict, count in counts.most_common())
            + (f"; not run: {missing}" if missing else "")
            + "."
        )
        parts.append(_table(rows))
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _versions(results: list[dict[str, Any]]) -> str:
    trees = collections.Counter(result["versions"]["tree"] for result in results)
    first = results[0]["versions"]
    dates = sorted({result["date"] for result in results})
    return (
        f"{' to '.join(sorted({dates[0], dates[-1]}))}; torch {first['torch']}, transformers {first['transformers']}, "
        f"Python {first['python']}, CPU. State of the package (git's tree of `fx_instrument/`): "
        + ", ".join(f"`{tree}` ({count} models)" for tree, count in trees.most_common())
        + "."
    )


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| model | layers | attention, MLP sites | one call: graphs, breaks, records | generate | verdict | reason |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        sites = f"{row['sites'].get('attention', 0)}, {row['sites'].get('mlp', 0)}"
        examples = " ".join(f"`{name}`" for name in row["examples"].values())
        runs = dict(row["runs"])
        once, other = _run(runs.pop("forward", None)), " ".join(map(_run, runs.values()))
        reason = row["reason"].replace("|", "\\|")[:220]
        lines.append(
            f"| {row['name']} | {row['layers']} | {sites} {examples} | {once} | {other} | {row['verdict']} | {reason} |"
        )
    return "\n".join(lines)


def _run(run: dict[str, Any] | None) -> str:
    if run is None or not run["records"]:
        return "-"
    eager = f" ({run['eager_records']} eager)" if run["eager_records"] else ""
    return f"{run['captured_graphs']}, {run['breaks']}, {run['records']}{eager}"
