"""Captures that leave the compiled numbers alone: proven by the generated kernels, or taken from a run of their own.

A captured value has to exist in its dtype. Where Inductor kept it wider inside a fused kernel (a bf16 block or norm
output), the kernel then reads the rounded value, and the model's outputs change. So both graphs are compiled, with
captures and without. Where Inductor wrote the same kernels, the captures changed nothing but what is returned, and
that graph runs. Where it did not, the plain graph runs, and before it a graph that returns the captures alone:

    plain      return (%logits,)                     what a model without captures runs
    captures   return (%clone, ...)                  compiled as inference; computes what the captures need

It costs what computing up to the last site costs, and changes nothing: inputs that the graph writes to (static caches,
running statistics) are copied for it, random states are put back.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any
from unittest import mock

import torch
from torch import fx

from ..errors import RewriteError
from .nested import copy_graph
from .rewrite import Rewritten
from .written import written_arguments

log = logging.getLogger(__name__)

Compiled = Callable[..., Any]


def compile_strictly(
    inner: Compiled, plain: fx.GraphModule, rewritten: Rewritten, inputs: Sequence[Any], **kwargs: Any
) -> Compiled:
    """A callable like ``inner(rewritten.gm, inputs)``, whose first outputs are bit for bit those of ``plain``.

    Raises:
        RewriteError: the captures need a run of their own, and arguments that the graph writes to overlap.
    """
    without, uncaptured = _compile(inner, plain, inputs, kwargs)
    captured, capturing = _compile(inner, rewritten.gm, inputs, kwargs)
    if without and without == captured:
        log.debug("captures leave the %d kernels of a graph as they are", sum(without.values()))
        return capturing
    log.info("captures would change the kernels of a graph: they get a run of their own (strict_numerics)")
    _refuse_overlaps(rewritten.gm, inputs)
    with torch.no_grad():
        _, alone = _compile(inner, captures_alone(rewritten), inputs, kwargs)
    devices = sorted({value.device.index for value in inputs if _is_on_cuda(value)})

    def run(*args: Any) -> tuple[Any, ...]:
        with torch.no_grad(), torch.random.fork_rng(devices):
            values = alone(*args)
        return (*uncaptured(*args), *values)

    return run


def captures_alone(rewritten: Rewritten) -> fx.GraphModule:
    """The rewritten graph with the captures as its only outputs, and no effect on its arguments."""
    graph, _ = copy_graph(rewritten.gm.graph)
    copied = fx.GraphModule(rewritten.gm, graph, type(rewritten.gm).__name__)
    copied.meta = rewritten.gm.meta.copy()
    for name in ("_param_name_to_source", "_backend_id"):
        if hasattr(rewritten.gm, name):
            setattr(copied, name, getattr(rewritten.gm, name))
    for old, new in zip(rewritten.gm.graph.nodes, graph.nodes, strict=True):
        if (source := getattr(old, "_dynamo_source", None)) is not None:
            new._dynamo_source = source
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    written = written_arguments(copied)
    output.args = (tuple(output.args[0][rewritten.num_outputs :]),)
    first = next(node for node in graph.nodes if node.op != "placeholder")
    for placeholder in written:
        with graph.inserting_before(first):
            private = graph.call_function(torch.clone, (placeholder,))
        private.meta = dict(placeholder.meta)
        fake = placeholder.meta["example_value"]
        with fake.fake_mode, torch.no_grad():
            private.meta["example_value"] = fake.clone()
        for user in list(placeholder.users):
            if user is not private:
                user.replace_input_with(placeholder, private)
    graph.lint()
    copied.recompile()
    return copied


def _refuse_overlaps(gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
    """RewriteError where arguments overlap that are written to: copied one by one, they would come apart."""
    written = set(written_arguments(gm))
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    by_storage: dict[int, list[tuple[Any, Any, bool]]] = {}
    for node, value in zip(placeholders, inputs, strict=True):
        if isinstance(value, torch.Tensor) and value.layout is torch.strided and value.numel():
            steps = (stride * (size - 1) for size, stride in zip(value.shape, value.stride(), strict=True))
            start = value.storage_offset() * value.itemsize
            end = start + (sum(steps) + 1) * value.itemsize
            by_storage.setdefault(value.untyped_storage()._cdata, []).append((start, end, node in written))
    for extents in by_storage.values():
        for (start, end, writes), (other, other_end, other_writes) in combinations(extents, 2):
            if (writes or other_writes) and start < other_end and other < end:
                raise RewriteError(
                    "strict_numerics runs this graph's captures apart, on copies of what the graph writes to, but two "
                    "of its arguments or buffers share memory that it writes to, so their copies would differ: "
                    "capture without strict_numerics, or give the model tensors that don't overlap"
                )


def _is_on_cuda(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "cuda"


def _compile(
    inner: Compiled, gm: fx.GraphModule, inputs: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[Counter[str], Compiled]:
    """What ``inner`` makes of a graph, and the kernels that Inductor wrote for it; none if it wrote none."""
    from torch._inductor.graph import GraphLowering  # loads Inductor, which other backends need not

    codes: list[str] = []
    # Called with what Inductor generates, and with what it finds in its caches.
    with mock.patch.object(GraphLowering, "save_output_code", codes.append):
        compiled = inner(gm, inputs, **kwargs)
    return sum(map(kernels, codes), Counter()), compiled


def kernels(code: str) -> Counter[str]:
    """The kernels and library calls of a module that Inductor generated, without the names of their buffers.

    A buffer that is returned as well can't be written over, so ``in_out_ptr`` becomes an input and an output; what is
    computed stays the same.
    """
    found: Counter[str] = Counter()
    for body in re.findall(r"'''(.*?)'''", code, flags=re.DOTALL):
        # From the kernel's parameters on; before them stand includes and its name.
        text = re.sub(r"(?:in_out|in|out)_ptr\d+", "ptr", body[body.find("{") :])
        lines = (line.partition("//")[0].strip() for line in text.splitlines())
        kept = (line for line in lines if line and line != "auto ptr = ptr;")
        found["\n".join(re.sub(r"\btriton_\w*fused_\w+", "kernel", line) for line in kept)] += 1
    for call in re.findall(r"\b(extern_kernels\.\w+|torch\.ops\.[\w.]+|aten\.[\w.]+)\(", code):
        if not call.startswith("torch.ops.fx_instrument."):  # reads values, computes none
            found[call] += 1
    return found
