"""Timing by alternating rounds: contenders take turns in one process, and ratios are per round.

A machine's speed drifts (its clock, its neighbours), so two times taken minutes apart say little
about each other. The ratio of two times taken in the same round says much more.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

MIN_ROUNDS = 2
MAX_STEPS = 20
TURN_S = 0.03  # what one turn should last: long beside the clock's resolution and a thread's start


@dataclass(frozen=True)
class Spread:
    """The median of some values, and what 10% and 90% of them do not exceed."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Timing:
    """Seconds per step: by round, the mean over some steps; ``steps`` in all."""

    rounds: Mapping[Hashable, float]
    steps: int

    @property
    def spread(self) -> Spread:
        """Seconds per step."""
        return spread_of(list(self.rounds.values()))


def spread_of(values: Sequence[float]) -> Spread:
    """The spread of two values or more."""
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return Spread(statistics.median(values), deciles[0], deciles[-1])


def ratio(a: Timing, b: Timing) -> Spread:
    """How many times as long ``a`` takes as ``b``, over the rounds in which both took part."""
    shared = [turn for turn in a.rounds if turn in b.rounds]
    return spread_of([a.rounds[turn] / b.rounds[turn] for turn in shared])


def together(passes: Sequence[Timing]) -> Timing:
    """What was measured in several passes, as one."""
    return Timing(
        {
            (i, turn): mean
            for i, timing in enumerate(passes)
            for turn, mean in timing.rounds.items()
        },
        sum(timing.steps for timing in passes),
    )


def rounds(
    contenders: Mapping[str, Callable[[], object]],
    *,
    count: int = 16,
    budget: float = 10.0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time contenders against each other.

    In each round each contender takes one turn: an untimed step, which brings its own data into
    the caches, then some timed ones. The order rotates from round to round. A contender so slow
    that it would use more than its share of the budget takes part in every second round, or fourth,
    and so on: from the first to the last, since the machine may drift in between.

    Args:
        contenders: What to time, by name; each call is one step.
        count: Rounds, at least ``MIN_ROUNDS``.
        budget: Seconds for all of it, roughly; ``MIN_ROUNDS`` rounds take place in any case.
        clock: Returns seconds.
    """
    steps, affordable = {}, {}
    for name, step in contenders.items():
        step()  # creates the optimizer's state
        step()
        seconds = max(_mean(step, 1, clock), 1e-9)
        steps[name] = max(1, min(MAX_STEPS, round(TURN_S / seconds)))
        turns = int(budget / len(contenders) / (seconds * (1 + steps[name])))
        affordable[name] = max(MIN_ROUNDS, min(count, turns))

    names = list(contenders)
    count = max(affordable.values())
    # Powers of two, so that any two contenders share the rounds of the one that has fewer.
    every = {name: 1 << int(math.log2(count / affordable[name])) for name in names}
    means: dict[str, dict[Hashable, float]] = {name: {} for name in names}
    for turn in range(count):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            if turn % every[name] == 0:
                contenders[name]()
                means[name][turn] = _mean(contenders[name], steps[name], clock)
    return {name: Timing(means[name], steps[name] * len(means[name])) for name in names}


def _mean(step: Callable[[], object], steps: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(steps):
        step()
    return (clock() - start) / steps
