"""Curves have the values of their formulas and of torch's schedulers; the scheduler resumes."""

from __future__ import annotations

import io
import math
import pickle
import random
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from helpers import table
from torch.nn import Parameter
from torch.optim import lr_scheduler as stock

import fusedopt
from fusedopt.schedule import (
    WSDLR,
    Curve,
    InverseSquareRootLR,
    InverseTimeLR,
    PiecewiseConstantLR,
    Plateau,
    ScheduleLR,
    WarmupCosineLR,
    constant,
    cosine,
    exponential,
    inverse_sqrt,
    inverse_time,
    linear,
    multi_step,
    piecewise_constant,
    plot_schedule,
    polynomial,
    step,
    values,
    warmup,
    wsd,
)

NAN, INF = math.nan, math.inf


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


def saved(scheduler: Any) -> Any:
    """The state, through a file that may hold nothing but plain data."""
    file = io.BytesIO()
    torch.save(scheduler.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


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


# --- the curves -----------------------------------------------------------------------------------


TORCH: dict[str, tuple[Curve, Callable[[Any], Any], int]] = {
    "ConstantLR": (
        piecewise_constant([5], [1 / 3, 1]),
        partial(stock.ConstantLR, factor=1 / 3, total_iters=5),
        60,
    ),
    "LinearLR-up": (
        warmup(constant(), 7, start=1 / 3),
        partial(stock.LinearLR, start_factor=1 / 3, total_iters=7),
        60,
    ),
    "LinearLR-down": (
        linear(40, min_ratio=0.2),
        partial(stock.LinearLR, start_factor=1.0, end_factor=0.2, total_iters=40),
        60,
    ),
    "PolynomialLR": (
        polynomial(40, power=1.7),
        partial(stock.PolynomialLR, total_iters=40, power=1.7),
        60,
    ),
    "PolynomialLR-line": (linear(40), partial(stock.PolynomialLR, total_iters=40), 60),
    "CosineAnnealingLR": (
        cosine(40, min_ratio=0.05),
        partial(stock.CosineAnnealingLR, T_max=40, eta_min=0.05 * 0.1),
        41,  # it rises again
    ),
    "CosineAnnealingWarmRestarts": (
        cosine(70, cycles=3, cycle_mult=2.0, min_ratio=0.05),
        partial(stock.CosineAnnealingWarmRestarts, T_0=10, T_mult=2, eta_min=0.05 * 0.1),
        70,
    ),
    "ExponentialLR": (exponential(0.95), partial(stock.ExponentialLR, gamma=0.95), 200),
    "StepLR": (step(50, 0.5), partial(stock.StepLR, step_size=50, gamma=0.5), 200),
    "MultiStepLR": (
        multi_step([50, 125, 160], 0.5),
        partial(stock.MultiStepLR, milestones=[50, 125, 160], gamma=0.5),
        200,
    ),
}


@table("case", TORCH)
def test_torchs_schedulers(case: tuple[Curve, Callable[[Any], Any], int]) -> None:
    curve, theirs, steps = case
    ours = run(ScheduleLR(optimizer_of(0.1), curve), steps)
    close(ours, run(theirs(optimizer_of(0.1)), steps))
    assert len(set(ours)) > 1


ENDS = {
    "linear": (linear(40, min_ratio=0.1), 40, 0.1),
    "polynomial": (polynomial(40, power=0.5, min_ratio=0.3), 40, 0.3),
    "cosine": (cosine(40, min_ratio=0.1), 40, 0.1),
    "cosine-restarts": (cosine(70, cycles=3, cycle_mult=2, cycle_decay=0.1), 70, 0.0),
    "multi_step": (multi_step([3, 40], 0.5), 40, 0.25),
    "piecewise_constant": (piecewise_constant([3, 40], [1, 2, 0.7]), 40, 0.7),
    "warmup": (warmup(linear(30), 10), 40, 0.0),
    "warmup-over": (warmup(linear(40), 10, prefix=False), 40, 0.0),
    "wsd": (wsd(30, 10, min_ratio=0.1), 40, 0.1),
    "exponential": (exponential(0.5, min_ratio=0.1), 4, 0.1),
    "inverse_sqrt": (inverse_sqrt(4, min_ratio=0.25), 60, 0.25),
    "inverse_time": (inverse_time(0.5, min_ratio=0.25), 6, 0.25),
}


@table("case", ENDS)
def test_after_the_end_it_stays(case: tuple[Curve, int, float]) -> None:
    curve, end, last = case
    assert curve(end - 1) != last
    assert [curve(t) for t in (end, end + 1, 2 * end, 10**9)] == [last] * 4


@pytest.mark.parametrize("min_ratio", [0.0, 0.1, 0.3, 1 / 3, 0.7, 1.0])
def test_both_ends_are_exact(min_ratio: float) -> None:
    curves = [
        linear(7, min_ratio=min_ratio),
        polynomial(7, power=2.5, min_ratio=min_ratio),
        cosine(7, min_ratio=min_ratio),
        *(
            wsd(0, 7, shape=shape, min_ratio=min_ratio)
            for shape in ("1-sqrt", "linear", "cosine", "exponential")
        ),
    ]
    for curve in curves:
        assert (curve(0), curve(7)) == (1.0, min_ratio)


def test_the_articles_decays() -> None:
    """lr 0.1: milestones [50, 125, 160] and every 50 steps with gamma 0.5; 0.95 each step."""
    multi = run(ScheduleLR(optimizer_of(0.1), multi_step([50, 125, 160], 0.5)), 200)
    assert multi == [0.1] * 50 + [0.05] * 75 + [0.025] * 35 + [0.0125] * 40
    every = run(ScheduleLR(optimizer_of(0.1), step(50, 0.5)), 200)
    assert every == [0.1] * 50 + [0.05] * 50 + [0.025] * 50 + [0.0125] * 50
    close(
        run(ScheduleLR(optimizer_of(0.1), exponential(0.95)), 200),
        [0.1 * 0.95**t for t in range(200)],
    )


def test_the_articles_warmup() -> None:
    """The epochs' factors are (epoch + 1) / 5 for five epochs."""
    close(values(warmup(constant(), 4, start=0.2), 7), [0.2, 0.4, 0.6, 0.8, 1, 1, 1])


@pytest.mark.parametrize("lr", [0.01, 0.1, 0.125, 0.2, 0.3])
def test_gradient_descent_on_a_parabola(lr: float) -> None:
    """y = 4 x^2: each step multiplies x by 1 - 8 lr; at 0.125 one step lands on 0."""
    x = Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer = fusedopt.SGD([x], lr=lr)
    scheduler = ScheduleLR(optimizer, constant())
    for n in range(1, 11):
        x.grad = 8 * x.detach()
        optimizer.step()
        scheduler.step()
        assert x.item() == pytest.approx(2 * (1 - 8 * lr) ** n, rel=1e-12, abs=1e-300)


def test_one_step_on_half_a_square() -> None:
    """loss = w^2 / 2 from w = 1 with lr 0.1."""
    w = Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = fusedopt.SGD([w], lr=0.1)
    ScheduleLR(optimizer, cosine(10))
    (w * w / 2).sum().backward()
    optimizer.step()
    assert w.item() == 0.9


def test_a_schedule_is_a_factor() -> None:
    """An article returned learning rates where factors belong: 100 times less after warm-up."""
    base, warm, total = 1e-2, 5, 50
    found = run(WarmupCosineLR(optimizer_of(base), total, warm), total + 1)
    assert max(found) == found[warm] == base
    assert found[:warm] == sorted(found[:warm])
    assert found[warm:] == sorted(found[warm:], reverse=True)
    assert found[warm + 1] > 0.99 * base
    assert all(type(lr) is float for lr in found)

    def wrong(epoch: int) -> float:  # as in the article
        rate = (epoch + 1) / warm
        return rate if epoch < warm else base * (1 + math.cos(math.pi * epoch / total)) / 2

    theirs = run(stock.LambdaLR(optimizer_of(base), wrong), total)
    assert theirs[warm] < theirs[warm - 1] / 100 * 1.01


def test_transformers_inverse_sqrt() -> None:
    """min(t / warm-up, 1 / sqrt((t + shift) / timescale)), with shift = timescale - warm-up."""
    for warm, timescale in ((10, 10), (10, 25), (0, 10_000)):

        def theirs(t: int, warm: int = warm, timescale: int = timescale) -> float:
            if t < warm:
                return t / warm
            return 1.0 / math.sqrt((t + timescale - warm) / timescale)

        scheduler = InverseSquareRootLR(optimizer_of(0.1), warm, timescale=timescale)
        close(run(scheduler, 300), [0.1 * theirs(t) for t in range(300)])
    defaults = InverseSquareRootLR(optimizer_of(0.1), 10)
    assert run(defaults, 99) == run(InverseSquareRootLR(optimizer_of(0.1), 10, timescale=10), 99)
    assert InverseSquareRootLR(optimizer_of(0.1)).schedule == [warmup(inverse_sqrt(10_000), 0)]
    close(values(inverse_sqrt(1), 50), [1 / math.sqrt(t + 1) for t in range(50)])


@pytest.mark.parametrize("min_ratio", [0.0, 0.1])
@pytest.mark.parametrize("shape", ["linear", "cosine", "1-sqrt"])
def test_transformers_wsd(shape: str, min_ratio: float) -> None:
    warm, stable, decay = 10, 20, 30

    def theirs(t: int) -> float:
        if t < warm:
            return t / warm
        if t < warm + stable:
            return 1.0
        if t >= warm + stable + decay:
            return min_ratio
        progress = (t - warm - stable) / decay
        factor = {
            "linear": 1 - progress,
            "cosine": 0.5 * (1 + math.cos(math.pi * 0.5 * 2 * progress)),
            "1-sqrt": 1 - math.sqrt(progress),
        }[shape]
        return factor * (1 - min_ratio) + min_ratio

    scheduler = WSDLR(
        optimizer_of(0.1), stable, decay, warmup_steps=warm, shape=shape, min_ratio=min_ratio
    )
    close(run(scheduler, 80), [0.1 * theirs(t) for t in range(80)])


@pytest.mark.parametrize("shape", ["linear", "cosine", "1-sqrt", "exponential"])
def test_megatrons_cooldown(shape: str) -> None:
    """It computes min_lr + coefficient * (max_lr - min_lr) over the last wsd_decay_steps."""
    max_lr, min_lr, total, decay = 0.1, 0.01, 60, 25

    def theirs(t: int) -> float:
        begin = total - decay
        if t <= begin:
            coefficient = 1.0
        elif t > total:
            return min_lr
        else:
            ratio = (t - begin) / decay
            coefficient = {
                "linear": 1.0 - ratio,
                "cosine": 0.5 * (math.cos(math.pi * ratio) + 1.0),
                "exponential": 2.0 * math.pow(0.5, ratio) - 1.0,
                "1-sqrt": 1.0 - math.sqrt(ratio),  # minus_sqrt there
            }[shape]
        return min_lr + coefficient * (max_lr - min_lr)

    curve = wsd(total - decay, decay, shape=shape, min_ratio=min_lr / max_lr)
    close([max_lr * f for f in values(curve, 80)], [theirs(t) for t in range(80)])


@pytest.mark.parametrize("staircase", [False, True])
def test_keras_inverse_time(staircase: bool) -> None:
    """initial / (1 + rate * step / decay_steps), the quotient rounded down in a staircase."""

    def theirs(t: int) -> float:
        time = math.floor(t / 7) if staircase else t / 7
        return 0.1 / (1 + 0.5 * time)

    scheduler = InverseTimeLR(optimizer_of(0.1), 0.5, every=7, staircase=staircase)
    close(run(scheduler, 50), [theirs(t) for t in range(50)])


def test_keras_piecewise_constant() -> None:
    """There the first value counts as long as step <= boundaries[0]: one step longer than here."""

    def theirs(t: int) -> float:
        if t <= 10:
            return 1.0
        if t <= 25:
            return 0.5
        return 0.1

    scheduler = PiecewiseConstantLR(optimizer_of(1.0), [10 + 1, 25 + 1], [1.0, 0.5, 0.1])
    assert run(scheduler, 40) == [theirs(t) for t in range(40)]


def test_cosine_with_everything() -> None:
    """timm's formula: lr_min + (lr_max - lr_min) (1 + cos(pi t^k / T^k)) / 2 within each cycle."""
    found = values(cosine(70, cycles=3, cycle_mult=2, cycle_decay=0.5, k=1.5, min_ratio=0.1), 70)
    wanted = []
    for cycle, length in enumerate((10, 20, 40)):
        peak = 0.5**cycle
        for t in range(length):
            angle = math.pi * t**1.5 / length**1.5
            wanted.append(0.1 + 0.5 * (peak - 0.1) * (1 + math.cos(angle)))
    close(found, wanted)


def test_cycles_begin_on_whole_steps() -> None:
    curve = cosine(10, cycles=3)
    assert [t for t in range(10) if curve(t) == 1] == [0, 3, 7]
    shrinking = cosine(70, cycles=3, cycle_mult=0.5)
    assert [t for t in range(70) if shrinking(t) == 1] == [0, 40, 60]
    low = cosine(30, cycles=3, cycle_decay=0.1, min_ratio=0.5)
    assert values(low, 30)[10:] == [0.5] * 20  # peaks are not below the end


def test_warmup_kinds() -> None:
    rises = {
        "linear": lambda u: 0.1 + 0.9 * u,
        "exponential": lambda u: 0.1 ** (1 - u),
        "cosine": lambda u: 0.1 + 0.9 * (1 - math.cos(math.pi * u)) / 2,
        "saturating": lambda u: 0.1 + 0.9 * (1 - math.exp(-5 * u)) / (1 - math.exp(-5)),
    }
    for kind, rise in rises.items():
        found = values(warmup(constant(), 20, kind=kind, start=0.1), 22)
        close(found, [rise(t / 20) for t in range(21)] + [1.0])
        assert found[20:] == [1.0, 1.0]
        assert found == sorted(found)


def test_saturating_warmup_is_the_papers() -> None:
    """1 - exp(-t / tau) with tau = steps / 5, up to the 0.7 % that are missing at its end."""
    for t, found in enumerate(values(warmup(constant(), 50, kind="saturating"), 50)):
        assert found == pytest.approx(1 - math.exp(-t / 10), rel=0.0068)


def test_warmup_before_and_over_a_curve() -> None:
    curve = linear(20)
    before = values(warmup(curve, 10), 30)
    close(before, [t / 10 for t in range(10)] + values(curve, 20))
    over = values(warmup(curve, 10, prefix=False), 30)
    close(over, [min(t / 10, 1) * curve(t) for t in range(30)])
    assert warmup(curve, 0) != curve
    assert values(warmup(curve, 0), 30) == values(curve, 30)


def test_sequential_in_one_object() -> None:
    """Ours from 1e-3 equals torch's LinearLR and CosineAnnealingLR in a SequentialLR."""
    optimizer = optimizer_of(0.1)
    parts = [
        stock.LinearLR(optimizer, start_factor=1e-3, total_iters=10),
        stock.CosineAnnealingLR(optimizer, T_max=30),
    ]
    theirs = run(stock.SequentialLR(optimizer, parts, milestones=[10]), 41)
    close(run(WarmupCosineLR(optimizer_of(0.1), 40, 10, start=1e-3), 41), theirs)


@table("curve", CURVES)
def test_curves_are_values(curve: Curve) -> None:
    again = pickle.loads(pickle.dumps(curve))
    assert again == curve
    assert hash(again) == hash(curve)
    assert repr(again) == repr(curve)
    assert values(again, 60) == values(curve, 60)
    backwards = [curve(t) for t in reversed(range(60))]
    assert backwards[::-1] == values(curve, 60)  # nothing depends on what was asked before
    name = next(iter(vars(curve)))
    with pytest.raises(AttributeError):
        setattr(curve, name, 1)


def test_values_and_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    assert values(linear(4), 6) == [1, 0.75, 0.5, 0.25, 0, 0]
    assert values(linear(4), 0) == []
    import matplotlib as mpl
    from matplotlib.figure import Figure

    ax = Figure().subplots()
    assert plot_schedule(linear(4), 6, ax=ax) is ax
    assert ax.lines[0].get_ydata().tolist() == values(linear(4), 6)
    assert len(plot_schedule(cosine(4), 6, ax=ax).lines) == 2

    mpl.use("Agg")
    from matplotlib import pyplot

    own = plot_schedule(linear(4), 6)
    assert own.get_xlabel() == "step"
    pyplot.close(own.figure)
    assert pyplot.get_fignums() == []

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="plots need matplotlib: pip install matplotlib"):
        plot_schedule(linear(4), 6)


