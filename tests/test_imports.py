"""The house's rules: imports only go down, strands meet in few rooms, and nothing heavy loads unasked."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fx_instrument

ROOT = Path(fx_instrument.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

STRANDS = {"graph", "capture", "stream"}
# What every room may use.
SHARED = {"errors", "forks", "config", "sampling", "version"}


def room(path: Path) -> tuple[str, ...]:
    return path.relative_to(ROOT).with_suffix("").parts


def imports(path: Path) -> list[tuple[str, int]]:
    """Absolute dotted names of what a file imports, and the line; relative names resolved."""
    found = []
    package = ["fx_instrument", *room(path)[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            found.append((name, node.lineno))
            if node.module is None:
                found += [(f"{name}.{alias.name}", node.lineno) for alias in node.names]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: "/".join(room(path)))
def test_imports_go_down(path: Path) -> None:
    """A strand's room imports from its own strand and the shared rooms; torch stays out of stream/."""
    strand = room(path)[0]
    for name, line in imports(path):
        where = f"{path.name}:{line} imports {name}"
        parts = name.split(".")
        if parts[0] == "fx_instrument" and len(parts) > 1:
            if strand in STRANDS:
                assert parts[1] == strand or parts[1] in SHARED, where
            elif strand in SHARED:
                assert parts[1] in SHARED, where
        if strand == "stream":
            assert parts[0] not in {"torch", "transformers"}, where
        if parts[0] in {"lz4", "zstandard"}:
            assert path.name == "codec.py" or strand == "framework", where


def test_no_circles() -> None:
    """No file imports another that, through others, imports it again."""
    names = {".".join(["fx_instrument", *room(path)]).removesuffix(".__init__"): path for path in FILES}
    graph = {name: {other for other, _ in imports(path) if other in names} for name, path in names.items()}

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail, name])
        if name not in done:
            for other in graph[name]:
                visit(other, (*trail, name))
            done.add(name)

    done: set[str] = set()
    for name in graph:
        visit(name, ())


def test_nothing_optional_or_heavy_is_imported() -> None:
    """Importing the package loads no optional package, no Inductor, and does not touch CUDA."""
    script = (
        "import sys, fx_instrument, torch;"
        "optional = {'transformers', 'matplotlib', 'pyarrow', 'zarr', 'safetensors', 'rich', 'click', 'vllm'};"
        "optional |= {'prometheus_client', 'ray'};"
        "bad = optional & set(sys.modules);"
        "assert not bad, bad; assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)


def test_every_public_name_is_documented() -> None:
    for name in fx_instrument.__all__:
        if name != "__version__":
            assert (getattr(fx_instrument, name).__doc__ or "").strip(), name


def test_no_file_is_two_rooms() -> None:
    """A file past about 400 lines asks to be two."""
    long = {path.name: count for path in FILES if (count := len(path.read_text().splitlines())) > 430}
    assert not long
