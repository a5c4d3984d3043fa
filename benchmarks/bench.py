"""Measure fusedopt against torch and DeepSpeed: ``python benchmarks/bench.py --help``."""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import memory
import torch
from cases import (
    CASES,
    CONTENDERS,
    DEFAULT_GRID,
    HOST_CASE,
    OPTIMIZERS,
    STOCK,
    AbsentError,
    Case,
    Optimizer,
    gradients,
)
from measure import Spread, Timing, ratio, rounds

import fusedopt
from fusedopt.extension import ISA

MEMORY_CASE = "1x50M"
MEMORY_CONTENDERS = ("foreach", "ours")
QUICK_ELEMENTS = 30_000_000  # --quick leaves out larger cases unless they are named


@dataclass(frozen=True)
class Effort:
    """How long to measure one case."""

    count: int  # rounds
    budget: float  # seconds


@dataclass(frozen=True)
class Result:
    """One case with one optimizer."""

    case: Case
    optimizer: Optimizer
    timings: dict[str, Timing]
    absent: dict[str, str]  # reasons

    @property
    def ratios(self) -> dict[str, Spread]:
        """How many times as long as ours each other takes; for the limit, ours' share of it."""
        ours = self.timings["ours"]
        others = {name: t for name, t in self.timings.items() if name != "ours"}
        best = min(
            (others[name] for name in STOCK if name in others), key=lambda t: t.spread.median
        )
        return {name: ratio(t, ours) for name, t in {"torch's best": best, **others}.items()}

    def as_json(self) -> dict[str, Any]:
        """Everything, in milliseconds, bytes and GB/s."""
        moved = self.optimizer.bytes_per_step(self.case)
        return {
            "case": self.case.name,
            "optimizer": self.optimizer.name,
            "tensors": len(self.case.shapes),
            "elements": self.case.elements,
            "bytes_per_step": moved,
            "contenders": {
                name: {
                    "ms": _milliseconds(timing.spread),
                    "gb_per_s": moved / timing.spread.median / 1e9,
                    "rounds": len(timing.rounds),
                    "steps_per_round": timing.steps,
                }
                for name, timing in self.timings.items()
            },
            "absent": self.absent,
            "time_relative_to_ours": {name: asdict(r) for name, r in self.ratios.items()},
        }


def measure_case(case: Case, optimizer: Optimizer, effort: Effort) -> Result:
    grads = gradients(case)
    steps, absent = {}, {}
    for name, make in CONTENDERS.items():
        try:
            steps[name] = make(case, optimizer, grads)
        except AbsentError as error:
            absent[name] = str(error)
    timings = rounds(steps, count=effort.count, budget=effort.budget)
    steps.clear()
    gc.collect()  # optimizers are in reference cycles, and hold gigabytes
    return Result(case, optimizer, timings, absent)


def measure_host(effort: Effort) -> Spread:
    """Seconds per step of 1000 two-element tensors."""
    step = CONTENDERS["ours"](HOST_CASE, OPTIMIZERS["adamw"], gradients(HOST_CASE))
    return rounds({"ours": step}, count=effort.count, budget=effort.budget)["ours"].spread


def measure_memory() -> dict[str, Any]:
    """Bytes that one AdamW step takes for itself, also relative to all tensors that exist."""
    held = OPTIMIZERS["adamw"].bytes_held(CASES[MEMORY_CASE])
    report: dict[str, Any] = {"case": MEMORY_CASE, "optimizer": "adamw", "bytes_held": held}
    for name in MEMORY_CONTENDERS:
        try:
            taken = memory.step_bytes(MEMORY_CASE, "adamw", name)
            report[name] = {"bytes_taken": taken, "relative": taken / held}
        except RuntimeError as error:
            report[name] = {"absent": str(error)}
    return report


def environment() -> dict[str, Any]:
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "versions": {
            "fusedopt": fusedopt.__version__,
            "torch": torch.__version__,
            "deepspeed": _version("deepspeed"),
            "python": platform.python_version(),
        },
        "cpu": _cpu_model(),
        "isa": ISA,
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],  # what ran here in the last minute
    }


