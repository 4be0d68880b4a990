"""Files of llm-instrumentation become streams: every packet bit for bit, cut and foreign files told apart."""

from __future__ import annotations

import json
import struct

import lz4.frame
import numpy as np
import pytest
import torch
import zstandard

from fx_instrument import open_stream
from fx_instrument.errors import CorruptStreamError, NotAStreamError
from fx_instrument.packets import convert_packets, read_packets

PACK = {"none": bytes, "zstd": zstandard.ZstdCompressor(level=3).compress, "lz4": lz4.frame.compress}


def packet(name: str, data: bytes) -> bytes:
    return struct.pack("!HI", len(name.encode()), len(data)) + name.encode() + data


def values(seed: int, rows: int = 5) -> torch.Tensor:
    return torch.randn((rows, 8), generator=torch.Generator().manual_seed(seed)).half()


@pytest.fixture(params=PACK)
def old_file(tmp_path, request):
    """Two modules, three steps, as the old recorder lays them out."""
    path = tmp_path / "old.stream"
    packets = [
        packet(name, PACK[request.param](values(10 * step + n).numpy().tobytes()))
        for step in range(3)
        for n, name in enumerate(("layers_0", "layers_1"))
    ]
    path.write_bytes(b"".join(packets))
    return path


def test_every_packet_becomes_a_record(tmp_path, old_file):
    found = convert_packets(old_file, tmp_path / "new.stream", width=8)
    assert (found["sites"], found["records"], found["truncated"]) == (2, 6, None)
    with open_stream(tmp_path / "new.stream") as stream:
        for step in range(3):
            for n, name in enumerate(("layers_0", "layers_1")):
                assert torch.equal(stream.read(name, step), values(10 * step + n))
    convert_packets(old_file, tmp_path / "flat.stream", codec="none")
    with open_stream(tmp_path / "flat.stream") as stream:
        assert torch.equal(stream.read("layers_1", 2), values(21).flatten())
    with pytest.raises(FileExistsError):
        convert_packets(old_file, tmp_path / "flat.stream")


def test_a_cut_file_gives_its_whole_packets(tmp_path, old_file):
    old_file.write_bytes(old_file.read_bytes()[:-3])
    found = convert_packets(old_file, tmp_path / "new.stream", width=8)
    assert found["records"] == 5
    assert "needs bytes up to" in found["truncated"]


def test_a_wrong_dtype_or_width_leaves_no_file(tmp_path, old_file):
    for options in ({"width": 7}, {"dtype": "float32", "width": 3}):
        with pytest.raises(ValueError, match=r"'layers_0' packet 0 has 80 bytes"):
            convert_packets(old_file, tmp_path / "new.stream", **options)
    with pytest.raises(ValueError, match="dtype must be one of"):
        convert_packets(old_file, tmp_path / "new.stream", dtype="half")
    assert not (tmp_path / "new.stream").exists()


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "other"
    path.write_bytes(b"not packets at all, but some text")
    with pytest.raises(NotAStreamError, match="byte 0"):
        list(read_packets(path))
    damaged = bytearray(packet("a", PACK["zstd"](bytes(4000))) * 2)
    damaged[-6:] = b"\xff" * 6
    path.write_bytes(damaged)
    with pytest.raises(CorruptStreamError, match="of 'a'"):
        list(read_packets(path))
    bomb = PACK["zstd"](b"")[:4] + bytes([0xE0]) + struct.pack("<Q", 1 << 40)
    path.write_bytes(packet("a", bomb))
    with pytest.raises(CorruptStreamError):
        list(read_packets(path))


def test_the_command_converts(capsys, tmp_path, old_file):
    pytest.importorskip("click")
    from fx_instrument.cli import run

    new = tmp_path / "new.stream"
    assert run(["convert", str(old_file), str(new), "--width", "8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["records"] == 6
    with open_stream(new) as stream:
        assert np.array_equal(stream["layers_0"][1].numpy(), values(10).numpy())
