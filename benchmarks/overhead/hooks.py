"""The hook designs that the rewritten graph is measured against, feeding the same writer."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fx_instrument.capture.session import Session
from fx_instrument.graph.marker import first_tensor
from fx_instrument.graph.sites import Site
from fx_instrument.stream.records import RecordMeta
from fx_instrument.stream.writer import StreamWriter

from .models import call_through

MAX_MEMORY_BYTES = 1_000_000_000


def make_sites(names: Sequence[str]) -> list[Site]:
    return [Site(name, "mlp" if name.endswith("mlp") else "attention") for name in names]


class GoodHooks:
    """A forward hook on each site, at any depth, tuples understood, a copy of each value into the same session.

    Compiled, the hooks are registered first. Locks and queues are nothing that Dynamo can trace, so the Python that
    hands a value over is kept out of the graph (``torch.compiler.disable``), as PyTorch's documentation says.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], codec: str, call: Callable[..., Any]) -> None:
        self._codec = codec
        self._sites = make_sites(names)
        self.session: Session | None = None
        for site in self._sites:
            model.get_submodule(site.name).register_forward_hook(self._hook_of(site))
        call_through(model, self._counted(call))

    def _hook_of(self, site: Site) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if self.session is not None:
                self._record(site, first_tensor(output))

        return hook

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _record(self, site: Site, value: torch.Tensor) -> None:
        if self.session is not None:
            self.session.record_eager(site, value)

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            if self.session is None:
                return call(*args, **kwargs)
            self.session.begin_step({})
            try:
                return call(*args, **kwargs)
            finally:
                self.session.end_step()

        return counted

    @contextlib.contextmanager
    def block(self, path: Path | None) -> Iterator[Session]:
        writer = StreamWriter(path, metadata={}, codec=self._codec, memory_bytes=MAX_MEMORY_BYTES // 4)
        self.session = Session(
            writer,
            RecordMeta,
            self._sites,
            max_memory_bytes=MAX_MEMORY_BYTES,
            drop=False,
            sampling=None,
            target_gbps=1.0,
            progress=False,
        )
        session = self.session
        try:
            yield session
        finally:
            self.session = None
            session.close()


class TracedBuffers:
    """Hooks without Python at run time: traced into the graph, they copy into preallocated buffers.

    The strongest that hooks can do under compile: no graph break, one copy a value, no thread between model and
    writer. Sets of buffers are taken from a pool and come back when the writer has stored them, so nothing is
    copied twice and nothing is overwritten too early. On a device each set has pinned memory, which it is copied to
    beside the next call.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], codec: str, call: Callable[..., Any]) -> None:
        self._codec = codec
        self._names = list(names)
        self._taps = [_Tap() for _ in names]
        for name, tap in zip(names, self._taps, strict=True):
            model.get_submodule(name).register_forward_hook(tap)
        parameter = next(model.parameters())
        self._dtype, self._device = parameter.dtype, parameter.device
        self._width = model.config.hidden_size  # type: ignore[union-attr]
        self._pool = _Pool()
        self._on_its_way: Callable[[], None] | None = None
        self._step = 0
        self._writer: StreamWriter | None = None
        call_through(model, self._around(call))

    def _around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def around(*args: Any, **kwargs: Any) -> Any:
            writer = self._writer
            if writer is None:
                return call(*args, **kwargs)
            ids = args[0] if args else kwargs["input_ids"]
            shape = (*ids.shape, self._width)
            buffers = self._pool.take((len(self._taps), *shape), self._dtype, self._device, writer)
            for tap, buffer in zip(self._taps, buffers.tensors, strict=True):
                tap.buffer = buffer
            result = call(*args, **kwargs)
            buffers.start_copies()
            self._store_earlier()
            step, self._step = self._step, self._step + 1

            def store() -> None:
                dtype, release = str(self._dtype).removeprefix("torch."), buffers.countdown()
                for site_id, data in enumerate(buffers.host_bytes()):
                    writer.put(RecordMeta(site_id, step, 0, dtype, shape), data, release)

            self._on_its_way = store
            if self._device.type == "cpu":
                self._store_earlier()
            return result

        return around

    def _store_earlier(self) -> None:
        """Give the writer what was on its way to the host."""
        store, self._on_its_way = self._on_its_way, None
        if store is not None:
            store()

    @contextlib.contextmanager
    def block(self, path: Path | None) -> Iterator[StreamWriter]:
        writer = StreamWriter(path, metadata={}, codec=self._codec, memory_bytes=MAX_MEMORY_BYTES // 4)
        for site in make_sites(self._names):
            writer.add_site(site.name, site.role)
        self._step = 0
        for tap in self._taps:
            tap.active = True
        self._writer = writer
        try:
            yield writer
        finally:
            self._store_earlier()
            self._writer = None
            for tap in self._taps:
                tap.active = False
            writer.close({"num_steps": self._step})


class _Tap:
    """The traced hook of one site."""

    def __init__(self) -> None:
        self.active = False
        self.buffer: torch.Tensor | None = None

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.active and self.buffer is not None:
            value = first_tensor(output)
            assert value is not None
            self.buffer.copy_(value.detach())


class _Buffers:
    """One buffer a site, of one shape."""

    def __init__(self, pool: _Pool, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self._pool = pool
        self.shape = shape
        self.tensors = [torch.zeros(shape[1:], dtype=dtype, device=device) for _ in range(shape[0])]
        self._host = self.tensors
        self._copied: torch.cuda.Event | None = None
        if device.type == "cuda":
            for tensor in self.tensors:
                # Else CUDA graphs would refuse a graph that writes to them.
                torch._dynamo.mark_static_address(tensor, guard=False)
            self._host = [torch.empty(shape[1:], dtype=dtype, pin_memory=True) for _ in self.tensors]
            self._copied = torch.cuda.Event()
        self._left = 0
        self._lock = threading.Lock()

    def start_copies(self) -> None:
        """Behind the model's call, without waiting for it."""
        if self._copied is not None:
            for tensor, host in zip(self.tensors, self._host, strict=True):
                host.copy_(tensor, non_blocking=True)
            self._copied.record()

    def host_bytes(self) -> list[Any]:
        """Each buffer's bytes, 1-D uint8, once they are on the host; views."""
        if self._copied is not None:
            self._copied.synchronize()
        return [np.asarray(tensor.view(-1).view(torch.uint8).numpy()) for tensor in self._host]

    def countdown(self) -> Callable[[], None]:
        self._left = len(self.tensors)
        return self._done

    def _done(self) -> None:
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last:
            self._pool.give(self)


class _Pool:
    """Sets of buffers by shape; allocates while the bound allows it, then waits for one to come back."""

    def __init__(self) -> None:
        self._free: dict[tuple[int, ...], list[_Buffers]] = {}
        self._made: dict[tuple[int, ...], int] = {}
        self._changed = threading.Condition()

    def take(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, writer: StreamWriter
    ) -> _Buffers:
        size = int(np.prod(shape)) * dtype.itemsize
        with self._changed:
            free = self._free.setdefault(shape, [])
            made = self._made.get(shape, 0)
            if free:
                return free.pop()
            if made < 2 or (made + 1) * size <= MAX_MEMORY_BYTES * 3 // 4:
                self._made[shape] = made + 1
                return _Buffers(self, shape, dtype, device)
            writer.seal()  # pages that are not full hold buffers too
            self._changed.wait_for(lambda: bool(free))
            return free.pop()

    def give(self, buffers: _Buffers) -> None:
        with self._changed:
            self._free.setdefault(buffers.shape, []).append(buffers)
            self._changed.notify()