# --- the scheduler --------------------------------------------------------------------------------


@table("curve", CURVES)
def test_the_scheduler_follows_the_curve(curve: Curve) -> None:
    scheduler = ScheduleLR(optimizer_of(0.1, 0.02), curve)
    for t in range(60):
        assert lrs_of(scheduler.optimizer) == [0.1 * curve(t), 0.02 * curve(t)]
        assert scheduler.get_last_lr() == lrs_of(scheduler.optimizer)
        assert scheduler.last_epoch == t
        scheduler.step()


def test_a_curve_for_each_group() -> None:
    curves = [linear(10), cosine(20), constant()]
    scheduler = ScheduleLR(optimizer_of(0.1, 0.2, 0.3), curves)
    for t in range(30):
        wanted = [base * curve(t) for base, curve in zip((0.1, 0.2, 0.3), curves, strict=True)]
        assert lrs_of(scheduler.optimizer) == wanted
        scheduler.step()


def test_any_function_is_a_curve() -> None:
    functions: list[Callable[[int], Any]] = [
        lambda t: 1 / (t + 1),
        lambda t: torch.tensor(0.5) ** t,
        lambda t: t,
    ]
    scheduler = ScheduleLR(optimizer_of(0.1, 0.1, 0.1), functions)
    scheduler.step()
    scheduler.step()
    assert lrs_of(scheduler.optimizer) == [0.1 / 3, 0.1 * 0.25, 0.1 * 2]
    assert all(type(group["lr"]) is float for group in scheduler.optimizer.param_groups)


