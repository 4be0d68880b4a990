"""A plugin of pytest beside ``one_as_two.c``: the second device's work runs on a stream of its own.

Both devices share a default stream, where all would be in order by chance.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

# NVML, which torch asks first, counts the devices that there are.
torch.cuda._device_count_nvml = lambda: -1


@pytest.fixture(autouse=True)
def second_stream() -> Iterator[None]:
    assert torch.cuda.device_count() == 2, "start with LD_PRELOAD, as one_as_two.c says"
    torch.cuda.set_stream(torch.cuda.Stream(device=1))
    torch.cuda.set_device(0)
    yield
    for device in range(2):
        torch.cuda.synchronize(device)
