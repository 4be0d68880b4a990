"""``python -m benchmarks.overhead.alone PEER THREADS FILE``: the rows of one peer, measured in this process.

The options come as JSON on standard input. A process of :mod:`multiprocessing` would not do: torchlens refuses to trace
in one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from . import sections
from .table import Options


def main() -> None:
    name, threads, path = sys.argv[1:]
    torch.set_num_threads(int(threads))
    Path(path).write_text(json.dumps(sections.beside(name, Options.from_json(sys.stdin.read()))))


if __name__ == "__main__":
    main()