def test_groups_added_later() -> None:
    scheduler = ScheduleLR(optimizer_of(0.1), linear(10))
    optimizer = scheduler.optimizer
    run(scheduler, 4)
    optimizer.add_param_group({"params": [Parameter(torch.ones(1))], "lr": 0.2})
    for t in range(5, 15):
        scheduler.step()
        assert lrs_of(optimizer) == [0.1 * linear(10)(t), 0.2 * linear(10)(t)]
        assert scheduler.base_lrs == [0.1, 0.2]

    own = ScheduleLR(optimizer_of(0.1, 0.1), [linear(10), constant()])
    own.optimizer.add_param_group({"params": [Parameter(torch.ones(1))], "lr": 0.2})
    with pytest.raises(ValueError, match="schedule has 2 curves for 3 parameter groups"):
        own.step()
    own = ScheduleLR(optimizer_of(0.1, 0.1), [linear(10), constant()])
    own.optimizer.add_param_group({"params": [Parameter(torch.ones(1))], "lr": 0.2})
    own.schedule.append(step(1, 0.5))
    own.step()
    assert lrs_of(own.optimizer) == [0.1 * linear(10)(1), 0.1, 0.1]


@pytest.mark.parametrize("shape", [(), (1,)])
def test_tensor_lr_is_filled_in_place(shape: tuple[int, ...]) -> None:
    """Computed in double precision from the base, then rounded; resumed to the last bit."""
    own = [torch.full(shape, 0.1), torch.full(shape, 0.03)]
    bases = [lr.item() for lr in own]
    optimizer = torch.optim.SGD([Parameter(torch.ones(1))], lr=own[0], foreach=False)
    stepped(optimizer)
    scheduler = ScheduleLR(optimizer, linear(7))
    optimizer.add_param_group({"params": [Parameter(torch.ones(1))], "lr": own[1]})

    def wanted(t: int) -> list[float]:
        return [torch.tensor(base * linear(7)(t)).item() for base in bases]

    states = {}
    for t in range(1, 9):
        scheduler.step()
        assert lrs_of(optimizer) == wanted(t)
        states[t] = saved(scheduler)
    for t, state in states.items():
        scheduler.load_state_dict(state)
        assert lrs_of(optimizer) == wanted(t)
        scheduler.step()
        assert lrs_of(optimizer) == wanted(t + 1)
    groups = optimizer.param_groups
    assert all(group["lr"] is lr for group, lr in zip(groups, own, strict=True))
    assert [group["initial_lr"].item() for group in groups] == bases


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], ScheduleLR]] = {
    **{name: partial(ScheduleLR, schedule=curve) for name, curve in CURVES.items()},
    "per-group": partial(ScheduleLR, schedule=[warmup(cosine(30), 10), inverse_sqrt(3)]),
    "InverseSquareRootLR": partial(InverseSquareRootLR, warmup_steps=10),
    "InverseTimeLR": partial(InverseTimeLR, rate=0.1),
    "PiecewiseConstantLR": partial(PiecewiseConstantLR, boundaries=[9, 20], factors=[1, 2, 0.5]),
    "WarmupCosineLR": partial(WarmupCosineLR, total_steps=50, warmup_steps=10, cycles=2),
    "WSDLR": partial(WSDLR, stable=10, decay=20, warmup_steps=10),
}


