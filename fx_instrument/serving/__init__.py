"""Always-on recording inside a long-running server: files that rotate, failures that stay out of responses."""

from .recorder import Recorder
from .report import RecorderReport

__all__ = ["Recorder", "RecorderReport"]
