"""Measure what a step does around the update: ``python benchmarks/pipeline.py --help``.

Clipping, averaging the weights, accumulating gradients, and low-precision weights and state, each
against the usual recipe around torch's fused step.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from bench import environment
from cases import CASES, OPTIMIZERS, Case, gradients
from measure import ratio, rounds

import fusedopt

Step = Callable[[], None]
OPTIONS = OPTIMIZERS["adamw"].options
MICRO_BATCHES = 4


class Model:
    """A case's parameters, with gradients, in one dtype."""

    def __init__(self, case: Case, dtype: torch.dtype = torch.float32) -> None:
        self.grads = [grad.to(dtype) for grad in gradients(case)]
        self.params = [torch.nn.Parameter(grad.clone()) for grad in self.grads]
        self.set_grads()

    def set_grads(self) -> None:
        """Give each parameter its gradient again."""
        for param, grad in zip(self.params, self.grads, strict=True):
            param.grad = grad

    def ours(self, **options: Any) -> fusedopt.AdamW:
        """Our optimizer of these parameters."""
        return fusedopt.AdamW(self.params, **OPTIONS, **options)

    def fused(self) -> torch.optim.AdamW:
        """Torch's fused optimizer of these parameters."""
        return torch.optim.AdamW(self.params, **OPTIONS, fused=True)


def torch_fused(case: Case, dtype: torch.dtype = torch.float32) -> Step:
    return Model(case, dtype).fused().step


def ours(case: Case, dtype: torch.dtype = torch.float32, **options: Any) -> Step:
    return Model(case, dtype).ours(**options).step


def torch_clipped(case: Case) -> Step:
    model = Model(case)
    optimizer = model.fused()

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(model.params, 1e-3, foreach=True)
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


def torch_accumulated(case: Case, accumulators: torch.dtype) -> Step:
    """Micro-batches added up by torch, averaged, and a step.

    As autograd does in the gradients' own dtype, or as training loops do by hand in float32, with
    the sums cast to the parameters' dtype in the end.
    """
    model = Model(case, torch.bfloat16)
    optimizer = model.fused()
    by_hand = accumulators != torch.bfloat16
    sums = [torch.empty_like(grad, dtype=accumulators) for grad in model.grads]

    def step() -> None:
        with torch.no_grad():
            torch._foreach_copy_(sums, model.grads)
            for _ in range(MICRO_BATCHES - 1):
                torch._foreach_add_(sums, model.grads)
            torch._foreach_div_(sums, MICRO_BATCHES)
            for param, total in zip(model.params, sums, strict=True):
                param.grad = total.to(torch.bfloat16) if by_hand else total
        optimizer.step()

    return step


def ours_accumulated(case: Case, **options: Any) -> Step:
    model = Model(case, torch.bfloat16)
    optimizer = model.ours(**options)

    def step() -> None:
        for _ in range(MICRO_BATCHES - 1):
            model.set_grads()
            optimizer.accumulate()
        model.set_grads()
        optimizer.step()

    return step


BF16 = torch.bfloat16

# By title: the cases, the contenders (the first is what the others are compared with), and what
# each moves, in bytes per parameter.
Contenders = dict[str, tuple[Callable[[Case], Step], int]]
SUITES: dict[str, tuple[Sequence[str], Contenders]] = {
    "clip": (
        ("1x50M", "gpt2-124m", "1000x4096", "1000x64"),
        {
            "max_grad_norm": (lambda case: ours(case, max_grad_norm=1e-3), 32),
            "clip_grad_norm_ + fused": (torch_clipped, 40),
            "no clipping": (ours, 28),
        },
    ),
    "ema": (
        ("1x50M", "gpt2-124m", "1000x4096"),
        {
            "ema_decay": (lambda case: ours(case, ema_decay=0.999), 36),
            "no average": (ours, 28),
            "ours + a pass": (lambda case: averaged_apart(Model(case).ours()), 40),
            "fused + a pass": (lambda case: averaged_apart(Model(case).fused()), 40),
        },
    ),
    "accumulate": (
        ("gpt2-124m",),
        {
            "accumulate()": (ours_accumulated, 6 + 2 * 10 + 18),
            "bfloat16 += and fused": (lambda case: torch_accumulated(case, BF16), 4 + 3 * 6 + 18),
            "float32 += and fused": (
                lambda case: torch_accumulated(case, torch.float32),
                6 + 3 * 10 + 8 + 6 + 14,
            ),
        },
    ),
    "state": (
        ("1x50M", "gpt2-124m", "1000x4096"),
        {
            "float32": (ours, 28),
            "bfloat16": (lambda case: ours(case, state_dtype=BF16), 20),
            "8 bits": (lambda case: ours(case, state_dtype=torch.uint8), 16),
            "torch fused, float32": (torch_fused, 28),
        },
    ),
    "bfloat16 weights": (
        ("1x50M", "gpt2-124m"),
        {
            "nearest": (lambda case: ours(case, BF16), 14),
            "master": (lambda case: ours(case, BF16, weight_precision="master"), 30),
            "remainder": (lambda case: ours(case, BF16, weight_precision="remainder"), 26),
            "stochastic": (lambda case: ours(case, BF16, weight_precision="stochastic"), 22),
            "kahan": (lambda case: ours(case, BF16, weight_precision="kahan"), 26),
            "remainder, 8 bits": (
                lambda case: ours(
                    case, BF16, weight_precision="remainder", state_dtype=torch.uint8
                ),
                14,
            ),
            "torch fused, bfloat16": (lambda case: torch_fused(case, BF16), 14),
            "torch fused, float32": (torch_fused, 28),
        },
    ),
}


def measure(title: str, case: Case, contenders: Contenders, count: int, budget: float) -> Any:
    steps = {name: make(case) for name, (make, _) in contenders.items()}
    timings = rounds(steps, count=count, budget=budget)
    steps.clear()
    gc.collect()
    first = next(iter(contenders))
    print(f"\n{title}, {case.name}")
    rows = {}
    for name, (_, moved) in contenders.items():
        spread, relative = timings[name].spread, ratio(timings[name], timings[first])
        rate = moved * case.elements / spread.median / 1e9
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
    return {"suite": title, "case": case.name, "contenders": rows}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--suite", nargs="+", choices=SUITES, default=list(SUITES))
    parser.add_argument("--case", nargs="+", choices=CASES, help="instead of each suite's own")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured here")
    parser.add_argument("--quick", action="store_true", help="few rounds")
    options = parser.parse_args(arguments)
    count, budget = (3, 1.0) if options.quick else (15, 12.0)
    report = {**environment(), "results": []}
    print(f"torch {torch.__version__}, {report['cpu']}, {report['isa']}, ", end="")
    print(f"{report['threads']} threads, load average {report['load_average']:.2f}")
    for title in options.suite:
        cases, contenders = SUITES[title]
        for name in options.case or cases:
            report["results"].append(measure(title, CASES[name], contenders, count, budget))
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
