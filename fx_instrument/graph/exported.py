"""The pass over an ``ExportedProgram``: capture ops behind the sites, delivered as further outputs of its signature.

    before   return (%logits,)      after   return (%logits, %clone, ...)
             out_spec: *                    out_spec: (*, {"fx_instrument/1": {SITES: {SITE: *, ...}}})

SITES is "whole", or "sampled/RATE/SEED" with the value's whole shape beside each value; SITE is "ROLE/NAME/CALL". So
the program says by itself what its further outputs are, wherever its signature goes: through ``torch.export.save``,
into AOTInductor's package, to another process.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry
from torch.export.graph_signature import OutputKind, OutputSpec, TensorArgument
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from ..errors import RewriteError
from ..sampling import fold_seed, num_samples, place
from .marker import check_dtype
from .rewrite import Sampling
from .sites import Site

_torch: Any = torch  # its symbolic functions have no types
MARK = "fx_instrument/1"
WHOLE = "whole"


@dataclass(frozen=True, slots=True)
class ExportedOutputs:
    """What the further outputs of a program are, read from its signature."""

    keys: tuple[tuple[Site, int], ...]
    """(site, call within a step) of each, in order."""
    sampling: Sampling | None

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(dict.fromkeys(site for site, _ in self.keys))


def read_spec(spec: Any) -> ExportedOutputs | None:
    """The captures that an output spec names; None if it has none."""
    if spec.type is not tuple or spec.num_children != 2:
        return None
    mark = spec.child(1)
    if mark.type is not dict or list(mark.context) != [MARK]:
        return None
    kind = mark.child(0)
    (how,), named = kind.context, kind.child(0)
    sampling = None
    if how != WHOLE:
        _, rate, seed = how.split("/")
        sampling = Sampling(float(rate), int(seed))
    keys = []
    for key in named.context:
        role, _, rest = key.partition("/")
        name, _, call = rest.rpartition("/")
        keys.append((Site(name, role), int(call)))
    return ExportedOutputs(tuple(keys), sampling)


def skeleton(program: ExportedProgram) -> nn.Module:
    """Empty modules of the program's names and classes, with its parameters: what sites are chosen by."""
    classes: dict[str, str] = {"": "ExportedProgram"}
    for node in program.graph.nodes:
        for name, kind in (node.meta.get("nn_module_stack") or {}).values():
            name = _first_call(name)
            if name and not name.startswith("_empty"):
                classes.setdefault(name, str(kind).rpartition(".")[2])
    parameters = dict(program.named_parameters())
    names = dict.fromkeys(name.rpartition(".")[0] for name in parameters)
    names.update(dict.fromkeys(classes))
    root: nn.Module = type("ExportedProgram", (nn.Module,), {})()
    for name in names:
        _module_at(root, name, classes)
    for name, parameter in parameters.items():
        parent, _, key = name.rpartition(".")
        _module_at(root, parent, classes).register_parameter(
            key, parameter if isinstance(parameter, nn.Parameter) else nn.Parameter(parameter, False)
        )
    return root


def _module_at(root: nn.Module, name: str, classes: Mapping[str, str]) -> nn.Module:
    module, path = root, ""
    for key in name.split(".") if name else ():
        path = f"{path}.{key}" if path else key
        if key not in module._modules:
            # What was never called and holds modules is a list of layers.
            called = path in classes
            kind = type(classes[path], (nn.Module,), {}) if called else nn.ModuleList
            module.add_module(key, kind())
        found = module._modules[key]
        assert found is not None
        module = found
    return module


def _first_call(name: str) -> str:
    """The name of a module without the number that export gives to its second and later calls."""
    return re.sub(r"@\d+", "", name)


def insert_exported(
    program: ExportedProgram, sites: Sequence[Site], sampling: Sampling | None
) -> tuple[fx.GraphModule, dict[str, Any]]:
    """A copy of the program's graph module with captures, and what of the program's constructor changes with it.

    Raises:
        RewriteError: a site was called, and which value it returned can't be told, or no stream holds its dtype.
    """
    gm = copy.deepcopy(program.graph_module)
    graph = gm.graph
    preserved = _preserved_outputs(program)
    calls = _calls(graph, {site.name for site in sites})
    captures: dict[str, Any] = {}
    extra: list[fx.Node] = []
    for site in sites:
        for number, (key, nodes) in enumerate(calls.get(site.name, {}).items()):
            value = _returned(graph, site, key, nodes, preserved, number)
            kept = _capture(graph, value, nodes[-1], sampling)
            extra += kept
            captures[f"{site.role}/{site.name}/{number}"] = 0 if sampling is None else [0, 0]
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    output.args = ((*output.args[0], *extra),)
    graph.lint()
    gm.recompile()
    signature = copy.deepcopy(program.graph_signature)
    signature.output_specs.extend(
        OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None) for node in extra
    )
    how = WHOLE if sampling is None else f"sampled/{sampling.rate!r}/{sampling.seed}"
    further = pytree.tree_structure({MARK: {how: captures}})
    entries = [_extended(entry, further) for entry in program.module_call_graph]
    return gm, {"graph": graph, "graph_signature": signature, "module_call_graph": entries}


