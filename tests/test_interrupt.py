"""Ctrl-C at any moment: a call of ours has happened as a whole, or not at all.

Python runs signal handlers between its own instructions, in effect when a call returns: so after
the kernels have run, for example, and before the next line. The tests interrupt there, at one
return after the other.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from helpers import make_params, params_of, set_grads, table
from torch import Tensor

import fusedopt
from fusedopt.optimizer import FusedOptimizer

PLACES = (str(Path(fusedopt.__file__).parent), str(Path(torch.optim.__file__).parent))


class Interrupter:
    """Raises KeyboardInterrupt when the n-th call made by our code or by torch.optim returns."""

    def __init__(self, n: int) -> None:
        self.left = n
        self.fired = False

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        if event == "c_return":
            caller: FrameType | None = frame
        elif event == "return":
            caller = frame.f_back
        else:
            return
        if self.fired or caller is None or not caller.f_code.co_filename.startswith(PLACES):
            return
        self.left -= 1
        if self.left < 0:
            self.fired = True
            raise KeyboardInterrupt

    def __enter__(self) -> Interrupter:
        sys.setprofile(self)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)


def contents(optimizer: FusedOptimizer) -> Any:
    """All that may change, copied: weights, gradients, state, groups and attributes."""
    own = vars(optimizer)
    state = own["state"]
    return copy.deepcopy(
        {
            "weights": [p.detach() for p in params_of(optimizer)],
            "grads": [p.grad for p in params_of(optimizer)],
            "state": [dict(state[p]) if p in state else {} for p in params_of(optimizer)],
            "groups": [
                {k: v for k, v in group.items() if k != "params"}
                for group in optimizer.param_groups
            ],
            "own": [
                optimizer._micro_batches, int(optimizer.skipped_steps), optimizer._idle_averages,
                optimizer._used(), optimizer._from_checkpoint,
            ],
        }
    )  # fmt: skip


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one.nan_to_num(), other.nan_to_num())
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def grads(optimizer: FusedOptimizer, step: int) -> None:
    set_grads(params_of(optimizer), step)


def windowed(optimizer: FusedOptimizer, n: int) -> None:
    for micro in range(n):
        grads(optimizer, 100 + micro)
        optimizer.accumulate()


def new(name: str, **options: Any) -> Callable[[], FusedOptimizer]:
    return lambda: getattr(fusedopt, name)(make_params(), lr=0.1, **options)


def first_step(o: FusedOptimizer) -> None:
    grads(o, 0)


def end_of_window(o: FusedOptimizer) -> None:
    windowed(o, 3)
    grads(o, 0)


def bad_step(o: FusedOptimizer) -> None:
    end_of_window(o)
    params_of(o)[0].grad.fill_(math.inf)  # type: ignore[union-attr]


def idle_averages(o: FusedOptimizer) -> None:
    grads(o, 0)
    o.ema_decay = 0.9
    o.step()
    saved = copy.deepcopy(o.state_dict())
    o.ema_decay = None
    with pytest.warns(UserWarning, match="ema"):
        o.load_state_dict(saved)
    grads(o, 1)


def averaged(o: FusedOptimizer) -> None:
    grads(o, 0)
    o.step()


def load(o: FusedOptimizer) -> None:
    o.load_state_dict(copy.deepcopy(SAVED))  # it may keep the tensors


# What is done before, and what is interrupted.
Call = tuple[Callable[[], FusedOptimizer], Callable[[FusedOptimizer], Any], Callable]
CALLS: dict[str, Call] = {
    "first_step": (new("SGD", momentum=0.9), first_step, lambda o: o.step()),
    "first_step_of_all_options": (
        new("AdamW", max_grad_norm=0.5, nonfinite="skip", ema_decay=0.9, state_dtype=torch.uint8),
        first_step, lambda o: o.step(),
    ),
    "later_step": (new("Adam"), averaged, lambda o: (grads(o, 5), o.step())),
    "end_of_window": (new("SGD", momentum=0.9), end_of_window, lambda o: o.step()),
    "end_of_first_window": (new("AdamW"), end_of_window, lambda o: o.step()),
    "first_micro_batch": (new("AdamW"), first_step, lambda o: o.accumulate()),
    "second_micro_batch": (new("SGD"), end_of_window, lambda o: o.accumulate()),
    "empty_micro_batch": (new("SGD"), lambda o: windowed(o, 2), lambda o: o.accumulate()),
    "skipped_step": (new("SGD", nonfinite="skip"), bad_step, lambda o: o.step()),
    "idle_averages": (new("AdamW"), idle_averages, lambda o: o.step()),
    "dropping_averages": (
        new("AdamW", ema_decay=0.9), averaged, lambda o: setattr(o, "ema_decay", None),
    ),
    "to_8_bits": (new("AdamW"), averaged, lambda o: setattr(o, "state_dtype", torch.uint8)),
    "load": (new("AdamW", ema_decay=0.5), averaged, load),
    "load_into_new": (new("AdamW"), lambda o: None, load),
}  # fmt: skip


def saved() -> dict[str, Any]:
    o = fusedopt.AdamW(make_params(), ema_decay=0.9, max_grad_norm=0.5)
    grads(o, 7)
    o.step()
    grads(o, 8)
    o.accumulate()
    return copy.deepcopy(o.state_dict())


SAVED = saved()


# (One that is met where a generator ends has nowhere to go.)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@table("call", CALLS)
def test_all_or_nothing(call: Call) -> None:
    make, prepare, act = call
    torch.manual_seed(0)
    ready = make()
    prepare(ready)

    def interrupted(n: int) -> tuple[FusedOptimizer, bool]:
        optimizer = copy.deepcopy(ready)
        for p, q in zip(params_of(optimizer), params_of(ready), strict=True):
            p.grad = None if q.grad is None else q.grad.clone()
        torch.manual_seed(1)
        try:
            with Interrupter(n) as interrupter:
                act(optimizer)
        except KeyboardInterrupt:
            pass
        return optimizer, interrupter.fired

    before, after = contents(interrupted(-1)[0]), contents(interrupted(10**9)[0])
    outcomes = set()
    n = 0
    while True:
        optimizer, fired = interrupted(n)
        if not fired:
            break
        found = contents(optimizer)
        nothing, everything = equal(found, before), equal(found, after)
        assert nothing != everything, f"neither nothing nor everything: interrupted at return {n}"
        outcomes.add(everything)
        # It can go on, and comes to where the other two do.
        torch.manual_seed(2)
        grads(optimizer, 50)
        optimizer.step()
        n += 1
    assert False in outcomes
    assert n > 5
