"""The library from a shell: look into stream files, check, repair and export them, run the demo."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click
from rich.console import Console

from ..errors import InstrumentationError, TruncatedStreamError
from ..version import __version__
from .make import convert, demo, export
from .mend import recover, verify
from .options import EXIT_CODES, EXIT_USAGE, error_line, exit_code
from .read import head, info, stats


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line with ``arguments`` (``sys.argv`` if None); the exit code."""
    errors = Console(stderr=True, soft_wrap=True)
    try:
        result = cli.main(args=arguments, prog_name="fx-instrument", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.Abort:
        errors.print("stopped")
        return 130
    except click.ClickException as error:
        error.show()
        return EXIT_USAGE
    except BrokenPipeError:
        # The reader of the pipe has gone, as `head` does; Python must not fail again when it flushes at exit.
        sys.stdout = None
        return 0
    except (OSError, ValueError, InstrumentationError) as error:
        errors.print(error_line(error))
        if isinstance(error, TruncatedStreamError) and "recover=True" in str(error):
            errors.print("Read it so, or repair it with `fx-instrument recover`.")
        return exit_code(error)


@click.group(epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def cli() -> None:
    """Look into the activation streams that fx_instrument captures.

    A stream file holds the outputs of a model's attention and MLP modules, step by step, compressed. Several files,
    or a folder of them, are read as one: ranks beside each other, files of one rank one after the other.
    """


for command in (info, stats, verify, recover, export, convert, head, demo):
    cli.add_command(command)
