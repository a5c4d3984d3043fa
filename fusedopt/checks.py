"""Checks to make before a long training: two that find most bugs in minutes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fusedopt.arguments import count, finite, finite_positive, not_negative, number, shown
from fusedopt.trial import check_arguments, train_step, trial


@dataclass(frozen=True)
class Check:
    """What a check has found; true when it has passed.

    Attributes:
        passed: Whether all is well.
        message: A sentence that says so, or what is wrong and what to look at.
        evidence: The numbers that led to it, by name.
        losses: The loss before each step, where there were steps.
    """

    passed: bool
    message: str
    evidence: dict[str, float]
    losses: list[float] = field(default_factory=list, repr=False)

    def __bool__(self) -> bool:
        return self.passed


def check_initial_loss(
    loss: Any,
    *,
    num_classes: int | None = None,
    expected: float | None = None,
    rtol: float = 0.25,
    atol: float = 1e-3,
) -> Check:
    """Whether a model that has learned nothing has the loss of one that knows nothing.

    Softmax cross entropy with C classes is ln(C) when all are equally likely. A larger loss comes
    from an initialization that is sure of wrong answers; a smaller one from labels that leak into
    the input, or classes of very different sizes.

    Args:
        loss: A number, or a tensor of one, of the first batch.
        num_classes: C, at least 2.
        expected: What the loss should be, for other losses; finite. Either this or C.
        rtol: How far it may lie from that, as a part of it (default: 0.25).
        atol: How far beyond that, which counts where 0 is expected (default: 1e-3).

    Raises:
        TypeError: An argument is not a number.
        ValueError: Both or none of C and ``expected``, or a number out of its range.
    """
    value = number("loss", loss)
    if (num_classes is None) == (expected is None):
        raise ValueError(f"give either num_classes or expected: {num_classes!r} and {expected!r}")
    if num_classes is not None:
        wanted = math.log(count("num_classes", num_classes, 2))
        why = f"ln({num_classes})"
    else:
        wanted = finite("expected", expected)
        why = "expected"
    rtol, atol = finite_positive("rtol", rtol), not_negative("atol", atol)
    evidence = {"loss": value, "expected": wanted, "rtol": rtol, "atol": atol}
    told = f"the initial loss is {value:.4g}; {why} is {wanted:.4g}"
    if not math.isfinite(value):
        return Check(False, f"{told}: look for bad data, logarithms of 0, and overflow", evidence)
    if abs(value - wanted) <= atol + rtol * abs(wanted):
        return Check(True, told, evidence)
    if value > wanted:
        return Check(False, f"{told}: the initialization is too sure of wrong answers", evidence)
    return Check(
        False, f"{told}: do the labels leak into the input, or is one class the rule?", evidence
    )


def overfit_batch(
    closure: Callable[[Any], Tensor],
    batch: Any,
    optimizer: torch.optim.Optimizer,
    *,
    stateful: Sequence[Any],
    scaler: Any = None,
    steps: int = 200,
    target: float = 0.1,
) -> Check:
    """Whether a model can learn a few samples by heart; if not, there is a bug, or a bad rate.

    Trains on the one batch until the loss is at the target. Afterwards everything is as it was,
    bit for bit (:func:`fusedopt.trial.trial`). Regularization may have to be off for it.

    Args:
        closure: Takes the batch, returns the loss; no backward.
        batch: Five to ten samples are enough.
        optimizer: Any whose ``step()`` needs no closure, so not ``torch.optim.LBFGS``; its
            learning rates are used as they are.
        stateful: What the closure changes beside the optimizer's parameters: ``(model,)``, and
            generators or other objects with ``state_dict`` and ``load_state_dict``.
        scaler: A ``torch.amp.GradScaler`` to scale the loss with (default: None).
        steps: At most so many, at least 1 (default: 200).
        target: The loss to reach. A cross entropy of 0.1, the default, means that right answers
            have a probability of 90%.

    Raises:
        TypeError, ValueError: An argument is wrong.
        RuntimeError: A window of ``accumulate()`` is open.
    """
    check_arguments(optimizer, stateful, scaler)
    if not callable(closure):
        raise TypeError(f"closure is not callable: {shown(closure)}")
    count("steps", steps, 1)
    target = finite("target", target)
    losses: list[float] = []
    with trial(optimizer, stateful, scaler):
        for _ in range(steps):
            losses.append(train_step(closure, [batch], optimizer, scaler))
            if losses[-1] <= target or not math.isfinite(losses[-1]):
                break
        params = [p for group in optimizer.param_groups for p in group["params"]]
        moved = any(p.grad is not None for p in params)
    evidence = {
        "first": losses[0],
        "last": losses[-1],
        "lowest": min(losses),
        "target": target,
        "steps": len(losses),
    }
    told = f"the loss on one batch went from {losses[0]:.4g} to {losses[-1]:.4g}"
    if losses[-1] <= target:
        return Check(True, f"{told}, in {len(losses)} steps", evidence, losses)
    if not math.isfinite(losses[-1]):
        hint = "lower the learning rate, or look for bad data"
    elif not moved:
        hint = "no parameter of the optimizer has a gradient: is it another model's?"
    elif losses[-1] > losses[0]:
        hint = "it rose: lower the learning rate, and look at the loss's sign"
    else:
        hint = "more steps or another learning rate may do; if not, there is a bug in the model"
    return Check(False, f"{told}, not to {target:.4g}: {hint}", evidence, losses)
