"""Ray Data harvests with two actors: a file each, a manifest, and only what is missing is run again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import PLAIN, make
from torch import nn

from fx_instrument import InstrumentationConfig, open_stream
from fx_instrument.harvest import MANIFEST, collect, finished_ids

pytestmark = pytest.mark.server


def load() -> nn.Module:
    return make(PLAIN)


def run(model: nn.Module, batch: Mapping[str, Any]) -> None:
    with torch.no_grad():
        model(torch.from_numpy(np.stack(batch["tokens"])))


def test_two_actors(tmp_path: Path) -> None:
    """Each actor writes a file; together they hold every input once, at the step that the manifest says."""
    ray = pytest.importorskip("ray")
    from fx_instrument.integrations.ray import HarvestActor, without_finished

    folder = tmp_path / "harvest"
    items = [{"id": f"doc-{n}", "tokens": [n % 37, (3 * n) % 37, 5, 7]} for n in range(40)]
    actors = {
        "fn_constructor_kwargs": {
            "load": load,
            "run": run,
            "folder": str(folder),
            "config": InstrumentationConfig(max_memory_gb=0.05),
            "instrument": {"backend": "eager"},
        },
        "concurrency": 2,
        "num_cpus": 1,
        "batch_size": 4,
    }
    ray.init(
        num_cpus=3,
        include_dashboard=False,
        runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).parent)}},
    )
    # Else the actor that is up first may have run everything before the second is.
    ray.data.DataContext.get_current().wait_for_min_actors_s = 300
    try:
        first = ray.data.from_items(items[:24], override_num_blocks=6)
        rows = first.map_batches(HarvestActor, **actors).take_all()
        assert sorted(row["id"] for row in rows) == sorted(item["id"] for item in items[:24])
        assert len({row["file"] for row in rows}) == 2
        assert finished_ids(folder) == {item["id"] for item in items[:24]}
        everything = ray.data.from_items(items, override_num_blocks=10)
        rest = without_finished(everything, folder).map_batches(HarvestActor, **actors).take_all()
        assert {row["id"] for row in rest} == {item["id"] for item in items[24:]}
        # Waits for the actors to end their files, which a shutdown would not.
        files = collect(folder)
    finally:
        ray.shutdown()
    lines = [json.loads(line) for line in (folder / MANIFEST).read_text().splitlines()]
    assert [line["file"] for line in lines] == [file.file for file in files]
    ids = [one for file in files for one in file.ids]
    assert sorted(ids) == sorted(item["id"] for item in items)
    model, by_id = make(PLAIN), {item["id"]: item["tokens"] for item in items}
    seen: list[torch.Tensor] = []
    model.layers[1].mlp.register_forward_hook(lambda module, args, output: seen.append(output))
    for file in files:
        with open_stream(folder / file.file) as stream:
            values = torch.cat([record.tensor() for record in stream["layers.1.mlp"]])
        assert values.shape == (file.rows, 4, PLAIN.width)
        for row, one in enumerate(file.ids):
            with torch.no_grad():
                model(torch.tensor([by_id[one]]))
            torch.testing.assert_close(values[row], seen.pop()[0])
    with open_stream(folder) as stream:
        assert stream.num_steps == sum(file.steps for file in files)
