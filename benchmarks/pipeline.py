"""Measure what a step does around the update: ``python benchmarks/pipeline.py --help``.

Clipping, averaging the weights, accumulating gradients, and low-precision weights and state, each
against the usual recipe around torch's fused step.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

import fusedopt
from fusedopt.bench.contenders import CPU, OPTIMIZERS, Case, Gradients
from fusedopt.bench.machine import describe, environment
from fusedopt.bench.measure import ratio, rounds
from fusedopt.models import MODELS, Model

Step = Callable[[], None]
ADAMW = OPTIMIZERS["adamw"]
MICRO_BATCHES = 4


class Training:
    """A model's parameters, in one group and one dtype, and their gradients."""

    def __init__(self, model: Model, dtype: torch.dtype = torch.float32) -> None:
        self.gradients = Gradients(Case(replace(model, group_each=False), ADAMW, dtype=dtype))
        self.params = self.gradients.parameters()

    def ours(self, **options: Any) -> fusedopt.AdamW:
        """Our optimizer of these parameters."""
        return fusedopt.AdamW(self.params, **ADAMW.options, **options)

    def fused(self) -> torch.optim.AdamW:
        """Torch's fused optimizer of these parameters."""
        return torch.optim.AdamW(self.params, **ADAMW.options, fused=True)


def torch_fused(model: Model, dtype: torch.dtype = torch.float32) -> Step:
    return Training(model, dtype).fused().step


def ours(model: Model, dtype: torch.dtype = torch.float32, **options: Any) -> Step:
    return Training(model, dtype).ours(**options).step


def torch_clipped(model: Model) -> Step:
    training = Training(model)
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


def torch_accumulated(model: Model, accumulators: torch.dtype) -> Step:
    """Micro-batches added up by torch, averaged, and a step.

    As autograd does in the gradients' own dtype, or as training loops do by hand in float32, with
    the sums cast to the parameters' dtype in the end.
    """
    training = Training(model, torch.bfloat16)
    optimizer = training.fused()
    by_hand = accumulators != torch.bfloat16
    sums = [torch.empty_like(grad, dtype=accumulators) for grad in training.gradients.tensors]

    def step() -> None:
        with torch.no_grad():
            torch._foreach_copy_(sums, training.gradients.tensors)
            for _ in range(MICRO_BATCHES - 1):
                torch._foreach_add_(sums, training.gradients.tensors)
            torch._foreach_div_(sums, MICRO_BATCHES)
            for param, total in zip(training.params, sums, strict=True):
                param.grad = total.to(torch.bfloat16) if by_hand else total
        optimizer.step()

    return step


def ours_accumulated(model: Model, **options: Any) -> Step:
    training = Training(model, torch.bfloat16)
    optimizer = training.ours(**options)

    def step() -> None:
        for _ in range(MICRO_BATCHES - 1):
            training.gradients.give()
            optimizer.accumulate()
        training.gradients.give()
        optimizer.step()

    return step


BF16 = torch.bfloat16

# By title: the models, the contenders (the first is what the others are compared with), and what
# each moves, in bytes per parameter.
Contenders = dict[str, tuple[Callable[[Model], Step], int]]
SUITES: dict[str, tuple[Sequence[str], Contenders]] = {
    "clip": (
        ("1x50M", "gpt2-124m", "1000x4096", "1000x64"),
        {
            "max_grad_norm": (lambda model: ours(model, max_grad_norm=1e-3), 32),
            "clip_grad_norm_ + fused": (torch_clipped, 40),
            "no clipping": (ours, 28),
        },
    ),
    "ema": (
        ("1x50M", "gpt2-124m", "1000x4096"),
        {
            "ema_decay": (lambda model: ours(model, ema_decay=0.999), 36),
            "no average": (ours, 28),
            "ours + a pass": (lambda model: averaged_apart(Training(model).ours()), 40),
            "fused + a pass": (lambda model: averaged_apart(Training(model).fused()), 40),
        },
    ),
    "accumulate": (
        ("gpt2-124m",),
        {
            "accumulate()": (ours_accumulated, 6 + 2 * 10 + 18),
            "bfloat16 += and fused": (lambda model: torch_accumulated(model, BF16), 4 + 3 * 6 + 18),
            "float32 += and fused": (
                lambda model: torch_accumulated(model, torch.float32),
                6 + 3 * 10 + 8 + 6 + 14,
            ),
        },
    ),
    "state": (
        ("1x50M", "gpt2-124m", "1000x4096"),
        {
            "float32": (ours, 28),
            "bfloat16": (lambda model: ours(model, state_dtype=BF16), 20),
            "8 bits": (lambda model: ours(model, state_dtype=torch.uint8), 16),
            "torch fused, float32": (torch_fused, 28),
        },
    ),
    "bfloat16 weights": (
        ("1x50M", "gpt2-124m"),
        {
            "nearest": (lambda model: ours(model, BF16), 14),
            "master": (lambda model: ours(model, BF16, weight_precision="master"), 30),
            "remainder": (lambda model: ours(model, BF16, weight_precision="remainder"), 26),
            "stochastic": (lambda model: ours(model, BF16, weight_precision="stochastic"), 22),
            "kahan": (lambda model: ours(model, BF16, weight_precision="kahan"), 26),
            "remainder, 8 bits": (
                lambda model: ours(
                    model, BF16, weight_precision="remainder", state_dtype=torch.uint8
                ),
                14,
            ),
            "torch fused, bfloat16": (lambda model: torch_fused(model, BF16), 14),
            "torch fused, float32": (torch_fused, 28),
        },
    ),
}


def measure(title: str, model: Model, contenders: Contenders, count: int, budget: float) -> Any:
    steps = {name: make(model) for name, (make, _) in contenders.items()}
    timings = rounds(steps, count=count, budget=budget)
    steps.clear()
    gc.collect()
    first = next(iter(contenders))
    print(f"\n{title}, {model.name}")
    rows = {}
    for name, (_, moved) in contenders.items():
        spread, relative = timings[name].spread, ratio(timings[name], timings[first])
        rate = moved * model.elements / spread.median / 1e9
        print(
            f"  {name:<26}{1e3 * spread.median:>9.3f} ms{moved:>5} B/param{rate:>8.1f} GB/s"
            f"{relative.median:>8.2f} x [{relative.low:.2f}-{relative.high:.2f}]",
            flush=True,
        )
        rows[name] = {
            "ms": {k: 1e3 * v for k, v in asdict(spread).items()},
            "bytes_per_parameter": moved,
            "gb_per_s": rate,
            "time_relative_to_first": asdict(relative),
        }
    return {"suite": title, "case": model.name, "contenders": rows}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--suite", nargs="+", choices=SUITES, default=list(SUITES))
    parser.add_argument("--model", nargs="+", choices=MODELS, help="instead of each suite's own")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured here")
    parser.add_argument("--quick", action="store_true", help="few rounds")
    options = parser.parse_args(arguments)
    count, budget = (4, 1.0) if options.quick else (16, 12.0)
    report: dict[str, Any] = {**environment(CPU), "results": []}
    print(describe(report))
    for title in options.suite:
        names, contenders = SUITES[title]
        for name in options.model or names:
            report["results"].append(measure(title, MODELS[name], contenders, count, budget))
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
