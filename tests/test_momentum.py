"""fusedopt.Momentum: the exponentially weighted average of the gradients, and SGD's checkpoints."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from helpers import (
    SETTLED,
    Twins,
    assert_same,
    make_params,
    params_of,
    random_tensor,
    set_grads,
    table,
)
from torch.nn import Parameter
from torch.optim import SGD, Optimizer, lr_scheduler

from fusedopt import Momentum
from fusedopt.cases import Case


def test_worked_numbers() -> None:
    """Loss w^2 / 2, whose gradient is w itself."""
    w = Parameter(torch.tensor(1.0, dtype=torch.float64))
    optimizer = Momentum([w], lr=0.1, momentum=0.9)
    # s = 1, then 0.9 * 1 + 0.1 * 0.9 = 0.99, then 0.9 * 0.99 + 0.1 * 0.801 = 0.9711
    for expected in (0.9, 0.801, 0.70389):
        optimizer.zero_grad()
        (w**2 / 2).backward()
        optimizer.step()
        assert w.item() == pytest.approx(expected, abs=1e-15)


def by_the_formula(
    w: float, grads: Sequence[float], lr: float, b: float, decay: float = 0, sign: int = 1
) -> float:
    s = 0.0
    for step, g in enumerate(grads):
        g = sign * g + decay * w
        s = g if step == 0 else b * s + (1 - b) * g
        w -= lr * s
    return w


@pytest.mark.parametrize("b", [0.0, 0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize(("decay", "sign"), [(0.0, 1), (0.1, 1), (0.1, -1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_follows_the_formula(b: float, decay: float, sign: int, dtype: torch.dtype) -> None:
    start = random_tensor((40,), dtype, 0)
    grads = [random_tensor((40,), dtype, step + 1) for step in range(20)]
    p = Parameter(start.clone())
    optimizer = Momentum([p], 0.05, b, weight_decay=decay, maximize=sign < 0)
    for grad in grads:
        p.grad = grad
        optimizer.step()
    expected = [
        by_the_formula(w, g, 0.05, b, decay, sign)
        for w, g in zip(start.tolist(), torch.stack(grads, 1).tolist(), strict=True)
    ]
    torch.testing.assert_close(p.detach(), torch.tensor(expected, dtype=dtype))


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_is_sgd_with_equal_dampening(momentum: float) -> None:
    params = make_params(), make_params()
    ours = Momentum(params[0], lr=0.1, momentum=momentum)
    stock = SGD(params[1], lr=0.1, momentum=momentum, dampening=momentum, foreach=False)
    for step in range(SETTLED):
        for optimizer in (ours, stock):
            set_grads(params_of(optimizer), step)
            optimizer.step()
        assert_same(ours, stock)


def test_defaults() -> None:
    group = Momentum(make_params()).param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (1e-3, 0.9, 0)
    assert (group["dampening"], group["nesterov"], group["maximize"]) == (0.9, False, False)


# --- Dampening: follows the momentum, or stays -------------------------------------------------


def one_cycle(optimizer: Optimizer) -> Any:
    return lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=12, cycle_momentum=True)


@pytest.mark.parametrize("fixed", [None, 0.3])
def test_a_scheduler_cycles_the_momentum(fixed: float | None) -> None:
    options = {"lr": 0.1, "dampening": 0.0 if fixed is None else fixed}
    twins = Twins(Case("Momentum", options))
    if fixed is None:
        twins.ours = Momentum(make_params(), lr=0.1)
    schedulers = [one_cycle(optimizer) for optimizer in twins]
    seen = set()
    for _ in range(10):
        if fixed is None:
            twins.stock.param_groups[0]["dampening"] = twins.stock.param_groups[0]["momentum"]
        twins.step()
        group = twins.ours.param_groups[0]
        assert group["dampening"] == (group["momentum"] if fixed is None else fixed)
        seen.add(group["momentum"])
        for scheduler in schedulers:
            scheduler.step()
    assert len(seen) > 5


OUTER = {"follows": None, "fixed": 0.3}
GROUPS = {
    "plain": ({}, lambda outer: 0.9 if outer is None else outer),
    "own_momentum": ({"momentum": 0.5}, lambda outer: 0.5 if outer is None else outer),
    "own_dampening": ({"dampening": 0.7}, lambda outer: 0.7),
    "no_dampening": ({"dampening": 0.0}, lambda outer: 0.0),
    "both": ({"momentum": 0.5, "dampening": 0.1}, lambda outer: 0.1),
    "follows_by_itself": ({"momentum": 0.5, "dampening": None}, lambda outer: 0.5),
}
COPIES: dict[str, Callable[[Optimizer], Optimizer]] = {
    "itself": lambda o: o,
    "deepcopy": copy.deepcopy,
    "pickle": lambda o: pickle.loads(pickle.dumps(o)),
}


@table("outer", OUTER)
@table("group", GROUPS)
@table("duplicate", COPIES)
def test_groups_have_their_own_dampening(
    outer: float | None, group: tuple, duplicate: Callable
) -> None:
    """In the constructor as when added later, also to a copy; and when the momentum changes."""
    options, expected = group
    first, second = make_params([(3,), (4,)])
    optimizer = Momentum([{"params": [first], **options}], lr=0.1, dampening=outer)
    optimizer = duplicate(optimizer)
    optimizer.add_param_group({"params": [second], **options})
    stock = SGD(
        [
            {"params": [p], **options, "dampening": expected(outer)}
            for p in make_params([(3,), (4,)])
        ],
        **{"lr": 0.1, "momentum": 0.9, "foreach": False},
    )
    for step in range(SETTLED):
        for either in (optimizer, stock):
            set_grads(params_of(either), step)
            either.step()
        assert_same(optimizer, stock)
    follows = (options.get("dampening", outer)) is None
    for changed in optimizer.param_groups:
        changed["momentum"] = 0.25
    set_grads(params_of(optimizer), 9)
    optimizer.step()
    for changed in optimizer.param_groups:
        assert changed["dampening"] == (0.25 if follows else expected(outer))


# --- Checkpoints -------------------------------------------------------------------------------


def test_saves_the_dampening_that_goes_with_the_momentum() -> None:
    """A scheduler has set the momentum of the next step already."""
    optimizer = Momentum(make_params(), lr=0.1)
    optimizer.param_groups[0]["momentum"] = 0.5
    group = optimizer.state_dict()["param_groups"][0]
    assert group["dampening"] == 0.5


@pytest.mark.parametrize("relay", [("ours", "stock", "ours"), ("stock", "ours", "stock")])
@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_checkpoints_pass_between_sgd_and_momentum(relay: tuple, momentum: float) -> None:
    options = {"lr": 0.1, "momentum": momentum}
    make = {
        "ours": lambda params: Momentum(params, **options),
        "stock": lambda params: SGD(params, **options, dampening=momentum, foreach=False),
    }
    params, saved = make_params(), None
    reference = make["stock"](make_params())
    for leg, runner in enumerate(relay):
        params = copy.deepcopy(params)
        optimizer = make[runner](params)
        if saved is not None:
            optimizer.load_state_dict(saved)
        for step in range(SETTLED * leg, SETTLED * (leg + 1)):
            for either in (optimizer, reference):
                set_grads(params_of(either), step)
                either.step()
            assert_same(optimizer, reference)
        saved = copy.deepcopy(optimizer.state_dict())


@pytest.mark.parametrize(
    ("momentum", "dampening", "after"),
    [(0.9, 0.9, 0.5), (0.9, 0.0, 0.0), (0.9, 0.3, 0.3), (0.0, 0.0, 0.5)],
)
def test_a_checkpoint_of_sgd_decides_on_the_dampening(
    momentum: float, dampening: float, after: float
) -> None:
    """It follows when it was equal to the momentum, and stays when it was not."""
    optimizer = Momentum(make_params(), lr=0.1)
    stock = SGD(make_params(), lr=0.1, momentum=momentum, dampening=dampening)
    optimizer.load_state_dict(stock.state_dict())
    group = optimizer.param_groups[0]
    assert (group["momentum"], group["dampening"]) == (momentum, dampening)
    group["momentum"] = 0.5
    set_grads(params_of(optimizer), 0)
    optimizer.step()
    assert group["dampening"] == after


def test_a_checkpoint_keeps_whether_dampening_follows() -> None:
    for dampening in (None, 0.9):
        saved = Momentum(make_params(), dampening=dampening).state_dict()
        optimizer = Momentum(make_params(), dampening=0.1)
        optimizer.load_state_dict(saved)
        optimizer.param_groups[0]["momentum"] = 0.5
        set_grads(params_of(optimizer), 0)
        optimizer.step()
        assert optimizer.param_groups[0]["dampening"] == (0.5 if dampening is None else 0.9)


def test_groups_made_for_sgd_serve() -> None:
    """Whoever exchanges the groups by hand gives it those of SGD."""
    optimizer, stock = Momentum(make_params(), lr=0.1), SGD(make_params(), lr=0.1, momentum=0.9)
    optimizer.param_groups = [{**stock.param_groups[0], "params": params_of(optimizer)}]
    for step in range(SETTLED):
        for either in (optimizer, stock):
            set_grads(params_of(either), step)
            either.step()
        assert_same(optimizer, stock)
