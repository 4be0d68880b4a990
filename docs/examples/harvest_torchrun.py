"""Harvest a dataset with torchrun: each process runs its share and writes a file of its rank.

    pip install 'fx_instrument[demo]'
    torchrun --nproc-per-node 2 harvest_torchrun.py activations

Run it again after a kill: what is whole is not run again.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch
import torch.distributed as dist

from fx_instrument import HookGranularity, InstrumentationConfig, InstrumentationFramework, open_stream
from fx_instrument.demo.smollm import load_model
from fx_instrument.harvest import Harvest, collect, finished_ids

BATCH = 4
# One shape for all batches: compiled once, and nothing to trace with symbolic sizes.
FIXED: dict[str, Any] = {
    "return_tensors": "pt",
    "padding": "max_length",
    "max_length": 32,
    "truncation": True,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--backend", default="inductor")
    arguments = parser.parse_args()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo")

    texts = {f"text-{n}": f"The number {n} is " + "very " * (n % 5) + "nice." for n in range(arguments.texts)}
    done = finished_ids(arguments.folder)
    dist.barrier()  # all look before one writes
    mine = [name for name in list(texts)[rank::world] if name not in done]

    if rank == 0:
        load_model(torch.float32)  # fetches the weights once
    dist.barrier()
    model, tokenizer = load_model(torch.float32)
    framework = InstrumentationFramework(
        InstrumentationConfig(granularity=HookGranularity.MLP_ONLY, max_memory_gb=0.5)
    )
    framework.instrument_model(model, backend=arguments.backend)
    if mine:
        with Harvest(framework, arguments.folder, name=f"rank-{rank}") as harvest, torch.inference_mode():
            for begin in range(0, len(mine), BATCH):
                ids = mine[begin : begin + BATCH]
                with harvest.batch(ids):
                    model(
                        **tokenizer([texts[one] for one in ids], **FIXED),
                        use_cache=False,
                    )

    dist.barrier()
    if rank == 0:
        for file in collect(arguments.folder):
            print(f"{file.file}: {file.rows} texts in {file.steps} steps")
        with open_stream(arguments.folder) as stream:
            print(f"{len(stream)} records of {len(stream.sites)} sites, ranks {stream.ranks}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
