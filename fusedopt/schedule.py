"""Learning-rate schedules: a scheduler that applies curves to an optimizer.

The curves are in ``curves.py``; their names are to be imported from here.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fusedopt.arguments import (
    check_fields,
    count,
    finite,
    items,
    not_negative,
    number,
    numbers,
    one_of,
    optional,
    positive_ratio,
    ratio,
    shown,
)
from fusedopt.curves import (
    Curve,
    as_curve,
    constant,
    cosine,
    exponential,
    factor_at,
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

__all__ = [
    "WSDLR",
    "Curve",
    "InverseSquareRootLR",
    "InverseTimeLR",
    "PiecewiseConstantLR",
    "Plateau",
    "ScheduleLR",
    "WarmupCosineLR",
    "constant",
    "cosine",
    "exponential",
    "inverse_sqrt",
    "inverse_time",
    "linear",
    "multi_step",
    "piecewise_constant",
    "plot_schedule",
    "polynomial",
    "step",
    "values",
    "warmup",
    "wsd",
]

PLATEAU_STATE = {
    "multiplier": ratio,
    "best": optional(finite),
    "num_bad": count,
    "cooldown_left": count,
}
SCHEDULER_STATE = (
    "last_epoch",
    "_step_count",
    "base_lrs",
    "lr",
    "_last_lr",
    "schedule",
    "cooldown",
    "plateau",
)


def _check_keys(of: str, state: dict[str, Any], wanted: Iterable[str]) -> None:
    if not isinstance(state, Mapping):
        raise TypeError(f"state_dict is not one of {of}: {shown(state)}")
    missing = [name for name in wanted if name not in state]
    if missing:
        raise ValueError(f"state_dict is not one of {of}: it has no {', '.join(missing)}")


def _cooldown(name: str, state: Any) -> wsd:
    if not isinstance(state, Mapping) or state.keys() != asdict(wsd(0, 1)).keys():
        raise ValueError(f"{name} is not that of a ScheduleLR: {shown(state)}")
    return wsd(**state)


def _base_lr(index: int, group: dict[str, Any]) -> float | Tensor:
    """The learning rate that a group's are multiples of, as the group has it."""
    name = "initial_lr" if "initial_lr" in group else "lr"
    number(f"param_groups[{index}][{name!r}]", group[name])
    return group[name]  # type: ignore[no-any-return]


def _plateau_state(state: dict[str, Any]) -> dict[str, Any]:
    _check_keys("a Plateau", state, PLATEAU_STATE)
    return {name: check(name, state[name]) for name, check in PLATEAU_STATE.items()}


