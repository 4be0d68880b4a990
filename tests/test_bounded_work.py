"""Files of a few hundred bytes with right checksums and huge numbers: what reads them ends soon, in little memory."""

from __future__ import annotations

import struct
import time
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from written import write_stream

from fx_instrument.activations import open_stream
from fx_instrument.analysis import analyze_activations
from fx_instrument.errors import CorruptStreamError
from fx_instrument.export import export_stream
from fx_instrument.record_table import record_rows
from fx_instrument.requests import NEW_INPUT, ROWS_INPUT, encode_new, encode_rows
from fx_instrument.stream.blocks import ROW_DTYPE, BlockHeader, write_directory
from fx_instrument.stream.codec import PageEncoder, empty_frame
from fx_instrument.stream.frames import FRAME_HEAD, SITES, TAGS, Prolog, SiteEntry, write_sites
from fx_instrument.stream.index import IndexRow, write_index
from fx_instrument.stream.payload import LEAD_BYTES
from fx_instrument.stream.reader import StreamReader
from fx_instrument.stream.records import RecordMeta
from fx_instrument.stream.writer import StreamWriter

SITE = "model.layers.0.mlp"


def test_steps_that_a_file_only_claims_cost_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """2**62 steps, of which three have records and one an input; what is there is found as ever."""
    ids = torch.arange(3).reshape(1, 3)
    made = [
        {SITE: torch.ones(1, 3)},
        {},
        {},
        {SITE: torch.ones(1, 3)},
        {SITE: [torch.ones(1), torch.ones(2)]},
    ]
    inputs = [{}, {}, {"input_ids": ids}]
    path = write_stream(tmp_path / "a.stream", made, inputs=inputs, summary={"num_steps": 1 << 62})
    looked = 0
    find_all = StreamReader.find_all

    def counted(self, *arguments, **options):
        nonlocal looked
        looked += 1
        assert looked < 1000, "looks for records of steps without any"
        return find_all(self, *arguments, **options)

    monkeypatch.setattr(StreamReader, "find_all", counted)
    with open_stream(path) as stream:
        assert stream.num_steps == 1 << 62
        rows = list(record_rows(stream, [SITE], 3))
        export_stream(stream, tmp_path / "a.npz")
    assert [(row["step"], row["call"]) for row in rows] == [(0, 0), (3, 0), (4, 0), (4, 1)]
    with np.load(tmp_path / "a.npz") as found:
        assert (found["inputs/2/input_ids"] == ids.numpy()).all()
        assert len([name for name in found.files if name.startswith("inputs/")]) == 1


def test_requests_are_looked_for_where_inputs_are(tmp_path: Path) -> None:
    """Rows of one request in a file that claims 2**62 steps."""
    made = [{SITE: torch.ones(1, 2, 3)}]
    rows = {ROWS_INPUT: encode_rows([(5, 0, 2)]), NEW_INPUT: encode_new([{"number": 5, "id": "a"}])}
    path = write_stream(tmp_path / "a.stream", made, inputs=[rows], summary={"num_steps": 1 << 62})
    with open_stream(path) as stream:
        assert stream.requests == ("a",)


def test_the_width_that_a_sampled_record_claims_costs_nothing(tmp_path: Path) -> None:
    """One value of a tensor of 2**24 channels, for which sums by channel took 0.6 GB; the rest is told of it."""
    path = tmp_path / "a.stream"
    metadata = {"config": {"hook_config": {"sampling_rate": 1e-300, "seed": 0}}}
    writer = StreamWriter(path, metadata=metadata, codec="zstd")
    site = writer.add_site(SITE, "mlp")
    value = np.full(1, 3, np.float32)
    writer.put(RecordMeta(site, 0, 0, "float32", (1,), (1, 1 << 24)), value.view(np.uint8))
    writer.close({"num_steps": 1})
    tracemalloc.start()
    found = analyze_activations(path)["sites"][SITE]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20
    assert (found["mean"], found["shape"], found["top_channels"]) == (3.0, [1, 1 << 24], [])


def test_a_record_of_many_small_parts_is_scanned_in_time_linear_in_them(tmp_path: Path) -> None:
    """32768 parts of one byte of a record of 2**40, in a file of 1 kB; a sum over the parts for each took 20 s."""
    path = tmp_path / "a.stream"
    prolog = Prolog("zstd", bytes(range(16)), {})
    segment_id = prolog.uuid[:8]
    sites = [SiteEntry(0, SITE, "mlp")]
    data = bytearray(empty_frame("zstd") + prolog.write() + write_sites(sites, segment_id))
    encoder = PageEncoder("zstd", 1 << 20)
    index = []
    num_parts = 1 << 14
    for sequence in range(2):
        rows = np.zeros(num_parts, ROW_DTYPE)
        rows["offset"] = np.arange(num_parts)
        rows["part_offset"] = rows["offset"] + sequence * num_parts
        directory = write_directory(rows, [((1 << 40,), None)])
        encoding, stored_directory = encoder.encode_directory(directory)
        page = encoder.encode([np.zeros(num_parts, np.uint8)], "uint8", site=0)
        header = BlockHeader(
            codec=2,
            dtype=2,
            filter=page.filter,
            directory_encoding=encoding,
            num_rows=num_parts,
            segment_id=segment_id,
            sequence=sequence,
            time_ns=0,
            min_step=0,
            max_step=0,
            num_shapes=1,
            directory_bytes=len(stored_directory),
            directory_raw_bytes=len(directory),
            raw_bytes=num_parts,
            payload_bytes=page.payload_bytes,
            payload_crc=page.payload_crc,
            plane_bytes=page.plane_bytes,
            plane_encodings=page.plane_encodings,
        )
        offset = len(data)
        data += header.write(stored_directory, offset, LEAD_BYTES)
        data += b"".join(bytes(piece) for piece in page.pieces)
        index.append(IndexRow(offset, 0, 0, len(data) - offset, num_parts, num_parts, frozenset([0])))
    data += write_index(
        len(data),
        index,
        sites,
        segment_id=segment_id,
        num_steps=1,
        num_records=1,
        raw_bytes=2 * num_parts,
        summary={},
    )
    path.write_bytes(data)
    assert len(data) < 2000
    with StreamReader(path) as reader:
        start = time.perf_counter()
        with pytest.raises(CorruptStreamError, match="lack a part"):
            list(reader.scan())
        assert time.perf_counter() - start < 6


@pytest.mark.parametrize("gap", [0, 5], ids=["to the end", "nearly"])
def test_frames_that_claim_each_others_bytes_are_not_summed_for_ever(tmp_path: Path, gap: int) -> None:
    """Heads with good checksums, each with a wrong body to the end of the file: for 1 MB there are 19 GB to sum."""
    path = write_stream(tmp_path / "a.stream", [{SITE: torch.ones(1, 3)}], finish=False)
    good = path.read_bytes()
    num_heads = 40_000
    heads = bytearray()
    for number in range(num_heads):
        length = FRAME_HEAD.size * (num_heads - number) - 8 - min(gap, num_heads - number - 1)
        head = FRAME_HEAD.pack(SITES, length, TAGS[SITES], 1, 0)[:-4]
        heads += head + struct.pack("<I", zlib.crc32(head))
    path.write_bytes(good + heads)
    with StreamReader(path, recover=True) as reader:
        assert reader.num_records == 1 == len(list(reader.scan()))
        assert "was not searched" in reader.damage[-1].reason
        assert reader.damage[-1].offset + reader.damage[-1].num_bytes == len(good) + len(heads)
