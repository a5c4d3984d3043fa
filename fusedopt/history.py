"""Learning curves: keep them, look at them, and say what is wrong with them."""

from __future__ import annotations

import csv
import html
import io
import json
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from fusedopt.arguments import below_one, count, finite_positive, integer, number

BARS = "▁▂▃▄▅▆▇█"


# Curves -------------------------------------------------------------------------------------------


def ewma(values: Sequence[float], beta: float = 0.9) -> list[float]:
    """The exponentially weighted average: S_1 = Y_1, S_t = beta S_(t-1) + (1 - beta) Y_t.

    nan and inf stand for themselves and enter no average.

    Raises:
        ValueError: ``beta`` is not in [0, 1).
        TypeError: It is not a number.
    """
    below_one("beta", beta)
    average: float | None = None
    smooth = []
    for value in values:
        if not math.isfinite(value):
            smooth.append(value)
            continue
        average = value if average is None else beta * average + (1 - beta) * value
        smooth.append(average)
    return smooth


def mean(values: Sequence[float]) -> float:
    """The mean; not finite where a value is not, or where the sum is too large."""
    return sum(values) / len(values)


def noise(values: Sequence[float]) -> float:
    """The standard deviation of a curve's noise, from how far points lie off their neighbours.

    The median of a - 2 b + c over neighbours a, b, c, so that neither the trend nor a jump counts:
    for normal noise the median of absolute values is 0.6745 standard deviations, and that sum has
    6 times the noise's variance.
    """
    bends = [abs(a - 2 * b + c) for a, b, c in zip(values, values[1:], values[2:], strict=False)]
    return statistics.median(bends) / (0.6745 * math.sqrt(6)) if bends else 0.0


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """A curve as a line of text; × where something is nan or inf.

    Args:
        values: Any number of them; of more than ``width``, neighbours are averaged.
        width: Characters at most, at least 1.
    """
    cells = min(width, len(values))
    edges = [len(values) * i // cells for i in range(cells + 1)] if cells else [0]
    means = [mean(values[a:b]) for a, b in pairwise(edges)]
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


def _write(path: str | Path, text: str) -> None:
    """Write a file in one go: whatever fails, the old one is there, whole."""
    target = Path(path).resolve()  # a link stays one
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        with open(part, "w", newline="", encoding="utf-8") as file:
            file.write(text)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


class History:
    """What a training loop measures, by step: columns of numbers, with gaps.

    A row may come in parts: a second :meth:`append` with the last step adds to it. ``print`` shows
    each column with its last and lowest value and its curve; :meth:`line` is one line of text for
    a terminal; a notebook draws the curves.

    Example::

        history = History()
        for step, batch in enumerate(loader):
            ...
            history.append(step, train_loss=loss, lr=optimizer.param_groups[0]["lr"])
            print("\\r" + history.line(), end="")
    """

    def __init__(self) -> None:
        self._steps: list[int] = []
        self._columns: dict[str, list[float | None]] = {}

    def append(self, step: int, /, **metrics: Any) -> None:
        """Add what was measured at a step.

        Args:
            step: Not below the last one.
            **metrics: Numbers, or tensors of one number. Reading a tensor waits for its device.

        Raises:
            TypeError: The step is not an integer, or a metric not a number.
            ValueError: The step lies before the last one, or its row has this metric already.
        """
        step = integer("step", step)
        if self._steps and step < self._steps[-1]:
            raise ValueError(f"step must not lie before the last one, {self._steps[-1]}: {step!r}")
        if "step" in metrics:
            raise ValueError(f"a metric cannot be called step: {metrics['step']!r}")
        again = bool(self._steps) and step == self._steps[-1]
        for name in metrics:
            if again and self._columns.get(name, [None])[-1] is not None:
                raise ValueError(f"step {step} has a {name} already: {metrics[name]!r}")
        row = {name: number(name, value) for name, value in metrics.items()}
        if not again:
            self._steps.append(step)
            for column in self._columns.values():
                column.append(None)
        for name, value in row.items():
            self._columns.setdefault(name, [None] * len(self._steps))[-1] = value

    def __len__(self) -> int:
        """The number of rows."""
        return len(self._steps)

    def __eq__(self, other: object) -> bool:
        """Whether the other one has the same rows; nan is like nan."""
        if not isinstance(other, History):
            return NotImplemented
        return self._text() == other._text()

    __hash__ = None  # type: ignore[assignment] # it changes

    @property
    def steps(self) -> list[int]:
        """The step of each row."""
        return list(self._steps)

    @property
    def names(self) -> list[str]:
        """The columns, in the order in which they came."""
        return list(self._columns)

    def __contains__(self, name: object) -> bool:
        return name in self._columns

    def __getitem__(self, name: str) -> list[float | None]:
        """A column: a value for each row, None in a gap. KeyError names the columns there are."""
        return list(self._column(name))

    def points(self, name: str) -> tuple[list[int], list[float]]:
        """A column without its gaps: steps, and values."""
        pairs = zip(self._steps, self._column(name), strict=True)
        known = [(step, value) for step, value in pairs if value is not None]
        return [step for step, _ in known], [value for _, value in known]

    def _column(self, name: str) -> list[float | None]:
        try:
            return self._columns[name]
        except KeyError:
            raise KeyError(f"no column {name!r}; there are {self.names}") from None

    # Files ----------------------------------------------------------------------------------------

    def _text(self) -> dict[str, list[str]]:
        """All columns as text that gives back the exact number; nothing in a gap."""
        return {
            "step": [str(step) for step in self._steps],
            **{
                name: ["" if value is None else repr(value) for value in column]
                for name, column in self._columns.items()
            },
        }

    @classmethod
    def _from_text(cls, columns: dict[str, list[str]], source: Any) -> History:
        history = cls()
        try:
            steps = columns.pop("step")
            history.load_state_dict(
                {
                    "steps": [int(step) for step in steps],
                    "columns": {
                        name: [float(text) if text else None for text in column]
                        for name, column in columns.items()
                    },
                }
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{source} holds no history: {error}") from error
        return history

    def to_csv(self, path: str | Path) -> None:
        """Write a row for each step; numbers are exact, gaps are empty.

        An old file is replaced in one go, and stays as it is when that fails.
        """
        columns = self._text()
        file = io.StringIO(newline="")
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
        _write(path, file.getvalue())

    @classmethod
    def from_csv(cls, path: str | Path) -> History:
        """Read what :meth:`to_csv` wrote. ValueError when it is something else."""
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
        header = rows[0] if rows else []
        if any(len(row) != len(header) for row in rows) or len(set(header)) != len(header):
            raise ValueError(f"{path} holds no history: its rows do not fit its header {header}")
        return cls._from_text({n: [row[i] for row in rows[1:]] for i, n in enumerate(header)}, path)

    def to_json(self, path: str | Path) -> None:
        """Write an object of columns, whose numbers are strings: JSON has no nan and no inf.

        An old file is replaced as by :meth:`to_csv`.
        """
        _write(path, json.dumps(self._text(), ensure_ascii=False) + "\n")

    @classmethod
    def from_json(cls, path: str | Path) -> History:
        """Read what :meth:`to_json` wrote. ValueError when it is something else."""
        columns = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(columns, dict):
            raise ValueError(f"{path} holds no history: it is not an object of columns")
        return cls._from_text(columns, path)

    def state_dict(self) -> dict[str, Any]:
        """All rows, as plain numbers, for a checkpoint."""
        columns = {name: list(column) for name, column in self._columns.items()}
        return {"steps": list(self._steps), "columns": columns}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Have the rows of a :meth:`state_dict`, and no others.

        Raises:
            TypeError: A step is not an integer, a value not a number, or a name not a string.
            ValueError: The rows do not fit.
        """
        missing = [name for name in ("steps", "columns") if name not in state_dict]
        if missing:
            raise ValueError(f"state_dict is none of a History: it has no {', '.join(missing)}")
        steps = [integer(f"steps[{i}]", step) for i, step in enumerate(state_dict["steps"])]
        columns = {
            name: [None if value is None else number(name, value) for value in column]
            for name, column in state_dict["columns"].items()
        }
        for name, column in columns.items():
            if not isinstance(name, str):
                raise TypeError(f"a column's name is not a string: {name!r}")
            if name == "step":  # as in append()
                raise ValueError(f"a column cannot be called step: {column}")
            if not any(value is not None for value in column):
                raise ValueError(f"{name} has no values: {column}")
            if len(column) != len(steps):
                raise ValueError(f"{name} has {len(column)} rows, but there are {len(steps)} steps")
        if any(b <= a for a, b in pairwise(steps)):
            raise ValueError(f"steps must rise: {steps}")
        self._steps, self._columns = steps, columns

    # Views ----------------------------------------------------------------------------------------

    def line(self, width: int = 20) -> str:
        """One line: the last step, and each column's last value and curve.

        Args:
            width: Characters of a curve.
        """
        parts = [f"step {self._steps[-1]}" if self._steps else "no steps yet"]
        for name in self._columns:
            values = self.points(name)[1]
            parts.append(f"{name} {values[-1]:.4g} {sparkline(values, width)}")
        return "  ".join(parts)

    def __str__(self) -> str:
        """A line for each column."""
        if not self._steps:
            return "History: no steps yet"
        longest = max((len(name) for name in self._columns), default=0)
        lines = [f"History: {len(self)} rows, steps {self._steps[0]} to {self._steps[-1]}"]
        for name in self._columns:
            values = self.points(name)[1]
            finite = [value for value in values if math.isfinite(value)]
            low, high = min(finite, default=math.nan), max(finite, default=math.nan)
            lines.append(
                f"{name:<{longest}}  last {values[-1]:<10.4g} {low:>10.4g} to {high:<10.4g} "
                f"{sparkline(values)}"
            )
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"History({len(self)} rows: {', '.join(self._columns) or 'no columns'})"

    def plot(
        self, ax: Any = None, *, names: Sequence[str] | None = None, smoothing: float = 0.0
    ) -> Any:
        """Draw curves with matplotlib, on ``ax`` or a new one, and return it.

        Args:
            ax: Axes, or None.
            names: Which columns (default: those whose names end in "loss", or else all).
            smoothing: The ``beta`` of :func:`ewma`; the raw curve is then drawn faintly.
        """
        losses = [name for name in self._columns if name.endswith("loss")]
        chosen = list(names) if names is not None else losses or self.names
        curves = [(name, *self.points(name)) for name in chosen]  # KeyError before a figure
        ax = axes_for(ax)
        for name, steps, values in curves:
            (line,) = ax.plot(steps, ewma(values, smoothing), label=name)
            if smoothing:
                ax.plot(steps, values, alpha=0.25, color=line.get_color())
        ax.set_xlabel("step")
        if curves:
            ax.legend()
        return ax

    def _repr_html_(self) -> str:
        """For a notebook: the text, and the curves when there is matplotlib."""
        return f"<pre>{html.escape(str(self))}</pre>{self._svg()}"

    def _svg(self) -> str:
        try:
            from matplotlib.figure import Figure  # no pyplot: nothing is left to be closed
        except ImportError:
            return ""
        if not self._columns:
            return ""
        figure = Figure(figsize=(6, 3), layout="constrained")
        self.plot(figure.add_subplot())
        file = io.StringIO()
        figure.savefig(file, format="svg")
        svg = file.getvalue()
        return svg[svg.index("<svg") :]


# Diagnosis ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Thresholds:
    """What :func:`diagnose` calls much or little. All are choices; these are the reasons.

    Levels are means over a tenth of a curve (3 points or more). A difference of levels is real
    when it exceeds ``significant`` standard errors, by the noise that the curve itself shows.

    Attributes:
        least_points: Fewer than this have no tenths; at least 5, which the rules take.
        significant: Curves are compared in some ten places, so that 2 would be exceeded by chance.
        flat: A loss that has lost less than this part of its start has not fallen: as much comes
            from learning how frequent the classes are.
        slow: A loss that has lost less than this part, and still falls as at first, trains slowly.
        high: A loss that ends above this part of its start, and flat, is high. Where labels are
            noisy, the best possible loss may be as high: raise it there.
        wait: A loss that stays where it starts for this part of the run is stuck. Warmups are
            shorter.
        still: A curve that wins this part of its whole gain within its last quarter is not done;
            one that approaches its end with a time constant of a fifth of the run wins 2% there.
        rise: An overfitted validation loss has lost this part of what it had gained.
        gap: Validation loss above training loss, as a part of the former: at one half the
            training loss is half of it.
        swing: The spread of the second half around its trend, as a part of the total fall.
        lost: A loss that has lost this part of what it had gained has diverged, also when it
            stays finite.
        exploded: So has one that ends at this many times its start; above 1.
        drop: A learning rate that falls to this part or less from one row to the next has been
            dropped. Smooth schedules do that in their last steps only.
        stalled: The fall after a drop, as a part of that in as many steps before it.
        remaining: The part of the start that must be left for a stop to be too early.

    Raises:
        TypeError, ValueError: A number is not one, not finite and positive, or too small.
    """

    least_points: int = 10
    significant: float = 4.0
    flat: float = 0.05
    slow: float = 0.3
    high: float = 0.5
    wait: float = 0.2
    still: float = 0.03
    rise: float = 0.1
    gap: float = 0.5
    swing: float = 0.2
    lost: float = 0.8
    exploded: float = 1.5
    drop: float = 0.5
    stalled: float = 0.2
    remaining: float = 0.25

    def __post_init__(self) -> None:
        count("least_points", self.least_points, 5)
        for each in fields(self)[1:]:
            finite_positive(each.name, getattr(self, each.name))
        if self.exploded <= 1:
            raise ValueError(f"exploded must be above 1: {self.exploded!r}")


@dataclass(frozen=True)
class Finding:
    """Something that curves show.

    Attributes:
        code: Which of the diagnoses, such as ``"OVERFITTING"``.
        severity: ``"error"``: training failed; ``"warning"``: it can be better; ``"info"``.
        evidence: The numbers that led to it, by name.
        advice: What to try.
    """

    code: str
    severity: str
    evidence: dict[str, float] = field(repr=False)
    advice: str

    def __str__(self) -> str:
        """One line."""
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in self.evidence.items())
        return f"{self.code} ({self.severity}): {numbers}. {self.advice}"


ADVICE = {
    "INSUFFICIENT_DATA": ("info", "Log more often, or train longer, before judging the curve."),
    "DIVERGED": (
        "error",
        "Lower the learning rate, clip the gradients, or warm up; look for bad data.",
    ),
    "BAD_INIT": (
        "warning",
        "The loss fell late: fix the initialization, or warm up; if it was the warmup that took "
        "so long, warm up faster.",
    ),
    "LR_TOO_HIGH_PLATEAU": (
        "error",
        "The loss never fell. A rate that is too high and one that is far too low look alike, as "
        "does a finished model: run lr_range_test(), then overfit_batch() to rule out a bug.",
    ),
    "LR_TOO_LOW_OR_SMALL_MODEL": (
        "warning",
        "The loss is high and still falls slowly: raise the learning rate (lr_range_test()); if "
        "that does not help, take a larger model.",
    ),
    "UNDERFITTING": (
        "warning",
        "The loss is flat and high, in training as in validation: take a larger model, regularize "
        "less, or train longer with another schedule. A noisy task looks the same.",
    ),
    "STILL_IMPROVING": ("info", "Train longer: the curve has not reached its end."),
    "OVERFITTING": (
        "warning",
        "Regularize more (weight decay, dropout, augmentation), get more data, or stop earlier.",
    ),
    "OSCILLATING": (
        "warning",
        "Lower the learning rate, or take larger batches: noise of small batches looks the same.",
    ),
    "DECAYED_TOO_EARLY": (
        "warning",
        "The loss was falling until the learning rate was dropped: drop it later, or by less.",
    ),
}


def _finding(code: str, **evidence: float) -> Finding:
    severity, advice = ADVICE[code]
    return Finding(code, severity, evidence, advice)


class _Curve:
    """A finite curve, and the levels that the rules compare."""

    def __init__(self, steps: Sequence[int], values: Sequence[float], limits: Thresholds) -> None:
        self.steps, self.values = steps, values
        self.width = max(3, len(values) // 10)
        self.start = mean(values[: self.width])
        self.end = mean(values[-self.width :])
        # The mean around each point, so that it neither lags nor is lowest by chance.
        half = self.width // 2
        self.levels = [mean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
        self.lowest = min(range(len(values)), key=self.levels.__getitem__)
        self.best = self.levels[self.lowest]
        self._noise = noise(values) * limits.significant

    def real(self, width: int | None = None) -> float:
        """What a difference of two levels must exceed to be more than noise."""
        return self._noise * math.sqrt(2 / (width or self.width))

    def swing(self) -> float:
        """The spread of the second half around its trend, in the median of its tenths."""
        half = self.values[len(self.values) // 2 :]
        chunks = [half[i : i + self.width] for i in range(0, len(half), self.width)]
        spreads = [_spread(chunk) for chunk in chunks if len(chunk) == self.width]
        return statistics.median(spreads)

    def gain(self, sign: float) -> tuple[float, float]:
        """What the last quarter has won, from end to end, and what that must exceed.

        A ``sign`` of 1 is for curves that should fall, -1 for those that should rise.
        """
        quarter = self.values[-max(3, len(self.values) // 4) :]
        # The variance of a slope over n points is 12 / n^3 times the noise's.
        return -sign * _slope(quarter) * len(quarter), self._noise * math.sqrt(12 / len(quarter))


def _slope(values: Sequence[float]) -> float:
    """Of the line that fits best, for each point."""
    middle = (len(values) - 1) / 2
    products = sum((i - middle) * value for i, value in enumerate(values))
    return products / sum((i - middle) ** 2 for i in range(len(values)))


def _spread(values: Sequence[float]) -> float:
    """The standard deviation around that line."""
    middle, level, slope = (len(values) - 1) / 2, mean(values), _slope(values)
    left = [value - level - slope * (i - middle) for i, value in enumerate(values)]
    return math.sqrt(sum(x * x for x in left) / (len(values) - 2))


def _bad_init(curve: _Curve, limits: Thresholds) -> Finding | None:
    fall = curve.start - curve.best
    needed = max(curve.real(), limits.flat * abs(curve.start))
    if fall <= needed:
        return None
    bound = curve.start - max(limits.flat * fall, curve.real())
    if not curve.best < bound or curve.start - bound > limits.wait * fall / 2:
        return None  # a steady fall, too, would take long to show beside the noise
    stuck = next(i for i, level in enumerate(curve.levels) if level < bound)
    if stuck < limits.wait * len(curve.values):
        return None
    part = stuck / len(curve.values)
    return _finding("BAD_INIT", until_step=curve.steps[stuck], part=part, start=curve.start)


def _level(
    train: _Curve, val: _Curve | None, best: _Curve, sign: float, limits: Thresholds
) -> Finding | None:
    """Where training has ended: at most one of four findings."""
    fall = train.start - train.end
    part = fall / abs(train.start) if train.start else math.inf
    evidence = {"start": train.start, "end": train.end, "fallen": part}
    if fall <= max(limits.flat * abs(train.start), train.real()):
        return _finding("LR_TOO_HIGH_PLATEAU", **evidence)
    gained, needed = train.gain(1)
    falls = gained > max(needed, limits.still * fall)
    if val is not None:
        evidence["val_end"] = val.end
    if train.start > 0:  # below zero, nobody knows what a high loss is
        high_val = val is None or val.end > (1 - limits.slow) * train.start
        if part < limits.slow and falls and high_val:
            return _finding("LR_TOO_LOW_OR_SMALL_MODEL", **evidence, last_gain=gained)
        alike = val is not None and val.end - train.end < limits.flat * train.start + val.real()
        if train.end > limits.high * train.start and not falls and alike:
            return _finding("UNDERFITTING", **evidence)
    gained, needed = best.gain(sign)
    whole = sign * (best.start - best.end)
    if gained > max(needed, limits.still * whole):
        return _finding("STILL_IMPROVING", last_gain=gained, whole_gain=whole)
    return None


def _overfitting(train: _Curve, val: _Curve, limits: Thresholds) -> Finding | None:
    rise = val.end - val.best
    at = val.steps[val.lowest]
    evidence = {"val_best": val.best, "at_step": at, "val_end": val.end, "train_end": train.end}
    risen = rise > max(val.real(), limits.rise * (val.start - val.best))
    then = next(i for i, step in enumerate(train.steps) if step >= at or i == len(train.steps) - 1)
    if risen and train.end < train.levels[then] + train.real():
        return _finding("OVERFITTING", **evidence)
    gained, needed = val.gain(1)
    falls = gained > max(needed, limits.still * (val.start - val.end))
    gap = val.end - train.end
    if val.end > 0 and gap > max(limits.gap * val.end, val.real()) and not falls:
        return _finding("OVERFITTING", **evidence)
    return None


def _oscillating(curve: _Curve, limits: Thresholds) -> Finding | None:
    fall = curve.start - curve.end
    scale = max(fall, abs(curve.start) / 2)  # where nothing falls, against the level
    swing = curve.swing()
    if swing <= limits.swing * scale:
        return None
    return _finding("OSCILLATING", swing=swing, fall=fall)


def _decayed_too_early(
    curve: _Curve, rate: tuple[list[int], list[float]], limits: Thresholds
) -> Finding | None:
    if curve.start <= 0 or curve.end < limits.remaining * curve.start:
        return None
    for step, before, after in zip(rate[0][1:], rate[1], rate[1][1:], strict=False):
        if not 0 <= after <= limits.drop * before:
            continue
        at = sum(s < step for s in curve.steps)
        # Two levels on either side: the one next to the drop, and one before and at the end.
        width = min(curve.width, at // 2, (len(curve.values) - at) // 2)
        if width < 3:
            continue
        values = curve.values
        fall = mean(values[at - 2 * width : at - width]) - mean(values[at - width : at])
        left = mean(values[at : at + width]) - curve.end
        if fall > curve.real(width) and left < limits.stalled * fall:
            return _finding(
                "DECAYED_TOO_EARLY",
                at_step=step,
                lr_before=before,
                lr_after=after,
                fall_before=fall,
                fall_after=left,
                end=curve.end,
            )
    return None


def _nonfinite(name: str, steps: Sequence[int], values: Sequence[float]) -> Finding | None:
    bad = [step for step, value in zip(steps, values, strict=True) if not math.isfinite(value)]
    if not bad:
        return None
    return _finding("DIVERGED", first_step=bad[0], **{f"nonfinite_{name}": len(bad)})


def _exploded(curve: _Curve, limits: Thresholds) -> Finding | None:
    # The end of an explosion is short. A single outlier is none.
    end = min(curve.values[-3:])
    fallen = curve.start - curve.best
    if fallen > max(curve.real(), limits.flat * abs(curve.start)):
        risen, allowed = end - curve.best, limits.lost * fallen
    else:
        risen, allowed = end - curve.start, (limits.exploded - 1) * abs(curve.start)
    if risen <= max(allowed, curve.real(3)):
        return None
    return _finding("DIVERGED", start=curve.start, best=curve.best, end=end)


def diagnose(
    history: History,
    *,
    train: str = "train_loss",
    val: str = "val_loss",
    lr: str = "lr",
    accuracy: str = "val_accuracy",
    thresholds: Thresholds | None = None,
) -> list[Finding]:
    """What learning curves show, most severe first; an empty list when they look healthy.

    ``docs/training/curves.md`` has a table of the diagnoses. The rules look at curves only, so
    they cannot tell all: a learning rate that is far too high and one that is far too low both
    leave the loss where it was, and the noise of small batches looks like oscillation.

    Args:
        history: The curves.
        train: The training loss's column.
        val: The validation loss's. Without that column, nothing is said about validation.
        lr: The learning rate's. Without it, nothing is said about its decay.
        accuracy: A column that should rise, which tells whether training still improves things.
            Without it, the validation loss tells, or the training loss.
        thresholds: What counts as much (default: :class:`Thresholds`'s).

    Raises:
        TypeError: ``history`` is not a :class:`History`, or ``thresholds`` no :class:`Thresholds`.
    """
    if not isinstance(history, History):
        raise TypeError(f"history is not a History: {history!r}")
    limits = Thresholds() if thresholds is None else thresholds
    if not isinstance(limits, Thresholds):
        raise TypeError(f"thresholds is not a Thresholds: {thresholds!r}")

    def points(name: str) -> tuple[list[int], list[float]]:
        return history.points(name) if name in history else ([], [])

    for name in (train, val):
        failed = _nonfinite(name, *points(name))
        if failed:
            return [failed]
    curves = {}
    findings: list[Finding | None] = []
    for name in (train, val, accuracy):
        pairs = [pair for pair in zip(*points(name), strict=True) if math.isfinite(pair[1])]
        if len(pairs) >= limits.least_points:
            curves[name] = _Curve([step for step, _ in pairs], [y for _, y in pairs], limits)
        elif pairs or name == train:
            evidence = {f"points_of_{name}": len(pairs), "needed": limits.least_points}
            findings.append(_finding("INSUFFICIENT_DATA", **evidence))
    if train in curves:
        first, second = curves[train], curves.get(val)
        failed = _exploded(first, limits)
        if failed:
            return [failed]
        best, sign = (curves[accuracy], -1) if accuracy in curves else (second or first, 1)
        findings.append(_level(first, second, best, sign, limits))
        findings.append(_bad_init(first, limits))
        findings.append(_oscillating(first, limits))
        findings.append(_decayed_too_early(first, points(lr), limits))
        if second is not None:
            findings.append(_overfitting(first, second, limits))
    order = ("error", "warning", "info")
    return sorted(filter(None, findings), key=lambda finding: order.index(finding.severity))