@table("make", SCHEDULERS)
def test_resume_at_every_step(make: Callable[[torch.optim.Optimizer], ScheduleLR]) -> None:
    """With the scheduler's state alone: the optimizer is a new one."""
    first = make(optimizer_of(0.1, 0.03))
    states, wanted = [], []
    for _ in range(60):
        states.append(saved(first))
        wanted.append(lrs_of(first.optimizer))
        first.step()
    for t, state in enumerate(states):
        again = make(optimizer_of(7.0, 8.0))
        again.load_state_dict(state)
        assert saved(again) == state
        for u in range(t, min(t + 3, 60)):
            assert lrs_of(again.optimizer) == wanted[u]
            assert again.get_last_lr() == wanted[u]
            stepped(again.optimizer)
            again.step()
        assert saved(make(optimizer_of(0.1, 0.03))) == states[0]


@pytest.mark.parametrize("order", ["optimizer-first", "scheduler-first"])
def test_resume_with_the_optimizer(order: str) -> None:
    first = WarmupCosineLR(optimizer_of(0.1), 30, 5)
    run(first, 12)
    again = WarmupCosineLR(optimizer_of(0.5), 30, 5)
    parts = [(again.optimizer, first.optimizer.state_dict()), (again, saved(first))]
    for part, state in parts if order == "optimizer-first" else parts[::-1]:
        part.load_state_dict(state)
    stepped(again.optimizer)
    assert run(again, 20) == run(first, 20)


class Training:
    """Micro-batches by three, of which some overflow; the schedule counts steps that were done."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Linear(3, 2)
        self.optimizer = fusedopt.AdamW(self.model.parameters(), lr=0.1, nonfinite="skip")
        plateau = Plateau(0.5, 1, cooldown=1)
        self.scheduler = ScheduleLR(self.optimizer, warmup(cosine(12), 4), plateau=plateau)

    def window(self, number: int) -> list[float]:
        for micro in range(3):
            value = math.inf if number in (2, 5, 6) and micro == 1 else number + micro - 2.0
            self.model(torch.full((1, 3), value)).sum().backward()
            if micro < 2:
                self.optimizer.accumulate()
        skipped = int(self.optimizer.skipped_steps)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if int(self.optimizer.skipped_steps) == skipped:
            self.scheduler.step(metric=1.0 if number % 4 else 1.0 / number if number else 2.0)
        weights = [float(x) for p in self.model.parameters() for x in p.detach().flatten()]
        return [*lrs_of(self.optimizer), *weights]

    def state(self) -> dict[str, Any]:
        return {
            name: getattr(self, name).state_dict() for name in ("model", "optimizer", "scheduler")
        }

    def load(self, state: dict[str, Any]) -> None:
        for name, part in state.items():
            getattr(self, name).load_state_dict(part)


def test_resume_with_accumulation_and_skipped_steps() -> None:
    first, states, wanted = Training(), [], []
    for number in range(14):
        file = io.BytesIO()
        torch.save(first.state(), file)
        states.append(file)
        wanted.append(first.window(number))
    assert first.scheduler.last_epoch == 14 - 3
    assert first.scheduler.plateau is not None
    assert first.scheduler.plateau.multiplier < 1
    for number, file in enumerate(states):
        file.seek(0)
        again = Training()
        again.load(torch.load(file, weights_only=True))
        for later in range(number, 14):
            assert again.window(later) == wanted[later]


def test_another_configuration_than_the_checkpoints() -> None:
    first = ScheduleLR(optimizer_of(0.1), linear(100))
    run(first, 20)
    again = ScheduleLR(optimizer_of(0.1), linear(50))
    with pytest.warns(UserWarning, match=r"total=50.* replaces .*total=100"):
        again.load_state_dict(saved(first))
    assert lrs_of(again.optimizer) == again.get_last_lr() == [0.1 * linear(50)(20)]
    stepped(again.optimizer)
    assert run(again, 5) == [0.1 * linear(50)(t) for t in range(20, 25)]

    patient = ScheduleLR(optimizer_of(0.1), linear(100), plateau=Plateau(patience=3))
    with pytest.warns(UserWarning, match="patience=3"):
        patient.load_state_dict(saved(first))
    assert lrs_of(patient.optimizer) == lrs_of(first.optimizer)

    strict = ScheduleLR(optimizer_of(0.1), linear(50))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning):
            strict.load_state_dict(saved(first))
    assert lrs_of(strict.optimizer) == [0.1 * linear(50)(20)]  # nothing is half loaded


def test_another_configuration_after_the_optimizer() -> None:
    """The order that the documentation asks for, as the optimizer's state has the old rates."""
    assert "load the optimizer first" in " ".join(str(ScheduleLR.load_state_dict.__doc__).split())
    first = ScheduleLR(optimizer_of(1.0), linear(10))
    run(first, 5)
    again = ScheduleLR(optimizer_of(1.0), linear(20))
    again.optimizer.load_state_dict(first.optimizer.state_dict())
    with pytest.warns(UserWarning, match="replaces"):
        again.load_state_dict(saved(first))
    assert lrs_of(again.optimizer) == again.get_last_lr() == [0.75]


def test_a_function_again_is_the_same_configuration() -> None:
    """Though it lies at another address in another process."""

    def make() -> Any:
        def curve(t: int) -> float:
            return 1 / (t + 1)

        return warmup(curve, 3)

    first = ScheduleLR(optimizer_of(0.1), make())
    run(first, 5)
    again = ScheduleLR(optimizer_of(0.1), make())
    assert again.schedule != first.schedule
    again.load_state_dict(saved(first))  # no warning, which would be an error
    assert lrs_of(again.optimizer) == lrs_of(first.optimizer)