def _commit() -> str | None:
    """The checkout's commit, marked when files differ from it; None outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), None)


def _milliseconds(spread: Spread) -> dict[str, float]:
    return {name: 1e3 * seconds for name, seconds in asdict(spread).items()}


# One row: the case, milliseconds per contender, GB/s, ratios.
_ROW = "{:<15}" + len(CONTENDERS) * "{:>10}" + "{:>7}" + 3 * "{:>22}"


def print_header(optimizer: Optimizer) -> None:
    print(f"\n{optimizer.name}: milliseconds per step (median), and how ours compares [10%-90%]\n")
    header = _ROW.format(
        "case", *CONTENDERS, "GB/s", "vs torch's best", "vs DeepSpeed", "share of limit"
    )
    print(header, "-" * len(header), sep="\n", flush=True)


def print_row(result: Result) -> None:
    medians = {name: timing.spread.median for name, timing in result.timings.items()}
    times = [f"{1e3 * medians[name]:.3f}" if name in medians else "absent" for name in CONTENDERS]
    speed = result.optimizer.bytes_per_step(result.case) / medians["ours"] / 1e9
    ratios = [_cell(result.ratios.get(name)) for name in ("torch's best", "DeepSpeed", "limit")]
    print(_ROW.format(result.case.name, *times, f"{speed:.1f}", *ratios), flush=True)


def _cell(r: Spread | None) -> str:
    return "absent" if r is None else f"{r.median:.2f} [{r.low:.2f}-{r.high:.2f}]"


def grid(
    cases: Sequence[str] | None, optimizers: Sequence[str] | None, quick: bool
) -> Iterator[tuple[Optimizer, list[Case]]]:
    """The cases to measure, by optimizer."""
    for name in dict.fromkeys(optimizers or DEFAULT_GRID):
        chosen = [CASES[case] for case in dict.fromkeys(cases or DEFAULT_GRID.get(name, CASES))]
        if quick and not cases:
            chosen = [case for case in chosen if case.elements <= QUICK_ELEMENTS]
        yield OPTIMIZERS[name], chosen


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Time fusedopt's steps against stock torch's, DeepSpeed's and the memory's.",
        epilog="benchmarks/README.md explains the columns.",
    )
    parser.add_argument(
        "--case",
        nargs="+",
        action="extend",
        choices=CASES,
        help="cases to measure (default: all with adamw, some with the other optimizers)",
    )
    parser.add_argument(
        "--optimizer",
        nargs="+",
        action="extend",
        choices=OPTIMIZERS,
        help=f"optimizers to measure (default: {', '.join(DEFAULT_GRID)})",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured here")
    parser.add_argument(
        "--quick", action="store_true", help="few rounds, and no large case that is not named"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    effort = Effort(count=3, budget=1.0) if options.quick else Effort(count=15, budget=10.0)
    report: dict[str, Any] = {**environment(), "results": []}
    print(
        f"torch {torch.__version__}, {report['cpu']}, {ISA}, {report['threads']} threads, "
        f"load average {report['load_average']:.2f}"
    )

    for optimizer, cases in grid(options.case, options.optimizer, options.quick):
        print_header(optimizer)
        absent = {}
        for case in cases:
            result = measure_case(case, optimizer, effort)
            print_row(result)
            absent.update(result.absent)
            report["results"].append(result.as_json())
        for name, reason in absent.items():
            print(f"{name} is absent: {reason}")

    measured = {(result["optimizer"], result["case"]) for result in report["results"]}
    if any(optimizer == "adamw" for optimizer, _ in measured):
        report["host_ms_per_1000_tensors"] = host = _milliseconds(measure_host(effort))
        print(f"\nhost time: {host['median']:.3f} ms per 1000 tensors")
    if ("adamw", MEMORY_CASE) in measured:
        report["memory"] = taken = measure_memory()
        for name in MEMORY_CONTENDERS:
            found = taken[name]
            text = found.get("absent") or f"{found['relative']:.1%} of what exists already"
            print(f"memory that a step of {name} takes for itself: {text}")
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
