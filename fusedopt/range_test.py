"""The learning-rate range test: one short sweep instead of many trainings.

Leslie N. Smith, "Cyclical Learning Rates for Training Neural Networks" (2017), section 3.3.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from fusedopt.arguments import below_one, count, finite_positive, number, one_of, optional, shown
from fusedopt.series import axes_for, mean, noise
from fusedopt.trial import check_arguments, train_step, trial

MODES = ("exponential", "linear")
RULES = ("valley", "minimum", "steepest")

# Fewer than these tell nothing about a curve's shape.
LEAST_POINTS = 5

# A descent counts when it is this many standard errors deep. It is the deepest of some ten
# windows: of pure noise, one in ten would be deeper than 2 of them, of which 4 leaves none.
SIGNIFICANT = 4.0


@dataclass(frozen=True)
class LRFinderResult:
    """What :func:`lr_range_test` has seen.

    Attributes:
        lrs: The first group's learning rate in each iteration.
        losses: The loss in each; all are finite.
        smoothed: Their exponentially weighted average, corrected for its start at zero.
        diverged: Whether the loss exploded, or was nan or inf, before the sweep's end.
        reason: Why the sweep ended, in words.
        mode: ``"exponential"`` or ``"linear"``.
    """

    lrs: list[float]
    losses: list[float]
    smoothed: list[float]
    diverged: bool
    reason: str
    mode: str = "exponential"

    def suggest(
        self, rule: str = "valley", *, skip_start: float = 0.1, skip_end: float = 0.0
    ) -> float | None:
        """A learning rate to start from, for the first group; None when the curve tells none.

        Then :meth:`explain` says why not. Of the smoothed losses:

        - ``"valley"``: the middle of the longest descent, which may pause and go on (the longest
          decreasing subsequence).
        - ``"minimum"``: a tenth of where the loss is lowest.
        - ``"steepest"``: where the loss falls fastest against log(lr), before it is lowest. That
          is often close to where training diverges.

        Args:
            rule: One of these.
            skip_start: The part of the points to leave out at the start, where the average is
                one of few losses.
            skip_end: The same at the end.

        Raises:
            ValueError: An unknown rule, or nothing would be left to look at.
            TypeError: A part is not a number.
        """
        return self._judge(rule, skip_start, skip_end)[0]

    def explain(
        self, rule: str = "valley", *, skip_start: float = 0.1, skip_end: float = 0.0
    ) -> str:
        """Why :meth:`suggest` answers what it does, in a sentence."""
        return self._judge(rule, skip_start, skip_end)[1]

    def _judge(self, rule: str, skip_start: float, skip_end: float) -> tuple[float | None, str]:
        one_of(*RULES)("rule", rule)
        below_one("skip_start", skip_start)
        below_one("skip_end", skip_end)
        if skip_start + skip_end >= 1:
            raise ValueError(
                f"skip_start={skip_start} and skip_end={skip_end} leave no points at all"
            )
        total = len(self.lrs)
        used = slice(int(total * skip_start), total - int(total * skip_end))
        lrs, smoothed = self.lrs[used], self.smoothed[used]
        if len(lrs) < LEAST_POINTS:
            return None, f"only {len(lrs)} usable points of the {LEAST_POINTS} that it takes"
        depth, needed = _descent(self.losses)
        if not depth > needed:
            return None, (
                f"no descent: the losses fall by {depth:.3g}, where noise alone explains "
                f"{needed:.3g}"
            )
        lowest = min(range(len(smoothed)), key=smoothed.__getitem__)
        if lowest == len(lrs) - 1 and not self.diverged:
            return None, (
                f"the loss still falls at the end, at lr {lrs[-1]:.3g}: sweep to a larger end_lr"
            )
        if lowest == 0:
            return None, f"the loss only rises from lr {lrs[0]:.3g}: start at a lower start_lr"
        if rule == "minimum":
            return lrs[lowest] / 10, f"a tenth of lr {lrs[lowest]:.3g}, where the loss is lowest"
        if rule == "steepest":
            logs = [math.log(lr) for lr in lrs]
            slopes = [
                (smoothed[i + 1] - smoothed[i]) / (logs[i + 1] - logs[i]) for i in range(lowest)
            ]
            steepest = min(range(lowest), key=slopes.__getitem__)
            return lrs[steepest], f"the loss falls fastest at lr {lrs[steepest]:.3g}"
        start, end = _longest_descent(smoothed)
        middle = (start + end) // 2
        return lrs[middle], (
            f"the middle of the descent from lr {lrs[start]:.3g} to lr {lrs[end]:.3g}"
        )

    def plot(self, ax: Any = None) -> Any:
        """Draw losses and suggestion with matplotlib, on ``ax`` or a new one, and return it."""
        ax = axes_for(ax)
        ax.plot(self.lrs, self.losses, alpha=0.3, label="loss")
        ax.plot(self.lrs, self.smoothed, label="smoothed")
        suggestion = self.suggest()
        if suggestion is not None:
            ax.axvline(suggestion, linestyle="--", color="gray", label=f"valley: {suggestion:.2g}")
        if self.mode == "exponential":
            ax.set_xscale("log")
        ax.set_xlabel("learning rate")
        ax.set_ylabel("loss")
        ax.legend()
        return ax


def _descent(losses: Sequence[float]) -> tuple[float, float]:
    """By how much the losses fall below those at the start, and how much noise may explain."""
    width = max(3, len(losses) // 10)
    means = [mean(losses[i : i + width]) for i in range(0, len(losses) - width + 1, width // 2)]
    error = noise(losses) * math.sqrt(2 / width)
    return means[0] - min(means), SIGNIFICANT * error


def _longest_descent(values: Sequence[float]) -> tuple[int, int]:
    """First and last index of the longest descent.

    Its last is where the longest strictly decreasing subsequence ends. Its first is as far before
    as that is long: a few chance members from a flat start do not stretch it.
    """
    tails: list[float] = []  # the negated last members of the best subsequence of each length
    end = longest = 0
    for index, value in enumerate(values):
        position = bisect_left(tails, -value)
        tails[position : position + 1] = [-value]
        if position + 1 > longest:
            longest, end = position + 1, index
    return end - longest + 1, end


def _endless(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches, again and again."""
    number = 0
    while True:
        before = number
        for batch in batches:
            number += 1
            yield batch
        if not number:
            raise ValueError("batches is empty")
        if number == before:
            raise ValueError(
                f"batches ended after {number} and does not start again, being an iterator: give "
                "what it is made from, such as the loader"
            )


