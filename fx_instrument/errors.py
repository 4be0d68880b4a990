"""What a caller can catch: one family for run time and files; bad arguments are ValueError or TypeError."""


class InstrumentationError(Exception):
    """Base of every error of this package that is not a plain bad argument."""


class NoSitesError(InstrumentationError, ValueError):
    """The model has no module that the granularity or the globs choose."""


class NotInstrumentedError(InstrumentationError):
    """The call needs an instrumented model, and this framework has none."""


class AlreadyInstrumentedError(InstrumentationError):
    """The model, or this framework, is taken already."""


class CaptureActiveError(InstrumentationError):
    """The call can't be made while a capture of this framework is open."""


class RewriteError(InstrumentationError):
    """A traced graph could not be rewritten, so its sites could not be captured exactly."""


class NothingCapturedError(InstrumentationError):
    """The model ran inside a capture block and none of its sites delivered a value: the file is empty of them."""


class IncompleteCaptureWarning(UserWarning):
    """Some sites delivered no value in a block in which others did, or values belong to no step of their own."""


class MissingCompilerError(InstrumentationError):
    """Inductor needs a C++ compiler and found none."""


class BufferTooSmallError(InstrumentationError):
    """The captured values of one graph run are larger than ``max_memory_gb`` lets the host buffer be."""


class CaptureFailedError(InstrumentationError):
    """A thread that moves captured values to the file failed; ``__cause__`` holds its exception."""


class StreamError(InstrumentationError):
    """Base of the errors about stream files."""


class NotAStreamError(StreamError):
    """The file does not begin as a stream file does."""


class TruncatedStreamError(StreamError):
    """The file ends before the stream does: it was cut, or its writer was killed."""


class CorruptStreamError(StreamError):
    """Bytes of the file contradict their checksum or the format."""


class UnsupportedStreamError(StreamError):
    """The file is of a format version, codec or dtype that this version can't read."""


class MissingRecordError(StreamError, KeyError):
    """The stream holds no record of that site, step and call."""

    # KeyError shows the repr of its message; this one is written to be read.
    __str__ = Exception.__str__


class MissingPackageError(InstrumentationError, ImportError):
    """The call needs an optional package that is not installed."""
