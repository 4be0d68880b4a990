"""Which modules are captured: by role (attention, MLP), or by globs over their names."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn
from torch.nn.parameter import is_lazy

from ..config import HookGranularity, InstrumentationConfig
from ..errors import NoSitesError
from .ops import ATTENTION_OPS, find_op_sites, op_of

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
# Names that say where a module stands, not what it is: a mixer may be Mamba in one layer and an MLP in the next.
_PLACE_WORDS = frozenset({"mixer", "mixers"})
# Words of modules that belong to an attention or MLP by name only ("post_attention_layernorm").
_SUPPORT_WORDS = frozenset(
    {"norm", "layernorm", "rmsnorm", "batchnorm", "groupnorm", "ln", "dropout", "drop", "droppath"}
    | {"activation", "act", "embedding", "embeddings", "embed", "rotary", "rope", "pos", "position"}
    | {"bias", "scale", "gate", "router", "identity", "cache", "pool", "pooler", "mask"}
)
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


@dataclass(frozen=True, slots=True)
class Site:
    """One module whose output is captured.

    ``name`` is what ``model.get_submodule(name)`` takes; of a module with several names, the first.
    """

    name: str
    role: Role


def choose_sites(model: nn.Module, config: InstrumentationConfig) -> tuple[Site, ...]:
    """The sites that ``config`` stands for, in module order.

    Raises:
        NoSitesError: nothing matches; the message shows what was looked for and near misses.
    """
    if any(is_lazy(parameter) for parameter in model.parameters()):
        raise ValueError(
            f"{type(model).__name__} has uninitialised lazy parameters: call it once before instrumenting"
        )
    roles = find_roles(model)
    if "attention" not in roles.values():
        roles = _in_order(model, {**roles, **dict.fromkeys(find_op_sites(model), "attention")})
    globs = config.hook_config.target_layers
    if globs is not None:
        return _sites_by_glob(model, tuple(globs), roles)
    wanted: tuple[Role, ...] = ("attention", "mlp")
    if config.granularity is HookGranularity.ATTENTION_ONLY:
        wanted = ("attention",)
    elif config.granularity is HookGranularity.MLP_ONLY:
        wanted = ("mlp",)
    sites = tuple(Site(name, role) for name, role in roles.items() if role in wanted)
    if not sites:
        classes = sorted({type(module).__name__ for module in model.modules()} - {type(model).__name__})
        raise NoSitesError(
            f"{type(model).__name__} has no {' or '.join(wanted)} module: looked for modules with weights whose "
            f"name or class holds words such as attn, attention, mixer / mlp, ffn, feed_forward, moe; its modules "
            f"are of the classes {', '.join(classes[:12]) or '(none)'}. "
            f"Name the modules with HookConfig(target_layers=[...])."
        )
    return sites


def find_roles(model: nn.Module) -> dict[str, Role]:
    """Name -> role of every attention and MLP of ``model``, in module order, by names and structure alone."""
    found: dict[str, Role] = {}
    _walk(model, "", "", found)
    _last_projections(model, found)
    return _in_order(model, found)


def _in_order(model: nn.Module, roles: dict[str, Role]) -> dict[str, Role]:
    """By module order; an op's site stands behind its module."""
    order: dict[str, float] = {name: number for number, (name, _) in enumerate(model.named_modules())}
    for name in roles:
        path, _, last = name.rpartition(".")
        if name not in order and last in ATTENTION_OPS and path in order:
            order[name] = order[path] + 0.5
    # A module with a second name is found under whichever comes first; named_modules knows only that one.
    return {name: roles[name] for name in sorted((n for n in roles if n in order), key=order.__getitem__)}


