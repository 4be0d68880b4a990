"""Instructions a call of the toy, under valgrind's callgrind: what timings can't resolve, whatever else runs.

Each variant runs in a process of its own, where counting is on for one block only: it is opened, CALLS forward
calls, the block left. Compressing threads count like the rest. Callgrind knows AVX2 and no AVX-512, so ATen and
Inductor are held to AVX2.
"""

from __future__ import annotations

import concurrent.futures
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

CALLS = 40
VARIANTS = (
    "compiled",
    "FX, not capturing",
    "FX, zstd file",
    "compiled + traced hooks, zstd file",
)
TIMEOUT_S = 600


def available() -> str:
    """Why callgrind can't be used; empty if it can."""
    if shutil.which("valgrind") is None:
        return "valgrind is not installed (apt-get install valgrind)"
    if platform.machine() != "x86_64":
        return f"callgrind was tried on x86_64 only, this is {platform.machine()}"
    return ""


def measure(names: tuple[str, ...] = VARIANTS, progress: Callable[[], None] = lambda: None) -> dict[str, int]:
    """Instructions a call of each variant; two processes at a time."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONHASHSEED": "0",
            "ATEN_CPU_CAPABILITY": "avx2",
            "TORCHINDUCTOR_CACHE_DIR": f"{folder}/cache",
        }

        def one(name: str) -> int:
            out = Path(folder) / re.sub(r"\W+", "-", name)
            me = [sys.executable, "-m", "benchmarks.overhead.instructions", name]
            # Compiled outside valgrind first; the counted process finds the code in Inductor's cache.
            subprocess.run(
                [*me, "warm"], env=environment, check=True, timeout=TIMEOUT_S, stdout=subprocess.DEVNULL
            )
            valgrind = ["valgrind", "--tool=callgrind", "--instr-atstart=no", "--quiet"]
            command = [*valgrind, f"--callgrind-out-file={out}", *me, "count"]
            subprocess.run(command, env=environment, check=True, timeout=TIMEOUT_S, stdout=subprocess.DEVNULL)
            found = re.search(r"^totals: (\d+)", out.read_text(), re.M)
            if found is None or not int(found[1]):
                raise ValueError(f"callgrind counted nothing of {name!r}")
            progress()
            return int(found[1]) // CALLS

        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            return dict(zip(names, pool.map(one, names), strict=True))


def child(name: str, count: bool) -> None:
    import torch
    import torch._inductor.config

    from . import models, variants

    torch._inductor.config.cpp.march = "x86-64-v3"
    torch.set_num_threads(1)
    setup = variants.Setup(models.toy(torch.float32, "cpu", depth=2))
    made: Any
    if name == variants.BASE:
        made = [variants.compiled(setup)]
    elif name.startswith("FX"):
        made = variants.ours(setup)
    elif "traced" in name:
        made = variants.traced_hooks(setup)
    else:
        made = [variants.hooked(setup, compiled=True)]
    variant = next(variant for variant in made if variant.name == name)
    ids = torch.arange(16)[None]
    # inference_mode and one positional argument: what is left is the model, Dynamo's guards and the wrapper.
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        for _ in range(2):
            with variant.block(Path(folder)):
                for _ in range(3):
                    variant.run(ids)
        if not count:
            return
        _callgrind("on")
        with variant.block(Path(folder)):
            for _ in range(CALLS):
                variant.run(ids)
        _callgrind("off")


def _callgrind(state: str) -> None:
    """Count from here on, or no more; the request and its process cost every variant the same."""
    # torch._C._valgrind_toggle would count its own thread alone, and compressing is done in others.
    command = ["callgrind_control", "-i", state, str(os.getpid())]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    child(sys.argv[1], sys.argv[2] == "count")
