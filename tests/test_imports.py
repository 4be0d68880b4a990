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


OUTSIDE = sorted(
    path for folder in ("tests", "benchmarks", "docs") for path in (ROOT.parent / folder).rglob("*.py")
)


@pytest.mark.skipif(not OUTSIDE, reason="the package was installed without its source tree")
def test_what_is_imported_is_there() -> None:
    """What tests, benchmarks and examples take from the package: some run only beside servers that CI has none of."""
    for path in OUTSIDE:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or (node.module or "").split(".")[0] != "fx_instrument":
                continue
            source = ROOT.joinpath(*str(node.module).split(".")[1:])
            source = source / "__init__.py" if source.is_dir() else source.with_suffix(".py")
            assert source.is_file(), f"{path}:{node.lineno} imports from {node.module}"
            there = names_in(source)
            if source.name == "__init__.py":
                there |= {child.stem for child in source.parent.iterdir()}
            for alias in node.names:
                assert alias.name in there, f"{path}:{node.lineno} imports {alias.name} from {node.module}"


def names_in(path: Path) -> set[str]:
    """What a file binds outside its functions and classes."""
    found: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
            continue
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        waiting += ast.iter_child_nodes(node)
    return found
