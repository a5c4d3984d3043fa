"""AdamW steps on a GPU: torch's implementations and ours, beside a copy that moves as many bytes.

    python benchmarks/gpu.py --json gpu.json

Times are of whole steps, up to 20 of which are queued before the device is waited for; a ratio is
of two contenders that took turns in one process. With a norm, torch's contenders call
``clip_grad_norm_`` first. Host times are those of a call that finds the device idle and, as after
any ``backward()``, gradients at other addresses than the call before.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from cases import CASES, Case, Step
from measure import ratio, rounds

import fusedopt

OPTIONS = {"lr": 1e-5, "weight_decay": 0.01}
BYTES = 28  # read and written for an element: p, m and v twice, g once
NORM_BYTES = 4  # g once more


def commit() -> str:
    """The checkout's; empty when there is none, or no git."""
    try:
        command = ["git", "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def clock() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def contenders(case: Case, clip: bool) -> tuple[dict[str, Step], Callable[[], None]]:
    """Everyone with parameters and state of their own, on the same gradients.

    And what gives all of them other gradients.
    """
    batches = [[torch.randn(shape, device="cuda") for shape in case.shapes] for _ in range(2)]
    models: list[list[torch.nn.Parameter]] = []

    def next_batch() -> None:
        batches.reverse()
        for params in models:
            for p, g in zip(params, batches[0], strict=True):
                p.grad = g

    def model() -> list[Any]:
        params = [torch.nn.Parameter(torch.randn_like(g)) for g in batches[0]]
        models.append(params)
        return [{"params": [p]} for p in params] if case.group_each else params

    def stock(**how: bool) -> Step:
        optimizer = torch.optim.AdamW(model(), **OPTIONS, **how)
        params = [p for group in optimizer.param_groups for p in group["params"]]

        def step() -> None:
            if clip:
                torch.nn.utils.clip_grad_norm_(params, 1e9, foreach=True)
            optimizer.step()

        return step

    def copy() -> Step:
        moved = BYTES + (NORM_BYTES if clip else 0)
        source = torch.empty(case.elements * moved // 2, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    ours = fusedopt.AdamW(model(), **OPTIONS, max_grad_norm=1e9 if clip else None)
    steps = {
        "foreach": stock(foreach=True),
        "fused": stock(fused=True),
        "ours": ours.step,
        "copy": copy(),
    }
    next_batch()
    return steps, next_batch


def host_time(step: Step, next_batch: Callable[[], None], count: int = 20) -> float:
    """Seconds until a step's call returns."""
    times = []
    for _ in range(count):
        next_batch()
        start = clock()
        step()
        times.append(time.perf_counter() - start)
    return sorted(times)[count // 2]


def measure(case: Case, clip: bool, budget: float) -> dict[str, Any]:
    steps, next_batch = contenders(case, clip)
    timings = rounds(steps, budget=budget, clock=clock)
    ours = timings["ours"]
    return {
        "case": case.name,
        "clip": clip,
        "seconds": {name: vars(t.spread) for name, t in timings.items()},
        "ratio to ours": {n: vars(ratio(t, ours)) for n, t in timings.items() if n != "ours"},
        "host seconds": {n: host_time(step, next_batch) for n, step in steps.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where the results go")
    parser.add_argument("--budget", type=float, default=4.0, help="seconds for a case")
    arguments = parser.parse_args()
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "fusedopt": fusedopt.__version__,
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cases": [],
    }
    print(f"{'case':<18}{'foreach':>10}{'fused':>10}{'copy':>10}   times ours took;  ours, ms")
    for clip in (False, True):
        for case in CASES.values():
            row = measure(case, clip, arguments.budget)
            results["cases"].append(row)
            arguments.json.write_text(json.dumps(results, indent=1))  # also if a later one fails
            cells = [f"{row['ratio to ours'][n]['median']:>10.2f}" for n in ("foreach", "fused")]
            cells.append(f"{row['ratio to ours']['copy']['median']:>10.2f}")
            ours = 1e3 * row["seconds"]["ours"]["median"]
            print(f"{case.name + (' clip' if clip else ''):<18}{''.join(cells)}   {ours:.3f}")


if __name__ == "__main__":
    main()
