"""Rows of a server's captures by request: what a step notes of its rows, both ways, and the view of one request.

A server's forward call mixes tokens of many requests. Each step of such a capture holds, beside the values (rows x
hidden), up to three integer inputs (role ``input`` in the file):

    request_rows   int64 (runs, 3): request number, token position of the run's first row, rows of the run; the runs
                   follow each other in the order of the rows, and cover them; number -1 is padding. Of values of
                   more dimensions, as (batch, tokens, hidden), all but the last count rows
    new_requests   uint8: a JSON list with an entry for each request that the step is the first of:
                   number, id, engine_id, prompt_tokens, cached_tokens, sites (null: all), positions
    input_ids      int32 (rows,): the token of each row

A request's number is not negative, and no other request of the file has it; in the files of one run, and in those of
workers that hold different sites of one request, it is the same. An entry that comes again says what is known by then.
``input`` records are read whole, by step; they are small.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from .errors import CorruptStreamError, MissingRecordError
from .row_order import Order, is_tokens_first, num_rows, order_of, reads_tokens, rows_of

ROWS_INPUT = "request_rows"
NEW_INPUT = "new_requests"
TOKENS_INPUT = "input_ids"
NO_REQUEST = -1
"""The request number of rows that belong to none."""
MAX_REQUEST_ROWS = 1 << 31

Positions = str | tuple[int, ...]
_Key = tuple[int, int]
"""Rank and step of a record."""
Run = tuple[int, int, int]
"""Request number, token position of the first row, number of rows."""


def encode_rows(runs: Sequence[Run]) -> torch.Tensor:
    return torch.tensor(runs, dtype=torch.int64).reshape(-1, 3)


def encode_new(requests: Sequence[Mapping[str, Any]]) -> torch.Tensor:
    # ASCII, as a client's id may hold half of a surrogate pair, which UTF-8 has no bytes for.
    text = json.dumps(requests, ensure_ascii=True, separators=(",", ":"))
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def interval_of(positions: Positions, num_prompt_tokens: int) -> tuple[int, int | None] | None:
    """Where the positions that a name stands for begin and end (None: no end); None for a list of positions."""
    if positions == "all":
        return 0, None
    if positions == "prompt":
        return 0, num_prompt_tokens
    if positions == "last":
        return max(0, num_prompt_tokens - 1), num_prompt_tokens
    if positions == "generated":
        return num_prompt_tokens, None
    return None


class StreamLike(Protocol):
    """What the table of requests needs of a stream."""

    path: str
    ranks: tuple[int, ...]

    @property
    def input_names(self) -> tuple[str, ...]: ...
    def input_steps(self) -> list[int]: ...
    def inputs(self, step: int, *, rank: int | None = None) -> dict[str, torch.Tensor]: ...
    def find(self, site: str, step: int, call: int = 0, *, rank: int | None = None) -> Any: ...
    def near_sites(self, site: str) -> str: ...
    @property
    def sites(self) -> Sequence[Any]: ...


@dataclass(slots=True)
class _Place:
    """Rows of one request in one step: ``count`` rows from ``offset`` on, of tokens from ``position`` on."""

    step: int
    offset: int
    position: int
    count: int
    step_rows: frozenset[int]
    """How many rows a record of the step has whose rows are its tokens: those of the runs, or with padding behind them
    those of the recorded ids."""
    batch: tuple[int, int] | None
    """Sequences and tokens of each, where the step's ids are laid out so."""

    def order(self, shape: Sequence[int]) -> Order | None:
        """How a record of this shape has the step's rows; None if it has others."""
        if num_rows(shape) not in self.step_rows:
            return None
        return "batch first" if self.batch is None else order_of(rows_of(shape), *self.batch)

    def row(self, index: int, *, tokens_first: bool) -> int:
        """Which of a record's rows, one after the other, the ``index``-th of this request is."""
        index += self.offset
        if not tokens_first or self.batch is None:
            return index
        sequence, token = divmod(index, self.batch[1])
        return token * self.batch[0] + sequence


@dataclass(slots=True)
class _Found:
    """One request as the files of one rank have it."""

    rank: int
    entry: dict[str, Any]
    places: list[_Place] = field(default_factory=list)


class RequestTable:
    """The requests of a stream, in the order in which they first appear; made once, by reading its steps' inputs."""

    def __init__(self, stream: StreamLike) -> None:
        self._stream = stream
        self._requests: dict[str, list[_Found]] = {}
        names: dict[tuple[int, str], str] = {}
        for rank in stream.ranks if ROWS_INPUT in stream.input_names else ():
            for found in _scan(stream, rank):
                number, engine_id = found.entry["number"], _engine_id(found.entry)
                # By both: files that number their requests from 0 each may stand beside each other.
                name = names.get((number, engine_id))
                if name is None:
                    # Clients use an id twice, and so do engines once its first request has finished.
                    candidates = (str(found.entry["id"]), engine_id, f"{engine_id}-{number & 0xFFFFFFFF:08x}")
                    free = (one for one in candidates if one not in self._requests)
                    name = names[number, engine_id] = next(free, f"{engine_id}-{number:x}-{len(names)}")
                self._requests.setdefault(name, []).append(found)

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(self._requests)

    def request(self, request_id: str) -> Request:
        """One request; MissingRecordError (a KeyError) that names near ids."""
        found = self._requests.get(request_id)
        if found is None:
            near = difflib.get_close_matches(str(request_id), self._requests, n=3, cutoff=0.3)
            hint = f"near it are {', '.join(map(repr, near))}" if near else f"it holds {len(self._requests)}"
            raise MissingRecordError(f"the stream has no rows of a request {request_id!r}; {hint}")
        return Request(self._stream, request_id, found)