def _ratios(optimizer: torch.optim.Optimizer) -> list[float]:
    """The groups' learning rates, as multiples of the first one's."""
    base = [number("lr", group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
    if not base[0] > 0:
        raise ValueError(
            "the first group's lr must be positive, because others keep their ratio to it: "
            f"{base[0]}"
        )
    return [lr / base[0] for lr in base]


def _set_lr(optimizer: torch.optim.Optimizer, ratios: Sequence[float], lr: float) -> None:
    for group, ratio in zip(optimizer.param_groups, ratios, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr * ratio)
        else:
            group["lr"] = lr * ratio


def _validated(validate: Callable[[], Any], stateful: Sequence[Any]) -> float:
    """The validation loss; the modules are in the same modes after it."""
    roots = [each for each in stateful if isinstance(each, torch.nn.Module)]
    modes = [(module, module.training) for root in roots for module in root.modules()]
    with torch.no_grad():
        loss = number("the loss of validate()", validate())
    for module, training in modes:
        module.training = training
    return loss


def lr_range_test(
    closure: Callable[[Any], Tensor],
    batches: Iterable[Any],
    optimizer: torch.optim.Optimizer,
    *,
    stateful: Sequence[Any],
    scaler: Any = None,
    start_lr: float = 1e-7,
    end_lr: float = 10.0,
    num_iter: int = 100,
    mode: str = "exponential",
    smoothing: float = 0.98,
    diverge_factor: float | None = 4.0,
    accumulate: int = 1,
    validate: Callable[[], Any] | None = None,
) -> LRFinderResult:
    """Train for a moment while the learning rate rises, and look at the loss.

    Afterwards model, optimizer, scaler, random number generators and modes are as they were, bit
    for bit (:func:`fusedopt.trial.trial`), whatever happened. So it may be run in mid-training.
    A scheduler may be attached: it is not stepped, and finds the rates that it has set.

    Iteration i of n uses ``start_lr * (end_lr / start_lr) ** (i / (n - 1))``, or in linear mode
    ``start_lr + (end_lr - start_lr) * i / (n - 1)``. The smoothed loss after t of them is
    ``(1 - b) * sum(b ** (t - k) * loss_k, k = 1..t) / (1 - b ** t)``, b being ``smoothing``. It
    has diverged when it lies above its lowest value by ``diverge_factor - 1`` times the larger of
    that value's size and the descent so far: at ``diverge_factor`` times the lowest loss as long
    as there was little descent, and not by chance where the loss has come near zero or below.

    Args:
        closure: Takes a batch, returns the loss; no backward.
        batches: Any iterable, such as a loader. It starts again when it ends.
        optimizer: Any whose ``step()`` needs no closure, so not ``torch.optim.LBFGS``; it is
            stepped. The sweep is of the first group's rate; others keep their ratio to it (of
            ``initial_lr``, where a scheduler has left one).
        stateful: What the closure changes beside the optimizer's parameters: ``(model,)``, and
            generators or other objects with ``state_dict`` and ``load_state_dict``; so also the
            generator that a ``DataLoader`` was given.
        scaler: A ``torch.amp.GradScaler`` to scale the loss with (default: None).
        start_lr: Positive (default: 1e-7).
        end_lr: Above start_lr (default: 10).
        num_iter: Steps, at least 10 (default: 100).
        mode: ``"exponential"`` (default) or ``"linear"``.
        smoothing: In [0, 1) (default: 0.98).
        diverge_factor: Above 1 (default: 4). None: go on to the end, or a nan.
        accumulate: Batches to a step (default: 1).
        validate: Returns a loss to look at instead, after each step; called without gradients.

    Raises:
        TypeError, ValueError: An argument is wrong, or there are no batches.
        RuntimeError: The very first loss is not finite, or a window of ``accumulate()`` is open.
    """
    check_arguments(optimizer, stateful, scaler)
    for name, function in (("closure", closure), ("validate", validate)):
        if not callable(function) and not (name == "validate" and function is None):
            raise TypeError(f"{name} is not callable: {shown(function)}")
    if not isinstance(batches, Iterable):
        raise TypeError(f"batches is not iterable: {shown(batches)}")
    low, high = finite_positive("start_lr", start_lr), number("end_lr", end_lr)
    if not low < high < math.inf:
        raise ValueError(f"end_lr must be finite and above start_lr={start_lr}: {end_lr!r}")
    start_lr, end_lr = low, high
    num_iter, accumulate = count("num_iter", num_iter, 10), count("accumulate", accumulate, 1)
    one_of(*MODES)("mode", mode)
    smoothing = below_one("smoothing", smoothing)
    diverge_factor = optional(number)("diverge_factor", diverge_factor)
    if diverge_factor is not None and not diverge_factor > 1:
        raise ValueError(f"diverge_factor must be above 1, or None: {diverge_factor!r}")
    ratios = _ratios(optimizer)

    lrs: list[float] = []
    losses: list[float] = []
    smoothed: list[float] = []
    average = 0.0

    def ended(diverged: bool, reason: str) -> LRFinderResult:
        return LRFinderResult(lrs, losses, smoothed, diverged, reason, mode)

    with trial(optimizer, stateful, scaler):
        data = _endless(batches)
        for i in range(num_iter):
            part = i / (num_iter - 1)
            if mode == "exponential":
                lr = start_lr * (end_lr / start_lr) ** part
            else:
                lr = start_lr + (end_lr - start_lr) * part
            _set_lr(optimizer, ratios, lr)
            loss = train_step(closure, list(islice(data, accumulate)), optimizer, scaler)
            if validate is not None and math.isfinite(loss):
                loss = _validated(validate, stateful)
            if not math.isfinite(loss):
                if not losses:
                    raise RuntimeError(f"the first loss is {loss}: there is nothing to test")
                return ended(True, f"the loss was {loss} at lr {lr:.3g}")
            average = smoothing * average + (1 - smoothing) * loss
            lrs.append(lr)
            losses.append(loss)
            smoothed.append(average / (1 - smoothing ** (i + 1)))
            best = min(smoothed)
            if diverge_factor is not None:
                bound = best + (diverge_factor - 1) * max(abs(best), smoothed[0] - best)
                if smoothed[-1] > bound:
                    return ended(
                        True,
                        f"the smoothed loss rose to {smoothed[-1]:.3g} at lr {lr:.3g}, from "
                        f"{best:.3g} at its lowest",
                    )
    return ended(False, f"all {num_iter} iterations were done")
