"""Measure what a step does around the update: ``python benchmarks/pipeline.py --help``.

Clipping, averaging the weights, accumulating gradients, and low-precision weights and state, each
against the usual recipe around torch's fused step.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import fusedopt
from fusedopt.bench import machine
from fusedopt.bench.contenders import CPU, OPTIMIZERS, Case, Gradients
from fusedopt.bench.measure import ratio, rounds
from fusedopt.models import Model, find

Step = Callable[[], object]
ADAMW = OPTIMIZERS["adamw"]
MICRO_BATCHES = 4


@dataclass(frozen=True)
class Place:
    """A model somewhere."""

    model: Model
    device: torch.device


class Training:
    """A model's parameters, in one group and one dtype, and their gradients."""

    def __init__(self, place: Place, dtype: torch.dtype = torch.float32) -> None:
        model = replace(place.model, group_each=False)
        self.gradients = Gradients(Case(model, ADAMW, place.device, dtype))
        self.params = self.gradients.parameters()

    def ours(self, **options: Any) -> fusedopt.AdamW:
        """Our optimizer of these parameters."""
        return fusedopt.AdamW(self.params, **ADAMW.options, **options)

    def fused(self, **options: Any) -> torch.optim.AdamW:
        """Torch's fused optimizer of these parameters."""
        return torch.optim.AdamW(self.params, **ADAMW.options, fused=True, **options)


def torch_fused(place: Place, dtype: torch.dtype = torch.float32) -> Step:
    return Training(place, dtype).fused().step


def ours(place: Place, dtype: torch.dtype = torch.float32, **options: Any) -> Step:
    return Training(place, dtype).ours(**options).step


def replayed(optimizer: torch.optim.Optimizer) -> Step:
    """A CUDA graph of a step."""
    optimizer.step()  # makes the state
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return lambda: (graph.replay(), optimizer)  # which holds what the graph works on


def torch_with_master(place: Place) -> Step:
    """The usual recipe for bfloat16 weights: torch steps a copy in float32, and copies it back."""
    training = Training(place, BF16)
    masters = [torch.nn.Parameter(p.detach().float()) for p in training.params]
    for master in masters:
        master.grad = torch.empty_like(master)
    optimizer = torch.optim.AdamW(masters, **ADAMW.options, fused=True)

    def step() -> None:
        with torch.no_grad():
            torch._foreach_copy_([m.grad for m in masters], training.gradients.tensors)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(training.params, masters)

    return step


def torch_clipped(place: Place) -> Step:
    training = Training(place)
    optimizer = training.fused()

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(training.params, 1e-3, foreach=True)
        optimizer.step()

    return step