def _extended(entry: ModuleCallEntry, further: Any) -> ModuleCallEntry:
    if entry.fqn or entry.signature is None:
        return entry
    spec = entry.signature.out_spec
    together = pytree.TreeSpec(tuple, None, [spec, further])
    return ModuleCallEntry(entry.fqn, replace(entry.signature, out_spec=together))


def _preserved_outputs(program: ExportedProgram) -> dict[tuple[str, int], str]:
    """(module, call) -> node of its first output tensor, where export was asked to preserve the call's signature."""
    found: dict[tuple[str, int], str] = {}
    for entry in program.module_call_graph:
        if not entry.fqn or entry.signature is None:
            continue
        name, _, number = entry.fqn.partition("@")
        for argument in entry.signature.outputs:
            if isinstance(argument, TensorArgument):
                found[name, int(number or 0)] = argument.name
                break
    return found


def _calls(graph: fx.Graph, names: set[str]) -> dict[str, dict[str, list[fx.Node]]]:
    """Of each module the nodes of each of its calls, in order."""
    found: dict[str, dict[str, list[fx.Node]]] = {}
    for node in graph.nodes:
        for key, (name, _) in (node.meta.get("nn_module_stack") or {}).items():
            first = _first_call(name)
            if first in names:
                # One key a call: `L__self__mlp`, `L__self__mlp@1`.
                found.setdefault(first, {}).setdefault(f"{key} {name}", []).append(node)
    return found


def _returned(
    graph: fx.Graph,
    site: Site,
    key: str,
    nodes: Sequence[fx.Node],
    preserved: Mapping[tuple[str, int], str],
    number: int,
) -> fx.Node:
    """The node of the value that a call returned: by the preserved signature, else the last float seen outside it."""
    name = preserved.get((site.name, number))
    if name is not None:
        for node in nodes:
            if node.name == name:
                return node
    inside = set(nodes)
    for node in reversed(nodes):
        value = node.meta.get("val")
        seen_outside = any(user not in inside for user in node.users)
        if isinstance(value, torch.Tensor) and value.is_floating_point() and seen_outside:
            return node
    raise RewriteError(
        f"which value {site.name!r} returned can't be told from the exported program (call {key!r}): export it with "
        f"preserve_module_call_signature=({site.name!r}, ...), or choose other sites"
    )


def _capture(graph: fx.Graph, value: fx.Node, last: fx.Node, sampling: Sampling | None) -> list[fx.Node]:
    """Insert a copy of ``value``, or its samples and whole shape, where its module returned."""
    fake = value.meta["val"]
    check_dtype(fake, "a site's value")
    after = last
    if any(node is value for node in _following(last)):
        after = value
    while after.op == "placeholder" and after.next.op == "placeholder":
        after = after.next
    with fake.fake_mode, torch.no_grad():
        traced = make_fx(_copy_of if sampling is None else _sampler(sampling))(fake)
    places = [node for node in traced.graph.nodes if node.op == "placeholder"]
    mapping: dict[fx.Node, Any] = {places[0]: value}
    with graph.inserting_before(after.next):
        made: Any = graph.graph_copy(traced.graph, mapping)
    for old, new in mapping.items():
        if old.op != "placeholder":
            new.meta = {**old.meta}
            for name in ("nn_module_stack", "stack_trace"):
                if name in value.meta:
                    new.meta[name] = value.meta[name]
    return list(made) if isinstance(made, (tuple, list)) else [made]


def _following(node: fx.Node) -> Sequence[fx.Node]:
    found, node = [], node.next
    while node.op not in ("output", "root"):
        found.append(node)
        node = node.next
    return found


def _copy_of(x: torch.Tensor) -> torch.Tensor:
    return torch.clone(x.detach())


def _sampler(sampling: Sampling) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    def sampled(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.detach()
        numel: Any = x.numel()
        count: Any
        if isinstance(numel, int):
            count = num_samples(numel, sampling.rate)
        else:
            count = _torch.sym_max(1, _rounded(sampling.rate * numel))
        index = torch.arange(count, device=x.device)
        where = place(index, numel, count, fold_seed(sampling.seed))
        sizes = [torch.full((1,), size, dtype=torch.int64) for size in x.shape]
        shape = torch.cat(sizes) if sizes else torch.zeros(0, dtype=torch.int64)
        return torch.index_select(x.flatten(), 0, where), shape

    return sampled


def _rounded(share: Any) -> Any:
    """``round`` (half to even) of a symbolic float, in operations that ``torch.export.save`` takes."""
    up = _torch.sym_int(share + 0.5)
    above = _torch.sym_float(up) - share
    even = _torch.sym_ite(above == 0.5, up - up % 2, up)
    # 2.4999999999999996 + 0.5 is 3.0 in floating point.
    return _torch.sym_ite(above > 0.5, up - 1, even)
