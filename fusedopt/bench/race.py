"""One case: its contenders against each other, and what they are measured by besides."""

from __future__ import annotations

import contextlib
import gc
import statistics
from collections.abc import Iterable, Mapping, Sequence
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
from fusedopt.bench.measure import Spread, Timing, ratio, rounds, together
from fusedopt.models import Model

# Up to so many elements there is next to nothing to move on a CPU: a step's time is the host's.
HOST_ELEMENTS = 1_000_000
LONGEST_LISTED_MS = 100
BEST = "torch's best"


@dataclass(frozen=True)
class Effort:
    """How long to measure a case: in each pass over all of them, so many rounds and seconds."""

    passes: int
    rounds: int
    budget: float


@dataclass(frozen=True)
class Measured:
    """What one pass found for a case, by contender.

    Attributes:
        timings: Of those that took part.
        absent: Why others did not.
        details: Figures besides.
        copied: Bytes that a copy in memory read and wrote per second before.
    """

    timings: dict[str, Timing]
    absent: dict[str, str]
    details: dict[str, dict[str, float]]
    copied: float


def bytes_needed(case: Case, names: Iterable[str]) -> int:
    """Memory for a case whose contenders are all there at once, roughly."""
    present = [name for name in names if not fault_of(name, case)]
    copied = "limit" in present and case.device.type != "cpu"
    holders = len(present) - copied
    # Beside parameters and state: the gradients, twice while they move, and foreach's temporaries.
    tensors = holders * (1 + case.optimizer.states) + 2 + 2
    buffers = 2 * COPIED_AT_ONCE + 2 * machine.COPIED_BYTES["cuda"]
    return case.bytes_of_parameters * tensors + copied * buffers


def measure(case: Case, names: Iterable[str], effort: Effort, *, details: bool = True) -> Measured:
    """Measure a case in one pass.

    Args:
        case: What to measure.
        names: Of contenders, among them "ours".
        effort: How long.
        details: Not only the steps' times.
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
    found: dict[str, dict[str, float]] = {}
    if details:
        for name, step in steps.items():
            found[name] = _details(case, step, gradients, effort.budget / 10)
    steps.clear()
    del gradients, step
    _forget(case)
    return Measured(timings, absent, found, copied)


def memory_of_steps(case: Case, names: Iterable[str]) -> dict[str, int]:
    """Bytes that a step takes for itself on a CPU, as far as that can be had."""
    found: dict[str, int] = {}
    if case.device.type != "cpu":
        return found  # measured with the other details
    for name in names:
        with contextlib.suppress(OSError, RuntimeError):  # not Linux; or too little memory
            found[name] = memory.step_bytes(case, name)
    return found


def launches_of_steps(case: Case, measured: Measured) -> dict[str, int]:
    """What steps launch on a GPU. To be asked when all cases have been timed (machine.launches).

    Not of contenders whose calls take so long that a list of all they launch takes minutes to read.
    """
    found: dict[str, int] = {}
    for name, details in measured.details.items():
        if details["host_ms"] > LONGEST_LISTED_MS:
            continue
        step = CONTENDERS[name](case, Gradients(case))
        step()  # creates the state
        step()
        found[name] = machine.launches(step)
        del step
        _forget(case)
    return found


def _forget(case: Case) -> None:
    """Give back what contenders had: optimizers are in reference cycles, and hold gigabytes."""
    gc.collect()
    if case.device.type == "cuda":
        torch.cuda.empty_cache()


def _details(case: Case, step: Step, gradients: Gradients, budget: float) -> dict[str, float]:
    on_cpu = case.device.type == "cpu"
    if on_cpu and case.model.elements > HOST_ELEMENTS:
        return {}
    host = machine.host_seconds(step, gradients.move, machine.clock(case.device), budget)
    if on_cpu:
        return {"host_ms": 1e3 * host}
    return {
        "host_ms": 1e3 * host,
        "device_ms": machine.device_ms(step, host),
        "extra_bytes": machine.extra_bytes(step),
    }


def result(
    case: Case,
    passes: Sequence[Measured],
    more: Mapping[str, Mapping[str, float]] | None = None,
) -> dict[str, Any]:
    """What JSON files hold of a case; ``more``: further figures, by name, of contenders."""
    more = more or {}
    absent = {name: why for found in passes for name, why in found.absent.items()}
    timings = {
        name: together([found.timings[name] for found in passes])
        for name in passes[0].timings
        if name not in absent
    }
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
        "left_out": case.model.left_out,
        "bytes_per_step": moved,
        "copy_gb_per_s": [found.copied / 1e9 for found in passes],
        "contenders": {
            name: {
                "ms": {key: 1e3 * value for key, value in asdict(timing.spread).items()},
                "gb_per_s": moved / timing.spread.median / 1e9,
                "rounds": len(timing.rounds),
                "steps": timing.steps,
                **_medians([found.details.get(name, {}) for found in passes]),
                **{key: figures[name] for key, figures in more.items() if name in figures},
            }
            for name, timing in timings.items()
        },
        "absent": absent,
        "time_relative_to_ours": {n: asdict(r) for n, r in _relative_to_ours(timings).items()},
    }


def _medians(figures: Sequence[dict[str, float]]) -> dict[str, float]:
    keys = dict.fromkeys(key for each in figures for key in each)
    return {key: statistics.median(each[key] for each in figures if key in each) for key in keys}


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
