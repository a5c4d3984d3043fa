"""What learning curves show, and what to try: the rules behind ``diagnose`` in ``history.py``."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields

from fusedopt.arguments import count, finite_positive
from fusedopt.series import mean, noise


@dataclass(frozen=True)
class Thresholds:
    """What :func:`diagnose` calls much or little. All are choices; these are the reasons.

    Levels are means over a tenth of a curve (3 points or more), in which no single point counts
    that is far off. The start is the first tenth's; but where that has points far above the first
    one, the mean of those before them, if it is lower. What is lost since is measured from the
    first points where these are higher. A difference of levels is real when it exceeds
    ``significant`` standard errors, by the noise that the curve itself shows.

    Attributes:
        least_points: Fewer than this have no tenths; at least 5, which the rules take.
        significant: Curves are compared in some ten places, so that 2 would be exceeded by chance.
        flat: A loss that has lost less than this part of its start has not fallen: as much comes
            from learning how frequent the classes are.
        slow: A loss that has lost less than this part, and still falls as at first, trains slowly;
            one that has lost more has fallen, whatever the noise.
        high: A loss that ends above this part of its start, and flat, is high. Where labels are
            noisy, the best possible loss may be as high: raise it there.
        wait: A loss that stays where it starts for this part of the run is stuck. Warmups are
            shorter.
        still: A curve that wins this part of its whole gain within its last quarter is not done;
            one that approaches its end with a time constant of a fifth of the run wins 2% there.
        rise: An overfitted validation loss has lost this part of what it had gained.
        gap: Validation loss above training loss, as a part of the former, that is worth a word:
            at one half the training loss is half of it.
        swing: The spread of the second half around its trend, as a part of the total fall.
        lost: A loss that has lost this part of what it had gained has diverged, also when it
            stays finite.
        exploded: So has one that ends at this many times its start; above 1.
        drop: A learning rate that falls to this part or less from one row to the next has been
            dropped. Smooth schedules do that in their last steps only.
        stalled: The fall after a drop, as a part of that in as many steps before it.
        remaining: The part of the start that must be left for a stop to be too early, or for a
            gap to be worth a word.

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


