"""Learning curves of known causes, simulated and from small trainings: what `diagnose` has to know.

Each is a function of a seed that gives a history, and what there is to be found in it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

import fusedopt
from fusedopt.history import History

ROWS = 200
EVERY = 5  # a validation for so many rows
Shape = Callable[[float], float]  # from the part of the run that is over
Noise = Callable[[random.Random, float], float]  # from the value that it is added to


class Case(NamedTuple):
    """The codes that there are to be found (none: it is healthy), its curves by seed, how many."""

    codes: list[str]
    make: Callable[[int], History]
    seeds: int = 20


def fall(start: float, end: float, tau: float) -> Shape:
    """From start to end, exponentially."""
    return lambda x: end + (start - end) * math.exp(-x / tau)


def steady(spread: float) -> Noise:
    return lambda rng, _: rng.gauss(0, spread)


def relative(part: float) -> Noise:
    """As large as the loss: that of small batches."""
    return lambda rng, value: value * rng.gauss(0, part)


USUAL = steady(0.04)


def heavy(spread: float) -> Noise:
    """Student's t with three degrees of freedom: now and then, a batch that is far off."""

    def draw(rng: random.Random, _: float) -> float:
        squares = sum(rng.gauss(0, 1) ** 2 for _ in range(3))
        return spread * rng.gauss(0, 1) / math.sqrt(squares / 3)

    return draw


def drawn(
    train: Shape,
    val: Shape | None = None,
    *,
    noise: Noise = USUAL,
    accuracy: Shape | None = None,
    lr: Shape | None = None,
    rows: int = ROWS,
    every: int = EVERY,
    scale: float = 1.0,
) -> Callable[[int], History]:
    """Curves by their shapes; validation has a third of the noise."""

    def make(seed: int) -> History:
        rng, history = random.Random(seed), History()
        for row in range(rows):
            x = row / rows
            history.append(row * 10, train_loss=scale * (train(x) + noise(rng, train(x))))
            if lr is not None:
                history.append(row * 10, lr=lr(x))
            if val is not None and row % every == 0:
                history.append(row * 10, val_loss=scale * (val(x) + noise(rng, val(x)) / 3))
            if accuracy is not None and row % every == 0:
                history.append(row * 10, val_accuracy=accuracy(x) + rng.gauss(0, 0.005))
        return history

    return make


def with_spike(shape: Shape, at: float, height: float, tau: float, last: float = 0.0) -> Shape:
    """Thrown up at a point, from where it falls back to `last` above the shape."""
    return lambda x: (
        shape(x) + (last + (height - last) * math.exp(-(x - at) / tau) if x >= at else 0.0)
    )


GOOD = fall(2.3, 0.3, 0.12)
GOOD_VAL = fall(2.3, 0.4, 0.12)


def stepwise(x: float) -> float:
    """The learning rate drops at 0.4 and 0.7, from which the loss falls further each time."""
    if x < 0.4:
        return fall(2.3, 1.0, 0.06)(x)
    if x < 0.7:
        return fall(1.0, 0.6, 0.02)(x - 0.4)
    return fall(0.6, 0.5, 0.02)(x - 0.7)


def restarted(x: float) -> float:
    """Four cycles of a cosine: each restart lifts the loss a little, and its end is lower."""
    cycle, u = divmod(4 * x, 1)
    floor = [0.9, 0.6, 0.45, 0.4][int(cycle)]
    return fall(2.3, floor, 0.2)(u) if cycle == 0 else floor + 0.25 * (1 - u) ** 2


def warmed_up(x: float) -> float:
    """It falls, the peak of the warm-up's rate lifts it, and then it falls for good."""
    return GOOD(x) + 0.6 * math.exp(-(((x - 0.12) / 0.03) ** 2))


def descended_twice(x: float) -> float:
    return (
        fall(2.3, 0.8, 0.05)(x)
        + 0.7 * math.exp(-(((x - 0.35) / 0.1) ** 2))
        - 0.4 * min(1.0, max(0.0, (x - 0.35) / 0.35))
    )


def grokked(x: float) -> float:
    """A validation loss that rises while the training loss is zero, and falls late."""
    risen = 2.3 + 1.5 * min(1.0, x / 0.2)
    return risen / (1 + math.exp((x - 0.6) / 0.03)) + 0.05


def jagged(x: float) -> float:
    """A rate that goes up and down ten times; the loss with it, around a falling trend."""
    return GOOD(x) + 0.15 * abs((20 * x) % 2 - 1)


def swinging(x: float) -> float:
    return fall(2.3, 0.8, 0.1)(x) + 0.6 * math.sin(2 * math.pi * x * ROWS / 7)


def overfitted(x: float) -> float:
    return fall(2.3, 0.6, 0.1)(x) + max(0.0, x - 0.4)


