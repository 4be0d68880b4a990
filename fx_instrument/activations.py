"""The torch view of stream files: sites, records as tensors, the inputs that they belong to."""

from __future__ import annotations

import difflib
import functools
import os
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .errors import CorruptStreamError, MissingRecordError, UnsupportedStreamError
from .record import Record, SiteRecords
from .requests import Request, RequestTable
from .sampling import num_samples, positions
from .stream.mapped import stream_files
from .stream.reader import StreamReader
from .stream.records import Damage, SiteEntry, StreamPart
from .stream.refs import RecordRef

__all__ = [
    "ActivationStream",
    "Record",
    "SiteRecords",
    "StreamSource",
    "open_stream",
]

INPUT_ROLE = "input"


StreamSource = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
"""A stream file, a folder of them, or a sequence of either."""


def open_stream(path: StreamSource, *, recover: bool = False) -> ActivationStream:
    """The captured values of one or several stream files, ready to read as one; no file is ever modified.

    Several files come from processes beside each other, which have different ranks, from one process after the
    other, or both. Files of one rank are put in the order of their creation, whatever their names, and steps go on
    from one to the next; a step of one rank is beside the step of that number of another. The same holds of files
    that were joined by ``cat``. ``.parts`` says which steps came from where.

    Args:
        path: a file that ``capture_activations`` wrote; a folder, of which the files that are streams are taken; or
            a sequence of files and folders.
        recover: read a file without an index (its writer was killed, or it was cut) as far as it is whole, and
            pass over damaged blocks; ``.damage`` then says what is missing. Of several files, those of which nothing
            can be read are passed over too.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file is named twice, or none is.
        NotAStreamError: a file is something else, or a folder has no streams.
        TruncatedStreamError: a file has no index, and ``recover`` is False.
        CorruptStreamError: bytes contradict their checksum.
        UnsupportedStreamError: a newer format, or a codec or dtype that this version can't read.
    """
    files = stream_files(path)
    # A folder keeps its own name, also where there is one file in it.
    name = os.fspath(path) if isinstance(path, (str, os.PathLike)) else None
    return ActivationStream(StreamReader(files, recover=recover), name)


