"""An open capture: what the ``with`` block of ``capture_activations`` yields, and how it opens and closes."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol

import torch

from .activations import open_stream
from .capture.report import CaptureReport
from .capture.session import Session
from .config import HookGranularity, InstrumentationConfig
from .errors import (
    BufferTooSmallError,
    CaptureActiveError,
    CaptureFailedError,
    IncompleteCaptureWarning,
    NothingCapturedError,
    TruncatedStreamError,
)
from .forks import track
from .graph.attach import Attachment
from .graph.exported_call import ExportedAttachment
from .stream.memory import MIN_MEMORY_BYTES
from .stream.records import RecordMeta
from .stream.writer import StreamWriter

log = logging.getLogger(__name__)

Path = str | os.PathLike[str]

# The writer's own memory (compressor scratch, staging) is a quarter of the bound at most; values get the rest.
_WRITER_SHARE = 4


class Instrumenter(Protocol):
    """What a capture needs of its framework."""

    config: InstrumentationConfig
    _capture: object | None

    def _attached(self, caller: str) -> Attachment | ExportedAttachment: ...
    def _metadata(self, attachment: Attachment | ExportedAttachment) -> dict[str, Any]: ...


class Capture:
    """An open capture; made by ``InstrumentationFramework.capture_activations``."""

    def __init__(
        self,
        framework: Instrumenter,
        path: Path | None,
        *,
        mode: str,
        on_full: str,
        progress: bool,
    ) -> None:
        self.path = path
        self._framework = framework
        self._mode = mode
        self._on_full = on_full
        self._progress = progress
        self._session: Session | None = None
        self._forked = False

    @property
    def report(self) -> CaptureReport:
        """What the capture has done so far; final once the block is left."""
        if self._session is None:
            raise CaptureActiveError(
                "the capture has not begun: its report is there inside the with block and after"
            )
        return self._session.report

    def __enter__(self) -> Capture:
        framework = self._framework
        attachment = framework._attached("capture_activations")
        if framework._capture is not None or self._session is not None:
            raise CaptureActiveError(
                "a capture of this framework is open already"
                if framework._capture is not None
                else "a capture can be entered once; call capture_activations again"
            )
        attachment.check_unchanged()
        track(self)
        self._session = open_session(
            framework, self.path, mode=self._mode, on_full=self._on_full, progress=self._progress
        )
        framework._capture = self
        try:
            attachment.open(self._session)
        except BaseException:
            # Ctrl-C while calls of other threads finish: the block is not entered, so it won't be left either.
            framework._capture = None
            self._session.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._forked:
            return
        framework, session = self._framework, self._session
        assert session is not None, "a context manager is left after it was entered"
        attachment = framework._attached("capture_activations")
        witness = None
        try:
            witness = attachment.close()
            session.silent_sites = witness.silent(site.name for site in attachment.sites)
        finally:
            framework._capture = None
            self._finish(session, error)
        if error is None:
            # What was replaced inside the block was not captured from then on.
            attachment.check_unchanged()
            _check_complete(session.report, len(attachment.sites), witness.completed)

    def forked(self) -> None:
        """In a forked process: leaving the block does nothing, and the framework is free for captures of its own."""
        self._forked = True
        if self._framework._capture is self:
            self._framework._capture = None

    def _finish(self, session: Session, error: BaseException | None) -> None:
        try:
            session.close()
        except CaptureFailedError as failure:
            if error is None:
                raise
            # The user's exception stays the user's; it carries the capture's failure along.
            log.error("the capture failed too: %s", failure)
            if hasattr(error, "add_note"):
                error.add_note(f"fx_instrument: {failure}")
        except BaseException:
            # Ctrl-C while the file is ended: nobody will do so later, and it would stay open and locked.
            session.abandon()
            raise


def process_rank() -> tuple[int, int]:
    """Which of how many processes this is: as torch.distributed knows it, else as torchrun says; (0, 1) if neither."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    rank, world = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    if rank.isdecimal() and world.isdecimal() and int(rank) < int(world):
        return int(rank), int(world)
    return 0, 1