def late(x: float) -> float:
    """Stuck for three tenths, then falling."""
    return 2.3 if x < 0.3 else fall(2.3, 0.3, 0.1)(x - 0.3)


def outlier(height: float, rows: range) -> Noise:
    """Beside the usual noise, rows that are far off by themselves; needs a fresh one a run."""
    seen = iter(range(10**9))
    return lambda rng, _: rng.gauss(0, 0.04) + (height if next(seen) in rows else 0.0)


def once(height: float, rows: range, **options: Any) -> Callable[[int], History]:
    return lambda seed: drawn(GOOD, noise=outlier(height, rows), **options)(seed)


def thrown(seed: int) -> History:
    """SGD at a rate of 1000: up by twelve orders of magnitude, and back to hundreds of starts."""
    rng, history = random.Random(seed), History()
    level = 8e11
    for step in range(60):
        loss = 2.32 if step == 0 else level * math.exp(rng.gauss(0, 0.15))
        level = max(350.0, level * 0.4) if step else level
        history.append(step, train_loss=loss)
    return history


# Small trainings ----------------------------------------------------------------------------------


def trained(
    optimizer: str, lr: float, *, samples: int = 8192, batch: int = 32, wrong: float = 0.0
) -> Callable[[int], History]:
    """A small classifier of ten classes whose images are noisy versions of ten patterns.

    A part of the labels may be wrong, which can only be learned by heart.
    """

    def make(seed: int) -> History:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # so small that others would only wait for one another
        try:
            with torch.device("cpu"):
                return _trained(seed, optimizer, lr, samples, batch, wrong)
        finally:
            torch.set_num_threads(threads)

    return make