@dataclass(eq=False)
class Plateau:
    """A factor that falls each time a metric has stopped improving.

    It multiplies the curve, so it works together with a warm-up or any other schedule. Names and
    counting are those of ``torch.optim.lr_scheduler.ReduceLROnPlateau``, with two differences: a
    relative threshold is relative to the best metric's magnitude, so it is right for negative
    metrics, too; and a metric that is nan or infinite says nothing, it is neither the best nor
    counted.

    Args:
        factor: What each reduction leaves, above 0 and below 1 (default: 0.1).
        patience: Metrics in a row without improvement that are let pass; one more reduces
            (default: 10).
        mode: ``"min"`` or ``"max"``: which metrics are better (default: "min").
        threshold: How much better is an improvement, finite and not negative (default: 1e-4).
        threshold_mode: ``"rel"``: times the magnitude of the best metric; ``"abs"``: as it is
            (default: "rel").
        cooldown: Metrics after a reduction that are not counted (default: 0).
        min_ratio: :attr:`multiplier` does not fall below, between 0 and 1 (default: 0.0).

    Attributes:
        multiplier: The factor now; 1.0 until the first reduction.
        best: The best metric, or None before the first.
        num_bad: Metrics in a row without improvement.
        cooldown_left: How many more metrics are not counted.
    """

    factor: float = 0.1
    patience: int = 10
    _: KW_ONLY
    mode: str = "min"
    threshold: float = 1e-4
    threshold_mode: str = "rel"
    cooldown: int = 0
    min_ratio: float = 0.0
    multiplier: float = field(default=1.0, init=False, repr=False)
    best: float | None = field(default=None, init=False, repr=False)
    num_bad: int = field(default=0, init=False, repr=False)
    cooldown_left: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        check_fields(self, factor=positive_ratio, patience=count, mode=one_of("min", "max"))
        check_fields(self, threshold=not_negative, threshold_mode=one_of("rel", "abs"))
        check_fields(self, cooldown=count, min_ratio=ratio)
        if self.factor == 1:
            raise ValueError("factor must be below 1: 1.0")

    def update(self, metric: float | Tensor) -> bool:
        """Take a metric. The scheduler applies what follows in its next step.

        With several processes, give all of them the same number.

        Returns:
            Whether :attr:`multiplier` was reduced.
        """
        value = number("metric", metric)
        if not math.isfinite(value):
            return False
        if self._is_better(value):
            self.best, self.num_bad = value, 0
        else:
            self.num_bad += 1
        if self.cooldown_left:
            self.cooldown_left -= 1
            self.num_bad = 0
        if self.num_bad <= self.patience:
            return False
        before = self.multiplier
        # Not raised to min_ratio when a checkpoint is already below it.
        self.multiplier = min(before, max(before * self.factor, self.min_ratio))
        self.num_bad, self.cooldown_left = 0, self.cooldown
        return self.multiplier < before

    def _is_better(self, metric: float) -> bool:
        if self.best is None:
            return True
        margin = self.threshold * (abs(self.best) if self.threshold_mode == "rel" else 1)
        if self.mode == "min":
            return metric < self.best - margin
        return metric > self.best + margin

    def state_dict(self) -> dict[str, Any]:
        """The attributes that change, as plain numbers; not the arguments."""
        return {name: getattr(self, name) for name in PLATEAU_STATE}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state. The arguments stay the constructor's.

        Raises:
            TypeError, ValueError: When the state is another object's; nothing is changed then.
        """
        for name, value in _plateau_state(state_dict).items():
            setattr(self, name, value)


class ScheduleLR(LRScheduler):
    """Sets each group's learning rate to its base learning rate times a curve's factor.

    The base is the group's ``lr`` when the scheduler is made, or when the group is added. A group
    added later joins with the next :meth:`step`. Call ``step()`` once after each step of the
    optimizer, or once an epoch; a curve counts these calls. A learning rate that is a tensor is
    filled in place, so captured CUDA graphs see the new one.

    It is a torch scheduler, and works where those do, within ``SequentialLR``, too. As it computes
    each learning rate from the base, it overwrites what others have set: combine curves, not
    schedulers, in place of ``ChainedScheduler``.

    Args:
        optimizer: Whose learning rates to set.
        schedule: One curve for all groups, or a sequence of one for each. It is kept in the list
            :attr:`schedule`; where groups have their own, append the curve of a group added later.
        plateau: A factor that depends on a metric (default: None).
        last_epoch: As of torch's schedulers: the last step done, of a training that goes on
            without a scheduler's checkpoint (default: -1).

    Raises:
        TypeError, ValueError: When an argument is wrong; and here and in :meth:`step` when there
            are more or fewer curves than groups, when a curve gives nan, inf or a negative factor,
            or when a group's ``lr`` is not a number.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        schedule: Curve | Iterable[Curve],
        *,
        plateau: Plateau | None = None,
        last_epoch: int = -1,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer is not a torch.optim.Optimizer: {shown(optimizer)}")
        if not isinstance(plateau, Plateau | None):
            raise TypeError(f"plateau is not a Plateau: {shown(plateau)}")
        last_epoch = count("last_epoch", last_epoch, -1)
        self.schedule = (
            [as_curve(f"schedule[{i}]", curve) for i, curve in enumerate(schedule)]
            if isinstance(schedule, Iterable)
            else [as_curve("schedule", schedule)]
        )
        self.plateau = plateau
        self._cooldown: wsd | None = None
        # Before anything is changed.
        self._factors(last_epoch + 1, len(optimizer.param_groups), None, self._multiplier())
        for i, group in enumerate(optimizer.param_groups):
            _base_lr(i, group)
        super().__init__(optimizer, last_epoch)

    def step(self, metric: float | Tensor | None = None) -> None:
        """Go to the next step, and set the learning rates for it.

        When it raises, nothing has changed.

        Args:
            metric: For the plateau, taken into account at once. Where the curve counts batches and
                the metric comes once an epoch, call ``plateau.update(metric)`` instead.
        """
        if metric is not None and self.plateau is None:
            raise ValueError(f"metric={shown(metric)}, but the scheduler has no plateau")
        before = self._step_count, self.last_epoch
        plateau = None if metric is None else self.plateau
        counted = {} if plateau is None else plateau.state_dict()
        try:
            if plateau is not None and metric is not None:
                plateau.update(metric)
            super().step()
        except BaseException:  # torch counts before it asks for the rates
            self._step_count, self.last_epoch = before
            if plateau is not None:
                plateau.load_state_dict(counted)
            raise

    def cooldown(self, steps: int, *, shape: str = "1-sqrt", min_ratio: float = 0.0) -> None:
        """From this step on, stay with the present factor and let it fall.

        This ends a training of unknown length, whatever its curve, when you decide to. It is part
        of :meth:`state_dict`. A checkpoint from before it goes on without it.

        Args:
            steps: Until the end.
            shape: As :class:`wsd`'s (default: "1-sqrt").
            min_ratio: What is left of the present factor at the end, between 0 and 1
                (default: 0.0).

        Raises:
            RuntimeError: When a cooldown has begun already, or when a group's factor is 0 now, as
                in the first step of a warm-up, because it would stay 0. A curve ``constant(0.0)``
                wants that and is let pass.
        """
        if self._cooldown is not None:
            raise RuntimeError(f"the cooldown has begun at step {self._cooldown.stable} already")
        count("steps", steps, 1)
        at = max(self.last_epoch, 0)  # -1 where SequentialLR has not come to this one yet
        cooldown = wsd(at, steps, shape=shape, min_ratio=min_ratio)
        for curve in self.schedule:
            if curve != constant(0.0) and factor_at(curve, at) == 0:
                raise RuntimeError(
                    f"a cooldown from step {at} would keep the learning rate at 0 for good, which "
                    f"is the factor of {curve} there: begin it later"
                )
        self._cooldown = cooldown

    def get_lr(self) -> list[float]:  # type: ignore[override]
        """The learning rates of this step. To read them, ``get_last_lr()`` is the way."""
        groups = self.optimizer.param_groups
        factors = self._factors(self.last_epoch, len(groups), self._cooldown, self._multiplier())
        # All is computed before anything is kept, as a step that raises shall change nothing.
        bases: list[Any] = self.base_lrs
        added = groups[len(bases) :]
        if added or not all(type(base) is float for base in bases):  # at first, tensors
            more = [_base_lr(len(bases) + i, group) for i, group in enumerate(added)]
            bases = [*numbers("base_lrs", [*bases, *more])]
        rates = [base * factor for base, factor in zip(bases, factors, strict=True)]
        for group in added:
            lr = group["lr"]
            group.setdefault("initial_lr", lr.clone() if isinstance(lr, Tensor) else lr)
        self.base_lrs = bases
        return rates

    def _multiplier(self) -> float:
        return 1.0 if self.plateau is None else self.plateau.multiplier

    def _factors(self, t: int, groups: int, cooldown: wsd | None, scale: float) -> list[float]:
        at = t
        if cooldown is not None:
            at = min(t, cooldown.stable)
            scale *= cooldown(t)
        factors = [factor_at(curve, at) * scale for curve in self.schedule]
        if len(factors) == 1:
            return factors * groups
        if len(factors) != groups:
            raise ValueError(f"schedule has {len(factors)} curves for {groups} parameter groups")
        return factors

    def _description(self) -> list[str]:
        """The arguments, in words that are the same in another process."""
        parts = [*self.schedule, *([] if self.plateau is None else [self.plateau])]
        return [re.sub(r" at 0x\w+", "", repr(part)) for part in parts]

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and words, for ``torch.load(..., weights_only=True)``; no curves."""
        return {
            "last_epoch": self.last_epoch,
            "_step_count": self._step_count,
            "base_lrs": numbers("base_lrs", self.base_lrs),
            "lr": numbers("lr", [group["lr"] for group in self.optimizer.param_groups]),
            "_last_lr": numbers("_last_lr", self._last_lr),
            "schedule": self._description(),
            "cooldown": None if self._cooldown is None else asdict(self._cooldown),
            "plateau": None if self.plateau is None else self.plateau.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the state was saved, and write its learning rates into the groups.

        Base learning rates are the state's, curves and plateau the constructor's. When these are
        others than those of the state, a warning tells, and the learning rates are computed by the
        new ones: then load the optimizer first, because its state has the old learning rates. With
        the same ones the order does not matter.

        Raises:
            TypeError, ValueError: When the state is another scheduler's, or of other groups;
                nothing is changed then.
        """
        _check_keys("a ScheduleLR", state_dict, SCHEDULER_STATE)
        groups = self.optimizer.param_groups
        saved = len(items("lr", state_dict["lr"]))
        if saved != len(groups):
            raise ValueError(
                f"state_dict has {saved} parameter groups, the optimizer {len(groups)}: add the "
                "groups before loading"
            )
        # All is checked and computed before anything is written.
        last_epoch = count("last_epoch", state_dict["last_epoch"], -1)
        step_count = count("_step_count", state_dict["_step_count"])
        rates = {name: numbers(name, state_dict[name]) for name in ("base_lrs", "lr", "_last_lr")}
        for name, found in rates.items():  # fewer where a group has been added since
            if not all(map(math.isfinite, found)):
                raise ValueError(f"{name} must be finite: {found}")
            if len(found) > len(groups):
                raise ValueError(f"{name} has more rates than the {len(groups)} groups: {found}")
        cooldown = optional(_cooldown)("cooldown", state_dict["cooldown"])
        plateau: dict[str, Any] = {}
        if self.plateau is not None and state_dict["plateau"] is not None:
            plateau = _plateau_state(state_dict["plateau"])
        lrs, last_lr = rates["lr"], rates["_last_lr"]
        before, now = items("schedule", state_dict["schedule"]), self._description()
        # Before its first step, or where the rates are not its last ones, another scheduler is in
        # charge, as within SequentialLR.
        if now != before and last_epoch >= 0 and lrs == last_lr:
            scale = plateau.get("multiplier", self._multiplier())
            factors = self._factors(last_epoch, len(groups), cooldown, scale)
            lrs = [base * f for base, f in zip(rates["base_lrs"], factors, strict=True)]
            last_lr = [*lrs]

        if self.plateau is not None and plateau:
            self.plateau.load_state_dict(plateau)
        self._cooldown = cooldown
        self.last_epoch = last_epoch
        self._step_count = step_count
        self.base_lrs = [*rates["base_lrs"]]
        self._last_lr = [*last_lr]
        # SequentialLR has not come to this one: the rates are those of the one before, which may
        # have another curve than in the checkpoint, and has written what that gives.
        for group, lr in zip(groups, lrs, strict=True) if last_epoch >= 0 else ():
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        if now != before:
            warnings.warn(f"{now} replaces the checkpoint's schedule {before}", stacklevel=2)


