"""Files of random and mutated bytes: reading ends, in bounded memory, with the documented errors only."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch

from fx_instrument.stream.frames import FRAME_HEAD


def mutated(rng: random.Random, data: bytes) -> bytes:
    """Bytes of a file changed, doubled, moved or taken out; now and then the checksums of its frames made right."""
    edited = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        start = rng.randrange(len(edited) + 1)
        length = rng.choice([1, 2, 4, 8, 64, 500])
        match rng.randrange(4):
            case 0:
                edited[start : start + length] = rng.randbytes(length)
            case 1:
                edited[start:start] = edited[start : start + length]
            case 2:
                del edited[start : start + length]
            case _:
                edited[start : start + 4] = rng.choice(
                    [b"\xff" * 4, b"\0" * 4, b"\xff\xff\xff\x7f", b"\0\0\0\x80"]
                )
    if rng.random() < 0.5:
        make_right(edited)
    return bytes(edited)


def make_right(data: bytearray) -> None:
    """Right checksums for every frame that can still be told by its magic."""
    for number in range(16):
        magic = struct.pack("<I", 0x184D2A50 + number)
        at = data.find(magic)
        while at >= 0:
            if at + FRAME_HEAD.size <= len(data):
                end = at + 8 + struct.unpack_from("<I", data, at + 4)[0]
                if at + FRAME_HEAD.size <= end <= len(data):
                    struct.pack_into("<I", data, at + 16, zlib.crc32(data[at + FRAME_HEAD.size : end]))
                    struct.pack_into("<I", data, at + 20, zlib.crc32(data[at : at + 20]))
            at = data.find(magic, at + 1)


FUZZES = """
import random, sys, tracemalloc
from pathlib import Path
import test_stream_damage as damage
from memory import resident
from test_stream_fuzz import mutated
from stream_files import CODECS, small_samples, write

folder, seed, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
files = [
    write(folder / codec, small_samples(3), codec=codec, seal_every=4).read_bytes() for codec in CODECS
]
rng = random.Random(seed)
damage.read_everything(files[0])
imported = resident("VmHWM")
tracemalloc.start()
worst = 0
for _ in range(count):
    data = rng.randbytes(rng.randrange(2000)) if rng.random() < 0.1 else mutated(rng, rng.choice(files))
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    damage.read_everything(data)
    worst = max(worst, tracemalloc.get_traced_memory()[1] - before)
print(worst, imported, resident("VmHWM"))
"""


def fuzz(folder: Path, seed: int, count: int, timeout_s: float) -> None:
    tests = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{tests}:{tests.parent}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        [sys.executable, "-c", FUZZES, folder, str(seed), str(count)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=timeout_s,
    )
    assert done.returncode == 0, done.stderr
    worst, imported, resident = map(int, done.stdout.split())
    # A block of 4 MiB decoded, its planes, and the directory that its header may claim.
    assert worst < 64 << 20 and resident - imported < 90 << 20
    # Importing a torch that is built for CUDA alone takes more.
    assert resident < 400 << 20 or torch.version.cuda is not None


def test_mutated_files_take_bounded_memory(tmp_path: Path) -> None:
    """Whatever lengths the bytes claim, reading ends, with documented errors, in the memory of a few blocks."""
    fuzz(tmp_path, 1, 100, 300)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 6))
def test_many_mutated_files_take_bounded_memory(tmp_path: Path, seed: int) -> None:
    """The same for thousands of files."""
    fuzz(tmp_path, seed, 3000, 1200)
