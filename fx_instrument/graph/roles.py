"""Which modules are attentions and MLPs, by names and structure; no architecture is known by its own name."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Literal

from torch import nn

from .ops import ATTENTION_OPS

Role = Literal["attention", "mlp", "block", "other"]

# Words of a module's name or class that say what it is; a bigram ("feed", "forward") counts as one word.
# Mixers that stand in attention's place (state space, recurrent, convolutional) count as attention.
_ATTENTION_WORDS = frozenset(
    {"attn", "attention", "attentions", "selfattn", "selfattention", "linearattn", "mha", "mla"}
    | {"mixer", "mixers", "mamba", "mamba2", "ssm", "rwkv", "retention", "recurrent", "deltanet"}
    | {"mlstm", "slstm", "shortconv", "temporalblock"}
)
_MLP_WORDS = frozenset(
    {"mlp", "mlps", "ffn", "ffns", "ff", "ffw", "feedforward", "feedforwards", "moe", "swiglu", "geglu"}
    | {"denserelu", "denseact", "densegated", "channelmix", "channelmixer"}
)
# A word for a mixer (FocalNet) and for what scales and shifts by a condition (diffusion models): the mixer alone has
# projections from and to the model's width.
_MIXER_OR_CONDITION = frozenset({"modulation"})
# Names that say where a module stands, not what it is: a mixer may be Mamba in one layer and an MLP in the next.
_PLACE_WORDS = frozenset({"mixer", "mixers"})
# Words of modules that belong to an attention or MLP by name only ("post_attention_layernorm").
_SUPPORT_WORDS = frozenset(
    {"norm", "layernorm", "rmsnorm", "batchnorm", "groupnorm", "ln", "dropout", "drop", "droppath"}
    | {"activation", "act", "embedding", "embeddings", "embed", "rotary", "rope", "pos", "position"}
    | {"bias", "scale", "gate", "router", "identity", "cache", "pool", "pooler", "mask"}
)
_NORM_WORDS = frozenset({"norm", "layernorm", "rmsnorm", "batchnorm", "groupnorm"})
# Residual streams mixed around an attention or MLP, by whose name they go (``attn_hc``).
_AROUND_WORDS = frozenset({"hyperconnection", "hyperconnections"})
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def find_roles(model: nn.Module) -> dict[str, Role]:
    """Name -> role of every attention and MLP of ``model``, in module order, by names and structure alone."""
    found: dict[str, Role] = {}
    _walk(model, "", "", found)
    _last_projections(model, found)
    return in_order(model, found)


def in_order(model: nn.Module, roles: dict[str, Role]) -> dict[str, Role]:
    """By module order; an op's site stands behind its module."""
    order: dict[str, float] = {name: number for number, (name, _) in enumerate(model.named_modules())}
    for name in roles:
        path, _, last = name.rpartition(".")
        if name not in order and last in ATTENTION_OPS and path in order:
            order[name] = order[path] + 0.5
    # A module with a second name is found under whichever comes first; named_modules knows only that one.
    return {name: roles[name] for name in sorted((n for n in roles if n in order), key=order.__getitem__)}


def _walk(module: nn.Module, name: str, inherited: str, found: dict[str, Role]) -> None:
    """Collect the outermost attention and MLP modules below ``module``; ``inherited`` names a container's items."""
    for key, child in module.named_children():
        full = f"{name}.{key}" if name else key
        label = f"{inherited}_{key}" if inherited else key
        if isinstance(child, CONTAINERS):
            _walk(child, full, key, found)
            continue
        if _is_gated_norm(child, label):
            continue
        role = _role_of(child, label)
        if role is None or _is_block(child) or _is_stack(child, label):
            _walk(child, full, "", found)
            continue
        found[_without_wrapper(child, full)] = role


def _role_of(module: nn.Module, label: str) -> Role | None:
    name_words, class_words = _words(label), _words(type(module).__name__)
    if (name_words | class_words) & _SUPPORT_WORDS and not _is_compound(module):
        return None
    if not _has_matrix(module) or (name_words | class_words) & _AROUND_WORDS:
        return None
    if (name_words | class_words) & _MIXER_OR_CONDITION and _keeps_width(module):
        return "attention"
    # The attribute says more than the class: a `mlp` may be of any class, a class is often generic.
    by_name, by_class = _role_by_words(name_words), _role_by_class(class_words)
    return by_class or by_name if name_words & _PLACE_WORDS else by_name or by_class


