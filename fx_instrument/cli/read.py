"""Commands that look into stream files."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import click

from ..activations import open_stream
from ..analysis import analyze_activations, describe, describe_damage
from ..record_table import record_rows, record_table
from ..site_table import info_table, site_table
from ..terminal import console, print_json, show_progress
from .options import (
    choose,
    files_argument,
    json_option,
    one_or_all,
    print_lost,
    recover_option,
    site_option,
)


@click.command(short_help="Say what a file holds and where it comes from.")
@files_argument
@json_option
@recover_option
def info(files: Sequence[Path], as_json: bool, recover: bool) -> None:
    """Say where the files come from and what they hold, without reading the values."""
    with open_stream(one_or_all(files), recover=recover) as stream:
        found = describe(stream)
        sites = [{"name": site.name, "role": site.role} for site in stream.sites]
        inputs = list(stream.input_names)
    if as_json:
        print_json({**found, "sites": sites, "inputs": inputs})
        return
    out = console()
    out.print(info_table(found, sites, inputs))


@click.command(short_help="Print statistics of each site's values.")
@files_argument
@json_option
@recover_option
@site_option
def stats(files: Sequence[Path], as_json: bool, recover: bool, globs: Sequence[str]) -> None:
    """Print statistics of the values of each site."""
    with show_progress("reading", quiet=as_json) as progress:
        found = analyze_activations(one_or_all(files), recover=recover, progress=progress)
    if globs:
        found["sites"] = {name: found["sites"][name] for name in choose(list(found["sites"]), globs)}
    print_lost(found["metadata"]["damage"])
    if as_json:
        print_json(found)
        return
    out = console()
    out.print(site_table(found["sites"], out.width))


@click.command(short_help="Print the first records.")
@files_argument
@click.option(
    "-n",
    "--records",
    default=10,
    show_default=True,
    type=click.IntRange(1, 1 << 32),
    help="How many records.",
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
    with open_stream(one_or_all(files), recover=recover) as stream:
        names = [site.name for site in stream.sites]
        chosen = choose(names, globs) if globs else names
        ranks = stream.ranks
        found = list(itertools.islice(record_rows(stream, chosen, values), records))
        print_lost(describe_damage(stream.damage))
    if as_json:
        print_json(found)
        return
    console().print(record_table(found, with_ranks=len(ranks) > 1))
