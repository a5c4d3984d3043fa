"""Series of numbers, such as losses: smoothed, measured, and drawn."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from fusedopt.arguments import below_one, count, numbers

BARS = "▁▂▃▄▅▆▇█"


def ewma(values: Iterable[float], beta: float = 0.9) -> list[float]:
    """The exponentially weighted average: S_1 = Y_1, S_t = beta S_(t-1) + (1 - beta) Y_t.

    nan and inf stand for themselves and enter no average.

    Raises:
        ValueError: ``beta`` is not in [0, 1).
        TypeError: It, or a value, is not a number.
    """
    beta = below_one("beta", beta)
    average: float | None = None
    smooth = []
    for value in numbers("values", values):
        if not math.isfinite(value):
            smooth.append(value)
            continue
        average = value if average is None else beta * average + (1 - beta) * value
        smooth.append(average)
    return smooth


def mean(values: Sequence[float]) -> float:
    """The mean; not finite where a value is not, or where the sum is too large."""
    return sum(values) / len(values)


def noise(values: Iterable[float]) -> float:
    """The standard deviation of a curve's noise, from how far points lie off their neighbours.

    The median of a - 2 b + c over neighbours a, b, c, so that neither the trend nor a jump counts:
    for normal noise the median of absolute values is 0.6745 standard deviations, and that sum has
    6 times the noise's variance.

    Raises:
        TypeError: A value is not a number.
    """
    y = numbers("values", values)
    bends = [abs(a - 2 * b + c) for a, b, c in zip(y, y[1:], y[2:], strict=False)]
    return statistics.median(bends) / (0.6745 * math.sqrt(6)) if bends else 0.0


def sparkline(values: Iterable[float], width: int = 40) -> str:
    """A curve as a line of text; × where something is nan or inf.

    Args:
        values: Any number of them; of more than ``width``, neighbours are averaged.
        width: Characters at most, at least 1.

    Raises:
        TypeError, ValueError: A value is not a number, or ``width`` not an integer from 1 on.
    """
    y = numbers("values", values)
    cells = min(count("width", width, 1), len(y))
    edges = [len(y) * i // cells for i in range(cells + 1)] if cells else [0]
    means = [mean(y[a:b]) for a, b in pairwise(edges)]
    finite = [level for level in means if math.isfinite(level)]
    low = min(finite, default=0.0)
    span = max(finite, default=0.0) - low

    def bar(level: float) -> str:
        if not math.isfinite(level):
            return "×"
        height = (level - low) / span if 0 < span < math.inf else 0.0
        return BARS[min(int(height * len(BARS)), len(BARS) - 1)]

    return "".join(map(bar, means))


def axes_for(ax: Any) -> Any:
    """``ax``, or the axes of a new figure of matplotlib's."""
    if ax is not None:
        return ax
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install matplotlib") from error
    return pyplot.subplots()[1]
