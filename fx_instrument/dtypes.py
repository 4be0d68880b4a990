"""Dtypes between torch, stream files and NumPy."""

from __future__ import annotations

import torch

from .errors import UnsupportedStreamError


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a stream's dtype name.

    Raises:
        UnsupportedStreamError: torch has no such dtype.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise UnsupportedStreamError(f"torch {torch.__version__} has no dtype {name!r}")
    return dtype


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` in a dtype that NumPy has, exactly: bfloat16 and float8 as float32, complex32 as complex64."""
    # numpy knows half, float and double; every other floating dtype of torch is a narrower one.
    if tensor.dtype.is_floating_point and tensor.dtype not in (torch.float16, torch.float32, torch.float64):
        return tensor.to(torch.float32)
    return tensor.to(torch.complex64) if tensor.dtype == torch.complex32 else tensor
