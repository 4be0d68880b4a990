"""The release, in a file that packaging tools can read without importing torch."""

__version__ = "0.1.0"