def find_siblings(model: nn.Module, sites: Sequence[Site]) -> tuple[Site, ...]:
    """Modules whose values a graph of a site's may deliver, and that are no sites.

    Where layers are compiled one by one, or a graph breaks, the frames of equal modules share a graph whether those
    inside them carry a marker or not: `self_attn` of all layers, the router's projection of attention and MLP. With
    markers on the siblings too, a shared graph always delivers, and whose values it delivered decides.
    """
    owners = {site: op_of(model, site.name) for site in sites}
    modules = dict(model.named_modules())
    named = {name: module for name, module in modules.items() if name}
    for op in {op for _, op in owners.values() if op is not None}:
        named.update({f"{name}.{op}": module for name, module in tuple(named.items())})
    chosen = {site.name for site in sites}
    kinds = {
        place: site.role for site in sites for place in _places(modules, site.name, type(owners[site][0]))
    }
    found = []
    for name, module in named.items():
        if name in chosen:
            continue
        role = next((kinds[p] for p in _places(modules, name, type(module)) if p in kinds), None)
        if role is not None:
            found.append(Site(name, role))
    return tuple(found)


def _places(modules: Mapping[str, nn.Module], name: str, kind: type) -> Iterator[tuple[type, str, type]]:
    """Where frames find a module: each class around it, the path from there without numbers, its own class."""
    parts = name.split(".")
    for end in range(len(parts)):
        around = modules.get(".".join(parts[:end]))
        if around is not None and not isinstance(around, _CONTAINERS):
            yield type(around), re.sub(r"\d+", "#", ".".join(parts[end:])), kind


def _walk(module: nn.Module, name: str, inherited: str, found: dict[str, Role]) -> None:
    """Collect the outermost attention and MLP modules below ``module``; ``inherited`` names a container's items."""
    for key, child in module.named_children():
        full = f"{name}.{key}" if name else key
        label = f"{inherited}_{key}" if inherited else key
        if isinstance(child, _CONTAINERS):
            _walk(child, full, key, found)
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
    if not _has_matrix(module):
        return None
    # The attribute says more than the class: a `mlp` may be of any class, a class is often generic.
    by_name, by_class = _role_by_words(name_words), _role_by_class(class_words)
    return by_class or by_name if name_words & _PLACE_WORDS else by_name or by_class