def _words(text: str) -> frozenset[str]:
    """The lower-case words of ``selfAttn_out2`` or ``RMSNorm``, and each pair of neighbours joined."""
    words = [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+\d*", text)]
    return frozenset(words) | frozenset(a + b for a, b in itertools.pairwise(words))


def _has_matrix(module: nn.Module) -> bool:
    return any(_dims(parameter) >= 2 for parameter in module.parameters())


def _num_matrices(module: nn.Module) -> int:
    return sum(1 for parameter in module.parameters() if _dims(parameter) >= 2)


def _dims(parameter: nn.Parameter) -> int:
    # Kernels that pack a matrix keep it elsewhere and leave an empty parameter (vLLM on CPU).
    return 2 if parameter.numel() == 0 else parameter.dim()


def _is_compound(module: nn.Module) -> bool:
    """Has at least two projections of its own, as attention and MLPs have and their norms and gates have not."""
    return _num_matrices(module) >= 2


def _is_norm(module: nn.Module) -> bool:
    return not _has_matrix(module) and any(True for _ in module.parameters())


def _is_gated_norm(module: nn.Module, label: str) -> bool:
    """A norm by its name and class, whatever stands in it: AXK2's is scaled by an MLP."""
    class_words = _words(type(module).__name__)
    return bool(_words(label) & _NORM_WORDS and class_words & _NORM_WORDS) and not _role_by_words(class_words)


def _keeps_width(module: nn.Module) -> bool:
    """Has projections of its own, the last of which leads back to the width that the first takes."""
    shapes = [_matrix_shape(child) for child in module.children() if _is_projection(child)]
    return len(shapes) >= 2 and shapes[0][1] == shapes[-1][0]


def _is_block(module: nn.Module) -> bool:
    """Holds both an attention and an MLP: a whole layer, whatever its name says."""
    roles: set[str] = set()
    for name, child in module.named_modules():
        key = name.rpartition(".")[2]
        # Swin's attention computes its position bias with an MLP of its own; that makes it no layer.
        if name and not isinstance(child, CONTAINERS) and not _words(key) & _SUPPORT_WORDS:
            role = _role_of(child, key)
            if role is not None and _is_compound(child):
                roles.add(role)
    return len(roles) == 2


def _is_stack(module: nn.Module, label: str) -> bool:
    """Matches as a whole what only modules inside it are: ``MambaModel`` with a mixer in each layer.

    A class name alone says little ("Moe" is a model family too), so names inside it overrule it; an own name is
    overruled only by a list of layers with such a module in each.
    """
    by_class = _role_by_words(_words(label)) is None
    for name, child in module.named_modules():
        parent, _, key = name.rpartition(".")
        if not name or isinstance(child, CONTAINERS) or not _is_compound(child):
            continue
        role = _role_by_words(_words(key)) if not _words(key) & _SUPPORT_WORDS else None
        if role is None:
            continue
        in_layer = any(isinstance(module.get_submodule(p), nn.ModuleList) for p in _ancestors(parent)[:-1])
        if by_class or (role == "attention" and in_layer):
            return True
    return False


def _ancestors(name: str) -> list[str]:
    """``a.b.c`` -> ``["a", "a.b", "a.b.c"]``."""
    parts = name.split(".") if name else []
    return [".".join(parts[: end + 1]) for end in range(len(parts))]


def _role_by_words(words: frozenset[str]) -> Role | None:
    if words & _MLP_WORDS:
        return "mlp"
    return "attention" if words & _ATTENTION_WORDS else None


def _role_by_class(words: frozenset[str]) -> Role | None:
    """As by words, but "Moe" in a class may be the model's family: ``GraniteMoeHybridMambaLayer``."""
    if words & _ATTENTION_WORDS and words & _MLP_WORDS == {"moe"}:
        return "attention"
    return _role_by_words(words)


def _without_wrapper(module: nn.Module, name: str) -> str:
    """Down from a wrapper that adds norm and residual (T5's ``layer.0``) to what it wraps (``SelfAttention``)."""
    while True:
        children = list(module.named_children())
        weighted = [(key, child) for key, child in children if _has_matrix(child)]
        if len(weighted) != 1 or not any(_is_norm(child) for _, child in children):
            return name
        key, inner = weighted[0]
        if isinstance(inner, CONTAINERS) or not _is_compound(inner):
            return name
        module, name = inner, f"{name}.{key}"


def _last_projections(model: nn.Module, found: dict[str, Role]) -> None:
    """Where a role is spread over bare projections, keep the last: OPT's ``fc2``, BERT's ``output.dense``."""
    bare: dict[tuple[str, Role], list[str]] = {}
    for name, role in found.items():
        if _is_projection(model.get_submodule(name)):
            bare.setdefault((name.rpartition(".")[0], role), []).append(name)
    for names in bare.values():
        for name in names[:-1]:
            del found[name]
    for name in _convolutions_beside(model, found):
        del found[name]
    attention_blocks = {_block_of(model, name) for name, role in found.items() if role == "attention"}
    for block in attention_blocks | set(_siteless_layers(model, found)):
        prefix = f"{block}." if block else ""
        inside = [name for name in found if name.startswith(prefix)]
        if any(found[name] == "mlp" for name in inside):
            continue
        projections = {
            f"{prefix}{name}": _matrix_shape(module)
            for name, module in model.get_submodule(block).named_modules()
            if name
            and _is_projection(module)
            and not any(f"{prefix}{name}.".startswith(f"{n}.") for n in inside)
        }
        # One projection alone is not an MLP, and far from a layer (a model's head) it is none either.
        if len(projections) >= 2 and block:
            found[_last_of_pair(projections) or list(projections)[-1]] = "mlp"
        elif block in attention_blocks and (last := _last_convolution(model.get_submodule(block))):
            found[f"{prefix}{last}"] = "mlp"


def _block_of(model: nn.Module, name: str) -> str:
    """The module around a site; the layer around that, where it only wraps the site: MPNet's ``attention.attn``."""
    block = name.rpartition(".")[0]
    layer = block.rpartition(".")[0]
    wraps = _num_matrices(model.get_submodule(block)) == _num_matrices(model.get_submodule(name))
    in_list = isinstance(model.get_submodule(layer.rpartition(".")[0]), nn.ModuleList)
    return layer if layer and in_list and wraps else block


def _convolutions_beside(model: nn.Module, found: dict[str, Role]) -> list[str]:
    """Sites that are a convolution over positions beside an attention or MLP of its own: ``self_attn_conv``."""
    compound = {
        (name.rpartition(".")[0], role)
        for name, role in found.items()
        if _is_compound(model.get_submodule(name))
    }
    return [
        name
        for name, role in found.items()
        if (name.rpartition(".")[0], role) in compound and _is_convolution(model.get_submodule(name))
    ]


def _last_convolution(layer: nn.Module) -> str | None:
    """Of a layer's own convolutions from and to the same width the last: an MLP over neighbours (SeamlessM4T v2)."""
    shapes = {name: _matrix_shape(child) for name, child in layer.named_children() if _is_convolution(child)}
    names = list(shapes)
    return names[-1] if len(names) >= 2 and shapes[names[0]][1] == shapes[names[-1]][0] else None


def _is_convolution(module: nn.Module) -> bool:
    """Convolves over several positions and mixes all channels, alone."""
    matrices = [parameter for parameter in module.parameters(recurse=False) if _dims(parameter) >= 3]
    leaf = not list(module.children()) and len(matrices) == 1 and getattr(module, "groups", 1) == 1
    return leaf and any(size > 1 for size in matrices[0].shape[2:])


def _siteless_layers(model: nn.Module, found: dict[str, Role]) -> Iterator[str]:
    """Layers of a stack without any site that widen and narrow again: FNet's, whose mixing has no weights."""
    for stack, layers in model.named_modules():
        if not isinstance(layers, nn.ModuleList):
            continue
        # Neither a stack with a site in it, nor one inside a site: a mixture's experts.
        if any(name.startswith(f"{stack}.") or stack.startswith(f"{name}.") for name in found):
            continue
        for key, layer in layers.named_children():
            shapes = {name: _matrix_shape(m) for name, m in layer.named_modules() if _is_projection(m)}
            pair = _last_of_pair(shapes)
            # A projection of whatever kind may stand beside an MLP; convolutions and embeddings make another layer.
            if pair and len(shapes) == _num_matrices(layer) == 2:
                yield f"{stack}.{key}"


def _last_of_pair(shapes: dict[str, tuple[int, int]]) -> str | None:
    """The last projection that undoes the widening of one before it: ``output.dense`` after ``intermediate.dense``."""
    seen: set[tuple[int, int]] = set()
    last = None
    for name, (rows, columns) in shapes.items():
        if rows != columns and (columns, rows) in seen:
            last = name
        seen.add((rows, columns))
    return last


def _matrix_shape(projection: nn.Module) -> tuple[int, int]:
    """Rows and columns; zeros where the matrix is packed elsewhere."""
    weight = next(p for p in projection.parameters(recurse=False) if _dims(p) >= 2)
    return (weight.shape[0], weight.shape[1]) if weight.dim() >= 2 else (0, 0)


def _is_projection(module: nn.Module) -> bool:
    """A linear map by its weight: one matrix and at most a bias, no children.

    ``Linear``, GPT-2's ``Conv1D``, and convolutions over single positions (SqueezeBERT's).
    """
    if list(module.children()) or isinstance(module, nn.Embedding):
        return False
    parameters = list(module.parameters(recurse=False))
    matrices = [parameter for parameter in parameters if _dims(parameter) >= 2]
    return len(matrices) == 1 and len(parameters) <= 2 and all(size == 1 for size in matrices[0].shape[2:])
