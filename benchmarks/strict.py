"""What strict_numerics=True costs while blocks are captured, beside the same capture without it.

    OMP_NUM_THREADS=1 python -m benchmarks.strict [--model toy|smollm] [--rounds N] [--json FILE]

bfloat16, prefill 4 x 128, the outputs of all layers (which Inductor keeps wider inside fused kernels, so that strict
captures get a graph of their own), null sink. Variants run one after the other in every round; figures are medians over
rounds of the ratio to the compiled model without captures, of wall time and of the process' CPU time, blocks opened and
closed included. Also said: whether the outputs have the bits of the uncaptured compiled model.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

from .machine import processor

BATCH, LENGTH = 4, 128
STEPS = {"toy": 32, "smollm": 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=tuple(STEPS), default="toy")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()

    import torch

    from fx_instrument import HookConfig, InstrumentationConfig, InstrumentationFramework

    from .overhead.models import call_through, compile_alone, duplicate, smollm, toy

    torch.set_num_threads(1)
    make = {"toy": lambda: toy(torch.bfloat16, "cpu"), "smollm": lambda: smollm(torch.bfloat16, "cpu")[0]}
    model = make[arguments.model]()
    ids = torch.randint(3, 900, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    plain = duplicate(model)
    call_through(plain, compile_alone(plain))
    captured: dict[str, tuple[Any, InstrumentationFramework]] = {}
    for name, strict in (("captured", False), ("strict", True)):
        config = InstrumentationConfig(
            strict_numerics=strict, hook_config=HookConfig(target_layers=["model.layers.*"])
        )
        copy, framework = duplicate(model), InstrumentationFramework(config)
        framework.instrument_model(copy)
        captured[name] = (copy, framework)

    def run(name: str) -> Any:
        if name == "compiled":
            return [plain(ids).logits for _ in range(STEPS[arguments.model])][-1]
        copy, framework = captured[name]
        with framework.capture_activations(None) as capture:
            logits = [copy(ids).logits for _ in range(STEPS[arguments.model])][-1]
        assert capture.report.records == len(framework.sites) * STEPS[arguments.model]
        return logits

    names = ("compiled", *captured)
    rounds: list[dict[str, dict[str, float]]] = []
    with torch.inference_mode():
        outputs = {name: run(name) for name in names}
        equal = {name: torch.equal(outputs[name], outputs["compiled"]) for name in names}
        for _ in range(2):
            for name in names:
                run(name)
        for number in range(arguments.rounds):
            taken = {}
            for name in names[number % 3 :] + names[: number % 3]:
                wall, cpu = time.perf_counter(), time.process_time()
                run(name)
                taken[name] = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
            rounds.append(taken)
            print(
                f"round {number}: " + ", ".join(f"{n} {t['cpu']:.3f} s CPU" for n, t in taken.items()),
                flush=True,
            )
    ratios = {
        name: {
            kind: statistics.median(r[name][kind] / r["compiled"][kind] for r in rounds)
            for kind in ("wall", "cpu")
        }
        for name in names
    }
    for name in names:
        bits = "the same bits" if equal[name] else "other bits"
        print(f"{name}: wall {ratios[name]['wall']:.3f}, CPU {ratios[name]['cpu']:.3f}, outputs {bits}")
    if arguments.json:
        result = {
            "command": f"OMP_NUM_THREADS=1 python -m benchmarks.strict --model {arguments.model} "
            f"--rounds {arguments.rounds}",
            "workload": f"prefill {BATCH}x{LENGTH}, bfloat16, {STEPS[arguments.model]} steps a block",
            "median_ratio": ratios,
            "outputs_bit_equal": equal,
            "rounds": rounds,
            "cpu": processor(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
        }
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
