"""The checksum of a payload is CRC-32, whichever library computes it."""

from __future__ import annotations

import zlib

import numpy as np
import pytest

from fx_instrument.stream import payload


@pytest.mark.parametrize("size", [0, 1, 63, 4096, (128 << 10) - 1, 128 << 10, (1 << 20) + 17])
@pytest.mark.parametrize("zlib_only", [False, True])
def test_crc32(size: int, zlib_only: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of bytes and of arrays, in one go and piece by piece, with and without ISA-L."""
    if zlib_only:
        monkeypatch.setattr(payload, "crc32", zlib.crc32)
    elif payload.crc32 is zlib.crc32:
        pytest.skip("isal is not installed")
    data = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    expected = zlib.crc32(data.tobytes())
    assert payload.checksum(data) == payload.checksum(data.tobytes()) == expected
    assert payload.checksum(data[size // 3 :], payload.checksum(data[: size // 3])) == expected