def _engine_id(entry: Mapping[str, Any]) -> str:
    return str(entry.get("engine_id", entry["id"]))


def _scan(stream: StreamLike, rank: int) -> list[_Found]:
    found: list[_Found] = []
    by_number: dict[int, _Found] = {}
    for step in stream.input_steps():
        inputs = stream.inputs(step, rank=rank)
        if NEW_INPUT in inputs:
            for entry in _decode_new(stream, inputs[NEW_INPUT], step):
                # A later file of the same rank counts its requests from 0 again.
                by_number[entry["number"]] = _Found(rank, entry)
                found.append(by_number[entry["number"]])
        runs = inputs.get(ROWS_INPUT)
        if runs is None:
            continue
        if runs.dim() != 2 or runs.shape[1] != 3 or runs.dtype != torch.int64:
            raise CorruptStreamError(
                f"{stream.path}: {ROWS_INPUT} of step {step} is {runs.dtype} {tuple(runs.shape)}, expected int64 (n, 3)"
            )
        tokens = inputs.get(TOKENS_INPUT)
        offset, total = 0, int(runs[:, 2].sum())
        step_rows = frozenset({total, total if tokens is None else max(total, tokens.numel())})
        batch = None
        if tokens is not None and tokens.dim() == 2 and tokens.numel() == total:
            batch = (tokens.shape[0], tokens.shape[1])
        for number, position, count in runs.tolist():
            if position < 0 or not 0 < count <= MAX_REQUEST_ROWS:
                raise CorruptStreamError(
                    f"{stream.path}: {ROWS_INPUT} of step {step} has a run of {count} rows at position {position}"
                )
            if number == NO_REQUEST:
                offset += count
                continue
            request = by_number.get(number)
            if request is None:
                # The step that introduced it was lost (a damaged block): its rows stay readable, by number.
                request = by_number[number] = _Found(
                    rank, {"number": number, "id": f"#{number} of rank {rank}"}
                )
                found.append(request)
            request.places.append(_Place(step, offset, position, count, step_rows, batch))
            offset += count
    return found


def _decode_new(stream: StreamLike, data: torch.Tensor, step: int) -> list[dict[str, Any]]:
    try:
        entries = json.loads(data.numpy().tobytes().decode())
        if not all(isinstance(entry["number"], int) and isinstance(entry["id"], str) for entry in entries):
            raise ValueError("an entry lacks its number or id")
    except (ValueError, TypeError, KeyError) as error:
        raise CorruptStreamError(
            f"{stream.path}: {NEW_INPUT} of step {step} can't be read: {error}"
        ) from error
    return list(entries)


class Request(Mapping[str, "RequestRows"]):
    """The rows of one request, by the name of the site, and what is known of it.

    Attributes:
        id: as the client knows it.
        engine_id: as the engine knows it; it may have used it again for a later request, once this one was finished.
        num_prompt_tokens: None where it is not known: the file lost it, or the prompt was run in pieces and nothing
            told its length. Of calls inside ``Recorder.request`` it is the length of the first one, unless that or
            the next one shows that more of the prompt followed.
        num_cached_tokens: positions from 0 on that a prefix-cache hit spared, so that they have no rows.
        positions: which positions the request asked for: "all", "prompt", "last", "generated", or a list.
    """

    def __init__(self, stream: StreamLike, request_id: str, found: Sequence[_Found]) -> None:
        # The last says what was known last.
        entry = found[-1].entry
        self.id = request_id
        self.engine_id = _engine_id(entry)
        self.num_prompt_tokens: int | None = entry.get("prompt_tokens")
        self.num_cached_tokens = int(entry.get("cached_tokens", 0))
        positions = entry.get("positions", "all")
        self.positions: Positions = positions if isinstance(positions, str) else tuple(positions)
        self._stream = stream
        self._found = list(found)
        # Each worker knows its own sites only.
        chosen = [file.entry.get("sites") for file in found]
        self._sites = {
            site.name: None
            for site in stream.sites
            if any(names is None or site.name in names for names in chosen)
        }

    @property
    def num_tokens(self) -> int:
        """One more than the last position with a row."""
        return max((p.position + p.count for file in self._found for p in file.places), default=0)

    def token_ids(self) -> dict[int, int]:
        """The token at each position with a row, ascending; empty if tokens were not recorded."""
        tokens: dict[int, int] = {}
        by_rank: dict[int, set[int]] = {}
        # A request goes on in the next file after a rotation; pipeline stages all have the same tokens. Of a position
        # that was computed again the last counts, as with its rows: drafts may be rejected.
        for rank, place in ((file.rank, place) for file in self._found for place in file.places):
            positions = range(place.position, place.position + place.count)
            own = by_rank.setdefault(rank, set())
            if own.isdisjoint(positions) and tokens.keys() >= set(positions):
                continue
            own.update(positions)
            ids = self._stream.inputs(place.step, rank=rank).get(TOKENS_INPUT)
            if ids is not None:
                row = ids.flatten()[place.offset : place.offset + place.count].tolist()
                tokens.update(zip(positions, row, strict=True))
        return dict(sorted(tokens.items()))

    def __getitem__(self, site: str) -> RequestRows:
        if site not in self._sites:
            raise MissingRecordError(
                f"request {self.id!r} has no rows of {site!r}: it was not asked for or is no site; "
                f"{self._stream.near_sites(site)}"
            )
        return RequestRows(self._stream, self, site, self._found)

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)

    def __repr__(self) -> str:
        return f"Request({self.id!r}, {len(self)} sites, {self.num_tokens} tokens)"

    def _expected(self) -> npt.NDArray[np.int64]:
        if not isinstance(self.positions, str):
            return np.array(sorted(set(self.positions)), np.int64)
        begin, end = interval_of(self.positions, self.num_prompt_tokens or 0) or (0, None)
        # The engine never skips the last token of a prompt, so what is known to exist ends with the last row.
        return np.arange(begin, self.num_tokens if end is None else end, dtype=np.int64)


