"""What the tests of curves and of schedulers share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import Parameter

from fusedopt.schedule import (
    Curve,
    constant,
    cosine,
    exponential,
    inverse_sqrt,
    inverse_time,
    linear,
    multi_step,
    piecewise_constant,
    polynomial,
    step,
    warmup,
    wsd,
)


def optimizer_of(*lrs: Any) -> torch.optim.Optimizer:
    """SGD with a group for each learning rate, which has done a step (or torch's classes warn)."""
    groups = [
        {"params": [Parameter(torch.ones(2, device="cpu"))], "lr": lr} for lr in lrs or (0.1,)
    ]
    optimizer = torch.optim.SGD(groups)
    stepped(optimizer)
    return optimizer


def stepped(optimizer: torch.optim.Optimizer) -> None:
    """Count as stepped, for schedulers made before and after."""
    optimizer._opt_called = True


def lrs_of(optimizer: torch.optim.Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def run(scheduler: Any, steps: int, group: int = 0) -> list[float]:
    """The learning rates of that many steps, from now on."""
    found = []
    for _ in range(steps):
        found.append(lrs_of(scheduler.optimizer)[group])
        scheduler.step()
    return found


def close(found: list[float], wanted: list[float]) -> None:
    assert found == pytest.approx(wanted, rel=1e-12, abs=1e-12)


# Every curve, with arguments for which something happens within 60 steps.
CURVES: dict[str, Curve] = {
    "constant": constant(0.5),
    "linear": linear(40, min_ratio=0.1),
    "polynomial": polynomial(40, power=2.0, min_ratio=0.1),
    "cosine": cosine(40, min_ratio=0.1),
    "cosine-restarts": cosine(50, cycles=3, cycle_mult=1.5, cycle_decay=0.7, k=1.5, min_ratio=0.1),
    "exponential": exponential(0.95, min_ratio=0.1),
    "step": step(10, 0.5),
    "multi_step": multi_step((10, 25, 32), 0.5),
    "piecewise_constant": piecewise_constant((10, 20), (1.0, 0.25, 0.5)),
    "inverse_sqrt": inverse_sqrt(5, min_ratio=0.3),
    "inverse_time": inverse_time(0.5, every=7, staircase=True),
    "warmup": warmup(cosine(30), 10, kind="exponential", start=0.01),
    "warmup-over": warmup(linear(50), 10, kind="saturating", prefix=False),
    "wsd": warmup(wsd(20, 20, shape="linear", min_ratio=0.1), 10, kind="cosine"),
}
