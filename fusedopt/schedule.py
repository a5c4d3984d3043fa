"""Learning-rate schedules: curves over steps, and a scheduler that applies them to an optimizer.

A curve is a callable object: ``curve(t)`` is the factor of a group's base learning rate in step t,
counted from 0. It has no state, so resuming at a step is calling it with that step. Curves hold
their last value when they are over, are checked when they are made, can be pickled and compared.
Any other function of t can take a curve's place.
"""

# ruff: noqa: D102  the text above says what calling a curve means, once for all of them

from __future__ import annotations

import math
import re
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fusedopt.arguments import (
    count,
    finite,
    finite_positive,
    flag,
    not_negative,
    number,
    one_of,
    optional,
)
from fusedopt.series import axes_for

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curve = Callable[[int], float]

# How a cooldown falls from 1 to 0 while u goes from 0 to 1.
FALLS: dict[str, Callable[[float], float]] = {
    "1-sqrt": lambda u: 1 - math.sqrt(u),
    "linear": lambda u: 1 - u,
    "cosine": lambda u: (1 + math.cos(math.pi * u)) / 2,
    "exponential": lambda u: 2 * 0.5**u - 1,
}

# How a warm-up rises from a start to 1 while u goes from 0 to 1.
RISES: dict[str, Callable[[float, float], float]] = {
    "linear": lambda u, start: start + (1 - start) * u,
    "exponential": lambda u, start: start ** (1 - u),
    "cosine": lambda u, start: start + (1 - start) * (1 - math.cos(math.pi * u)) / 2,
    "saturating": lambda u, start: start + (1 - start) * math.expm1(-5 * u) / math.expm1(-5),
}


def _steps(name: str, value: Any) -> int:
    return count(name, value, 1)


def _ratio(name: str, value: Any) -> float:
    checked = number(name, value)
    if not 0 <= checked <= 1:
        raise ValueError(f"{name} must be between 0 and 1: {value!r}")
    return checked


def _kept(name: str, value: Any) -> float:
    if _ratio(name, value) == 0:
        raise ValueError(f"{name} must be above 0: {value!r}")
    return float(value)


def _items(name: str, values: Any) -> list[Any]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"{name} is not a sequence: {values!r}")
    return list(values)


def _rising_steps(name: str, values: Any) -> tuple[int, ...]:
    steps = tuple(_steps(f"{name}[{i}]", value) for i, value in enumerate(_items(name, values)))
    if not steps or any(a >= b for a, b in pairwise(steps)):
        raise ValueError(f"{name} must be one or more steps in rising order: {values!r}")
    return steps


def _factors(name: str, values: Any) -> tuple[float, ...]:
    return tuple(not_negative(f"{name}[{i}]", v) for i, v in enumerate(_items(name, values)))


def _curve(name: str, value: Any) -> Curve:
    if isinstance(value, type) or not callable(value):
        raise TypeError(f"{name} is not a curve, such as linear(100): {value!r}")
    return value  # type: ignore[no-any-return]


def _check(owner: object, **checks: Callable[[str, Any], Any]) -> None:
    """Put fields through their checks; what is checked may be frozen."""
    for name, check in checks.items():
        object.__setattr__(owner, name, check(name, getattr(owner, name)))


def _down_to(min_ratio: float, rest: float) -> float:
    """Between 1 (all of it rests) and min_ratio, exact at both ends."""
    return min_ratio + (1 - min_ratio) * rest


@dataclass(frozen=True)
class constant:
    """``factor``, always.

    Args:
        factor: Of the base learning rate (default: 1.0).
    """

    factor: float = 1.0

    def __post_init__(self) -> None:
        _check(self, factor=not_negative)

    def __call__(self, t: int) -> float:
        return self.factor


@dataclass(frozen=True)
class linear:
    """From 1 to ``min_ratio`` on a straight line: ``m + (1 - m) (1 - t/total)``.

    Args:
        total: Steps until the end.
        min_ratio: Factor at the end and after it, between 0 and 1 (default: 0.0).
    """

    total: int
    _: KW_ONLY
    min_ratio: float = 0.0

    def __post_init__(self) -> None:
        _check(self, total=_steps, min_ratio=_ratio)

    def __call__(self, t: int) -> float:
        return _down_to(self.min_ratio, 1 - min(t, self.total) / self.total)


