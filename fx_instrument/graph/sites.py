"""Which modules are captured: by role (attention, MLP), or by globs over their names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import is_lazy

from ..config import HookGranularity, InstrumentationConfig
from ..errors import NoSitesError
from .ops import ATTENTION_OPS, find_op_sites, op_of
from .roles import CONTAINERS, Role, find_roles, in_order


@dataclass(frozen=True, slots=True)
class Site:
    """One module whose output is captured.

    ``name`` is what ``model.get_submodule(name)`` takes; of a module with several names, the first.
    """

    name: str
    role: Role


def choose_sites(model: nn.Module, config: InstrumentationConfig, within: str = "") -> tuple[Site, ...]:
    """The sites that ``config`` stands for, in module order.

    Args:
        within: name of the module that they must lie in; "" for all of the model.

    Raises:
        NoSitesError: nothing matches; the message shows what was looked for and near misses. Or a glob names what lies
            elsewhere.
    """
    sites = _all_sites(model, config)
    if not within:
        return sites
    inside = tuple(site for site in sites if f"{site.name}.".startswith(f"{within}."))
    if not inside or (config.hook_config.target_layers is not None and inside != sites):
        elsewhere = next(site.name for site in sites if site not in inside)
        raise NoSitesError(
            f"{elsewhere} lies outside {within}: choose sites inside it, such as "
            f"HookConfig(target_layers=['{within}.**.mlp'])"
        )
    return inside


def _all_sites(model: nn.Module, config: InstrumentationConfig) -> tuple[Site, ...]:
    if any(is_lazy(parameter) for parameter in model.parameters()):
        raise ValueError(
            f"{type(model).__name__} has uninitialised lazy parameters: call it once before instrumenting"
        )
    roles = find_roles(model)
    if "attention" not in roles.values():
        roles = in_order(model, {**roles, **dict.fromkeys(find_op_sites(model), "attention")})
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


def find_siblings(model: nn.Module, sites: Sequence[Site]) -> tuple[Site, ...]:
    """Modules whose values a graph of a site's may deliver, and that are no sites.

    Where layers are compiled one by one, or a graph breaks, the frames of equal modules share a graph whether those
    inside them carry a marker or not: ``self_attn`` of all layers, the router's projection of attention and MLP. With
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
        if around is not None and not isinstance(around, CONTAINERS):
            yield type(around), re.sub(r"\d+", "#", ".".join(parts[end:])), kind


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
        callable_matches = [name for name in matches if not isinstance(names[name], CONTAINERS)]
        if not callable_matches:
            raise NoSitesError(_no_match(glob, matches, list(names)))
        chosen.update(first[id(names[name])] for name in callable_matches)
    chosen_roles = {name: _glob_role(name, roles) for name in (*names, *sorted(chosen)) if name in chosen}
    return tuple(Site(name, role) for name, role in in_order(model, chosen_roles).items())


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
