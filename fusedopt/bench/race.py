"""One case: its contenders against each other, and what they are measured by besides."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fusedopt.bench import machine, memory
from fusedopt.bench.contenders import (
    CONTENDERS,
    COPIED_AT_ONCE,
    TORCH,
    Case,
    Gradients,
    Step,
    fault_of,
    reason,
)
from fusedopt.bench.measure import Spread, Timing, ratio, rounds
from fusedopt.models import Model

# Up to so many elements there is next to nothing to move on a CPU: a step's time is the host's.
HOST_ELEMENTS = 1_000_000
BEST = "torch's best"


@dataclass(frozen=True)
class Effort:
    """How long to measure a case."""

    rounds: int
    budget: float  # seconds


def bytes_needed(case: Case, names: Iterable[str]) -> int:
    """Memory for a case whose contenders are all there at once, roughly."""
    present = [name for name in names if not fault_of(name, case)]
    copied = "limit" in present and case.device.type != "cpu"
    holders = len(present) - copied
    # Beside parameters and state: the gradients, twice while they move, and foreach's temporaries.
    tensors = holders * (1 + case.optimizer.states) + 2 + 2
    return case.bytes_of_parameters * tensors + copied * 2 * COPIED_AT_ONCE


def measure(
    case: Case, names: Iterable[str], effort: Effort, *, details: bool = True, extra: bool = False
) -> dict[str, Any]:
    """Measure a case; the result is what JSON files hold.

    Args:
        case: What to measure.
        names: Of contenders, among them "ours".
        effort: How long.
        details: Not only the steps' times.
        extra: On a CPU, also the memory that a step takes, which needs a process for each.
    """
    gradients = Gradients(case)
    steps: dict[str, Step] = {}
    absent: dict[str, str] = {}
    for name in names:
        try:
            step = CONTENDERS[name](case, gradients)
            step()  # what compiles, compiles now, and may fail
        except Exception as error:
            if name == "ours":
                raise
            absent[name] = reason(error)
        else:
            steps[name] = step
    copied = machine.copied_per_second(case.device)
    now = machine.clock(case.device)
    timings = rounds(steps, count=effort.rounds, budget=effort.budget, clock=now)
    result = {**_result(case, timings, absent), "copy_gb_per_s": copied / 1e9}
    if details:
        for name, step in steps.items():
            result["contenders"][name].update(_details(case, step, gradients, effort.budget / 10))
    steps.clear()
    del gradients, step
    gc.collect()  # optimizers are in reference cycles, and hold gigabytes
    if case.device.type == "cuda":
        torch.cuda.empty_cache()
    elif extra:
        for name in timings:
            with contextlib.suppress(OSError, RuntimeError):  # not Linux; or too little memory
                result["contenders"][name]["extra_bytes"] = memory.step_bytes(case, name)
    return result


def _details(case: Case, step: Step, gradients: Gradients, budget: float) -> dict[str, float]:
    on_cpu = case.device.type == "cpu"
    if on_cpu and case.model.elements > HOST_ELEMENTS:
        return {}
    host = machine.host_seconds(step, gradients.move, machine.clock(case.device), budget)
    return {"host_ms": 1e3 * host, **({} if on_cpu else machine.cuda_figures(step, host))}


def _result(case: Case, timings: dict[str, Timing], absent: dict[str, str]) -> dict[str, Any]:
    moved = case.bytes_per_step
    dtypes = dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in case.dtypes)
    return {
        "case": case.model.name,
        "optimizer": case.optimizer.name,
        "device": str(case.device),
        "dtype": "+".join(dtypes),
        "clip": case.clip,
        "tensors": len(case.model.shapes),
        "groups": len(case.model.shapes) if case.model.group_each else 1,
        "elements": case.model.elements,
        "bytes_per_step": moved,
        "contenders": {
            name: {
                "ms": {key: 1e3 * value for key, value in asdict(timing.spread).items()},
                "gb_per_s": moved / timing.spread.median / 1e9,
                "rounds": len(timing.rounds),
                "steps_per_round": timing.steps,
            }
            for name, timing in timings.items()
        },
        "absent": absent,
        "time_relative_to_ours": {n: asdict(r) for n, r in _relative_to_ours(timings).items()},
    }


def _relative_to_ours(timings: dict[str, Timing]) -> dict[str, Spread]:
    """How many times as long as ours each other takes; for the limit, ours' share of it."""
    ours = timings["ours"]
    others = {name: timing for name, timing in timings.items() if name != "ours"}
    stock = [others[name] for name in TORCH if name in others]
    best = {BEST: min(stock, key=lambda timing: timing.spread.median)} if stock else {}
    return {name: ratio(timing, ours) for name, timing in {**best, **others}.items()}


def curves() -> dict[str, list[Model]]:
    """What shows how a step's cost grows, by what it grows with: models from small to large."""
    counts = [digit * 10**power for power in range(9) for digit in (1, 3)]

    def many(count: int, elements: int, group_each: bool = False) -> Model:
        return Model(f"{count}x{elements}", count * ((elements,),), group_each=group_each)

    return {
        "elements": [many(1, count) for count in counts if 1_000 <= count <= 100_000_000],
        "tensors": [many(count, 64) for count in counts if count <= 10_000],
        "groups": [many(count, 64, group_each=True) for count in counts if count <= 1_000],
    }
