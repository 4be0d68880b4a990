"""Records as tensors: one captured value, and those of a site."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol, overload

import numpy as np
import numpy.typing as npt
import torch

from .dtypes import torch_dtype, widened
from .errors import CorruptStreamError
from .stream.reader import StreamReader
from .stream.refs import RecordRef


class RecordSource(Protocol):
    """What a record needs of the stream that it is of."""

    path: str
    ranks: tuple[int, ...]
    _reader: StreamReader

    def near_sites(self, site: str) -> str: ...
    def __contains__(self, site: object) -> bool: ...
    def _positions(self, part: int, numel: int, count: int) -> npt.NDArray[np.int64]: ...


class Record:
    """One captured value: which site, which step, and the tensor, which is read when asked for.

    Attributes:
        site: name of the module.
        step: number of the forward call, from 0.
        call: number of the module's call within the step, from 0.
        rank: which process captured it; 0 where there was one.
        shape: of the stored values; ``(k,)`` if sampled.
        dtype: as captured.
        full_shape: of the module's output; differs from ``shape`` only if sampled.
    """

    __slots__ = ("_data", "_ref", "_stream", "call", "dtype", "full_shape", "rank", "shape", "site", "step")

    def __init__(
        self, stream: RecordSource, site: str, ref: RecordRef, data: npt.NDArray[np.uint8] | None = None
    ) -> None:
        self._stream = stream
        self._ref = ref
        self._data = data
        self.site = site
        self.step = ref.step
        self.call = ref.call
        self.rank = ref.rank
        self.shape = torch.Size(ref.shape)
        self.dtype = torch_dtype(ref.dtype)
        self.full_shape = self.shape if ref.full_shape is None else torch.Size(ref.full_shape)

    @property
    def is_sampled(self) -> bool:
        """Whether the record holds chosen elements of the module's output, not all."""
        return self._ref.full_shape is not None

    @property
    def num_bytes(self) -> int:
        """Size of the values, uncompressed."""
        return math.prod(self.shape) * self.dtype.itemsize

    def tensor(self, *, copy: bool = True) -> torch.Tensor:
        """The values on the CPU, in the captured dtype; memory of the caller's own, valid after ``close``.

        Args:
            copy: False gives, where the values lie uncompressed and in one piece (codec "none", up to 4 MiB), a
                tensor over the mapped file instead of a copy. Do not write into it: what is written is seen by
                other tensors over the same values (the file itself never changes). It holds the map after ``close``.

        Raises:
            CorruptStreamError: the stored bytes contradict their checksum or the shape.
        """
        if not copy and self._data is None:
            place = self._stream._reader.mapped(self._ref)
            if place is not None and self.num_bytes:
                values = torch.frombuffer(
                    place[0], dtype=self.dtype, count=self.shape.numel(), offset=place[1]
                )
                return values.reshape(self.shape)
        # Bytes that came with an iteration are handed out once: a second tensor must not share them.
        data, self._data = self._data, None
        if data is None:
            data = self._stream._reader.read(self._ref)
        return self._made(data)

    def _made(self, data: npt.NDArray[np.uint8]) -> torch.Tensor:
        if data.nbytes != self.num_bytes:
            raise CorruptStreamError(
                f"{self._stream.path}: {self!r} holds {data.nbytes} bytes, its shape and dtype need {self.num_bytes}"
            )
        if data.nbytes == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        # Read-only bytes are the file's map or a page that other records share. torch has no read-only tensors:
        # writing into a view of them would change other records.
        owned = data if data.flags.writeable else np.array(data)
        return torch.from_numpy(owned).view(self.dtype).reshape(self.shape)

    def numpy(self, *, copy: bool = True) -> npt.NDArray[Any]:
        """The values as NumPy has them: bfloat16 and float8, which it lacks, widened to float32, complex32
        to complex64 (exactly).

        Args:
            copy: False gives a read-only array, over the mapped file where ``tensor(copy=False)`` is and nothing is
                widened.
        """
        values = widened(self.tensor(copy=copy)).numpy()
        if not copy:
            values.flags.writeable = False
        return values

    def positions(self) -> torch.Tensor | None:
        """Where the values lie in the flattened output: int64, ascending, shape ``(k,)``; None if not sampled."""
        if not self.is_sampled:
            return None
        return torch.from_numpy(
            self._stream._positions(self._ref.segment, math.prod(self.full_shape), self.shape.numel()).copy()
        )

    def __repr__(self) -> str:
        sampled = f" of {tuple(self.full_shape)}" if self.is_sampled else ""
        rank = f"rank={self.rank}, " if len(self._stream.ranks) > 1 else ""
        return (
            f"Record({self.site!r}, step={self.step}, call={self.call}, {rank}"
            f"{str(self.dtype).removeprefix('torch.')} {tuple(self.shape)}{sampled})"
        )