def open_session(
    framework: Instrumenter,
    path: Path | None,
    *,
    mode: str,
    on_full: str,
    progress: bool = False,
    max_memory_bytes: int | None = None,
    patience: Callable[[], float] | None = None,
    rank: int | None = None,
    world: int = 1,
) -> Session:
    """A session of ``framework``'s model that writes to ``path``, as the configuration has it.

    Args:
        max_memory_bytes: a bound of its own; None takes the configuration's.
        patience: see ``Session``.
        rank, world: which of how many processes writes this file; None asks torch.distributed, or torchrun.

    Raises:
        BufferTooSmallError, OSError, ValueError: as ``capture_activations``.
    """
    if rank is None:
        rank, world = process_rank()
    attachment = framework._attached("capture_activations")
    config = framework.config
    limit = config.max_memory_bytes if max_memory_bytes is None else max_memory_bytes
    if limit < 2 * MIN_MEMORY_BYTES:
        least = 2 * MIN_MEMORY_BYTES * config.max_memory_bytes // max(1, limit)
        raise BufferTooSmallError(
            f"max_memory_gb={config.max_memory_gb:g} ({config.max_memory_bytes} bytes) is less than capturing "
            f"needs: the writer alone takes {MIN_MEMORY_BYTES} bytes, so give it {least} or more"
        )
    hook_config = config.hook_config
    metadata = framework._metadata(attachment)
    if mode == "a" and path is not None:
        _check_resumable(path, metadata)
    writer = StreamWriter(
        path,
        metadata=metadata,
        codec=config.compression_algorithm,
        mode=mode,
        memory_bytes=max(MIN_MEMORY_BYTES, limit // _WRITER_SHARE),
        target_bytes_per_s=config.target_throughput_gbps * 1e9,
        max_relative_error=config.max_relative_error,
        rank=rank,
        world=world,
    )
    sampled = config.granularity is HookGranularity.SAMPLED_SLICES
    return Session(
        writer,
        RecordMeta,
        attachment.sites,
        max_memory_bytes=limit,
        drop=on_full == "drop",
        sampling=(hook_config.sampling_rate, hook_config.seed) if sampled else None,
        target_gbps=config.target_throughput_gbps,
        progress=progress,
        patience=patience,
    )


def _check_complete(report: CaptureReport, num_sites: int, completed: bool) -> None:
    """Say aloud what the block did not record.

    A site may rightly stay silent (an encoder whose outputs were passed, an expert that no token chose), so that some
    silent sites are a warning; that all are, though a forward call ended well, is an error.
    """
    silent = report.silent_sites
    if report.records and not report.steps:
        warnings.warn(
            f"{report.records} values were captured outside any forward call of the instrumented model, so they can't "
            f"be told apart by step: call the model itself, not model.forward or a model inside it, or instrument the "
            f"module that is called (PEFT's generate calls model.get_base_model())",
            IncompleteCaptureWarning,
            stacklevel=3,
        )
    if not silent:
        return
    if len(silent) < num_sites:
        warnings.warn(
            f"{len(silent)} of {num_sites} sites delivered no value in this capture: {_listed(silent)}. Their modules "
            f"were not called, returned no tensor, or ran in code that was compiled before instrument_model or by "
            f"another tool",
            IncompleteCaptureWarning,
            stacklevel=3,
        )
    elif completed:
        raise NothingCapturedError(
            f"the model ran {report.steps} times in this capture and none of its {num_sites} sites delivered a value "
            f"({_listed(silent)}): their modules were not called, returned no tensor, or ran in code that was compiled "
            f"before instrument_model or by another tool. Compile after instrument_model, with "
            f"backend=framework.backend(...), or let instrument_model compile"
        )
    elif not report.steps:
        log.warning(
            "nothing was captured: the instrumented model was not called inside the block. A copy, an exported or "
            "scripted program, or a function compiled before instrument_model is not the instrumented model."
        )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _check_resumable(path: Path, metadata: Mapping[str, Any]) -> None:
    """Raise if the file at ``path`` has values of another model or sampling: its one description is for all steps."""
    try:
        with open_stream(path, recover=True) as stream:
            before = stream.metadata
    except (FileNotFoundError, TruncatedStreamError):
        # None there, or cut before anything was captured: the writer begins it anew.
        return

    def described(values: Mapping[str, Any]) -> dict[str, Any]:
        config, model = values.get("config", {}), values.get("model") or {}
        hooks = config.get("hook_config", {})
        sampled = config.get("granularity") == HookGranularity.SAMPLED_SLICES.value
        return {
            "sampling (rate, seed)": (hooks.get("sampling_rate"), hooks.get("seed")) if sampled else None,
            "model (class, parameters)": (model.get("class"), model.get("num_parameters")),
        }

    there, here = described(before), described(metadata)
    for what, value in here.items():
        if there[what] != value:
            raise ValueError(
                f"mode 'a': {os.fspath(path)} has the {what} {there[what]}, this capture has {value}"
            )
