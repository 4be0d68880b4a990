"""The framework: one configuration, one instrumented model, its captures and their analysis."""

from __future__ import annotations

import logging
import os
import platform
import sys
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

import lz4
import numpy as np
import torch
import zstandard
from torch import nn
from torch.export import ExportedProgram

from .activations import StreamSource
from .analysis import analyze_activations
from .capture_block import Capture
from .config import HookGranularity, InstrumentationConfig
from .errors import (
    AlreadyInstrumentedError,
    CaptureActiveError,
    InstrumentationError,
    MissingCompilerError,
    NotInstrumentedError,
)
from .exported import attach_program, rewrite_program
from .graph.attach import Attachment, check_free, inner_module
from .graph.backend import CaptureBackend, InnerBackend, needs_strictness
from .graph.exported_call import ExportedAttachment
from .graph.guards import split_options
from .graph.rewrite import Sampling
from .graph.sites import Site, choose_sites
from .plan import Plan, plan_model
from .verify import Certificate, verify_model
from .version import __version__

log = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)
Path = str | os.PathLike[str]


class InstrumentationFramework:
    """Captures the activations of one model by rewriting its traced graph.

    Args:
        config: what to capture and how to keep it.
    """

    def __init__(self, config: InstrumentationConfig | None = None) -> None:
        if config is not None and not isinstance(config, InstrumentationConfig):
            raise TypeError(f"config must be an InstrumentationConfig, got {config!r}")
        self.config = config if config is not None else InstrumentationConfig()
        self._attachment: Attachment | ExportedAttachment | None = None
        self._backend_name = ""
        self._inner: InnerBackend = "inductor"
        self._compile_options: dict[str, Any] = {}
        self._certificate: dict[str, Any] | None = None
        self._capture: object | None = None

    @property
    def sites(self) -> tuple[Site, ...]:
        """The chosen sites in module order; empty before ``instrument_model``."""
        return self._attachment.sites if self._attachment is not None else ()

    def instrument_model(
        self, model: Model, *, backend: InnerBackend | None = "inductor", **compile_options: Any
    ) -> Model:
        """Instrument ``model`` in place and return it: its calls then run the rewritten graph.

        Args:
            model: a plain module, one compiled before, or what ``torch.compile`` returned.
            backend: what compiles the rewritten graph, a name or a callable. None plants the markers only; compile
                the model yourself then, with ``torch.compile(model, backend=framework.backend(...))``.
            **compile_options: ``mode``, ``dynamic``, ``fullgraph`` and ``options`` of ``torch.compile``.

        Raises:
            NoSitesError: the model has no such attention or MLP, or a glob matches nothing.
            AlreadyInstrumentedError: the model is instrumented, or this framework has a model.
            MissingCompilerError: backend "inductor" on CPU without a C++ compiler.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        unknown = set(compile_options) - {"mode", "dynamic", "fullgraph", "options"}
        if unknown:
            raise TypeError(
                f"unknown compile options {sorted(unknown)}; torch.compile's mode, dynamic, fullgraph and options "
                f"pass through"
            )
        if backend is None and compile_options:
            raise TypeError("backend=None does not compile: give the compile options to torch.compile")
        if self._attachment is not None:
            held = type(self._attachment.model).__name__
            raise AlreadyInstrumentedError(
                f"this framework instruments a {held} already; call restore(model) first, or use a second framework"
            )
        check_free(model)
        sites = choose_sites(inner_module(model), self.config)
        if backend == "inductor":
            _check_compiler(model)
        self._inner = "inductor" if backend is None else backend
        self._compile_options = dict(compile_options)
        attachment = Attachment(model, sites)
        try:
            if backend is None:
                attachment.count_steps_in_trace()
            else:
                guard_filter_fn, compile_options["options"] = split_options(compile_options.get("options"))
                outer = {
                    "fullgraph": compile_options.pop("fullgraph", False),
                    "dynamic": compile_options.get("dynamic"),
                    "guard_filter_fn": guard_filter_fn,
                }
                attachment.compile(self._make_backend(attachment, backend, compile_options), **outer)
        except BaseException:
            attachment.detach()
            raise
        self._backend_name = (
            backend if isinstance(backend, str) else getattr(backend, "__name__", repr(backend))
        )
        self._attachment = attachment
        log.info("instrumented %s: %d sites", type(attachment.model).__name__, len(sites))
        return model

    def backend(self, inner: InnerBackend = "inductor", **options: Any) -> Callable[..., Any]:
        """A backend for ``torch.compile(model, backend=...)`` that captures, then compiles with ``inner``.

        Args:
            inner: a name or a callable, as ``torch.compile`` takes it.
            **options: ``mode``, ``dynamic`` and ``options`` for the inner backend.

        Raises:
            NotInstrumentedError: before ``instrument_model(model, backend=None)``.
            InstrumentationError: ``instrument_model`` compiled the model itself.
        """
        unknown = set(options) - {"mode", "dynamic", "options"}
        if unknown:
            raise TypeError(
                f"unknown backend options {sorted(unknown)}; mode, dynamic and options pass through"
            )
        if "guard_filter_fn" in (options.get("options") or {}):
            raise TypeError("guard_filter_fn is torch.compile's own: give it to torch.compile(options=...)")
        attachment = self._instrumented("backend")
        if attachment.compiled:
            # Its steps are counted around the compiled call that stands in the model already.
            raise InstrumentationError(
                "instrument_model compiled this model already: call the model itself, or restore it, instrument it "
                "with backend=None and compile it with backend=framework.backend(...)"
            )
        made = self._make_backend(attachment, inner, options)
        self._inner, self._compile_options = inner, dict(options)
        return made

    def restore(self, model: nn.Module | ExportedProgram) -> None:
        """Undo ``instrument_model``: the model has the hooks and the compiled call that it had before.

        Of exported programs the framework lets go; their modules go on without delivering.
        """
        attachment = self._attached("restore")
        exported = isinstance(attachment, ExportedAttachment)
        if not exported and not (isinstance(model, nn.Module) and inner_module(model) is attachment.model):
            raise NotInstrumentedError(
                f"this {type(model).__name__} is not the model that this framework instruments"
            )
        if self._capture is not None:
            raise CaptureActiveError("a capture is open: leave its block before restore")
        attachment.detach()
        self._attachment = None
        self._certificate = None

    def capture_activations(
        self,
        output_path: Path | None,
        *,
        mode: Literal["w", "x", "a"] = "w",
        on_full: Literal["stall", "drop"] = "stall",
        progress: bool = False,
    ) -> Capture:
        """A context manager that captures every forward call inside its block into ``output_path``.

        Args:
            output_path: the stream file, created private to the user; None does everything but the file.
            mode: "w" replaces an existing file, "x" refuses one, "a" goes on with one: it is recovered first, and
                steps are numbered from its ``num_steps``.
            on_full: when the buffer is full, "stall" makes the forward call wait and loses nothing, "drop" counts
                the lost values.
            progress: show a line on standard error while capturing.

        Raises:
            NotInstrumentedError: before ``instrument_model``.
            CaptureActiveError: another capture of this framework is open.
            InstrumentationError: the model was changed after ``instrument_model``.
            BufferTooSmallError: ``max_memory_gb`` is less than the writer needs, or (in a forward call) less than
                the values of one graph run.
            OSError: the file can't be created, or another capture is writing it (BlockingIOError: each rank needs a
                path of its own); raised when the block is entered.
            ValueError: mode "a" and a file of another codec, model or sampling; raised when the block is entered.
            CaptureFailedError: a capture thread failed; raised when the block is left.
        """
        self._attached("capture_activations")
        if output_path is not None and not isinstance(output_path, (str, os.PathLike)):
            raise TypeError(f"output_path must be a path or None, got {output_path!r}")
        if mode not in ("w", "x", "a"):
            raise ValueError(f"mode must be 'w', 'x' or 'a', got {mode!r}")
        if on_full not in ("stall", "drop"):
            raise ValueError(f"on_full must be 'stall' or 'drop', got {on_full!r}")
        return Capture(self, output_path, mode=mode, on_full=on_full, progress=progress)

    def instrument_exported(self, program: ExportedProgram) -> ExportedProgram:
        """A copy of an exported program that captures: its modules deliver inside ``capture_activations``.

        The sites are chosen by the names and classes of modules that ``program`` remembers; each site's value is
        that of its preserved signature (``torch.export.export(..., preserve_module_call_signature=...)``), or the
        last floating-point value that is used outside the module. The captures are further outputs of the program,
        which ``module()`` hands on and strips. After ``torch.export.save`` and ``load``, or AOTInductor, give the
        callable to ``attach_exported``. Several programs (prefill and decode) may share a framework.

        Raises:
            NoSitesError: as ``instrument_model``.
            RewriteError: which value a site returned can't be told.
            AlreadyInstrumentedError: this framework has a model.
        """
        if not isinstance(program, ExportedProgram):
            raise TypeError(f"program must be a torch.export.ExportedProgram, got {type(program).__name__}")
        attachment, instrumented = rewrite_program(program, self.config, self._exported())
        self._attachment, self._backend_name = attachment, "export"
        return instrumented

    def attach_exported(self, program: Any) -> Callable[..., Any]:
        """A callable that delivers the captures of an instrumented program, wherever that was made or compiled.

        Args:
            program: ``torch.export.load(path).module()``, or what ``torch._inductor.aoti_load_package`` returned, of
                a program that came from ``instrument_exported``.

        Returns:
            The module itself, or a callable in the place of AOTInductor's: calls return the original's outputs.

        Raises:
            NotInstrumentedError: the program has no captures.
            ValueError: it was instrumented with another sampling than this configuration's.
        """
        attachment, call = attach_program(program, self.config, self._exported())
        self._attachment = attachment
        self._backend_name = "export" if isinstance(program, nn.Module) else "aot_inductor"
        return call

    def _exported(self) -> ExportedAttachment | None:
        if self._attachment is not None and not isinstance(self._attachment, ExportedAttachment):
            raise AlreadyInstrumentedError(
                "this framework instruments a model already; use a second framework for exported programs"
            )
        if self._capture is not None:
            raise CaptureActiveError("a capture is open: leave its block first")
        return self._attachment

    def plan(self, model: nn.Module, *args: Any, **kwargs: Any) -> Plan:
        """What a capture of calls like ``model(*args, **kwargs)`` would record, and what it would take.

        Traces and runs one forward call of a twin that shares the model's parameters, instrumented or not; the
        model, the arguments, random states and compiled code stay as they are, and nothing is recorded. The twin
        runs the traced graphs without compiling them.

        Raises:
            NoSitesError: as ``instrument_model``.
            RewriteError: a site can't be captured exactly; the message says why.
            InstrumentationError: the model's modules can't be copied.
        """
        inner, sites, ours = self._explained(model)
        dynamic = self._compile_options.get("dynamic") if ours else None
        return plan_model(inner, sites, self.config, args, kwargs, dynamic=dynamic)

    def verify(self, model: nn.Module, *args: Any, **kwargs: Any) -> Certificate:
        """What capturing changes in the call ``model(*args, **kwargs)``; compiles a twin with and without captures.

        An instrumented model is verified with the backend and options that it was instrumented with, any other with
        "inductor". Outputs, graphs and recompiles are compared with those of the same model compiled without this
        package, captured values with what eager forward hooks see. Files captured from an instrumented model
        afterwards hold the certificate in their metadata. The model, the arguments, random states and compiled code
        stay as they are. Holds the values of one step twice.

        Raises:
            NoSitesError, RewriteError, InstrumentationError: as ``plan``.
        """
        inner, sites, ours = self._explained(model)
        backend: InnerBackend = self._inner if ours else "inductor"
        options = self._compile_options if ours else {}
        if backend == "inductor":
            _check_compiler(inner)
        found = verify_model(inner, sites, self.config, args, kwargs, inner=backend, options=options)
        if ours:
            self._certificate = found.to_dict()
        return found

    def _explained(self, model: nn.Module) -> tuple[nn.Module, tuple[Site, ...], bool]:
        """The module inside, its sites, and whether this framework instruments it."""
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        inner = inner_module(model)
        ours = self._attachment is not None and self._attachment.model is inner
        return inner, (self.sites if ours else choose_sites(inner, self.config)), ours

    def analyze_activations(self, data_path: StreamSource) -> dict[str, Any]:
        """What stream files hold and what their values look like; see ``fx_instrument.analyze_activations``."""
        return analyze_activations(data_path)

    def _make_backend(
        self, attachment: Attachment, inner: InnerBackend, options: Mapping[str, Any]
    ) -> CaptureBackend:
        if options.get("mode") and options.get("options"):
            raise ValueError("mode and options exclude each other, as in torch.compile")
        hook_config = self.config.hook_config
        sampled = self.config.granularity is HookGranularity.SAMPLED_SLICES
        sampling = Sampling(hook_config.sampling_rate, hook_config.seed) if sampled else None
        strict = self.config.strict_numerics and needs_strictness(inner)
        return CaptureBackend(attachment.marker, attachment.finder, sampling, inner, strict=strict, **options)

    def _instrumented(self, caller: str) -> Attachment:
        attachment = self._attached(caller)
        if isinstance(attachment, ExportedAttachment):
            raise NotInstrumentedError(f"{caller} is for models; this framework has an exported program")
        return attachment

    def _attached(self, caller: str) -> Attachment | ExportedAttachment:
        if self._attachment is None:
            raise NotInstrumentedError(
                f"{caller} needs an instrumented model: call instrument_model(model) first"
            )
        return self._attachment

    def _metadata(self, attachment: Attachment | ExportedAttachment) -> dict[str, Any]:
        model = attachment.model
        first = next(iter(model.parameters()), None)
        versions = {
            "fx_instrument": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "lz4": lz4.__version__,
            "zstandard": zstandard.__version__,
        }
        if "transformers" in sys.modules:
            versions["transformers"] = sys.modules["transformers"].__version__
        return {
            "config": self.config.to_dict(),
            "model": {
                "class": type(model).__name__,
                "name_or_path": str(getattr(getattr(model, "config", None), "name_or_path", "") or ""),
                "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
                "dtype": str(first.dtype).removeprefix("torch.") if first is not None else None,
                "device": str(first.device) if first is not None else None,
                "is_encoder_decoder": bool(
                    getattr(getattr(model, "config", None), "is_encoder_decoder", False)
                ),
            },
            "backend": self._backend_name,
            "versions": versions,
            **({"certificate": self._certificate} if self._certificate is not None else {}),
        }


def _check_compiler(model: nn.Module) -> None:
    if any(parameter.device.type != "cpu" for parameter in inner_module(model).parameters()):
        return
    from torch._inductor import (
        cpp_builder,
        exc,
    )  # loads Inductor, a second that other backends need not spend

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler as error:
        raise MissingCompilerError(
            'backend "inductor" needs a C++ compiler on CPU and found none: install g++ (or set CXX), '
            'or call instrument_model(model, backend="aot_eager")'
        ) from error
