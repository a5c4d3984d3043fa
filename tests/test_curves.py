"""Curves have the values of their formulas, of torch's schedulers and of others'."""

from __future__ import annotations

import math
import pickle
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from helpers import table
from schedules import CURVES, close, optimizer_of, run
from torch.nn import Parameter
from torch.optim import lr_scheduler as stock

import fusedopt
from fusedopt.schedule import (
    WSDLR,
    Curve,
    InverseSquareRootLR,
    InverseTimeLR,
    PiecewiseConstantLR,
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


@table("curve", CURVES)
def test_steps_that_are_none(curve: Curve) -> None:
    for t in (-1, -(10**400), np.int64(-3), torch.tensor(-1)):
        with pytest.raises(ValueError, match="t must be at least 0: "):
            curve(t)
    for t in (0.0, 2.5, NAN, INF, "3", None, True, np.True_, [1], 1j, torch.tensor(1.0)):
        with pytest.raises(TypeError, match="t is not an integer: "):
            curve(t)  # type: ignore[arg-type]


@table("curve", CURVES)
def test_any_integer_is_a_step(curve: Curve) -> None:
    for t in (np.int64(7), np.array(7), torch.tensor(7)):
        found = curve(t)  # type: ignore[arg-type]
        assert found == curve(7)
        assert type(found) is float


LATEST: dict[str, tuple[Curve, float]] = {
    "step": (step(1, 0.5), 0.0),
    "exponential": (exponential(0.5), 0.0),
    "exponential-constant": (exponential(1), 1.0),
    "inverse_time": (inverse_time(1e308), 0.0),
    "inverse_time-staircase": (inverse_time(1e300, staircase=True), 0.0),
}


@table("case", LATEST)
def test_steps_without_end(case: tuple[Curve, float]) -> None:
    """Where floats are too small for a step's number."""
    curve, last = case
    for t in (10**19, 10**308, 10**309, 10**5000):
        assert curve(t) == pytest.approx(last, abs=1e-15)
    for every in CURVES.values():
        assert every(10**5000) == every(2**63)
        assert math.isfinite(every(10**5000))


def test_what_a_function_gives_to_a_warmup() -> None:
    def own(t: int) -> Any:
        return "half" if t else None

    for t, given in ((3, "None"), (5, "None"), (6, "'half'")):
        with pytest.raises(TypeError, match=rf"the factor of .*own.* is not a number: {given}"):
            warmup(own, 5)(t)
    assert type(warmup(lambda t: 1, 5)(7)) is float


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


# --- wrong input ----------------------------------------------------------------------------------

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
    (lambda: multi_step(b"30"), TypeError, "milestones is not a sequence: b'30'"),
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