class InverseSquareRootLR(ScheduleLR):
    """Linear warm-up, then :class:`inverse_sqrt`.

    Args:
        optimizer: Whose learning rates to set.
        warmup_steps: Steps of the warm-up (default: 0).
        timescale: Steps (default: ``warmup_steps``, or 10000 without a warm-up).
        min_ratio: The factor does not fall below (default: 0.0).
        plateau: As :class:`ScheduleLR`'s.
        last_epoch: As :class:`ScheduleLR`'s.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: int = 0,
        *,
        timescale: int | None = None,
        min_ratio: float = 0.0,
        plateau: Plateau | None = None,
        last_epoch: int = -1,
    ) -> None:
        steps = count("warmup_steps", warmup_steps)
        timescale = steps or 10_000 if timescale is None else timescale
        curve = warmup(inverse_sqrt(timescale, min_ratio=min_ratio), steps)
        super().__init__(optimizer, curve, plateau=plateau, last_epoch=last_epoch)


class InverseTimeLR(ScheduleLR):
    """:class:`inverse_time`, the 1/t decay.

    Args:
        optimizer: Whose learning rates to set.
        rate: Finite and not negative.
        every: Steps (default: 1).
        staircase: Whether ``t / every`` is rounded down (default: False).
        min_ratio: The factor does not fall below (default: 0.0).
        plateau: As :class:`ScheduleLR`'s.
        last_epoch: As :class:`ScheduleLR`'s.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        rate: float,
        *,
        every: int = 1,
        staircase: bool = False,
        min_ratio: float = 0.0,
        plateau: Plateau | None = None,
        last_epoch: int = -1,
    ) -> None:
        curve = inverse_time(rate, every=every, staircase=staircase, min_ratio=min_ratio)
        super().__init__(optimizer, curve, plateau=plateau, last_epoch=last_epoch)