def test_foreign_states_are_refused() -> None:
    scheduler = ScheduleLR(optimizer_of(0.1), linear(10))
    run(scheduler, 3)
    before = scheduler.state_dict()
    with pytest.raises(ValueError, match="not one of a ScheduleLR: it has no lr, schedule"):
        scheduler.load_state_dict(stock.StepLR(optimizer_of(0.1), 3).state_dict())
    with pytest.raises(ValueError, match="has 2 parameter groups, the optimizer 1"):
        scheduler.load_state_dict(ScheduleLR(optimizer_of(1.0, 2.0), linear(10)).state_dict())
    assert scheduler.state_dict() == before
    with pytest.raises(ValueError, match="not one of a Plateau: it has no multiplier"):
        Plateau().load_state_dict({"best": 1.0, "num_bad": 0, "cooldown_left": 0})


@table(
    "wrong",
    {
        "cooldown": ({"cooldown": {"stable": 0, "decay": 0}}, ValueError, "decay must be .*: 0"),
        "plateau": ({"multiplier": "x"}, TypeError, "multiplier is not a number: 'x'"),
        "large": ({"multiplier": 2.0}, ValueError, "multiplier must be between 0 and 1: 2.0"),
        "best": ({"best": NAN}, ValueError, "best must be finite: nan"),
        "bad": ({"num_bad": -1}, ValueError, "num_bad must be at least 0: -1"),
        "left": ({"cooldown_left": None}, TypeError, "cooldown_left is not an integer: None"),
        "last_epoch": ({"last_epoch": -2}, ValueError, "last_epoch must be at least -1: -2"),
        "step_count": ({"_step_count": "a"}, TypeError, "_step_count is not an integer: 'a'"),
        "lr": ({"lr": ["a"]}, TypeError, r"lr\[0\] is not a number: 'a'"),
        "base_lrs": ({"base_lrs": [1.0, 2.0]}, ValueError, "base_lrs has more rates than the 1 gr"),
        "_last_lr": ({"_last_lr": 1.0}, TypeError, "_last_lr is not a sequence: 1.0"),
    },
)
def test_a_wrong_state_changes_nothing(wrong: Any) -> None:
    change, error, message = wrong
    first = ScheduleLR(optimizer_of(1.0), linear(20), plateau=Plateau(0.5, 0))
    for _ in range(3):
        stepped(first.optimizer)
        first.step(1.0)
    state = first.state_dict()
    for name, value in change.items():
        (state["plateau"] if name in state["plateau"] else state)[name] = value
    again = ScheduleLR(optimizer_of(1.0), linear(10), plateau=Plateau(0.5, 0))
    before = again.state_dict()
    with pytest.raises(error, match=message):
        again.load_state_dict(state)
    assert again.state_dict() == before


def test_a_curve_that_fails_in_loading_changes_nothing() -> None:
    first = ScheduleLR(optimizer_of(1.0), linear(20), plateau=Plateau(0.5, 0))
    run(first, 3)
    again = ScheduleLR(optimizer_of(1.0), lambda t: 1 - t, plateau=Plateau(0.5, 0))
    before = again.state_dict()
    with pytest.raises(ValueError, match="at t=3 must be finite, not negative: -2"):
        again.load_state_dict(saved(first))
    assert again.state_dict() == before


def test_resume_without_a_checkpoint() -> None:
    """As in torch, with last_epoch and the group's initial_lr."""
    optimizer = optimizer_of(0.5)
    optimizer.param_groups[0]["initial_lr"] = 0.1
    scheduler = ScheduleLR(optimizer, linear(10), last_epoch=3)
    assert run(scheduler, 3) == [0.1 * linear(10)(t) for t in (4, 5, 6)]


def test_pickled_and_copied() -> None:
    scheduler = ScheduleLR(optimizer_of(0.1), warmup(linear(10), 2), plateau=Plateau(0.5, 0))
    run(scheduler, 4)
    scheduler.cooldown(5)
    again = pickle.loads(pickle.dumps(scheduler))
    stepped(again.optimizer)
    assert run(again, 8) == run(scheduler, 8)


@pytest.mark.parametrize("ours", [(0,), (1,), (0, 1)])
def test_within_sequential(ours: tuple[int, ...]) -> None:
    """First, second or both: the same numbers, and resumed at every step."""

    def make(lr: float) -> Any:
        optimizer = optimizer_of(lr)
        parts = [
            ScheduleLR(optimizer, warmup(constant(), 5, start=0.1))
            if 0 in ours
            else stock.LinearLR(optimizer, start_factor=0.1, total_iters=5),
            ScheduleLR(optimizer, cosine(10))
            if 1 in ours
            else stock.CosineAnnealingLR(optimizer, T_max=10),
        ]
        return stock.SequentialLR(optimizer, parts, milestones=[5])

    wanted = values(warmup(cosine(10), 5, start=0.1), 16)
    first = make(0.1)
    for t in range(16):
        assert lrs_of(first.optimizer) == pytest.approx([0.1 * wanted[t]], rel=1e-12, abs=1e-12)
        again = make(0.1)
        again.optimizer.load_state_dict(first.optimizer.state_dict())
        again.load_state_dict(saved(first))
        stepped(again.optimizer)
        rest = run(again, 16 - t)
        close(rest, [0.1 * factor for factor in wanted[t:]])
        first.step()


def test_another_configuration_of_one_that_is_not_in_charge() -> None:
    """The learning rate is that of torch's cosine, which goes on from it."""

    def make(warm: int) -> Any:
        optimizer = optimizer_of(0.1)
        parts = [
            ScheduleLR(optimizer, warmup(constant(), warm, start=0.1)),
            stock.CosineAnnealingLR(optimizer, T_max=10),
        ]
        return stock.SequentialLR(optimizer, parts, milestones=[5])

    first, again = make(5), make(50)
    run(first, 8)
    with pytest.warns(UserWarning, match="steps=50.* replaces .*steps=5"):
        again.load_state_dict(saved(first))
    stepped(again.optimizer)
    assert run(again, 5) == run(first, 5)


def test_another_configuration_of_one_that_is_not_reached_yet() -> None:
    """It does not compute the learning rate of the step before its first."""

    def make(total: int) -> Any:
        optimizer = optimizer_of(1.0)
        parts = [ScheduleLR(optimizer, constant()), ScheduleLR(optimizer, linear(total))]
        return stock.SequentialLR(optimizer, parts, milestones=[10])

    first, again = make(10), make(20)
    run(first, 3)
    with pytest.warns(UserWarning, match="total=20.* replaces .*total=10"):
        again.load_state_dict(saved(first))
    assert lrs_of(again.optimizer) == [1.0]
    stepped(again.optimizer)
    assert run(again, 9) == [1.0] * 8 + [0.95]


def test_is_a_torch_scheduler() -> None:
    scheduler = ScheduleLR(optimizer_of(), linear(5))
    assert isinstance(scheduler, stock.LRScheduler)
    for name in ("InverseSquareRootLR", "InverseTimeLR", "PiecewiseConstantLR", "WSDLR"):
        assert issubclass(globals()[name], ScheduleLR)


