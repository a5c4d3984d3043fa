"""Measure what a tensor costs, whatever its size: ``python benchmarks/many_tensors.py --help``.

AdamW on tensors of 64 elements, from as many as fit into the nearest caches to as many as do not.
Beside the steps, the two parts that nothing gets around: to ask torch for the gradient of each
parameter and tell it that the parameter changes; and the update, of all elements in one tensor.
"""

from __future__ import annotations

import argparse
import json
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict
from operator import attrgetter
from pathlib import Path
from typing import Any

from torch.autograd.graph import increment_version

from fusedopt.bench.contenders import CONTENDERS, CPU, OPTIMIZERS, Case, Gradients
from fusedopt.bench.machine import describe, environment
from fusedopt.bench.measure import ratio, rounds
from fusedopt.bench.report import doubts
from fusedopt.models import Model

COUNTS = (100, 1000, 10_000)
ELEMENTS = 64
OURS = "fusedopt"


def case_of(tensors: int, elements: int) -> Case:
    return Case(Model(f"{tensors}x{elements}", tensors * ((elements,),)), OPTIMIZERS["adamw"])


def asking(gradients: Gradients) -> Callable[[], None]:
    """What a step asks torch for, and tells it, through Python's own iteration in C."""
    params = gradients.parameters()
    grad = attrgetter("grad")

    def step() -> None:
        deque(map(grad, params), maxlen=0)
        increment_version(params)

    return step


def measure(tensors: int, count: int, budget: float) -> dict[str, Any]:
    """Measure, and print, nanoseconds per tensor."""
    case, whole = case_of(tensors, ELEMENTS), case_of(1, tensors * ELEMENTS)
    gradients = Gradients(case)
    timings = rounds(
        {
            "torch fused": CONTENDERS["fused"](case, gradients),
            OURS: CONTENDERS["ours"](case, gradients),
            "asking torch": asking(gradients),
            "one tensor": CONTENDERS["ours"](whole, Gradients(whole)),
        },
        count=count,
        budget=budget,
    )
    print(
        f"\n{tensors} tensors: nanoseconds for each, and how many times as long as ours [10%-90%]"
    )
    rows = {}
    for name, timing in timings.items():
        nanoseconds = {k: 1e9 * v / tensors for k, v in asdict(timing.spread).items()}
        relative = ratio(timing, timings[OURS])
        print(
            f"  {name:<16}{nanoseconds['median']:>9.0f}"
            f"{relative.median:>9.2f} [{relative.low:.2f}-{relative.high:.2f}]",
            flush=True,
        )
        rows[name] = {"ns": nanoseconds, "time_relative_to_ours": asdict(relative)}
    return {"tensors": tensors, "contenders": rows}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured here")
    parser.add_argument(
        "--quick", action="store_true", help="few rounds, and not the 10,000 tensors"
    )
    options = parser.parse_args(arguments)
    counts, count, budget = (COUNTS[:2], 4, 1.0) if options.quick else (COUNTS, 24, 10.0)
    report: dict[str, Any] = {**environment(CPU), "results": []}
    print(describe(report))
    for tensors in counts:
        report["results"].append(measure(tensors, count, budget))
    print(*doubts(report), sep="\n")
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
