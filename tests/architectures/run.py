"""Runs every model of the catalogue through ``check`` and writes what was found: docs/coverage.md.

    PYTHONPATH=. python tests/architectures/run.py                     all of them: about an hour on 2 cores
    PYTHONPATH=. python tests/architectures/run.py llama 'qwen*'       those whose names match
    PYTHONPATH=. python tests/architectures/run.py --family causal --report docs/coverage.md

Each model gets a process of its own, with a limit of time and memory. Results are kept in a folder, one JSON file a
model, so that a run that was stopped goes on where it was: a model is run again only if its result comes from another
torch, transformers or Python, or with --again. The page says which state of the package each result comes from.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import multiprocessing
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
import transformers  # noqa: E402

from architectures.check import Result, Subject, check  # noqa: E402
from architectures.report import markdown  # noqa: E402
from architectures.subjects import all_subjects  # noqa: E402

Key = tuple[str, str]


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    transformers.logging.set_verbosity_error()
    options.results.mkdir(parents=True, exist_ok=True)
    chosen = [
        subject
        for subject in all_subjects()
        if (not options.family or subject.family in options.family)
        and (not options.names or any(fnmatch.fnmatch(subject.name, glob) for glob in options.names))
    ]
    if not chosen:
        sys.exit(f"no model matches {options.names}, family {options.family}")
    version = versions()
    waiting = [s for s in chosen if options.again or not _is_done(_file(options.results, s), version)]
    print(f"{len(chosen)} models, {len(chosen) - len(waiting)} have a result already", flush=True)
    if waiting:
        torch.set_num_threads(1)
        # Everything that tracing and generating load lazily, loaded once, before the first fork.
        check(next(subject for subject in all_subjects() if subject.name == "llama"))
        _run_all(waiting, options, version)
    if options.report:
        known = [json.loads(path.read_text()) for path in sorted(options.results.glob("*.json"))]
        options.report.write_text(markdown(known, [(s.family, s.name) for s in all_subjects()]))
        print(f"wrote {options.report}")
    found = [json.loads(_file(options.results, subject).read_text()) for subject in chosen]
    return int(any(item["verdict"] in ("failed", "incomplete") for item in found))


def versions() -> dict[str, str]:
    """What a result depends on, so that a stale one is told from a fresh one."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short=10", "HEAD:fx_instrument"],
        cwd=HERE,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "tree": commit.stdout.strip(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _run_all(waiting: list[Subject], options: Any, version: dict[str, str]) -> None:
    context = multiprocessing.get_context("fork")  # torch and transformers are loaded once, here
    running: dict[int, tuple[Any, Subject, float]] = {}
    left, done = list(reversed(waiting)), 0
    while left or running:
        while left and len(running) < options.jobs:
            subject = left.pop()
            file = _file(options.results, subject)
            file.unlink(missing_ok=True)
            process = context.Process(target=_child, args=(subject, file, version, options.memory_gb))
            process.start()
            running[process.pid or 0] = (process, subject, time.monotonic())
        time.sleep(0.1)
        for pid, (process, subject, started) in list(running.items()):
            late = time.monotonic() - started > options.seconds
            if process.is_alive() and not late:
                continue
            if process.is_alive():
                process.kill()
            process.join()
            del running[pid]
            done += 1
            file = _file(options.results, subject)
            if not file.exists():
                why = (
                    f"took more than {options.seconds:g} s"
                    if late
                    else f"its process ended with {process.exitcode}"
                )
                _write(file, Result(subject.name, subject.family, verdict="failed", reason=why), version)
            result = json.loads(file.read_text())
            line = f"[{done}/{len(waiting)}] {subject.family} {subject.name}: {result['verdict']}"
            print(f"{line} ({result['seconds']:.0f} s) {result['reason'][:200]}", flush=True)


def _child(subject: Subject, file: Path, version: dict[str, str], memory_gb: float) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (int(memory_gb * 1e9),) * 2)
    torch.set_num_threads(1)
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    os.dup2(devnull, 2)
    _write(file, check(subject), version)


def _write(file: Path, result: Result, version: dict[str, str]) -> None:
    part = file.with_suffix(".part")
    part.write_text(json.dumps({**result.to_dict(), "versions": version, "date": time.strftime("%Y-%m-%d")}))
    part.replace(file)


def _file(folder: Path, subject: Subject) -> Path:
    return folder / f"{subject.family}.{subject.name}.json"


def _is_done(file: Path, version: dict[str, str]) -> bool:
    if not file.exists():
        return False
    known = json.loads(file.read_text())["versions"]
    return all(known[name] == version[name] for name in version if name != "tree")


def _parse(arguments: Sequence[str] | None) -> Any:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="globs over names")
    parser.add_argument("--family", action="append", help="causal, masked, ... (may be given again)")
    parser.add_argument("--jobs", type=int, default=2, help="models at a time")
    parser.add_argument("--seconds", type=float, default=300, help="limit for one model")
    parser.add_argument("--memory-gb", type=float, default=12, help="address space of one process")
    parser.add_argument("--again", action="store_true", help="run models again that have a result")
    parser.add_argument("--results", type=Path, default=Path("build/coverage"), help="folder of results")
    parser.add_argument("--report", type=Path, help="write this Markdown file")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