# --- cooldown on demand ---------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["1-sqrt", "linear", "cosine", "exponential"])
@pytest.mark.parametrize("at", [0, 1, 25])
def test_cooldown_on_demand_is_a_planned_one(at: int, shape: str) -> None:
    planned = ScheduleLR(optimizer_of(0.1), wsd(at, 10, shape=shape, min_ratio=0.1))
    asked = ScheduleLR(optimizer_of(0.1), constant())
    wanted = run(planned, at + 20)
    found = run(asked, at)
    asked.cooldown(10, shape=shape, min_ratio=0.1)
    assert found + run(asked, 20) == wanted


def test_cooldown_of_any_curve() -> None:
    """From the factor that was reached, within the warm-up, too; several groups at once."""
    curves = [warmup(inverse_sqrt(20), 20), linear(50)]
    scheduler = ScheduleLR(optimizer_of(0.1, 0.1), curves)
    run(scheduler, 15)
    scheduler.cooldown(10, shape="linear", min_ratio=0.5)
    for u in range(15):
        fall = 0.5 + 0.5 * (1 - min(u, 10) / 10)
        close(lrs_of(scheduler.optimizer), [0.1 * curve(15) * fall for curve in curves])
        scheduler.step()


def test_wsd_on_demand() -> None:
    planned = run(WSDLR(optimizer_of(0.1), 20, 10, warmup_steps=5, min_ratio=0.1), 45)
    scheduler = WSDLR(optimizer_of(0.1), None, 10, warmup_steps=5, min_ratio=0.1)
    found = run(scheduler, 25)
    scheduler.cooldown()  # as the constructor says
    assert found + run(scheduler, 20) == planned
    other = WSDLR(optimizer_of(0.1), None, 10, min_ratio=0.1)
    other.cooldown(4, shape="linear", min_ratio=0.0)
    close(run(other, 5), [0.1, 0.075, 0.05, 0.025, 0.0])


def test_cooldown_is_in_the_state() -> None:
    """Every checkpoint goes on as its run did; one from before the cooldown goes on without."""
    first = WSDLR(optimizer_of(0.1), None, 10, warmup_steps=5)
    states, wanted = [], []
    for t in range(30):
        if t == 12:
            before = saved(first)
            first.cooldown()
        states.append(saved(first))
        wanted.append(lrs_of(first.optimizer)[0])
        first.step()
    for t, state in enumerate(states):
        again = WSDLR(optimizer_of(0.1), None, 10, warmup_steps=5)
        again.load_state_dict(state)
        stepped(again.optimizer)
        rest = run(again, 30 - t)
        assert rest == wanted[t:] if t >= 12 else rest[: 12 - t] == wanted[t:12]
    first.load_state_dict(before)
    assert run(first, 30) == [0.1] * 30
    first.cooldown()
    assert lrs_of(first.optimizer) == [0.1]


def test_cooldown_begins_once() -> None:
    scheduler = ScheduleLR(optimizer_of(), constant())
    run(scheduler, 7)
    scheduler.cooldown(5)
    with pytest.raises(RuntimeError, match="has begun at step 7 already"):
        scheduler.cooldown(5)


def test_cooldown_from_zero_is_refused() -> None:
    """It would stay there for good."""
    scheduler = ScheduleLR(optimizer_of(1.0, 1.0), [warmup(constant(), 10), constant(0.0)])
    with pytest.raises(RuntimeError, match="from step 0 would keep the learning rate at 0"):
        scheduler.cooldown(5)
    run(scheduler, 1)
    scheduler.cooldown(5)  # that of the other group is meant
    assert lrs_of(scheduler.optimizer) == [0.1, 0.0]


def test_cooldown_within_sequential() -> None:
    """Of one that is not reached yet: it begins with its own first step."""
    optimizer = optimizer_of(1.0)
    second = ScheduleLR(optimizer, constant())
    whole = stock.SequentialLR(optimizer, [ScheduleLR(optimizer, constant()), second], [3])
    second.cooldown(4, shape="linear")
    assert run(whole, 8) == [1, 1, 1, 1, 0.75, 0.5, 0.25, 0]


# --- plateau --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("threshold_mode", ["rel", "abs"])
@pytest.mark.parametrize("cooldown", [0, 3])
@pytest.mark.parametrize("patience", [0, 2])
def test_plateau_counts_as_torchs(
    patience: int, cooldown: int, threshold_mode: str, mode: str
) -> None:
    """On positive metrics."""
    options: dict[str, Any] = {
        "factor": 0.5,
        "patience": patience,
        "mode": mode,
        "threshold": 0.05,
        "threshold_mode": threshold_mode,
        "cooldown": cooldown,
    }
    theirs = stock.ReduceLROnPlateau(optimizer_of(1.0), eps=0, **options)
    ours = ScheduleLR(optimizer_of(1.0), constant(), plateau=Plateau(**options))
    numbers = random.Random(0)
    for t in range(200):
        metric = numbers.uniform(0.5, 1) * (math.exp(-t / 40) if mode == "min" else t + 1)
        theirs.step(metric)
        ours.step(metric)
        assert lrs_of(ours.optimizer) == lrs_of(theirs.optimizer)
    assert 0 < lrs_of(ours.optimizer)[0] < 1


def test_plateau_with_warmup() -> None:
    """The multiplier and the warm-up do not know of one another."""
    plateau = Plateau(0.5, 1)
    curve = warmup(linear(20), 5)
    scheduler = ScheduleLR(optimizer_of(0.1), curve, plateau=plateau)
    multipliers = [1, 1, 0.5, 0.5, 0.25, 0.25, 0.125]
    for t, multiplier in enumerate(multipliers, start=1):
        scheduler.step(metric=1.0)
        assert plateau.multiplier == multiplier
        assert lrs_of(scheduler.optimizer) == [0.1 * (curve(t) * multiplier)]
    for _ in range(3):
        scheduler.step()  # without a metric nothing is counted
    assert plateau.num_bad == 0
    assert plateau.multiplier == 0.125


def test_plateau_fed_between_steps() -> None:
    plateau = Plateau(0.1, 0)
    scheduler = ScheduleLR(optimizer_of(1.0), constant(), plateau=plateau)
    loss = Parameter(torch.tensor(1.0)) * 1  # as it comes from a model, with its graph
    assert [plateau.update(1.0), plateau.update(loss)] == [False, True]
    assert lrs_of(scheduler.optimizer) == [1.0]
    scheduler.step()
    assert lrs_of(scheduler.optimizer) == [0.1]