class SiteRecords(Sequence[Record]):
    """The records of one site, by step, rank and call; empty if the site was not captured."""

    def __init__(self, stream: RecordSource, site: str, refs: Sequence[RecordRef]) -> None:
        self.site = site
        self._stream = stream
        self._refs = refs

    def __len__(self) -> int:
        return len(self._refs)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> SiteRecords: ...
    def __getitem__(self, index: int | slice) -> Record | SiteRecords:
        if isinstance(index, slice):
            return SiteRecords(self._stream, self.site, self._refs[index])
        try:
            ref = self._refs[index]
        except IndexError:
            raise IndexError(f"record {index} of {self._what_there_is()}") from None
        return Record(self._stream, self.site, ref)

    def _what_there_is(self) -> str:
        if self._refs or self.site in self._stream:
            return f"{self.site!r}: there are {len(self._refs)} here"
        return f"{self.site!r}, which is no site of {self._stream.path}; {self._stream.near_sites(self.site)}"

    def of_rank(self, rank: int) -> list[Record]:
        """The records that one process captured, by step and call."""
        return [record for record in self if record.rank == rank]

    def cat(self, *, rank: int | None = None) -> torch.Tensor:
        """All values in one tensor, joined along the token dimension in the order of steps and calls.

        That is the last but one dimension, so (batch, tokens, hidden) gives (batch, all tokens, hidden); sampled
        and one-dimensional records are joined end to end, scalars become one dimension.

        Args:
            rank: join the records of this process only.

        Raises:
            ValueError: there are no records, they are of several ranks (whose batches are not each other's
                continuation) and none is given, or their other dimensions or dtypes differ.
        """
        if not self._refs:
            raise ValueError(f"nothing to join of {self._what_there_is()}")
        records = list(self) if rank is None else self.of_rank(rank)
        ranks = sorted({record.rank for record in records})
        if len(ranks) != 1:
            there = ", ".join(map(str, self._stream.ranks))
            raise ValueError(
                f"records of {self.site!r} are of the ranks {there}; join one rank's, stream[site].cat(rank=...)"
                if ranks
                else f"rank {rank} has no records of {self.site!r}; there are the ranks {there}"
            )
        first = records[0]
        dims = len(first.shape)
        for record in records:
            same = len(record.shape) == dims and record.dtype == first.dtype
            same = same and all(
                a == b
                for d, (a, b) in enumerate(zip(record.shape, first.shape, strict=True))
                if d != max(0, dims - 2)
            )
            if not same:
                raise ValueError(
                    f"records of {self.site!r} differ beyond the token dimension: {first!r} and {record!r}; "
                    f"join a part of them, stream[site][a:b].cat()"
                )
        decoded = self._stream._reader.read_all([record._ref for record in records])
        tensors = [record._made(data) for record, data in zip(records, decoded, strict=True)]
        return torch.stack(tensors) if dims == 0 else torch.cat(tensors, dim=max(0, dims - 2))

    def __repr__(self) -> str:
        return f"SiteRecords({self.site!r}, {len(self)} records)"
