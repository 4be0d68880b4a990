from __future__ import annotations

import pytest
import torch
import torch._dynamo
from hypothesis import HealthCheck, settings

# Threads that spin while two cores are shared make every compiled call crawl; one thread is the fair setting.
torch.set_num_threads(1)

# Compiling is slow and its time says nothing about a bug.
settings.register_profile(
    "default",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("default")


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    """Compiled code of one test must not be found, or counted, by the next."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