class RequestRows:
    """The values of one site for one request, a row a token, in the order of token positions."""

    def __init__(self, stream: StreamLike, request: Request, site: str, found: Sequence[_Found]) -> None:
        self.site = site
        self._request = request
        rows: dict[int, tuple[_Key, int]] = {}
        self._records: dict[_Key, Any] = {}
        self._uneven: Any = None
        there = []
        # Of pipeline stages, each with a rank of its own, one has the site.
        for rank, place in ((file.rank, place) for file in found for place in file.places):
            record = stream.find(site, place.step, rank=rank)
            if record is not None:
                there.append(((rank, place.step), place, record))
        # A step of as many sequences as tokens does not show which come first; another one of the site does.
        turned = any(
            is_tokens_first(rows_of(record.shape), *place.batch) for _, place, record in there if place.batch
        )
        for key, place, record in there:
            order = place.order(record.shape) if reads_tokens(site) else None
            if order is None:
                # As of lm_head, which computes the last tokens only: whose its rows are nothing tells.
                self._uneven = record
                continue
            self._records[key] = record
            is_square = place.batch is not None and place.batch[0] == place.batch[1]
            tokens_first = order == "tokens first" or (turned and is_square and len(record.shape) == 3)
            for index in range(place.count):
                # A position that was computed again (after a preemption) counts as it was computed last.
                rows[place.position + index] = (key, place.row(index, tokens_first=tokens_first))
        self._rows = dict(sorted(rows.items()))

    @property
    def token_positions(self) -> torch.Tensor:
        """int64, ascending: the position in its sequence of each row's token; the prompt begins at 0."""
        return torch.tensor(list(self._rows), dtype=torch.int64)

    @property
    def missing_positions(self) -> torch.Tensor:
        """int64, ascending: positions that were asked for and have no row.

        Reasons: a prefix-cache hit spared computing them (``num_cached_tokens``), they were dropped, the site has not
        one row a token in their step (an lm_head that computes the last token only), or (for a list of positions) the
        sequence ended before.
        """
        there = np.fromiter(self._rows, np.int64, len(self._rows))
        return torch.from_numpy(np.setdiff1d(self._request._expected(), there))

    def tensor(self) -> torch.Tensor:
        """The values, (tokens x hidden), one row for each of ``token_positions``.

        Raises:
            ValueError: the request has no row at this site, or none that is known to be its own.
        """
        if not self._rows and self._uneven is not None:
            raise ValueError(
                f"{self.site!r} has not one row a token, so which of them are of request {self._request.id!r} is not "
                f"known: {self._uneven!r}"
            )
        if not self._rows:
            raise ValueError(f"request {self._request.id!r} has no rows of {self.site!r}")
        wanted: dict[_Key, list[int]] = {}
        for key, row in self._rows.values():
            wanted.setdefault(key, []).append(row)
        parts = [_rows(self._records[key])[rows] for key, rows in wanted.items()]
        # Steps interleave in position only where something was computed twice; else this is the identity.
        order = {
            place: index for index, place in enumerate((k, r) for k, rows in wanted.items() for r in rows)
        }
        joined = torch.cat(parts)
        index = [order[place] for place in self._rows.values()]
        return joined if index == list(range(len(index))) else joined[index]

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        return f"RequestRows({self.site!r} of {self._request.id!r}, {len(self)} rows)"


def _rows(record: Any) -> torch.Tensor:
    values: torch.Tensor = record.tensor()
    return values.flatten(0, -2) if values.dim() > 2 else values