@dataclass(frozen=True)
class polynomial:
    """From 1 to ``min_ratio``: ``m + (1 - m) (1 - t/total)^power``.

    Args:
        total: Steps until the end.
        power: Above 1 falls faster at first, below 1 at last (default: 1.0, a line).
        min_ratio: Factor at the end and after it, between 0 and 1 (default: 0.0).
    """

    total: int
    _: KW_ONLY
    power: float = 1.0
    min_ratio: float = 0.0

    def __post_init__(self) -> None:
        _check(self, total=_steps, power=finite_positive, min_ratio=_ratio)

    def __call__(self, t: int) -> float:
        return _down_to(self.min_ratio, (1 - min(t, self.total) / self.total) ** self.power)


@dataclass(frozen=True)
class cosine:
    """Half a cosine from 1 to ``min_ratio``, or several, each starting anew.

    Within a cycle, of which the part u is over and which starts from the peak p:
    ``m + (p - m) (1 + cos(pi u^k)) / 2``. Loshchilov & Hutter 2017
    (SGDR); k-decay: Zhang & Li 2020.

    Args:
        total: Steps until the end of the last cycle.
        cycles: How many; they begin on whole steps (default: 1).
        cycle_mult: How many times as long as the one before each cycle is (default: 1.0).
        cycle_decay: Peak of a cycle relative to the one before, above 0, at most 1; peaks stay at
            least ``min_ratio`` (default: 1.0).
        k: Above 1 stays high for longer (default: 1.0).
        min_ratio: Factor at the end and after it, between 0 and 1 (default: 0.0).

    Raises:
        ValueError: When a cycle would be shorter than a step.
    """

    total: int
    _: KW_ONLY
    cycles: int = 1
    cycle_mult: float = 1.0
    cycle_decay: float = 1.0
    k: float = 1.0
    min_ratio: float = 0.0
    _starts: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check(self, total=_steps, cycles=_steps, cycle_mult=finite_positive, cycle_decay=_kept)
        _check(self, k=finite_positive, min_ratio=_ratio)
        starts = [0, self.total]
        if 1 < self.cycles <= self.total:
            # Lengths relative to the longest cycle's: powers that cannot overflow.
            longest = self.cycles - 1 if self.cycle_mult > 1 else 0
            ends = list(accumulate(self.cycle_mult ** (i - longest) for i in range(self.cycles)))
            starts = [0, *(round(self.total * end / ends[-1]) for end in ends)]
        if self.cycles > self.total or any(a >= b for a, b in pairwise(starts)):
            raise ValueError(
                f"cycles={self.cycles} with cycle_mult={self.cycle_mult} do not fit into "
                f"total={self.total}: each needs a step"
            )
        object.__setattr__(self, "_starts", tuple(starts))

    def __call__(self, t: int) -> float:
        if t >= self.total:
            return self.min_ratio
        cycle = bisect_right(self._starts, t) - 1
        start, end = self._starts[cycle : cycle + 2]
        u = (t - start) / (end - start)
        peak = max(self.cycle_decay**cycle, self.min_ratio)
        rest = (1 + math.cos(math.pi * u**self.k)) / 2
        return self.min_ratio + (peak - self.min_ratio) * rest


@dataclass(frozen=True)
class exponential:
    """``gamma^(t / every)``, smoothly; :class:`step` does the same in steps.

    Args:
        gamma: What is left after ``every`` steps, above 0, at most 1.
        every: Steps (default: 1).
        min_ratio: The factor does not fall below, between 0 and 1 (default: 0.0).
    """

    gamma: float
    _: KW_ONLY
    every: int = 1
    min_ratio: float = 0.0

    def __post_init__(self) -> None:
        _check(self, gamma=_kept, every=_steps, min_ratio=_ratio)

    def __call__(self, t: int) -> float:
        return max(float(self.gamma ** (t / self.every)), self.min_ratio)


