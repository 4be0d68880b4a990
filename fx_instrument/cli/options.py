"""What the commands share: arguments and options, exit codes, how a failure is said."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from ..errors import (
    CorruptStreamError,
    InstrumentationError,
    MissingPackageError,
    NotAStreamError,
    TruncatedStreamError,
    UnsupportedStreamError,
)
from ..terminal import shown

EXIT_DAMAGED, EXIT_USAGE, EXIT_UNREADABLE, EXIT_MISSING_PACKAGE, EXIT_FAILED = 1, 2, 3, 4, 5
_GAPS_SHOWN = 10
EXIT_CODES = """\b
Exit codes: 0 done; 1 the file is damaged or cut short; 2 wrong usage, no such file, or output exists;
3 not a stream, or of a newer format; 4 an optional package is missing; 5 anything else that failed."""

files_argument = click.argument(
    "files", metavar="FILE...", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path)
)
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print JSON on standard output, nothing else."
)
recover_option = click.option(
    "--recover", is_flag=True, help="Read a file without an index as far as it is whole; it is not changed."
)
site_option = click.option(
    "--site",
    "globs",
    multiple=True,
    metavar="GLOB",
    help="Only these sites, '*' for any run of characters; repeatable.",
)


def error_line(error: Exception) -> str:
    return f"[red]error:[/] {shown(for_shell(str(error)))}"


def for_shell(text: str) -> str:
    return text.replace("recover=True", "--recover")


def exit_code(error: Exception) -> int:
    if isinstance(error, (TruncatedStreamError, CorruptStreamError)):
        return EXIT_DAMAGED
    if isinstance(error, (NotAStreamError, UnsupportedStreamError)):
        return EXIT_UNREADABLE
    if isinstance(error, MissingPackageError):
        return EXIT_MISSING_PACKAGE
    if isinstance(error, (FileNotFoundError, FileExistsError)) or (
        isinstance(error, ValueError) and not isinstance(error, InstrumentationError)
    ):
        return EXIT_USAGE
    return EXIT_FAILED


def print_lost(damage: Sequence[Mapping[str, Any]]) -> None:
    """Say on standard error what ``--recover`` passed over (gaps as ``describe_damage`` gives them)."""
    out = Console(stderr=True, soft_wrap=True)
    for gap in damage[:_GAPS_SHOWN]:
        where = f"{gap['num_bytes']} bytes at {gap['offset']}"
        out.print(f"[yellow]missing:[/] {shown(gap['file'])}: {where}: {shown(for_shell(gap['reason']))}")
    if len(damage) > _GAPS_SHOWN:
        out.print(f"[yellow]missing:[/] {len(damage) - _GAPS_SHOWN} more gaps, which info --json lists")


def one_or_all(files: Sequence[Path]) -> Path | Sequence[Path]:
    return files[0] if len(files) == 1 else files


def choose(names: Sequence[str], globs: Sequence[str]) -> list[str]:
    chosen = [name for name in names if any(fnmatch.fnmatchcase(name, glob) for glob in globs)]
    if not chosen:
        raise click.UsageError(
            f"no site matches {', '.join(map(repr, globs))}; there are {', '.join(map(repr, names[:6]))}"
            f"{' ...' if len(names) > 6 else ''}"
        )
    return chosen
