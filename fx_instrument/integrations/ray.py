"""Harvesting a dataset with Ray Data (``pip install 'fx_instrument[ray]'``): an actor, a model, a file each.

    dataset = ray.data.from_items(items)
    rows = without_finished(dataset, folder).map_batches(
        HarvestActor,
        fn_constructor_kwargs={"load": load, "run": run, "folder": folder, "config": config},
        concurrency=2,
        batch_size=8,
    )
    rows.materialize()
    collect(folder)  # before ray.shutdown(), which ends actors in the middle of what they still write

The values go into files beside each other, not through Ray's object store: a batch comes back as the ids of its rows
and the name of the file that holds them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ray.data import Dataset
from torch import nn

from ..config import InstrumentationConfig
from ..framework import InstrumentationFramework
from ..harvest import Harvest, finished_ids

Batch = Mapping[str, Any]


class HarvestActor:
    """The class for ``Dataset.map_batches``: each actor holds an instrumented model and writes one file.

    Args:
        load: makes the model; called once an actor, on its machine.
        run: calls the model on a batch (columns by name, as ``batch_format="numpy"`` gives them), a batch row an
            input, in the order of ``id_column``.
        folder: where the files go; one that all machines see, or one of each machine's own.
        config: what to capture.
        id_column: names each input; an input whose id lies in a whole file is not run again by
            ``without_finished``.
        instrument: options of ``instrument_model``, such as ``{"backend": "aot_eager", "dynamic": True}``.
    """

    def __init__(
        self,
        load: Callable[[], nn.Module],
        run: Callable[[nn.Module, Batch], object],
        folder: str | os.PathLike[str],
        config: InstrumentationConfig | None = None,
        id_column: str = "id",
        instrument: Mapping[str, Any] | None = None,
    ) -> None:
        self._model = load()
        self._run = run
        self._id_column = id_column
        framework = InstrumentationFramework(config)
        framework.instrument_model(self._model, **(instrument or {}))
        self._harvest = Harvest(framework, Path(folder), name="actor").__enter__()

    def __call__(self, batch: Batch) -> dict[str, np.ndarray[Any, Any]]:
        ids = [str(one) for one in batch[self._id_column]]
        with self._harvest.batch(ids):
            self._run(self._model, batch)
        return {self._id_column: np.array(ids), "file": np.array([self._harvest.path.name] * len(ids))}

    def __del__(self) -> None:
        # Ray Data lets go of an actor's object before it ends the process; where it does not, collect() ends the file.
        harvest = self.__dict__.pop("_harvest", None)
        if harvest is not None:
            harvest.close()


def without_finished(dataset: Dataset, folder: str | os.PathLike[str], *, id_column: str = "id") -> Dataset:
    """The rows of ``dataset`` that no whole file of ``folder`` has yet: all of them at first, the rest after a kill."""
    done = finished_ids(folder)
    if not done:
        return dataset
    return dataset.filter(lambda row: str(row[id_column]) not in done)
