"""Capture the inside of a running LLM by rewriting its traced graph."""

from .activations import ActivationStream, open_stream
from .analysis import analyze_activations
from .capture.report import CaptureReport
from .capture_block import Capture
from .config import HookConfig, HookGranularity, InstrumentationConfig
from .errors import (
    AlreadyInstrumentedError,
    BufferTooSmallError,
    CaptureActiveError,
    CaptureFailedError,
    CorruptStreamError,
    IncompleteCaptureWarning,
    InstrumentationError,
    MissingCompilerError,
    MissingPackageError,
    MissingRecordError,
    NoSitesError,
    NotAStreamError,
    NothingCapturedError,
    NotInstrumentedError,
    RewriteError,
    StreamError,
    TruncatedStreamError,
    UnsupportedStreamError,
)
from .export import export_stream
from .framework import InstrumentationFramework
from .graph.reference import SiteDifference
from .graph.sites import Site
from .graph.trace import GraphBreak
from .packets import convert_packets
from .plan import Compression, Plan, SitePlan
from .repair import recover_stream
from .serving import Recorder, RecorderReport
from .verify import Certificate
from .version import __version__

__all__ = [
    "ActivationStream",
    "AlreadyInstrumentedError",
    "BufferTooSmallError",
    "Capture",
    "CaptureActiveError",
    "CaptureFailedError",
    "CaptureReport",
    "Certificate",
    "Compression",
    "CorruptStreamError",
    "GraphBreak",
    "HookConfig",
    "HookGranularity",
    "InstrumentationConfig",
    "InstrumentationError",
    "InstrumentationFramework",
    "MissingCompilerError",
    "MissingPackageError",
    "MissingRecordError",
    "NoSitesError",
    "NotAStreamError",
    "NothingCapturedError",
    "NotInstrumentedError",
    "Recorder",
    "RecorderReport",
    "Plan",
    "RewriteError",
    "IncompleteCaptureWarning",
    "Site",
    "SiteDifference",
    "SitePlan",
    "StreamError",
    "TruncatedStreamError",
    "UnsupportedStreamError",
    "__version__",
    "analyze_activations",
    "convert_packets",
    "export_stream",
    "open_stream",
    "recover_stream",
]