def test_plateau_of_negative_metrics() -> None:
    """torch takes -0.995 for better than -1 when the relative threshold is 0.01."""
    theirs = stock.ReduceLROnPlateau(optimizer_of(), threshold=0.01)
    ours = Plateau(threshold=0.01)
    for metric in (-1.0, -0.995):
        theirs.step(metric)
        ours.update(metric)
    assert theirs.best == -0.995
    assert ours.best == -1.0
    ours.update(-1.005)  # too little
    assert ours.best == -1.0
    ours.update(-1.02)
    assert ours.best == -1.02
    highest = Plateau(mode="max", threshold=0.01)
    for metric in (-1.0, -1.005, -0.995):
        highest.update(metric)
    assert highest.best == -1.0


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_plateau_ignores_what_is_not_finite(bad: float, mode: str) -> None:
    plateau = Plateau(0.5, 2, mode=mode)
    for _ in range(9):
        assert not plateau.update(bad)
    assert plateau.state_dict() == Plateau().state_dict()
    for metric in (1.0, bad, 1.0, bad, 1.0, bad):
        assert not plateau.update(metric)
    assert (plateau.best, plateau.num_bad) == (1.0, 2)
    assert plateau.update(1.0)


def test_plateau_stops_at_min_ratio() -> None:
    plateau = Plateau(0.1, 0, min_ratio=0.05)
    found = []
    for _ in range(5):
        found.append((plateau.update(1.0), plateau.multiplier))
    assert found == [(False, 1), (True, 0.1), (True, 0.05), (False, 0.05), (False, 0.05)]
    higher = Plateau(0.1, 0, min_ratio=0.5)
    higher.load_state_dict(plateau.state_dict())
    assert not higher.update(1.0)
    assert higher.multiplier == 0.05  # a reduction never raises


def test_plateau_resumes_at_every_step() -> None:
    def make() -> ScheduleLR:
        plateau = Plateau(0.5, 1, cooldown=2)
        return ScheduleLR(optimizer_of(0.1), warmup(linear(40), 5), plateau=plateau)

    numbers = random.Random(1)
    metrics = [numbers.random() for _ in range(30)]
    first = make()
    states, wanted = [], []
    for metric in metrics:
        states.append(saved(first))
        first.step(metric)
        wanted.append(lrs_of(first.optimizer))
    assert first.plateau is not None
    assert first.plateau.multiplier < 0.1
    for t, state in enumerate(states):
        again = make()
        again.load_state_dict(state)
        stepped(again.optimizer)
        for u in range(t, 30):
            again.step(metrics[u])
            assert lrs_of(again.optimizer) == wanted[u]


# --- wrong input ----------------------------------------------------------------------------------

