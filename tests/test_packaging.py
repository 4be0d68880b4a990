"""What a newcomer relies on: the README's commands, the version, the types, the pinned packages."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import fx_instrument

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
PYPROJECT = (ROOT / "pyproject.toml").read_text()


def commands(text: str) -> list[str]:
    """Lines of the shell blocks of a Markdown text, without comments."""
    blocks = re.findall(r"```(?:bash|sh|console)\n(.*?)```", text, flags=re.DOTALL)
    lines = [
        line.split("  #")[0].strip().removeprefix("$ ") for block in blocks for line in block.splitlines()
    ]
    return [line for line in lines if line and not line.startswith("#")]


def test_ci_runs_the_readmes_test_command_and_nothing_else():
    script = (ROOT / ".ci" / "run").read_text().splitlines()
    body = [line for line in script if line and not line.startswith(("#", "set ", "cd "))]
    assert body == ["make test"]
    assert "make test" in commands(README)


def test_the_readmes_make_commands_are_targets_of_the_makefile():
    targets = set(re.findall(r"^([a-z]+):", MAKEFILE, flags=re.MULTILINE))
    named = {word for line in commands(README) for word in re.findall(r"^make ([a-z]+)", line)}
    assert {"demo", "test", "check"} <= named <= targets


def test_the_readmes_python_compiles():
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert blocks
    for number, block in enumerate(blocks):
        compile(block, f"README.md block {number}", "exec")


def test_the_readmes_files_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_version_is_one():
    assert fx_instrument.__version__ == version("fx_instrument")
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert f"## {fx_instrument.__version__}" in changelog


def test_the_package_is_typed():
    assert (Path(fx_instrument.__file__).parent / "py.typed").is_file()


def test_the_licence_is_apache_2():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert 'license = "Apache-2.0"' in PYPROJECT


def test_constraints_pin_exactly_and_name_no_source():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    for line in lines:
        assert re.fullmatch(r'[a-z0-9-]+==[0-9][0-9a-z.]*(; python_version >= "3\.\d+")?', line), line
    pinned = {line.split("==")[0] for line in lines}
    direct = set(re.findall(r'"([a-z0-9_-]+)>=', PYPROJECT)) - {"setuptools"}
    assert direct - pinned == set()


@pytest.mark.parametrize("module", ["fx_instrument", "fx_instrument.version", "fx_instrument.stream.reader"])
def test_importing_needs_none_of_the_extras(module):
    """And changes nothing: no thread, no random state, no configuration of logging."""
    program = f"""
import sys, threading, logging
for name in ("click", "rich", "transformers", "gguf", "matplotlib", "safetensors", "pyarrow", "zarr", "psutil"):
    sys.modules[name] = None
import {module}
assert threading.active_count() == 1, threading.enumerate()
assert not logging.getLogger().handlers
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_there_and_documented():
    for name in fx_instrument.__all__:
        found = getattr(fx_instrument, name)
        assert isinstance(found, str) or (found.__doc__ or "").strip(), name
