"""Measure what surrounds a training step: ``python benchmarks/training.py --help``.

Schedules, stopping, the best weights and averages of weights, each against torch's own, or against
what one would write by hand.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.optim import lr_scheduler, swa_utils

import fusedopt
from fusedopt.averaging import EMA
from fusedopt.bench.contenders import CPU
from fusedopt.bench.machine import describe, environment
from fusedopt.bench.measure import ratio, rounds
from fusedopt.schedule import ScheduleLR, cosine
from fusedopt.stopping import BestWeights, EarlyStopping

Contenders = dict[str, Callable[[], object]]
CALLS = 1000  # of what takes microseconds, for one turn


def repeated(call: Callable[[], object]) -> Callable[[], None]:
    def calls() -> None:
        for _ in range(CALLS):
            call()

    return calls


def network(layers: int, width: int) -> tuple[torch.nn.Module, fusedopt.AdamW]:
    """A model and its optimizer, with state."""
    model = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(layers)))
    optimizer = fusedopt.AdamW(model.parameters(), lr=1e-3)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return model, optimizer


def schedules() -> Contenders:
    def stepped(make: Callable[[torch.optim.Optimizer], Any]) -> Callable[[], None]:
        groups = [{"params": [torch.nn.Parameter(torch.ones(1))]} for _ in range(2)]
        optimizer = torch.optim.SGD(groups, lr=0.1)
        scheduler = make(optimizer)
        optimizer.step()  # or torch warns of the order
        return repeated(scheduler.step)

    curve = cosine(10**9)
    return {
        "ScheduleLR": stepped(lambda optimizer: ScheduleLR(optimizer, curve)),
        "torch's CosineAnnealingLR": stepped(
            lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=10**9)
        ),
        "torch's LambdaLR of the same curve": stepped(
            lambda optimizer: lr_scheduler.LambdaLR(optimizer, curve)
        ),
    }


def stopping() -> Contenders:
    number, tensor = (EarlyStopping(patience=10**9) for _ in range(2))
    loss = torch.tensor(0.5)
    return {
        "step() of a number": repeated(lambda: number.step(0.5)),
        "step() of a tensor": repeated(lambda: tensor.step(loss)),
    }


def best_weights(layers: int, width: int) -> Contenders:
    model, optimizer = network(layers, width)
    best = BestWeights({"model": model, "optimizer": optimizer})
    state = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    tensors = [*(p.detach() for p in model.parameters()), *state]
    copies = [torch.empty_like(t) for t in tensors]
    return {
        "save()": lambda: best.save(0),
        "_foreach_copy_ of the same": lambda: torch._foreach_copy_(copies, tensors),
        "deepcopy of the state dicts": lambda: copy.deepcopy(
            (model.state_dict(), optimizer.state_dict())
        ),
        "restore()": best.restore,
    }


def averages(layers: int, width: int) -> Contenders:
    model, _ = network(layers, width)
    ema = EMA(model, decay=0.999)
    stock = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.999))
    stock.update_parameters(model)  # the first one copies
    return {
        "EMA.update()": lambda: ema.update(model),
        "torch's AveragedModel": lambda: stock.update_parameters(model),
    }


# By title: the contenders, of which the first is what the others are compared with, and how many
# calls one of their steps makes.
SUITES: dict[str, tuple[Callable[[], Contenders], int]] = {
    "schedule, two groups": (schedules, CALLS),
    "stopping": (stopping, CALLS),
    "best weights, 12.6 million parameters in 96 tensors": (lambda: best_weights(48, 511), 1),
    "best weights, 66 thousand in 800": (lambda: best_weights(400, 12), 1),
    "average, 12.6 million parameters in 96 tensors": (lambda: averages(48, 511), 1),
    "average, 66 thousand in 800": (lambda: averages(400, 12), 1),
}


def measure(title: str, count: int, budget: float) -> Any:
    make, calls = SUITES[title]
    steps = make()
    timings = rounds(steps, count=count, budget=budget)
    first = next(iter(steps))
    print(f"\n{title}")
    rows = {}
    for name, timing in timings.items():
        microseconds = {k: 1e6 * v / calls for k, v in asdict(timing.spread).items()}
        relative = ratio(timing, timings[first])
        print(
            f"  {name:<36}{microseconds['median']:>12.1f} us"
            f"{relative.median:>8.2f} x [{relative.low:.2f}-{relative.high:.2f}]",
            flush=True,
        )
        rows[name] = {"us": microseconds, "time_relative_to_first": asdict(relative)}
    return {"suite": title, "contenders": rows}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured here")
    parser.add_argument("--quick", action="store_true", help="few rounds")
    options = parser.parse_args(arguments)
    count, budget = (4, 0.5) if options.quick else (16, 4.0)
    report: dict[str, Any] = {**environment(CPU), "results": []}
    print(describe(report))
    for title in SUITES:
        report["results"].append(measure(title, count, budget))
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