opt = optimizer_of
WRONG: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: linear(0), ValueError, "total must be at least 1: 0"),
    (lambda: linear(-3), ValueError, "total must be at least 1: -3"),
    (lambda: linear(True), TypeError, "total is not an integer: True"),
    (lambda: linear(10.0), TypeError, "total is not an integer: 10.0"),
    (lambda: linear("10"), TypeError, "total is not an integer: '10'"),
    (lambda: linear(None), TypeError, "total is not an integer: None"),
    (lambda: linear(5, min_ratio=-0.1), ValueError, "min_ratio must be between 0 and 1: -0.1"),
    (lambda: linear(5, min_ratio=1.1), ValueError, "min_ratio must be between 0 and 1: 1.1"),
    (lambda: linear(5, min_ratio=NAN), ValueError, "min_ratio must be between 0 and 1: nan"),
    (lambda: linear(5, min_ratio=None), TypeError, "min_ratio is not a number: None"),
    (lambda: constant(-1), ValueError, "factor must be finite and not negative: -1"),
    (lambda: polynomial(0), ValueError, "total must be at least 1: 0"),
    (lambda: polynomial(5, power=0), ValueError, "power must be positive: 0"),
    (lambda: polynomial(5, min_ratio=2), ValueError, "min_ratio must be between 0 and 1: 2"),
    (lambda: cosine(0), ValueError, "total must be at least 1: 0"),
    (lambda: cosine(5, cycles=0), ValueError, "cycles must be at least 1: 0"),
    (lambda: cosine(5, cycles=6), ValueError, "cycles=6 .* do not fit into total=5"),
    (lambda: cosine(9, cycles=5, cycle_mult=4), ValueError, "cycles=5 with cycle_mult=4.0 do not"),
    (lambda: cosine(9**4, cycles=5000, cycle_mult=9), ValueError, "cycles=5000 .* do not fit"),
    (lambda: cosine(5, cycle_mult=0), ValueError, "cycle_mult must be positive: 0"),
    (lambda: cosine(5, cycle_decay=0), ValueError, "cycle_decay must be above 0: 0"),
    (lambda: cosine(5, k=INF), ValueError, "k must be finite: inf"),
    (lambda: cosine(5, min_ratio=-1), ValueError, "min_ratio must be between 0 and 1: -1"),
    (lambda: exponential(0), ValueError, "gamma must be above 0: 0"),
    (lambda: exponential(-0.9), ValueError, "gamma must be between 0 and 1: -0.9"),
    (lambda: exponential(9.5), ValueError, "gamma must be between 0 and 1: 9.5"),
    (lambda: exponential(0.9, every=0), ValueError, "every must be at least 1: 0"),
    (lambda: step(0), ValueError, "step_size must be at least 1: 0"),
    (lambda: step(-3), ValueError, "step_size must be at least 1: -3"),
    (lambda: step(3, -1), ValueError, "gamma must be between 0 and 1: -1"),
    (lambda: step(3, NAN), ValueError, "gamma must be between 0 and 1: nan"),
    (lambda: multi_step([]), ValueError, "milestones must be one or more steps in rising order"),
    (lambda: multi_step([5, 3]), ValueError, r"in rising order: \[5, 3\]"),
    (lambda: multi_step([3, 3]), ValueError, r"in rising order: \[3, 3\]"),
    (lambda: multi_step([0, 3]), ValueError, r"milestones\[0\] must be at least 1: 0"),
    (lambda: multi_step([1, 2.5]), TypeError, r"milestones\[1\] is not an integer: 2.5"),
    (lambda: multi_step(30), TypeError, "milestones is not a sequence: 30"),
    (lambda: multi_step("30"), TypeError, "milestones is not a sequence: '30'"),
    (lambda: piecewise_constant([3, 1], [1, 1, 1]), ValueError, "boundaries must be one or more"),
    (lambda: piecewise_constant([3], [1]), ValueError, "one more than the 1 boundaries"),
    (lambda: piecewise_constant([3], [1, -1]), ValueError, r"factors\[1\] must be finite and not"),
    (lambda: piecewise_constant([3], [1, NAN]), ValueError, r"factors\[1\] must be finite and not"),
    (lambda: piecewise_constant([3], 1), TypeError, "factors is not a sequence: 1"),
    (lambda: inverse_sqrt(0), ValueError, "timescale must be at least 1: 0"),
    (lambda: inverse_time(-1), ValueError, "rate must be finite and not negative: -1"),
    (lambda: inverse_time(1, every=0), ValueError, "every must be at least 1: 0"),
    (lambda: inverse_time(1, staircase=1), TypeError, "staircase is not True or False: 1"),
    (lambda: warmup(5, 5), TypeError, r"curve is not a curve, such as linear\(100\): 5"),
    (lambda: warmup(cosine, 5), TypeError, "curve is not a curve, such as"),
    (lambda: warmup(linear(5), -1), ValueError, "steps must be at least 0: -1"),
    (lambda: warmup(linear(5), 1.5), TypeError, "steps is not an integer: 1.5"),
    (lambda: warmup(linear(5), 5, kind="log"), ValueError, "kind must be one of 'linear', .*'log'"),
    (lambda: warmup(linear(5), 5, start=-0.1), ValueError, "start must be between 0 and 1: -0.1"),
    (lambda: warmup(linear(5), 5, start=2), ValueError, "start must be between 0 and 1: 2"),
    (lambda: warmup(linear(5), 5, kind="exponential"), ValueError, "start must be above 0 with"),
    (lambda: warmup(linear(5), 5, prefix=0), TypeError, "prefix is not True or False: 0"),
    (lambda: wsd(-1, 5), ValueError, "stable must be at least 0: -1"),
    (lambda: wsd(None, 5), TypeError, "stable is not an integer: None"),
    (lambda: wsd(5, 0), ValueError, "decay must be at least 1: 0"),
    (lambda: wsd(5, 5, shape="sqrt"), ValueError, "shape must be one of '1-sqrt', .*: 'sqrt'"),
    (lambda: wsd(5, 5, min_ratio=2), ValueError, "min_ratio must be between 0 and 1: 2"),
    (lambda: values(5, 5), TypeError, "curve is not a curve"),
    (lambda: values(linear(5), -1), ValueError, "n must be at least 0: -1"),
    (lambda: plot_schedule(linear(5), 1.5), TypeError, "n is not an integer: 1.5"),
    (lambda: Plateau(0), ValueError, "factor must be above 0: 0"),
    (lambda: Plateau(1), ValueError, "factor must be below 1: 1"),
    (lambda: Plateau(1.5), ValueError, "factor must be between 0 and 1: 1.5"),
    (lambda: Plateau(patience=-1), ValueError, "patience must be at least 0: -1"),
    (lambda: Plateau(patience=True), TypeError, "patience is not an integer: True"),
    (lambda: Plateau(mode="auto"), ValueError, "mode must be one of 'min', 'max': 'auto'"),
    (lambda: Plateau(threshold=-1), ValueError, "threshold must be finite and not negative: -1"),
    (lambda: Plateau(threshold_mode="x"), ValueError, "threshold_mode must be one of 'rel', 'abs'"),
    (lambda: Plateau(cooldown=-1), ValueError, "cooldown must be at least 0: -1"),
    (lambda: Plateau(min_ratio=2), ValueError, "min_ratio must be between 0 and 1: 2"),
    (lambda: Plateau().update("good"), TypeError, "metric is not a number: 'good'"),
    (lambda: ScheduleLR(None, linear(5)), TypeError, "not a torch.optim.Optimizer: None"),
    (lambda: ScheduleLR(opt(), 5), TypeError, "schedule is not a curve, .*: 5"),
    (lambda: ScheduleLR(opt(), cosine), TypeError, "schedule is not a curve"),
    (lambda: ScheduleLR(opt(), [linear(5), 5]), TypeError, r"schedule\[1\] is not a curve"),
    (lambda: ScheduleLR(opt(), []), ValueError, "schedule has 0 curves for 1 parameter groups"),
    (lambda: ScheduleLR(opt(1, 2, 3), [linear(5)] * 2), ValueError, "has 2 curves for 3 parameter"),
    (lambda: ScheduleLR(opt(), linear(5), plateau=0.1), TypeError, "plateau is not a Plateau: 0.1"),
    (
        lambda: ScheduleLR(opt(), linear(5), last_epoch=-2),
        ValueError,
        "last_epoch must be at least",
    ),
    (
        lambda: ScheduleLR(opt(), linear(5)).step(0.3),
        ValueError,
        "metric=0.3, but the scheduler has",
    ),
    (lambda: ScheduleLR(opt(), linear(5)).cooldown(0), ValueError, "steps must be at least 1: 0"),
    (
        lambda: ScheduleLR(opt(), linear(5)).cooldown(1, shape="x"),
        ValueError,
        "shape must be one of",
    ),
    (lambda: InverseSquareRootLR(opt(), -1), ValueError, "warmup_steps must be at least 0: -1"),
    (lambda: InverseTimeLR(opt(), -1), ValueError, "rate must be finite and not negative: -1"),
    (lambda: PiecewiseConstantLR(opt(), [1], [1]), ValueError, "factors must be one more than"),
    (
        lambda: WarmupCosineLR(opt(), 10, 10),
        ValueError,
        "warmup_steps must be below total_steps=10",
    ),
    (lambda: WarmupCosineLR(opt(), 0, 0), ValueError, "total_steps must be at least 1: 0"),
    (lambda: WSDLR(opt(), -1, 5), ValueError, "stable must be at least 0: -1"),
    (lambda: WSDLR(opt(), False, 5), TypeError, "stable is not an integer: False"),
    (lambda: WSDLR(opt(), None, 0), ValueError, "decay must be at least 1: 0"),
    (
        lambda: WSDLR(opt(), 5, 5, warmup_steps=-1),
        ValueError,
        "warmup_steps must be at least 0: -1",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), WRONG, ids=[row[2] for row in WRONG])
def test_wrong_input(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_options_have_names() -> None:
    for call in (
        lambda: linear(5, 0.1),
        lambda: warmup(linear(5), 5, "linear"),
        lambda: wsd(1, 2, "cosine"),
    ):
        with pytest.raises(TypeError, match="positional"):
            call()


@pytest.mark.parametrize(
    ("bad", "error"), [(NAN, ValueError), (INF, ValueError), (-0.1, ValueError), ("1", TypeError)]
)
def test_a_curve_that_goes_wrong(bad: Any, error: type[Exception]) -> None:
    """The step is named, and the learning rate stays."""

    def curve(t: int) -> Any:
        return bad if t == 3 else 0.5

    with pytest.raises(error, match=r"curve.* at t=3.*" + str(bad)):
        values(curve, 5)
    scheduler = ScheduleLR(optimizer_of(0.1), curve)
    run(scheduler, 2)
    with pytest.raises(error, match="at t=3"):
        scheduler.step()
    assert lrs_of(scheduler.optimizer) == [0.05]


def test_nothing_is_changed_by_a_wrong_schedule() -> None:
    optimizer = torch.optim.SGD([Parameter(torch.ones(1))], lr=0.1)
    before, attributes = optimizer.state_dict(), set(vars(optimizer))
    for wrong in (lambda t: -1.0, [linear(5), linear(5)]):
        with pytest.raises(ValueError, match=r"at t=0|2 curves"):
            ScheduleLR(optimizer, wrong)
    with pytest.raises(ValueError, match="total_steps"):
        WarmupCosineLR(optimizer, -1, 0)
    assert optimizer.state_dict() == before
    assert set(vars(optimizer)) == attributes