def _words(text: str) -> frozenset[str]:
    """The lower-case words of ``selfAttn_out2`` or ``RMSNorm``, and each pair of neighbours joined."""
    words = [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+\d*", text)]
    return frozenset(words) | frozenset(a + b for a, b in itertools.pairwise(words))


def _has_matrix(module: nn.Module) -> bool:
    return any(_dims(parameter) >= 2 for parameter in module.parameters())


def _dims(parameter: nn.Parameter) -> int:
    # Kernels that pack a matrix keep it elsewhere and leave an empty parameter (vLLM on CPU).
    return 2 if parameter.numel() == 0 else parameter.dim()


def _is_compound(module: nn.Module) -> bool:
    """Has at least two projections of its own, as attention and MLPs have and their norms and gates have not."""
    return sum(1 for parameter in module.parameters() if _dims(parameter) >= 2) >= 2


def _is_norm(module: nn.Module) -> bool:
    return not _has_matrix(module) and any(True for _ in module.parameters())


def _is_block(module: nn.Module) -> bool:
    """Holds both an attention and an MLP: a whole layer, whatever its name says."""
    roles: set[str] = set()
    for name, child in module.named_modules():
        key = name.rpartition(".")[2]
        # Swin's attention computes its position bias with an MLP of its own; that makes it no layer.
        if name and not isinstance(child, _CONTAINERS) and not _words(key) & _SUPPORT_WORDS:
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
        if not name or isinstance(child, _CONTAINERS) or not _is_compound(child):
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
        if isinstance(inner, _CONTAINERS) or not _is_compound(inner):
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
    attention_blocks = {name.rpartition(".")[0] for name, role in found.items() if role == "attention"}
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
            if pair and len(shapes) == sum(1 for p in layer.parameters() if _dims(p) >= 2) == 2:
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


def _sites_by_glob(model: nn.Module, globs: Sequence[str], roles: dict[str, Role]) -> tuple[Site, ...]:
    # Every name that get_submodule takes, second names of shared modules too, each with the module's first name.
    first: dict[int, str] = {id(module): name for name, module in model.named_modules()}
    names = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    chosen: set[str] = set()
    for glob in globs:
        if glob.rpartition(".")[2] in ATTENTION_OPS:
            ops = _ops_by_glob(model, glob)
            chosen.update(ops)
            roles = {**roles, **dict.fromkeys(ops, "attention")}
            continue
        try:
            pattern = re.compile(_translate(glob))
        except re.error as error:
            raise ValueError(f"target_layers glob {glob!r} is malformed: {error}") from None
        matches = [name for name in names if pattern.fullmatch(name)]
        callable_matches = [name for name in matches if not isinstance(names[name], _CONTAINERS)]
        if not callable_matches:
            raise NoSitesError(_no_match(glob, matches, list(names)))
        chosen.update(first[id(names[name])] for name in callable_matches)
    chosen_roles = {name: _glob_role(name, roles) for name in (*names, *sorted(chosen)) if name in chosen}
    return tuple(Site(name, role) for name, role in _in_order(model, chosen_roles).items())


def _ops_by_glob(model: nn.Module, glob: str) -> list[str]:
    """The ops that a glob names; one that is spelt out is taken at its word, others must be seen in the code."""
    path, _, op = glob.rpartition(".")
    if not re.search(r"[*?[]", path):
        try:
            op_of(model, glob)
        except AttributeError:
            raise NoSitesError(
                f"target_layers names an op of {path!r}, and there is no such module"
            ) from None
        return [glob]
    pattern = re.compile(_translate(glob))
    found = [name for name in find_op_sites(model) if pattern.fullmatch(name)]
    if not found:
        raise NoSitesError(
            f"target_layers glob {glob!r}: no module's own forward is seen to call {op}; if one does, through code "
            f"that can't be followed, spell its name out ('<module>.{op}'), or choose the module itself"
        )
    return found


def _glob_role(name: str, roles: dict[str, Role]) -> Role:
    role = roles.get(name)
    if role is not None:
        return role
    inside = {other for n, other in roles.items() if n.startswith(f"{name}.")}
    # A layer holds attention and MLP as near descendants; a stack of layers holds more than one of each.
    attentions = sum(1 for n, r in roles.items() if r == "attention" and n.startswith(f"{name}."))
    return "block" if inside == {"attention", "mlp"} and attentions <= 2 else "other"


def _translate(glob: str) -> str:
    """A glob as a regular expression: ``*`` and ``?`` stop at dots, ``**`` crosses them, ``[0-3]`` is a class."""
    out, position = "", 0
    while position < len(glob):
        char = glob[position]
        if glob.startswith("**", position):
            out, position = out + ".*", position + 2
        elif char == "*":
            out, position = out + r"[^.]*", position + 1
        elif char == "?":
            out, position = out + r"[^.]", position + 1
        elif char == "[" and (end := glob.find("]", position + 2)) != -1:
            body = re.sub(r"([\\\[&~|])", r"\\\1", glob[position + 1 : end])
            out += "[" + ("^" + body[1:] if body[0] == "!" else body) + "]"
            position = end + 1
        else:
            out, position = out + re.escape(char), position + 1
    return out


def _no_match(glob: str, containers: list[str], names: list[str]) -> str:
    if containers:
        return (
            f"target_layers glob {glob!r} matches only containers that are never called ({containers[0]!r}); "
            f"choose the modules inside them, {containers[0] + '.*'!r} for example"
        )
    near = list(_near_misses(glob, names))
    hint = (
        f"near misses: {', '.join(map(repr, near))}"
        if near
        else "the model has no module with a similar name"
    )
    return f"target_layers glob {glob!r} matches no module; {hint}"


def _near_misses(glob: str, names: list[str]) -> Iterator[str]:
    seen: set[str] = set()
    for name in difflib.get_close_matches(re.sub(r"\[[^]]*\]|\*+|\?", "0", glob), names, n=12, cutoff=0.5):
        shape = re.sub(r"\d+", "*", name)
        if shape not in seen and len(seen) < 4:
            seen.add(shape)
            yield name