class PiecewiseConstantLR(ScheduleLR):
    """:class:`piecewise_constant`.

    Args:
        optimizer: Whose learning rates to set.
        boundaries: The steps from which the next factor counts, in rising order.
        factors: Of the base learning rate; one more than boundaries.
        plateau: As :class:`ScheduleLR`'s.
        last_epoch: As :class:`ScheduleLR`'s.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        boundaries: Sequence[int],
        factors: Sequence[float],
        *,
        plateau: Plateau | None = None,
        last_epoch: int = -1,
    ) -> None:
        curve = piecewise_constant(boundaries, factors)
        super().__init__(optimizer, curve, plateau=plateau, last_epoch=last_epoch)


class WarmupCosineLR(ScheduleLR):
    """Linear warm-up, then :class:`cosine`.

    Args:
        optimizer: Whose learning rates to set.
        total_steps: Steps until the end, with those of the warm-up.
        warmup_steps: Steps of the warm-up, fewer than ``total_steps``.
        start: Factor in the first step of the warm-up (default: 0.0).
        cycles: How many times the cosine falls (default: 1).
        min_ratio: Factor at the end and after it (default: 0.0).
        plateau: As :class:`ScheduleLR`'s.
        last_epoch: As :class:`ScheduleLR`'s.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        warmup_steps: int,
        *,
        start: float = 0.0,
        cycles: int = 1,
        min_ratio: float = 0.0,
        plateau: Plateau | None = None,
        last_epoch: int = -1,
    ) -> None:
        total, steps = count("total_steps", total_steps, 1), count("warmup_steps", warmup_steps)
        if steps >= total:
            raise ValueError(f"warmup_steps must be below total_steps={total}: {steps}")
        curve = warmup(
            cosine(total - steps, cycles=cycles, min_ratio=min_ratio), steps, start=start
        )
        super().__init__(optimizer, curve, plateau=plateau, last_epoch=last_epoch)