@dataclass(frozen=True)
class step:
    """``gamma^floor(t / step_size)``.

    Args:
        step_size: Steps between two decays.
        gamma: What each decay leaves, above 0, at most 1 (default: 0.1).
    """

    step_size: int
    gamma: float = 0.1

    def __post_init__(self) -> None:
        _check(self, step_size=_steps, gamma=_kept)

    def __call__(self, t: int) -> float:
        return float(self.gamma ** (t // self.step_size))


@dataclass(frozen=True)
class multi_step:
    """``gamma`` to the power of how many milestones are reached.

    Args:
        milestones: The steps from which the next factor counts, in rising order.
        gamma: What each milestone leaves, above 0, at most 1 (default: 0.1).
    """

    milestones: Sequence[int]
    gamma: float = 0.1

    def __post_init__(self) -> None:
        _check(self, milestones=_rising_steps, gamma=_kept)

    def __call__(self, t: int) -> float:
        return float(self.gamma ** bisect_right(self.milestones, t))


@dataclass(frozen=True)
class piecewise_constant:
    """``factors[i]`` from step ``boundaries[i - 1]`` until before step ``boundaries[i]``.

    Args:
        boundaries: The steps from which the next factor counts, in rising order.
        factors: One more than boundaries; finite and not negative, in any order.
    """

    boundaries: Sequence[int]
    factors: Sequence[float]

    def __post_init__(self) -> None:
        _check(self, boundaries=_rising_steps, factors=_factors)
        if len(self.factors) != len(self.boundaries) + 1:
            raise ValueError(
                f"factors must be one more than the {len(self.boundaries)} boundaries: "
                f"{self.factors!r}"
            )

    def __call__(self, t: int) -> float:
        return self.factors[bisect_right(self.boundaries, t)]


@dataclass(frozen=True)
class inverse_sqrt:
    """``sqrt(timescale / (timescale + t))``: 1/2 after three timescales.

    After a warm-up of as many steps this is ``sqrt(timescale / t)`` in the count of all steps, as
    in Vaswani et al. 2017; with a timescale of 1 it is ``1 / sqrt(t + 1)``.

    Args:
        timescale: Steps (default: 10000).
        min_ratio: The factor does not fall below, between 0 and 1 (default: 0.0).
    """

    timescale: int = 10_000
    _: KW_ONLY
    min_ratio: float = 0.0

    def __post_init__(self) -> None:
        _check(self, timescale=_steps, min_ratio=_ratio)

    def __call__(self, t: int) -> float:
        return max(math.sqrt(self.timescale / (self.timescale + t)), self.min_ratio)


@dataclass(frozen=True)
class inverse_time:
    """``1 / (1 + rate t / every)``: the 1/t decay of Robbins & Monro 1951.

    Args:
        rate: Finite and not negative.
        every: Steps (default: 1).
        staircase: Whether ``t / every`` is rounded down (default: False).
        min_ratio: The factor does not fall below, between 0 and 1 (default: 0.0).
    """

    rate: float
    _: KW_ONLY
    every: int = 1
    staircase: bool = False
    min_ratio: float = 0.0

    def __post_init__(self) -> None:
        _check(self, rate=not_negative, every=_steps, staircase=flag, min_ratio=_ratio)

    def __call__(self, t: int) -> float:
        time = t // self.every if self.staircase else t / self.every
        return max(1 / (1 + self.rate * time), self.min_ratio)


@dataclass(frozen=True)
class warmup:
    """A rise to 1 in ``steps`` steps, times a curve.

    With u = t/steps and s = start, the rise is

    - ``"linear"``: ``s + (1 - s) u``. Goyal et al. 2017.
    - ``"exponential"``: ``s^(1 - u)``, by the same factor in each step; needs a start above 0.
    - ``"cosine"``: ``s + (1 - s) (1 - cos(pi u)) / 2``.
    - ``"saturating"``: ``s + (1 - s) (1 - e^(-5 u)) / (1 - e^-5)``, fast at first. This is the
      ``1 - e^(-t/tau)`` of Ma & Yarats 2021 with tau = steps/5, stretched by 0.7 % to reach 1.

    The first step is taken with the factor ``start``: with 0 it changes nothing.

    Args:
        curve: What follows, or what is multiplied.
        steps: Of the warm-up; with 0 there is none.
        kind: ``"linear"``, ``"exponential"``, ``"cosine"`` or ``"saturating"`` (default: "linear").
        start: Factor in the first step, between 0 and 1 (default: 0.0).
        prefix: Whether the curve begins after the warm-up, which then rises to its first value;
            otherwise it begins at step 0, below the warm-up (default: True).
    """

    curve: Curve
    steps: int
    _: KW_ONLY
    kind: str = "linear"
    start: float = 0.0
    prefix: bool = True

    def __post_init__(self) -> None:
        _check(self, curve=_curve, steps=count, kind=one_of(*RISES), start=_ratio, prefix=flag)
        if self.kind == "exponential" and self.start == 0:
            raise ValueError("start must be above 0 with kind='exponential': 0.0")

    def __call__(self, t: int) -> float:
        if t >= self.steps:
            return self.curve(t - self.steps if self.prefix else t)
        return RISES[self.kind](t / self.steps, self.start) * self.curve(0 if self.prefix else t)


@dataclass(frozen=True)
class wsd:
    """1 for ``stable`` steps, then a cooldown to ``min_ratio`` within ``decay`` steps.

    With :func:`warmup` before it, this is the warmup-stable-decay schedule of Hu et al. 2024
    (MiniCPM). With u the part of the cooldown that is over, it is ``m + (1 - m) fall(u)``:

    - ``"1-sqrt"``: ``1 - sqrt(u)``. Hägele et al. 2024.
    - ``"linear"``: ``1 - u``.
    - ``"cosine"``: ``(1 + cos(pi u)) / 2``.
    - ``"exponential"``: ``2 * 0.5^u - 1``.

    To begin the cooldown when you decide to, see :meth:`ScheduleLR.cooldown`.

    Args:
        stable: Steps before the cooldown; may be 0.
        decay: Steps of the cooldown.
        shape: ``"1-sqrt"``, ``"linear"``, ``"cosine"`` or ``"exponential"`` (default: "1-sqrt").
        min_ratio: Factor at the end and after it, between 0 and 1 (default: 0.0).
    """

    stable: int
    decay: int
    _: KW_ONLY
    shape: str = "1-sqrt"
    min_ratio: float = 0.0

    def __post_init__(self) -> None:
        _check(self, stable=count, decay=_steps, shape=one_of(*FALLS), min_ratio=_ratio)

    def __call__(self, t: int) -> float:
        u = min(max(t - self.stable, 0), self.decay) / self.decay
        return _down_to(self.min_ratio, FALLS[self.shape](u))


def _factor(curve: Curve, t: int) -> float:
    factor = curve(t)
    if type(factor) is not float:  # whole numbers, and what functions of others return
        factor = number(f"the factor of {curve} at t={t}", factor)
    if not 0 <= factor < math.inf:
        raise ValueError(f"the factor of {curve} at t={t} must be finite, not negative: {factor}")
    return factor


def values(curve: Curve, n: int) -> list[float]:
    """The factors of the first n steps.

    Raises:
        ValueError: When the curve gives nan, inf or a negative factor; names the step.
    """
    _curve("curve", curve)
    return [_factor(curve, t) for t in range(count("n", n))]


def plot_schedule(curve: Curve, n: int, ax: Axes | None = None) -> Axes:
    """Draw the factors of the first n steps with matplotlib.

    Args:
        curve: What to draw.
        n: Steps.
        ax: Where to draw (default: a new figure of pyplot's, which the caller shows or closes).

    Returns:
        The axes; ``ax.figure.savefig(...)`` writes a file.

    Raises:
        ImportError: Without matplotlib.
        ValueError: As :func:`values`.
    """
    factors = values(curve, n)
    axes: Axes = axes_for(ax)
    axes.plot(factors)
    axes.set_xlabel("step")
    axes.set_ylabel("factor of the base learning rate")
    return axes


PLATEAU_STATE = {
    "multiplier": _ratio,
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
    missing = [name for name in wanted if name not in state]
    if missing:
        raise ValueError(f"state_dict is not one of {of}: it has no {', '.join(missing)}")


def _rates(name: str, values: Any) -> list[float]:
    return [number(f"{name}[{i}]", value) for i, value in enumerate(_items(name, values))]


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
        _check(self, factor=_kept, patience=count, mode=one_of("min", "max"))
        _check(self, threshold=not_negative, threshold_mode=one_of("rel", "abs"))
        _check(self, cooldown=count, min_ratio=_ratio)
        if self.factor == 1:
            raise ValueError("factor must be below 1: 1.0")

    def update(self, metric: float | Tensor) -> bool:
        """Take a metric. The scheduler applies what follows in its next step.

        With several processes, give all of them the same number.

        Returns:
            Whether :attr:`multiplier` was reduced.
        """
        value = number("metric", metric.detach() if isinstance(metric, Tensor) else metric)
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
            are more or fewer curves than groups, or when a curve gives nan, inf or a negative
            factor.
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
            raise TypeError(f"optimizer is not a torch.optim.Optimizer: {optimizer!r}")
        if not isinstance(plateau, Plateau | None):
            raise TypeError(f"plateau is not a Plateau: {plateau!r}")
        last_epoch = count("last_epoch", last_epoch, -1)
        self.schedule = (
            [_curve(f"schedule[{i}]", curve) for i, curve in enumerate(schedule)]
            if isinstance(schedule, Iterable)
            else [_curve("schedule", schedule)]
        )
        self.plateau = plateau
        self._cooldown: wsd | None = None
        # Before anything is changed.
        self._factors(last_epoch + 1, len(optimizer.param_groups), None, self._multiplier())
        super().__init__(optimizer, last_epoch)

    def step(self, metric: float | Tensor | None = None) -> None:
        """Go to the next step, and set the learning rates for it.

        Args:
            metric: For the plateau, taken into account at once. Where the curve counts batches and
                the metric comes once an epoch, call ``plateau.update(metric)`` instead.
        """
        if metric is not None:
            if self.plateau is None:
                raise ValueError(f"metric={metric!r}, but the scheduler has no plateau")
            self.plateau.update(metric)
        super().step()

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
        _steps("steps", steps)
        at = max(self.last_epoch, 0)  # -1 where SequentialLR has not come to this one yet
        cooldown = wsd(at, steps, shape=shape, min_ratio=min_ratio)
        for curve in self.schedule:
            if curve != constant(0.0) and _factor(curve, at) == 0:
                raise RuntimeError(
                    f"a cooldown from step {at} would keep the learning rate at 0 for good, which "
                    f"is the factor of {curve} there: begin it later"
                )
        self._cooldown = cooldown

    def get_lr(self) -> list[float]:  # type: ignore[override]
        """The learning rates of this step. To read them, ``get_last_lr()`` is the way."""
        groups = self.optimizer.param_groups
        for group in groups[len(self.base_lrs) :]:  # added since the last step
            lr = group["lr"]
            group.setdefault("initial_lr", lr.clone() if isinstance(lr, Tensor) else lr)
            self.base_lrs.append(float(group["initial_lr"]))
        factors = self._factors(self.last_epoch, len(groups), self._cooldown, self._multiplier())
        bases = [float(base) for base in self.base_lrs]  # tensors at first, where lr is one
        self.base_lrs = [*bases]
        return [base * factor for base, factor in zip(bases, factors, strict=True)]

    def _multiplier(self) -> float:
        return 1.0 if self.plateau is None else self.plateau.multiplier

    def _factors(self, t: int, groups: int, cooldown: wsd | None, scale: float) -> list[float]:
        at = t
        if cooldown is not None:
            at = min(t, cooldown.stable)
            scale *= cooldown(t)
        factors = [_factor(curve, at) * scale for curve in self.schedule]
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
            "base_lrs": [float(lr) for lr in self.base_lrs],
            "lr": [float(group["lr"]) for group in self.optimizer.param_groups],
            "_last_lr": [float(lr) for lr in self._last_lr],
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
        if len(state_dict["lr"]) != len(groups):
            raise ValueError(
                f"state_dict has {len(state_dict['lr'])} parameter groups, the optimizer "
                f"{len(groups)}: add the groups before loading"
            )
        # All is checked and computed before anything is written.
        last_epoch = count("last_epoch", state_dict["last_epoch"], -1)
        step_count = count("_step_count", state_dict["_step_count"])
        rates = {name: _rates(name, state_dict[name]) for name in ("base_lrs", "lr", "_last_lr")}
        for name, found in rates.items():  # fewer where a group has been added since
            if len(found) > len(groups):
                raise ValueError(f"{name} has more rates than the {len(groups)} groups: {found}")
        cooldown = None if state_dict["cooldown"] is None else wsd(**state_dict["cooldown"])
        plateau: dict[str, Any] = {}
        if self.plateau is not None and state_dict["plateau"] is not None:
            plateau = _plateau_state(state_dict["plateau"])
        lrs, last_lr = rates["lr"], rates["_last_lr"]
        before, now = state_dict["schedule"], self._description()
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
        for group, lr in zip(groups, lrs, strict=True):
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
        total, steps = _steps("total_steps", total_steps), count("warmup_steps", warmup_steps)
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
