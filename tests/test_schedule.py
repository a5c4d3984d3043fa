"""Schedulers set what their curves and plateaus say, and resume."""

from __future__ import annotations

import io
import math
import pickle
import random
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from helpers import table, through_a_file
from schedules import CURVES, close, lrs_of, optimizer_of, run, stepped
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
    inverse_sqrt,
    linear,
    step,
    values,
    warmup,
    wsd,
)

NAN, INF = math.nan, math.inf


def saved(scheduler: Any) -> Any:
    return through_a_file(scheduler.state_dict())


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
    for wrong in (None, [1]):
        with pytest.raises(TypeError, match=r"state_dict is not one of a ScheduleLR: (None|.1.)"):
            scheduler.load_state_dict(wrong)
    assert scheduler.state_dict() == before
    with pytest.raises(ValueError, match="not one of a Plateau: it has no multiplier"):
        Plateau().load_state_dict({"best": 1.0, "num_bad": 0, "cooldown_left": 0})


@table(
    "wrong",
    {
        "cooldown": (
            {"cooldown": {"stable": 0, "decay": 0, "shape": "linear", "min_ratio": 0.0}},
            ValueError,
            "decay must be .*: 0",
        ),
        "cooldown of text": ({"cooldown": "now"}, ValueError, "cooldown is not that of a .*'now'"),
        "half a cooldown": ({"cooldown": {"stable": 0}}, ValueError, "cooldown is not that of a "),
        "no rates": ({"lr": None}, TypeError, "lr is not a sequence: None"),
        "nan": ({"lr": [NAN]}, ValueError, r"lr must be finite: \[nan\]"),
        "base that is inf": ({"base_lrs": [INF]}, ValueError, r"base_lrs must be finite: \[inf\]"),
        "bytes": ({"lr": [b"1"]}, TypeError, r"lr\[0\] is not a number: b'1'"),
        "schedule": ({"schedule": 5}, TypeError, "schedule is not a sequence: 5"),
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


def test_one_that_is_not_reached_yet_writes_no_rates() -> None:
    """The one in charge, whose curve has changed, has written them."""

    def make(total: int) -> Any:
        optimizer = optimizer_of(1.0)
        parts = [ScheduleLR(optimizer, linear(total)), ScheduleLR(optimizer, constant())]
        return stock.SequentialLR(optimizer, parts, milestones=[10])

    first, again = make(10), make(20)
    run(first, 5)
    with pytest.warns(UserWarning, match="total=20.* replaces .*total=10"):
        again.load_state_dict(saved(first))
    assert lrs_of(again.optimizer) == again._schedulers[0].get_last_lr() == [0.75]
    stepped(again.optimizer)
    assert run(again, 6) == [0.75, 0.7, 0.65, 0.6, 0.55, 1.0]


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


def without_rate() -> torch.optim.Optimizer:
    """As left by a range test's suggestion that was None."""
    optimizer = optimizer_of()
    optimizer.param_groups[0]["lr"] = None
    return optimizer


WRONG: list[tuple[Callable[[], object], type[Exception], str]] = [
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
    (
        lambda: ScheduleLR(torch.nn.Sequential(torch.nn.ReLU()), linear(5)),
        TypeError,
        r"not a torch.optim.Optimizer: Sequential\(…$",  # not the whole model
    ),
    (lambda: ScheduleLR(opt(), linear(5), plateau=Plateau()).step(torch.ones(99)), TypeError, "…$"),
    (
        lambda: ScheduleLR(without_rate(), linear(5)),
        TypeError,
        r"param_groups\[0\]\['lr'\] is not a number: None",
    ),
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


@pytest.mark.parametrize("lrs", [(0.1,), (torch.tensor(0.1), 0.2)])
@table(
    "wrong",
    {
        "nan": (lambda s: s.schedule.__setitem__(0, lambda t: NAN), ValueError, "at t=4 must be"),
        "own error": (
            lambda s: s.schedule.__setitem__(0, lambda t: 1 / 0),
            ZeroDivisionError,
            "division",
        ),
        "curves": (lambda s: s.schedule.extend([constant()] * 2), ValueError, "has 3 curves for"),
        "base": (lambda s: s.base_lrs.__setitem__(0, None), TypeError, r"base_lrs\[0\] is not a "),
        "group": (
            lambda s: s.optimizer.add_param_group({"params": [Parameter(torch.ones(1))], "lr": ""}),
            TypeError,
            r"param_groups\[\d\]\['lr'\] is not a number: ''",
        ),
    },
)
def test_a_step_that_raises_changes_nothing(lrs: tuple[Any, ...], wrong: Any) -> None:
    break_it, error, message = wrong
    scheduler = ScheduleLR(optimizer_of(*lrs), linear(20), plateau=Plateau(0.5, 0))
    assert scheduler.plateau is not None
    for _ in range(3):
        scheduler.step(1.0)
    break_it(scheduler)

    def all_of_it() -> Any:
        of = (vars(scheduler), vars(scheduler.plateau), scheduler.optimizer.param_groups)
        return repr(
            [{k: v for k, v in each.items() if k != "params"} for each in [*of[:2], *of[2]]]
        )

    before = all_of_it()
    for metric in (None, 1.0, 0.1):
        with pytest.raises(error, match=message):
            scheduler.step(metric)
        assert all_of_it() == before


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