# Float32 has no such number, and float64 no sum of many such squares.
_INFINITE = 1e150

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
    "GENERALIZATION_GAP": (
        "info",
        "The validation loss has hardly risen, but is far above the training loss: more data, "
        "augmentation or regularization may lower it. Stopping earlier would not.",
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
    """A finite curve that should fall, and the levels that the rules compare.

    Attributes:
        start: The level of the first tenth, or of what is before a peak in it.
        top: The level of the very first points where it is above that beyond noise: a loss that
            falls fast has lost much within a tenth.
        end: The level of the last tenth.
        fall: From top to end.
        best: The lowest level.
        lowest: Where that is.
    """

    def __init__(self, steps: Sequence[int], values: Sequence[float], limits: Thresholds) -> None:
        self.steps, self.values = steps, values
        self._significant = limits.significant
        self._noise = noise(values)
        self.width = self._before = max(3, len(values) // 10)
        self.start = mean(values[: self.width])
        # A rate that is far too high throws the loss up within a few steps. With these in the mean,
        # coming back to where it was would look like a fall: the start is before them.
        bound = values[0] + max(limits.flat * abs(values[0]), self.real(1))
        spike = next((i for i, y in enumerate(values[: self.width]) if y > bound), self.width)
        if spike < self.width and mean(values[:spike]) < self.start:
            self.start, self._before = mean(values[:spike]), spike
        self.top = self.start
        for few in (3, 1):
            first = mean(values[:few])
            if few < self._before and first - self.start > self._significant * self._noise * (
                math.sqrt(1 / few + 1 / self._before)
            ):
                self.top = max(self.top, first)
        self.end = self.level(values[-self.width :])
        self.fall = self.top - self.end
        # Around each point, so that it neither lags nor is lowest by chance.
        half = self.width // 2
        self.levels = [
            self.level(values[max(0, i - half) : i + half + 1]) for i in range(len(values))
        ]
        self.lowest = min(range(len(values)), key=self.levels.__getitem__)
        self.best = self.levels[self.lowest]

    def level(self, values: Sequence[float]) -> float:
        """The mean, of which single points that are far off the median are no great part."""
        return mean(self.near(values))

    def near(self, values: Sequence[float], trend: float = 0.0) -> list[float]:
        """The values, those that are further off their median than by noise and trend put there."""
        middle = statistics.median(values)
        most = self._significant * self._noise + trend
        return [min(max(value, middle - most), middle + most) for value in values]

    def real(self, width: int | None = None) -> float:
        """What a difference of two levels must exceed to be more than noise."""
        return self._significant * self._noise * math.sqrt(2 / (width or self.width))

    def real_fall(self) -> float:
        """The same for a level and the start."""
        return self._significant * self._noise * math.sqrt(1 / self._before + 1 / self.width)

    def times_the_start(self, end: float) -> bool:
        """Whether a level is so far above the start that noise, relative to the loss, is not it.

        Of losses that are not negative. After a peak of many orders of magnitude, differences show
        more noise than there is level, and would hide it; the peak's logarithms do not.
        """
        if min(self.values) < 0 or self.start == 0:
            return False
        spread = noise([math.log(value) for value in self.values if value])
        rise = math.log(end / self.start)
        return rise > self._significant * spread * math.sqrt(1 / self._before + 1 / 3)

    def swing(self) -> float:
        """The spread of the second half around its trend, in the median of its tenths."""
        half = self.values[len(self.values) // 2 :]
        chunks = [half[i : i + self.width] for i in range(0, len(half), self.width)]
        spreads = [_spread(chunk) for chunk in chunks if len(chunk) == self.width]
        return statistics.median(spreads)

    def gain(self) -> tuple[float, float]:
        """What the last quarter has won, from end to end, and what that must exceed."""
        quarter = self.values[-max(3, len(self.values) // 4) :]
        # Single points that are far off are no part of the trend, which the thirds' levels tell.
        third = len(quarter) // 3
        won = 1.5 * (self.level(quarter[:third]) - self.level(quarter[-third:]))
        quarter = self.near(quarter, abs(won))
        # The variance of a slope over n points is 12 / n^3 times the noise's.
        needed = self._significant * self._noise * math.sqrt(12 / len(quarter))
        return -_slope(quarter) * len(quarter), needed

    def falls(self, limits: Thresholds) -> bool:
        """Whether it still falls at its end."""
        gained, needed = self.gain()
        return gained > max(needed, limits.still * self.fall)

    def is_flat(self) -> bool:
        """Whether it does not, also where noise would hide that: a steady fall wins a quarter."""
        return sum(self.gain()) < self.fall / 4


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
    fall = curve.top - curve.best
    needed = max(curve.real_fall(), limits.flat * abs(curve.top))
    if fall <= needed:
        return None
    bound = curve.top - max(limits.flat * fall, curve.real_fall())
    if not curve.best < bound or curve.top - bound > limits.wait * fall / 2:
        return None  # a steady fall, too, would take long to show beside the noise
    stuck = next(i for i, level in enumerate(curve.levels) if level < bound)
    if stuck < limits.wait * len(curve.values):
        return None
    part = stuck / len(curve.values)
    return _finding("BAD_INIT", until_step=curve.steps[stuck], part=part, start=curve.top)


def _level(train: _Curve, val: _Curve | None, best: _Curve, limits: Thresholds) -> Finding | None:
    """Where training has ended: at most one of four findings."""
    fall = train.start - train.end
    part = fall / abs(train.start) if train.start else math.inf
    evidence = {"start": train.start, "end": train.end, "fallen": part}
    # Noise may hide a fall; but of a loss that has lost much, nobody knows that it did not fall.
    hidden = min(train.real_fall(), limits.slow * abs(train.start))
    if fall <= max(limits.flat * abs(train.start), hidden):
        return _finding("LR_TOO_HIGH_PLATEAU", **evidence)
    # Validation shows it, too, with less noise than small batches have.
    falls = train.falls(limits) or (val is not None and val.falls(limits))
    if val is not None:
        evidence["val_end"] = val.end
    if train.start > 0:  # below zero, nobody knows what a high loss is
        evidence["start"], evidence["fallen"] = train.top, train.fall / train.top
        high_val = val is None or val.end > (1 - limits.slow) * train.top
        if train.fall < limits.slow * train.top and falls and high_val:
            return _finding("LR_TOO_LOW_OR_SMALL_MODEL", **evidence, last_gain=train.gain()[0])
        alike = val is not None and val.end - train.end < limits.flat * train.top + val.real()
        if train.end > limits.high * train.top and not falls and train.is_flat() and alike:
            return _finding("UNDERFITTING", **evidence)
    if best.falls(limits):
        return _finding("STILL_IMPROVING", last_gain=best.gain()[0], whole_gain=best.fall)
    return None


def _overfitting(train: _Curve, val: _Curve, limits: Thresholds) -> Finding | None:
    rise = val.end - val.best
    at = val.steps[val.lowest]
    evidence = {"val_best": val.best, "at_step": at, "val_end": val.end, "train_end": train.end}
    risen = rise > max(val.real(), limits.rise * (val.top - val.best))
    then = next(i for i, step in enumerate(train.steps) if step >= at or i == len(train.steps) - 1)
    if risen and train.end < train.levels[then] + train.real():
        return _finding("OVERFITTING", **evidence)
    gap = val.end - train.end
    high = val.end > max(0, limits.remaining * val.top)
    if high and gap > max(limits.gap * val.end, val.real()) and not val.falls(limits):
        return _finding("GENERALIZATION_GAP", val_end=val.end, train_end=train.end, gap=gap)
    return None


def _oscillating(curve: _Curve, limits: Thresholds) -> Finding | None:
    scale = max(curve.fall, abs(curve.start) / 2)  # where nothing falls, against the level
    swing = curve.swing()
    if swing <= limits.swing * scale:
        return None
    return _finding("OSCILLATING", swing=swing, fall=curve.fall)


def _decayed_too_early(
    curve: _Curve, rate: tuple[list[int], list[float]], limits: Thresholds
) -> Finding | None:
    if curve.top <= 0 or curve.end < limits.remaining * curve.top:
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


def _is_finite(value: float) -> bool:
    """Whether sums of squares are finite, too: no loss that trains comes near the limit."""
    return abs(value) < _INFINITE


def _nonfinite(name: str, steps: Sequence[int], values: Sequence[float]) -> Finding | None:
    bad = [step for step, value in zip(steps, values, strict=True) if not _is_finite(value)]
    if not bad:
        return None
    return _finding("DIVERGED", first_step=bad[0], **{f"nonfinite_{name}": len(bad)})


def _exploded(curve: _Curve, limits: Thresholds) -> Finding | None:
    # The end of an explosion is short. A single outlier is none.
    end = min(curve.values[-3:])
    fallen = curve.start - curve.best
    if fallen > max(curve.real_fall(), limits.flat * abs(curve.start)):
        risen, allowed = end - curve.best, limits.lost * fallen
    else:
        risen, allowed = end - curve.start, (limits.exploded - 1) * abs(curve.start)
        if risen > allowed and curve.times_the_start(end):
            return _finding("DIVERGED", start=curve.start, best=curve.best, end=end)
    if risen <= max(allowed, curve.real(3)):
        return None
    return _finding("DIVERGED", start=curve.start, best=curve.best, end=end)


def findings_of(
    points: Callable[[str], tuple[list[int], list[float]]],
    *,
    train: str,
    val: str,
    lr: str,
    accuracy: str,
    limits: Thresholds,
) -> list[Finding]:
    """What the curves show, most severe first.

    Args:
        points: Gives a curve's steps and values, or none, by its name.
        train, val, lr, accuracy: The curves' names.
        limits: What counts as much.
    """
    for name in (train, val):
        failed = _nonfinite(name, *points(name))
        if failed:
            return [failed]
    curves = {}
    findings: list[Finding | None] = []
    for name in (train, val, accuracy):
        sign = -1 if name == accuracy else 1  # turned round, it should fall as losses do
        pairs = [(step, sign * y) for step, y in zip(*points(name), strict=True) if _is_finite(y)]
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
        best = curves.get(accuracy) or second or first
        level = _level(first, second, best, limits)
        findings.append(level)
        findings.append(_bad_init(first, limits))
        if not level or level.code != "LR_TOO_HIGH_PLATEAU":  # where nothing falls, all is noise
            findings.append(_oscillating(first, limits))
        findings.append(_decayed_too_early(first, points(lr), limits))
        if second is not None:
            findings.append(_overfitting(first, second, limits))
    order = ("error", "warning", "info")
    return sorted(filter(None, findings), key=lambda finding: order.index(finding.severity))
