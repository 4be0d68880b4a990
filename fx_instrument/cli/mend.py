"""Commands that check files and make them whole."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from ..errors import InstrumentationError
from ..repair import check_file, recover_stream
from ..stream.mapped import stream_files
from ..terminal import console, print_json, show_progress, shown
from .options import EXIT_DAMAGED, error_line, exit_code, files_argument, for_shell, json_option


@click.command(short_help="Check a file against its checksums.")
@files_argument
@json_option
def verify(files: Sequence[Path], as_json: bool) -> int:
    """Check every byte against its checksums; exit code 1 if a file is damaged or cut short.

    Of several files, one that can't be checked is named, and the others are checked all the same; the exit code is then
    the first such file's.
    """
    with show_progress("verifying", quiet=as_json) as progress:
        names = stream_files(files)
        done = itertools.count()

        def check(name: str) -> dict[str, Any]:
            progress(next(done), len(names))
            return check_file(name)

        found, failed = _each(names, check)
    ok = not failed and all(result["ok"] for result in found)
    if as_json:
        problems = [problem for result in found for problem in result["problems"]]
        print_json(
            {
                "file": ", ".join(map(str, files)),
                "ok": ok,
                "readable_records": sum(result["readable_records"] for result in found),
                "problems": problems,
                "files": found,
                "failed": [{"file": name, "reason": str(error)} for name, error in failed],
            }
        )
    else:
        out = console()
        for result in found:
            for problem in result["problems"]:
                out.print(f"[red]damaged:[/] {shown(for_shell(problem['reason']))}")
            count = result["readable_records"]
            state = (
                f"whole, {count} records" if result["ok"] else f"{count} records are readable with --recover"
            )
            out.print(f"{shown(result['file'])}: {state}")
        _print_failed(failed)
    return exit_code(failed[0][1]) if failed else 0 if ok else EXIT_DAMAGED


@click.command(short_help="Make damaged or cut files whole again.")
@files_argument
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Leave the one FILE alone, write a repaired copy.",
)
@json_option
def recover(files: Sequence[Path], output: Path | None, as_json: bool) -> int:
    """Make files whole again after their writer was killed or bytes were damaged, so that they open as any other.

    Every record that can be read is written anew, and the result takes the file's place; what was lost is listed.
    A file that a capture still writes is left alone. Of several files, one that can't be recovered is named, and the
    others are recovered all the same; the exit code is then the first such file's.
    """
    names = stream_files(files)
    if output is not None and len(names) > 1:
        raise click.UsageError(f"--output takes one file, got {len(names)}")

    def mend(name: str) -> dict[str, Any]:
        with show_progress(f"recovering {Path(name).name}", quiet=as_json) as progress:
            return recover_stream(name, output, progress=progress)

    results, failed = _each(names, mend)
    code = exit_code(failed[0][1]) if failed else 0
    if as_json:
        errors = [{"file": name, "reason": str(error)} for name, error in failed]
        print_json(results[0] if len(names) == 1 else {"files": results, "failed": errors})
        return code
    out = console()
    for found in results:
        for problem in found["damage"]:
            out.print(
                f"[yellow]lost:[/] {problem['num_bytes']} bytes at {problem['offset']}: {shown(problem['reason'])}"
            )
        state = "" if found["rewritten"] else ", whole already"
        out.print(f"{shown(found['file'])}: {found['records']} records of {found['steps']} steps{state}")
    _print_failed(failed)
    return code


def _each(
    names: Sequence[str], work: Callable[[str], dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[tuple[str, Exception]]]:
    """What ``work`` found of each file, and what it failed with; a single file's failure is raised."""
    results: list[dict[str, Any]] = []
    failed: list[tuple[str, Exception]] = []
    for name in names:
        try:
            results.append(work(name))
        except (OSError, InstrumentationError) as error:
            if len(names) == 1:
                raise
            failed.append((name, error))
    return results, failed


def _print_failed(failed: Sequence[tuple[str, Exception]]) -> None:
    for _, error in failed:
        Console(stderr=True, soft_wrap=True).print(error_line(error))
