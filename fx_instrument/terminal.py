"""What the command line writes to: progress on standard error, text or JSON on standard output."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn


@contextmanager
def show_progress(what: str, *, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error, where that is a terminal."""
    errors = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors, transient=True, disable=quiet or not errors.is_terminal) as bar:
        task = bar.add_task(what, total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield show


def console() -> Console:
    """Standard output; what goes to a file or a pipe is not squeezed into 80 columns."""
    out = Console()
    return out if out.is_terminal else Console(width=160, soft_wrap=True)


def shown(text: object) -> str:
    """Text of a file as a terminal is to show it: neither markup nor control characters."""
    plain = (c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in str(text))
    return escape("".join(plain))


def print_json(value: Any) -> None:
    """One JSON value on standard output."""
    click.echo(json.dumps(value, indent=2))
