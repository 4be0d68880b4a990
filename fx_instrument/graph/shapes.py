"""Sizes of a graph's values from its arguments: known before the graph runs, so that room can be reserved."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx
from torch.utils._sympy.printers import PythonPrinter

Arguments = Sequence[Any]
IntOfArguments = Callable[[Arguments], int]


class SizeReader:
    """Turns symbolic sizes of one traced graph into functions of the graph's arguments."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self._where: dict[sympy.Expr, str] = {}
        placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
        for index, node in enumerate(placeholders):
            value = node.meta.get("example_value")
            if isinstance(value, torch.SymInt):
                self._where.setdefault(value.node.expr, f"a[{index}]")
        for index, node in enumerate(placeholders):
            value = node.meta.get("example_value")
            if isinstance(value, torch.Tensor):
                for dim, size in enumerate(value.shape):
                    if isinstance(size, torch.SymInt):
                        self._where.setdefault(size.node.expr, f"a[{index}].shape[{dim}]")

    def total(self, sizes: Sequence[tuple[int | torch.SymInt, int]]) -> IntOfArguments | None:
        """The sum of ``size * weight``; None if a size depends on the data."""
        constant = 0
        weights: dict[sympy.Expr, int] = {}
        for size, weight in sizes:
            if isinstance(size, torch.SymInt) and not size.node.expr.is_number:
                weights[size.node.expr] = weights.get(size.node.expr, 0) + weight
            else:
                constant += int(size) * weight
        terms = [self._code(expr) for expr in weights]
        if None in terms:
            return None
        code = " + ".join(
            [str(constant), *(f"{w} * ({t})" for t, w in zip(terms, weights.values(), strict=True))]
        )
        return _function(code)

    def shapes(
        self, shapes: Sequence[Sequence[int | torch.SymInt]]
    ) -> Callable[[Arguments], tuple[tuple[int, ...], ...]] | None:
        """The shapes as ints; None if one depends on the data."""
        rows = []
        for shape in shapes:
            terms = [
                self._code(size.node.expr) if isinstance(size, torch.SymInt) else str(int(size))
                for size in shape
            ]
            if None in terms:
                return None
            rows.append("(" + "".join(f"{term}, " for term in terms) + ")")
        return _function("(" + "".join(f"{row}, " for row in rows) + ")")

    def _code(self, expr: sympy.Expr) -> str | None:
        symbols = expr.free_symbols
        if not all(symbol in self._where for symbol in symbols):
            return None
        names = {symbol: sympy.Symbol(f"v{number}", integer=True) for number, symbol in enumerate(symbols)}
        code: str = PythonPrinter().doprint(expr.xreplace(names))
        arguments = ", ".join(f"{names[s]}={self._where[s]}" for s in symbols)
        return f"(lambda {', '.join(map(str, names.values()))}: {code})({arguments})" if symbols else code


def _function(code: str) -> Callable[[Arguments], Any]:
    # The text comes from torch's own printer of its own size expressions, never from input.
    function: Callable[[Arguments], Any] = eval(f"lambda a: {code}", {"math": math, "torch": torch})
    return function