def _trained(
    seed: int, optimizer: str, lr: float, samples: int, batch: int, wrong: float
) -> History:
    generator = torch.Generator().manual_seed(seed)

    def random_of(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    patterns = random_of(10, 64)
    labels = torch.randint(0, 10, (samples + 512,), generator=generator)
    images = patterns[labels] + 2.0 * random_of(samples + 512, 64)
    mislabeled = int(wrong * samples)
    labels[:mislabeled] = (labels[:mislabeled] + 3) % 10
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.copy_(random_of(*layer.weight.shape) / 8)
            layer.bias.zero_()
    step_of = getattr(fusedopt, optimizer)(model.parameters(), lr=lr)
    history = History()
    for step in range(200):
        pick = torch.randint(0, samples, (batch,), generator=generator)
        step_of.zero_grad()
        loss = nn.functional.cross_entropy(model(images[pick]), labels[pick])
        loss.backward()
        step_of.step()
        history.append(step, train_loss=loss)
        if step % 8 == 0:
            with torch.no_grad():
                outputs = model(images[samples:])
            history.append(step, val_loss=nn.functional.cross_entropy(outputs, labels[samples:]))
    return history


CASES: dict[str, Case] = {
    "good": Case([], drawn(GOOD, GOOD_VAL)),
    "good, without noise": Case([], drawn(GOOD, GOOD_VAL, noise=steady(0))),
    "good, small batches": Case([], drawn(GOOD, GOOD_VAL, noise=relative(0.3))),
    "good, batches far off": Case([], drawn(GOOD, GOOD_VAL, noise=heavy(0.1))),
    "ends at its best, 97% right": Case(
        [],
        drawn(
            fall(2.3, 0.02, 0.1),
            fall(2.3, 0.1, 0.1),
            noise=relative(0.15),
            accuracy=lambda x: 0.972 - 0.87 * math.exp(-x / 0.08),
        ),
    ),
    "peak at the start": Case([], drawn(with_spike(GOOD, 0.01, 100.0, 0.01), GOOD_VAL)),
    "spike, recovers": Case([], drawn(with_spike(GOOD, 0.7, 2.0, 0.02), GOOD_VAL)),
    "late spike, recovers": Case([], drawn(with_spike(GOOD, 0.9, 2.0, 0.01), GOOD_VAL)),
    "warm-up bump": Case([], drawn(warmed_up, GOOD_VAL)),
    "one outlier": Case([], once(50.0, range(120, 121))),
    "one outlier at the end": Case([], once(50.0, range(199, 200))),
    "two outliers at the end": Case([], once(50.0, range(198, 200))),
    "double descent": Case([], drawn(fall(2.3, 0.1, 0.1), descended_twice)),
    "cyclic rate": Case([], drawn(jagged, GOOD_VAL)),
    "rate dropped in time": Case(
        [], drawn(stepwise, stepwise, lr=lambda x: 0.1 ** (1 + (x >= 0.4) + (x >= 0.7)))
    ),
    "labels with noise": Case([], drawn(fall(2.3, 1.0, 0.1), fall(2.3, 1.05, 0.1))),
    "grokking": Case([], drawn(fall(2.3, 0.01, 0.05), grokked, noise=relative(0.1))),
    "log-likelihood": Case([], drawn(fall(-1.0, -9.0, 0.1), fall(-1.0, -8.5, 0.1))),
    "through zero": Case([], drawn(fall(1.0, -1.0, 0.1), fall(1.0, -0.9, 0.1))),
    "near zero": Case([], drawn(GOOD, GOOD_VAL, scale=1e-8)),
    "ten points": Case([], drawn(GOOD, rows=10, noise=steady(0.01))),
    "3 points": Case(["INSUFFICIENT_DATA"], drawn(GOOD, rows=3)),
    "9 points": Case(["INSUFFICIENT_DATA"], drawn(GOOD, rows=9)),
    "9 validations": Case(["INSUFFICIENT_DATA"], drawn(GOOD, GOOD_VAL, every=23)),
    "peak, stays up": Case(["DIVERGED"], thrown),
    "late spike, stays up": Case(["DIVERGED"], drawn(with_spike(GOOD, 0.8, 4.0, 0.05, 2.5))),
    "last steps explode": Case(["DIVERGED"], drawn(with_spike(GOOD, 0.96, 5.0, 1.0, 4.0))),
    "rises": Case(["DIVERGED"], drawn(lambda x: 2.3 + 5 * x)),
    "nan at the end": Case(["DIVERGED"], drawn(lambda x: GOOD(x) if x < 0.99 else math.nan)),
    "log-likelihood diverges": Case(
        ["DIVERGED"], drawn(with_spike(fall(-1.0, -9.0, 0.1), 0.6, 30.0, 0.1, 20.0))
    ),
    "plateau at the start": Case(["LR_TOO_HIGH_PLATEAU"], drawn(lambda x: 2.3)),
    "peak, back to the start": Case(
        ["LR_TOO_HIGH_PLATEAU"], drawn(with_spike(lambda x: 2.3, 0.01, 100.0, 0.01))
    ),
    "slow": Case(
        ["LR_TOO_LOW_OR_SMALL_MODEL"], drawn(lambda x: 2.3 - 0.5 * x, lambda x: 2.3 - 0.49 * x)
    ),
    "plateau, high": Case(["UNDERFITTING"], drawn(fall(2.3, 1.6, 0.1), fall(2.3, 1.62, 0.1))),
    "oscillates": Case(["OSCILLATING"], drawn(swinging)),
    "bad initialization": Case(["BAD_INIT"], drawn(late, late)),
    "rate dropped early": Case(
        ["DECAYED_TOO_EARLY"],
        drawn(lambda x: fall(2.3, 0.3, 0.3)(min(x, 0.2)), lr=lambda x: 0.1 if x < 0.2 else 0.01),
    ),
    "overfitted": Case(["OVERFITTING"], drawn(fall(2.3, 0.05, 0.12), overfitted)),
    "overfitted, near zero": Case(
        ["OVERFITTING"], drawn(fall(2.3, 0.05, 0.12), overfitted, scale=1e-8)
    ),
    "before it groks": Case(
        ["OVERFITTING"], drawn(fall(2.3, 0.01, 0.05), lambda x: grokked(x / 2), noise=relative(0.1))
    ),
    "gap": Case(["GENERALIZATION_GAP"], drawn(fall(2.3, 0.1, 0.12), fall(2.3, 1.0, 0.06))),
    # Its last cycle falls as every cycle does. That it is the last nobody can see.
    "restarts": Case(["STILL_IMPROVING"], drawn(restarted, restarted)),
    "ends too soon": Case(["STILL_IMPROVING"], drawn(fall(2.3, 0.0, 0.5), fall(2.3, 0.1, 0.5))),
    "SGD, good rate": Case([], trained("SGD", 0.05), 6),
    "AdamW, good rate": Case([], trained("AdamW", 3e-3), 6),
    "SGD, rate of 1000": Case(["DIVERGED"], trained("SGD", 1000.0), 6),
    "SGD, rate far too low": Case(["LR_TOO_HIGH_PLATEAU"], trained("SGD", 1e-6), 6),
    "SGD, rate too low": Case(["LR_TOO_LOW_OR_SMALL_MODEL"], trained("SGD", 6e-4, batch=128), 6),
    "AdamW, rate far too high": Case(["DIVERGED"], trained("AdamW", 10.0), 6),
    "AdamW, 100 samples": Case(
        ["GENERALIZATION_GAP"], trained("AdamW", 3e-3, samples=100, wrong=0.15), 6
    ),
    "AdamW, 200 samples, half of the labels wrong": Case(
        ["OVERFITTING"], trained("AdamW", 1e-2, samples=200, wrong=0.5), 6
    ),
}
