"""Curves: how learning rates go over steps.

A curve is a callable object: ``curve(t)`` is the factor of a group's base learning rate in step t,
counted from 0. It has no state, so resuming at a step is calling it with that step. Curves hold
their last value when they are over, are checked when they are made, can be pickled and compared.
A step that is not an integer is a TypeError, a negative one a ValueError. Any other function of t
can take a curve's place.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

from fusedopt.arguments import (
    check_fields,
    count,
    finite_positive,
    flag,
    items,
    not_negative,
    number,
    one_of,
    positive_ratio,
    ratio,
    shown,
)
from fusedopt.series import axes_for

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curve = Callable[[int], float]

# Later steps are like this one: where floats end, nothing happens any more.
LAST_STEP = 2**63

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


def _rising_steps(name: str, values: Any) -> tuple[int, ...]:
    steps = tuple(_steps(f"{name}[{i}]", value) for i, value in enumerate(items(name, values)))
    if not steps or any(a >= b for a, b in pairwise(steps)):
        raise ValueError(f"{name} must be one or more steps in rising order: {values!r}")
    return steps


def _factors(name: str, values: Any) -> tuple[float, ...]:
    return tuple(not_negative(f"{name}[{i}]", v) for i, v in enumerate(items(name, values)))


def as_curve(name: str, value: Any) -> Curve:
    """A function of t, and no class of curves."""
    if isinstance(value, type) or not callable(value):
        raise TypeError(f"{name} is not a curve, such as linear(100): {shown(value)}")
    return value  # type: ignore[no-any-return]


def _down_to(min_ratio: float, rest: float) -> float:
    """Between 1 (all of it rests) and min_ratio, exact at both ends."""
    return min_ratio + (1 - min_ratio) * rest


class _Curve:
    """What all curves have in common: which steps there are."""

    def __call__(self, t: int) -> float:
        if type(t) is not int or not 0 <= t <= LAST_STEP:  # each step asks: the usual one first
            t = min(count("t", t), LAST_STEP)
        return self._at(t)

    def _at(self, t: int) -> float:
        raise NotImplementedError


@dataclass(frozen=True)
class constant(_Curve):
    """``factor``, always.

    Args:
        factor: Of the base learning rate (default: 1.0).
    """

    factor: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self, factor=not_negative)

    def _at(self, t: int) -> float:
        return self.factor


@dataclass(frozen=True)
class linear(_Curve):
    """From 1 to ``min_ratio`` on a straight line: ``m + (1 - m) (1 - t/total)``.

    Args:
        total: Steps until the end.
        min_ratio: Factor at the end and after it, between 0 and 1 (default: 0.0).
    """

    total: int
    _: KW_ONLY
    min_ratio: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self, total=_steps, min_ratio=ratio)

    def _at(self, t: int) -> float:
        return _down_to(self.min_ratio, 1 - min(t, self.total) / self.total)


@dataclass(frozen=True)
class polynomial(_Curve):
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
        check_fields(self, total=_steps, power=finite_positive, min_ratio=ratio)

    def _at(self, t: int) -> float:
        return _down_to(self.min_ratio, (1 - min(t, self.total) / self.total) ** self.power)


@dataclass(frozen=True)
class cosine(_Curve):
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
        check_fields(self, total=_steps, cycles=_steps, cycle_mult=finite_positive)
        check_fields(self, cycle_decay=positive_ratio, k=finite_positive, min_ratio=ratio)
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

    def _at(self, t: int) -> float:
        if t >= self.total:
            return self.min_ratio
        cycle = bisect_right(self._starts, t) - 1
        start, end = self._starts[cycle : cycle + 2]
        u = (t - start) / (end - start)
        peak = max(self.cycle_decay**cycle, self.min_ratio)
        rest = (1 + math.cos(math.pi * u**self.k)) / 2
        return self.min_ratio + (peak - self.min_ratio) * rest


@dataclass(frozen=True)
class exponential(_Curve):
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
        check_fields(self, gamma=positive_ratio, every=_steps, min_ratio=ratio)

    def _at(self, t: int) -> float:
        return max(float(self.gamma ** (t / self.every)), self.min_ratio)


@dataclass(frozen=True)
class step(_Curve):
    """``gamma^floor(t / step_size)``.

    Args:
        step_size: Steps between two decays.
        gamma: What each decay leaves, above 0, at most 1 (default: 0.1).
    """

    step_size: int
    gamma: float = 0.1

    def __post_init__(self) -> None:
        check_fields(self, step_size=_steps, gamma=positive_ratio)

    def _at(self, t: int) -> float:
        return float(self.gamma ** (t // self.step_size))


@dataclass(frozen=True)
class multi_step(_Curve):
    """``gamma`` to the power of how many milestones are reached.

    Args:
        milestones: The steps from which the next factor counts, in rising order.
        gamma: What each milestone leaves, above 0, at most 1 (default: 0.1).
    """

    milestones: Sequence[int]
    gamma: float = 0.1

    def __post_init__(self) -> None:
        check_fields(self, milestones=_rising_steps, gamma=positive_ratio)

    def _at(self, t: int) -> float:
        return float(self.gamma ** bisect_right(self.milestones, t))


@dataclass(frozen=True)
class piecewise_constant(_Curve):
    """``factors[i]`` from step ``boundaries[i - 1]`` until before step ``boundaries[i]``.

    Args:
        boundaries: The steps from which the next factor counts, in rising order.
        factors: One more than boundaries; finite and not negative, in any order.
    """

    boundaries: Sequence[int]
    factors: Sequence[float]

    def __post_init__(self) -> None:
        check_fields(self, boundaries=_rising_steps, factors=_factors)
        if len(self.factors) != len(self.boundaries) + 1:
            raise ValueError(
                f"factors must be one more than the {len(self.boundaries)} boundaries: "
                f"{self.factors!r}"
            )

    def _at(self, t: int) -> float:
        return self.factors[bisect_right(self.boundaries, t)]


@dataclass(frozen=True)
class inverse_sqrt(_Curve):
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
        check_fields(self, timescale=_steps, min_ratio=ratio)

    def _at(self, t: int) -> float:
        return max(math.sqrt(self.timescale / (self.timescale + t)), self.min_ratio)


@dataclass(frozen=True)
class inverse_time(_Curve):
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
        check_fields(self, rate=not_negative, every=_steps, staircase=flag, min_ratio=ratio)

    def _at(self, t: int) -> float:
        time = t // self.every if self.staircase else t / self.every
        return max(1 / (1 + self.rate * time), self.min_ratio)


@dataclass(frozen=True)
class warmup(_Curve):
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
        check_fields(
            self, curve=as_curve, steps=count, kind=one_of(*RISES), start=ratio, prefix=flag
        )
        if self.kind == "exponential" and self.start == 0:
            raise ValueError("start must be above 0 with kind='exponential': 0.0")

    def _at(self, t: int) -> float:
        if t >= self.steps:
            return _number_at(self.curve, t - self.steps if self.prefix else t)
        follows = _number_at(self.curve, 0 if self.prefix else t)
        return RISES[self.kind](t / self.steps, self.start) * follows


@dataclass(frozen=True)
class wsd(_Curve):
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
        check_fields(self, stable=count, decay=_steps, shape=one_of(*FALLS), min_ratio=ratio)

    def _at(self, t: int) -> float:
        u = min(max(t - self.stable, 0), self.decay) / self.decay
        return _down_to(self.min_ratio, FALLS[self.shape](u))


def _number_at(curve: Curve, t: int) -> float:
    """What a curve gives, which may be any function."""
    factor = curve(t)
    if type(factor) is not float:  # whole numbers, and what functions of others return
        factor = number(f"the factor of {curve} at t={t}", factor)
    return factor


def factor_at(curve: Curve, t: int) -> float:
    """The same, checked: a factor of learning rates."""
    factor = _number_at(curve, t)
    if not 0 <= factor < math.inf:
        raise ValueError(f"the factor of {curve} at t={t} must be finite, not negative: {factor}")
    return factor


def values(curve: Curve, n: int) -> list[float]:
    """The factors of the first n steps.

    Raises:
        ValueError: When the curve gives nan, inf or a negative factor; names the step.
    """
    as_curve("curve", curve)
    return [factor_at(curve, t) for t in range(count("n", n))]


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