class ActivationStream:
    """Stream files as torch sees them; made by ``open_stream``. Also a context manager, and iterable.

    Iterating gives every record in the order of the files (by rank, then time), each read once, front to back; a
    record that was reached so holds its bytes, so let go of it before the next to keep memory small.
    """

    def __init__(self, reader: StreamReader, path: str | None = None) -> None:
        self._reader = reader
        self.path = reader.path if path is None else path
        """Of the file or folder; of several, of the first, and how many more."""
        self.metadata: dict[str, Any] = reader.metadata
        """Configuration, model, versions, and under "summary" what the capture came to (absent after a kill).

        Of several files the first one's, with the last one's summary; ``parts`` has those of each.
        """
        self.parts: tuple[StreamPart, ...] = reader.parts
        """The files, or parts of a joined file, in the order in which they are read."""
        self.ranks: tuple[int, ...] = reader.ranks
        """Which processes captured, ascending."""
        self.sites: tuple[SiteEntry, ...] = tuple(site for site in reader.sites if site.role != INPUT_ROLE)
        self.num_steps: int = reader.num_steps
        self.damage: list[Damage] = reader.damage
        self._ids = {site.name: site.id for site in self.sites}
        self._names = {site.id: site.name for site in self.sites}
        self._inputs = {site.name: site.id for site in reader.sites if site.role == INPUT_ROLE}
        self._last_positions: tuple[int, int, npt.NDArray[np.int64]] | None = None

    @property
    def codec(self) -> str:
        return self._reader.codec

    @property
    def raw_bytes(self) -> int:
        """Size of all records, uncompressed."""
        return self._reader.raw_bytes

    @property
    def stored_bytes(self) -> int:
        """Size of the file or files."""
        return self._reader.stored_bytes

    @property
    def input_names(self) -> tuple[str, ...]:
        """Which integer inputs of the forward calls were recorded."""
        return tuple(self._inputs)

    def __len__(self) -> int:
        return self._reader.num_records

    def __bool__(self) -> bool:
        return True

    def __getitem__(self, site: str) -> SiteRecords:
        if not isinstance(site, str):
            raise TypeError(f"stream[...] takes the name of a site, got {site!r}")
        site_id = self._ids.get(site)
        return SiteRecords(self, site, self._reader.refs(site_id) if site_id is not None else ())

    def __contains__(self, site: object) -> bool:
        return site in self._ids

    def __iter__(self) -> Iterator[Record]:
        for ref, data in self._reader.scan():
            name = self._names.get(ref.site_id)
            if name is not None:
                yield Record(self, name, ref, data)
            del data

    def read(self, site: str, step: int, call: int = 0, *, rank: int | None = None) -> torch.Tensor:
        """The values of one site in one forward call, as ``Record.tensor`` gives them.

        Args:
            rank: which process captured it; may be left out where only one did.

        Raises:
            MissingRecordError: (a KeyError) no such site, step, call or rank; the message says what there is.
            ValueError: several ranks have such a record, and none is given.
        """
        return self.record(site, step, call, rank=rank).tensor()

    def record(self, site: str, step: int, call: int = 0, *, rank: int | None = None) -> Record:
        """The record of one site in one forward call, not yet read; errors as ``read``."""
        site_id = self._ids.get(site)
        if site_id is None:
            raise MissingRecordError(f"{self.path} has no site {site!r}; {self.near_sites(site)}")
        found = self.find(site, step, call, rank=rank)
        if found is None:
            whose = "" if rank is None else f" of rank {rank}"
            raise MissingRecordError(
                f"{self.path} has no record of {site!r} at step {step}, call {call}{whose}: "
                f"{self._what_there_is(site_id, step, rank)}"
            )
        return found

    def _what_there_is(self, site_id: int, step: int, rank: int | None) -> str:
        if rank is not None and rank not in self.ranks:
            return f"there are the ranks {', '.join(map(str, self.ranks))}"
        refs = [ref for ref in self._reader.refs(site_id) if rank is None or ref.rank == rank]
        calls = [ref.call for ref in refs if ref.step == step]
        if calls:
            return f"in that step it was called {len(calls)} times (calls {calls[0]} to {calls[-1]})"
        if refs:
            return f"it has {len(refs)} records, of steps {refs[0].step} to {refs[-1].step}"
        return "the site has no records"

    def find(self, site: str, step: int, call: int = 0, *, rank: int | None = None) -> Record | None:
        """The record of one site in one forward call, not yet read; None if there is none.

        Raises:
            ValueError: several ranks have such a record, and none is given.
        """
        site_id = self._ids.get(site)
        if site_id is None:
            return None
        refs = self._reader.find_all(site_id, step, call, rank)
        if len(refs) > 1:
            raise self._ambiguous(site, step, refs)
        return Record(self, site, refs[0]) if len(refs) else None

    def _ambiguous(self, what: str, step: int, refs: Sequence[RecordRef]) -> ValueError:
        ranks = ", ".join(str(ref.rank) for ref in refs)
        return ValueError(f"{what!r} at step {step} is there of the ranks {ranks}; say which: rank=...")

    def steps(self, sites: Iterable[str]) -> list[int]:
        """The steps in which any of ``sites`` has a record, ascending.

        Raises:
            TypeError: a single name was given.
        """
        if isinstance(sites, str):
            raise TypeError(f"steps takes names of sites, got one: steps([{sites!r}])")
        return self._reader.steps(self._ids[site] for site in sites if site in self._ids)

    def input_steps(self) -> list[int]:
        """The steps of which inputs were recorded, by whatever rank, ascending."""
        return self._reader.steps(self._inputs.values())

    def inputs(self, step: int, *, rank: int | None = None) -> dict[str, torch.Tensor]:
        """The integer inputs of one forward call as they were passed, by argument name.

        Such as ``input_ids``, ``attention_mask``, ``position_ids``; empty if none was recorded.

        Args:
            rank: whose call; may be left out where only one process recorded inputs.

        Raises:
            MissingRecordError: (a KeyError) the stream has no such step.
            ValueError: several ranks recorded inputs of that step, and none is given.
        """
        if not 0 <= step < self.num_steps:
            raise MissingRecordError(
                f"{self.path} has no step {step}: it holds {self.num_steps}, counted from 0"
            )
        found = {}
        for name, site_id in self._inputs.items():
            refs = self._reader.find_all(site_id, step, 0, rank)
            if len(refs) > 1:
                raise self._ambiguous(name, step, refs)
            if len(refs):
                found[name] = Record(self, name, refs[0]).tensor()
        return found

    @functools.cached_property
    def _table(self) -> RequestTable:
        return RequestTable(self)

    @property
    def requests(self) -> tuple[str, ...]:
        """Ids of the requests whose rows an engine's capture holds, in order of appearance."""
        return self._table.ids

    def request(self, request_id: str) -> Request:
        """One request's rows by site; MissingRecordError (a KeyError) if there is none."""
        return self._table.request(request_id)

    def verify(self) -> list[Damage]:
        """Compare every byte with its checksums, and each index with its blocks; empty if all is well."""
        return self._reader.verify()

    def close(self) -> None:
        """Let go of the files; tensors that were read stay valid, other records can't be read any more."""
        self._reader.close()

    def __enter__(self) -> ActivationStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"ActivationStream({self.path!r}: {len(self.sites)} sites, {self.num_steps} steps, {len(self)} records)"

    def _positions(self, part: int, numel: int, count: int) -> npt.NDArray[np.int64]:
        # One entry: sites of a step mostly share a size, and a cache of many could outgrow the records.
        if self._last_positions is not None and self._last_positions[:2] == (part, numel):
            return self._last_positions[2]
        path, hook_config = (
            self.parts[part].path,
            self.parts[part].metadata.get("config", {}).get("hook_config", {}),
        )
        try:
            rate, seed = float(hook_config["sampling_rate"]), int(hook_config["seed"])
        except KeyError as missing:
            raise UnsupportedStreamError(
                f"{path}: the metadata lack config.hook_config.{missing.args[0]}, so positions are unknown"
            ) from missing
        if num_samples(numel, rate) != count:
            raise CorruptStreamError(
                f"{path}: a record holds {count} of {numel} elements, rate {rate} gives {num_samples(numel, rate)}"
            )
        self._last_positions = (part, numel, positions(numel, rate, seed))
        return self._last_positions[2]

    def near_sites(self, site: str) -> str:
        """A clause for error messages: the names closest to ``site``, or the first that there are."""
        near = difflib.get_close_matches(site, self._ids, n=3, cutoff=0.5)
        if near:
            return f"near it are {', '.join(map(repr, near))}"
        names = list(self._ids)
        return f"its sites are {', '.join(map(repr, names[:5]))}{' ...' if len(names) > 5 else ''}"
