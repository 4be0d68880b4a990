"""One rank of two that train a model with data parallelism and capture; run by test_ranks."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch._dynamo
import torch.distributed
from hooks import eager_values, same_bits
from models import Shape, make, tokens
from torch.nn.parallel import DistributedDataParallel

from fx_instrument import InstrumentationFramework, open_stream

SHAPE = Shape(depth=3, width=64)


def train(way: str, rank: int, path: Path | None) -> list[torch.Tensor]:
    """Gradients of one step, captured into ``path`` and compared with eager hooks."""
    torch._dynamo.reset()
    model = make(SHAPE).train()
    ids = tokens(2, 6, seed=rank)
    framework = InstrumentationFramework()
    if way == "fsdp":
        from torch.distributed.fsdp import fully_shard

        for layer in model.layers:
            fully_shard(layer)
        fully_shard(model)
        framework.instrument_model(model, backend="aot_eager")
        called = model
    elif way == "inner":
        framework.instrument_model(model, backend="aot_eager")
        called = DistributedDataParallel(model, bucket_cap_mb=0.05)
    else:
        called = DistributedDataParallel(model, bucket_cap_mb=0.05)
        if way == "outer":
            framework.instrument_model(called, backend="aot_eager")
        else:
            framework.instrument_model(called, backend=None)
            called = torch.compile(called, backend=framework.backend("aot_eager"))
    if path is None:
        called(ids).square().sum().backward()
    else:
        with framework.capture_activations(path) as capture:
            called(ids).square().sum().backward()
        assert capture.report.steps == 1 and capture.report.eager_records == 0, capture.report
        names = [site.name for site in framework.sites]
        prefix = "module." if names[0].startswith("module.") else ""
        plain = [name.removeprefix("module.") for name in names]
        expected = eager_values(make(SHAPE), plain, lambda m: m(ids))
        with open_stream(path) as stream:
            assert len(stream) == len(expected) == 6
            for (name, step, call), value in expected.items():
                assert same_bits(stream.read(prefix + name, step, call), value), (way, name)
    gradients = [parameter.grad for parameter in model.parameters()]
    return [g.to_local() if hasattr(g, "to_local") else g for g in gradients if g is not None]


def main() -> None:
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    torch.set_num_threads(1)
    # Small buckets, so that Dynamo splits the graph of so small a model too.
    torch.distributed._DEFAULT_FIRST_BUCKET_BYTES = 10_000
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=120),  # the other rank failed, and will never come
    )
    for way in ("inner", "outer", "user", "fsdp"):
        (folder / way).mkdir(exist_ok=True)
        plain = train(way, rank, None)
        captured = train(way, rank, folder / way / f"{rank}.stream")
        assert plain and all(torch.equal(a, b) for a, b in zip(plain, captured, strict=True)), way
    # One path for both: the second is told, and the first's file stays whole.
    framework = InstrumentationFramework()
    model = make(SHAPE)
    framework.instrument_model(model, backend="eager")
    opened = framework.capture_activations(folder / "one.stream")
    if rank == 0:
        with opened:
            torch.distributed.barrier()
            model(tokens(1, 3))
            torch.distributed.barrier()
    else:
        torch.distributed.barrier()
        try:
            with opened:
                raise AssertionError("the file is another's")
        except BlockingIOError as error:
            print("refused:", error)
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    print("rank", rank, "done")


if __name__ == "__main__":
    main()