def averaged_apart(optimizer: torch.optim.Optimizer) -> Step:
    """A step, then torch's own pass over all weights for the average."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    averages = [p.detach().clone() for p in params]

    def step() -> None:
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averages, params, 0.001)

    return step


def torch_accumulated(place: Place, accumulators: torch.dtype) -> Step:
    """Micro-batches added up by torch, averaged, and a step.

    As autograd does in the gradients' own dtype, or as training loops do by hand in float32, with
    the sums cast to the parameters' dtype in the end.
    """
    training = Training(place, BF16)
    optimizer = training.fused()
    by_hand = accumulators != BF16
    sums = [torch.empty_like(grad, dtype=accumulators) for grad in training.gradients.tensors]

    def step() -> None:
        with torch.no_grad():
            torch._foreach_copy_(sums, training.gradients.tensors)
            for _ in range(MICRO_BATCHES - 1):
                torch._foreach_add_(sums, training.gradients.tensors)
            torch._foreach_div_(sums, MICRO_BATCHES)
            for param, total in zip(training.params, sums, strict=True):
                param.grad = total.to(BF16) if by_hand else total
        optimizer.step()

    return step


def ours_accumulated(place: Place, **options: Any) -> Step:
    training = Training(place, BF16)
    optimizer = training.ours(**options)

    def step() -> None:
        for _ in range(MICRO_BATCHES - 1):
            training.gradients.give()
            optimizer.accumulate()
        training.gradients.give()
        optimizer.step()

    return step


BF16 = torch.bfloat16


@dataclass(frozen=True)
class Suite:
    """What is compared.

    Attributes:
        models: The names of its models, by the type of device.
        contenders: By name, what makes a step, and how many bytes per parameter that moves. The
            others are compared with the first one.
    """

    models: dict[str, tuple[str, ...]]
    contenders: dict[str, tuple[Callable[[Place], Step], int]]


def both(*names: str, large: str = "1x1B") -> dict[str, tuple[str, ...]]:
    """The same models on a CPU and on a GPU, on which 50 million elements are not many."""
    return {"cpu": names, "cuda": tuple(large if n == "1x50M" else n for n in names)}


SUITES = {
    "clip": Suite(
        both("1x50M", "gpt2-124m", "1000x4096", "1000x64"),
        {
            "max_grad_norm": (lambda place: ours(place, max_grad_norm=1e-3), 32),
            "clip_grad_norm_ + fused": (torch_clipped, 40),
            "no clipping": (ours, 28),
        },
    ),
    "ema": Suite(
        both("1x50M", "gpt2-124m", "1000x4096"),
        {
            "ema_decay": (lambda place: ours(place, ema_decay=0.999), 36),
            "no average": (ours, 28),
            "ours + a pass": (lambda place: averaged_apart(Training(place).ours()), 40),
            "fused + a pass": (lambda place: averaged_apart(Training(place).fused()), 40),
        },
    ),
    "accumulate": Suite(
        both("gpt2-124m"),
        {
            "accumulate()": (ours_accumulated, 6 + 2 * 10 + 18),
            "bfloat16 += and fused": (lambda place: torch_accumulated(place, BF16), 4 + 3 * 6 + 18),
            "float32 += and fused": (
                lambda place: torch_accumulated(place, torch.float32),
                6 + 3 * 10 + 8 + 6 + 14,
            ),
        },
    ),
    "state": Suite(
        both("1x50M", "gpt2-124m", "1000x4096"),
        {
            "float32": (ours, 28),
            "bfloat16": (lambda place: ours(place, state_dtype=BF16), 20),
            "8 bits": (lambda place: ours(place, state_dtype=torch.uint8), 16),
            "torch fused, float32": (torch_fused, 28),
        },
    ),
    "bfloat16 weights": Suite(
        both("1x50M", "gpt2-124m"),
        {
            "nearest": (lambda place: ours(place, BF16), 14),
            "master": (lambda place: ours(place, BF16, weight_precision="master"), 30),
            "remainder": (lambda place: ours(place, BF16, weight_precision="remainder"), 26),
            "stochastic": (lambda place: ours(place, BF16, weight_precision="stochastic"), 22),
            "kahan": (lambda place: ours(place, BF16, weight_precision="kahan"), 26),
            "remainder, 8 bits": (
                lambda place: ours(
                    place, BF16, weight_precision="remainder", state_dtype=torch.uint8
                ),
                14,
            ),
            "torch fused, bfloat16": (lambda place: torch_fused(place, BF16), 14),
            "torch fused, float32": (torch_fused, 28),
        },
    ),
    "a large model": Suite(
        {"cuda": ("llama-7b",)},  # as many of its layers as there is memory for
        {
            "master": (lambda place: ours(place, BF16, weight_precision="master"), 30),
            "remainder": (lambda place: ours(place, BF16, weight_precision="remainder"), 26),
            "float32 copy and fused": (torch_with_master, 2 + 4 + 28 + 4 + 2),
        },
    ),
    "graph": Suite(
        {"cuda": ("1000x1024", "10000x64", "resnet50")},
        {
            "replayed": (lambda place: replayed(Training(place).ours()), 28),
            "step()": (ours, 28),
            "torch fused, replayed": (
                lambda place: replayed(Training(place).fused(capturable=True)),
                28,
            ),
            "torch fused": (torch_fused, 28),
        },
    ),
}
# Bytes per parameter of the large model with all its contenders: weights, gradients and state, each
# with its own; and what is needed meanwhile.
LARGE_BYTES = (2 + 2 + 4 + 8) + (2 + 2 + 2 + 8) + (2 + 2 + 4 + 4 + 8) + 8


def fitting(model: Model, device: torch.device) -> Model:
    """A model, or as many of its first tensors as fit into memory for that suite's contenders."""
    room = machine.free_bytes(device) / LARGE_BYTES
    count, elements = 0, 0
    for shape in model.shapes:
        elements += math.prod(shape)
        if elements > room:
            break
        count += 1
    if count == len(model.shapes):
        return model
    return replace(model, name=f"{model.name}'s first {count}", shapes=model.shapes[:count])


