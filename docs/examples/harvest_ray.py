"""Harvest a dataset with Ray Data: two actors, each with an instrumented model and a file of its own.

    pip install 'fx_instrument[ray,demo]'
    python harvest_ray.py activations            # run it again after a kill: what is whole is not run again

On a cluster, `folder` is one that all machines see.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import ray
import torch

from fx_instrument import HookGranularity, InstrumentationConfig, open_stream
from fx_instrument.demo.smollm import load_model
from fx_instrument.harvest import collect
from fx_instrument.integrations.ray import HarvestActor, without_finished

# One shape for all batches: compiled once, and nothing to trace with symbolic sizes.
FIXED: dict[str, Any] = {
    "return_tensors": "pt",
    "padding": "max_length",
    "max_length": 32,
    "truncation": True,
}


class Texts:
    """Loads the model, and runs it on a batch of texts; made once an actor."""

    def load(self) -> torch.nn.Module:
        model, self.tokenizer = load_model(torch.float32)
        return model

    def run(self, model: torch.nn.Module, batch: Mapping[str, Any]) -> None:
        encoded = self.tokenizer(list(batch["text"]), **FIXED)
        with torch.inference_mode():
            model(**encoded, use_cache=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--texts", type=int, default=32)
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--backend", default="inductor")
    arguments = parser.parse_args()
    ray.init(num_cpus=arguments.actors + 1, include_dashboard=False)
    texts = [
        {"id": f"text-{n}", "text": f"The number {n} is " + "very " * (n % 5) + "nice."}
        for n in range(arguments.texts)
    ]
    job = Texts()
    dataset = without_finished(ray.data.from_items(texts), arguments.folder)
    dataset.map_batches(
        HarvestActor,
        fn_constructor_kwargs={
            "load": job.load,
            "run": job.run,
            "folder": arguments.folder,
            "config": InstrumentationConfig(granularity=HookGranularity.MLP_ONLY, max_memory_gb=0.5),
            "instrument": {"backend": arguments.backend},
        },
        concurrency=arguments.actors,
        num_cpus=1,
        batch_size=8,
    ).materialize()
    for file in collect(arguments.folder):
        print(f"{file.file}: {file.rows} texts in {file.steps} steps")
    with open_stream(arguments.folder) as stream:
        print(f"{len(stream)} records of {len(stream.sites)} sites in {stream.num_steps} steps")


if __name__ == "__main__":
    main()