class WSDLR(ScheduleLR):
    """Linear warm-up, a stable phase, and a cooldown: :class:`wsd`.

    Args:
        optimizer: Whose learning rates to set.
        stable: Steps between warm-up and cooldown; None: until :meth:`cooldown` is called.
        decay: Steps of the cooldown.
        warmup_steps: Steps of the warm-up (default: 0).
        shape: As :class:`wsd`'s (default: "1-sqrt").
        min_ratio: Factor at the end and after it (default: 0.0).
        plateau: As :class:`ScheduleLR`'s.
        last_epoch: As :class:`ScheduleLR`'s.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        stable: int | None,
        decay: int,
        *,
        warmup_steps: int = 0,
        shape: str = "1-sqrt",
        min_ratio: float = 0.0,
        plateau: Plateau | None = None,
        last_epoch: int = -1,
    ) -> None:
        self._planned = wsd(
            0 if stable is None else stable, decay, shape=shape, min_ratio=min_ratio
        )
        steps = count("warmup_steps", warmup_steps)
        curve = warmup(constant() if stable is None else self._planned, steps)
        super().__init__(optimizer, curve, plateau=plateau, last_epoch=last_epoch)

    def cooldown(
        self, steps: int | None = None, *, shape: str | None = None, min_ratio: float | None = None
    ) -> None:
        """As :meth:`ScheduleLR.cooldown`; what is None is as the constructor's arguments say."""
        planned = self._planned
        super().cooldown(
            planned.decay if steps is None else steps,
            shape=planned.shape if shape is None else shape,
            min_ratio=planned.min_ratio if min_ratio is None else min_ratio,
        )