def measure(title: str, suite: Suite, place: Place, count: int, budget: float) -> Any:
    model, device = place.model, place.device
    steps = {name: make(place) for name, (make, _) in suite.contenders.items()}
    now = machine.clock(device)
    timings = rounds(steps, count=count, budget=budget, clock=now)
    figures: dict[str, dict[str, float]] = {}
    if device.type == "cuda":
        for name, step in steps.items():
            host = machine.host_seconds(step, lambda: None, now, budget / 20)
            figures[name] = {"host_ms": 1e3 * host, "device_ms": machine.device_ms(step, host)}
        del step
    steps.clear()
    gc.collect()
    copied = machine.copied_per_second(device) / 1e9
    first = next(iter(suite.contenders))
    print(f"\n{title}, {model.name}; a copy runs at {copied:.0f} GB/s")
    rows = {}
    for name, (_, moved) in suite.contenders.items():
        spread, relative = timings[name].spread, ratio(timings[name], timings[first])
        rate = moved * model.elements / spread.median / 1e9
        found = figures.get(name, {})
        details = [
            f", {found[key]:.{digits}f} {words}"
            for key, digits, words in (
                ("device_ms", 3, "ms of the GPU"),
                ("host_ms", 3, "of the host"),
            )
            if key in found
        ]
        print(
            f"  {name:<26}{1e3 * spread.median:>9.3f} ms{moved:>5} B/param{rate:>8.1f} GB/s"
            f"{relative.median:>8.2f} x [{relative.low:.2f}-{relative.high:.2f}]{''.join(details)}",
            flush=True,
        )
        rows[name] = {
            "ms": {k: 1e3 * v for k, v in asdict(spread).items()},
            "bytes_per_parameter": moved,
            "gb_per_s": rate,
            "time_relative_to_first": asdict(relative),
            **found,
        }
    return {"suite": title, "case": model.name, "copy_gb_per_s": copied, "contenders": rows}


def count_launches(report: dict[str, Any], place_of: dict[str, Place]) -> None:
    """Add what each step launches. When all is timed (machine.launches)."""
    print("\nlaunches in a step")
    for found in report["results"]:
        counts = []
        for name, (make, _) in SUITES[found["suite"]].contenders.items():
            step = make(place_of[found["case"]])
            step()
            step()
            count = machine.launches(step)
            found["contenders"][name]["launches"] = count
            counts.append(f"{name} {count}")
            del step
            gc.collect()
            torch.cuda.empty_cache()
        print(f"  {found['suite']}, {found['case']}: {', '.join(counts)}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--suite", nargs="+", choices=SUITES, default=list(SUITES))
    parser.add_argument("--model", nargs="+", help="instead of each suite's own")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured here")
    parser.add_argument("--quick", action="store_true", help="few rounds")
    options = parser.parse_args(arguments)
    count, budget = (4, 1.0) if options.quick else (16, 12.0)
    device = CPU if options.device == "cpu" else torch.device("cuda", 0)
    report: dict[str, Any] = {**machine.environment(device), "results": []}
    place_of: dict[str, Place] = {}
    print(machine.describe(report))
    for title in options.suite:
        suite = SUITES[title]
        if device.type not in suite.models:
            continue
        for name in options.model or suite.models[device.type]:
            model = find(name)
            if title == "a large model":
                model = fitting(model, device)
            place = place_of[model.name] = Place(model, device)
            try:
                found = measure(title, suite, place, count, budget)
            except torch.OutOfMemoryError:
                print(f"\n{title}, {name}: left out, as the GPU has too little memory")
            else:
                report["results"].append(found)
            if device.type == "cuda":
                gc.collect()
                torch.cuda.empty_cache()
            write(report, options.json)
    if device.type == "cuda":
        count_launches(report, place_of)
        write(report, options.json)


def write(report: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
