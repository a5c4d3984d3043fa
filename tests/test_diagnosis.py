"""Diagnoses fire on their curves and on no others."""

from __future__ import annotations

import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import DEVICE, table
from simulated import CASES as SIMULATED
from simulated import GOOD, ROWS, Shape, fall, late, overfitted, swinging
from torch import nn

import fusedopt
from fusedopt.history import ADVICE, Finding, History, Thresholds, diagnose

EVERY = 5  # a validation for so many rows


def curves(
    seed: int,
    train: Shape,
    val: Shape | None = None,
    *,
    accuracy: Shape | None = None,
    lr: Shape | None = None,
    spread: float = 0.04,
    rows: int = ROWS,
) -> History:
    rng = random.Random(seed)
    history = History()
    for row in range(rows):
        x = row / rows
        history.append(row * 10, train_loss=train(x) + rng.gauss(0, spread))
        if lr is not None:
            history.append(row * 10, lr=lr(x))
        if row % EVERY == 0:
            if val is not None:
                history.append(row * 10, val_loss=val(x) + rng.gauss(0, spread / 3))
            if accuracy is not None:
                history.append(row * 10, val_accuracy=accuracy(x) + rng.gauss(0, spread / 8))
    return history


def codes(findings: list[Finding]) -> list[str]:
    return [finding.code for finding in findings]


def cosine(x: float) -> float:
    return 0.05 * (1 + math.cos(math.pi * x))


def early_drop(x: float) -> float:
    return fall(2.3, 0.3, 0.3)(min(x, 0.2))


def good_drop(x: float) -> float:
    """A plateau, from which a drop of the rate leads further down."""
    return fall(2.3, 1.0, 0.08)(x) if x < 0.5 else fall(1.0, 0.4, 0.03)(x - 0.5)


def dropped(at: float) -> Shape:
    return lambda x: 0.1 if x < at else 0.01


def rising(x: float) -> float:
    return 0.9 - 0.8 * math.exp(-x / 0.5)


def exploding(x: float) -> float:
    return fall(2.3, 0.3, 0.1)(x) + math.exp(60 * (x - 0.97))


def thrown_up(after: Shape) -> Shape:
    """Far up from the second row on, and soon back."""
    return lambda x: after(x) + (100 * math.exp(-x / 0.01) if x else 0.0)


HEALTHY: dict[str, dict[str, Any]] = {
    "exponential": {"train": fall(2.3, 0.3, 0.12)},
    "with validation": {"train": fall(2.3, 0.3, 0.12), "val": fall(2.3, 0.4, 0.12)},
    "without noise": {"train": fall(2.3, 0.3, 0.12), "val": fall(2.3, 0.4, 0.12), "spread": 0.0},
    "cosine rate": {"train": fall(2.3, 0.3, 0.1), "lr": cosine},
    "noisy": {"train": fall(2.3, 0.3, 0.12), "val": fall(2.3, 0.4, 0.12), "spread": 0.15},
    "dropped in time": {"train": good_drop, "val": good_drop, "lr": dropped(0.5)},
    "accuracy at its end": {
        "train": fall(2.3, 0.3, 0.12),
        "accuracy": lambda x: 0.9 - 0.8 * math.exp(-x / 0.1),
    },
    "negative loss": {"train": fall(-1.0, -9.0, 0.1), "val": fall(-1.0, -8.5, 0.1)},
    "long": {"train": fall(10.8, 3.0, 0.1), "val": fall(10.8, 3.1, 0.1), "rows": 2000},
    "short": {"train": fall(2.3, 0.3, 0.12), "rows": 12, "spread": 0.01},
    "thrown up, then learning": {"train": thrown_up(fall(2.3, 0.3, 0.12))},
    "from far up": {"train": lambda x: 2.3 + 100 * math.exp(-x / 0.05)},
}

SICK: dict[str, tuple[str, dict[str, Any], str]] = {
    "late": ("BAD_INIT", {"train": late, "val": late}, "until_step"),
    "never falls": ("LR_TOO_HIGH_PLATEAU", {"train": lambda x: 2.3}, "fallen"),
    "hardly falls": ("LR_TOO_HIGH_PLATEAU", {"train": lambda x: 2.3 - 0.05 * x}, "fallen"),
    "flat without noise": ("LR_TOO_HIGH_PLATEAU", {"train": lambda x: 2.3, "spread": 0.0}, "end"),
    "thrown up, then flat": ("LR_TOO_HIGH_PLATEAU", {"train": thrown_up(lambda x: 2.3)}, "fallen"),
    "thrown up a little": (
        "LR_TOO_HIGH_PLATEAU",
        {"train": lambda x: 2.3 + (2 if 0 < x < 0.02 else 0)},
        "fallen",
    ),
    "thrown up for good": (
        "DIVERGED",
        {"train": lambda x: 1000 + 4e5 * math.exp(-x / 0.1) if x else 2.3},
        "end",
    ),
    "dropped early": (
        "DECAYED_TOO_EARLY",
        {"train": early_drop, "lr": dropped(0.2)},
        "at_step",
    ),
    "accuracy rises": (
        "STILL_IMPROVING",
        {"train": fall(2.3, 0.3, 0.12), "accuracy": rising},
        "last_gain",
    ),
    "validation falls": (
        "STILL_IMPROVING",
        {"train": fall(2.3, 0.0, 0.5), "val": fall(2.3, 0.1, 0.5)},
        "last_gain",
    ),
    "train falls": ("STILL_IMPROVING", {"train": fall(2.3, 0.0, 0.5)}, "last_gain"),
    "validation rises": (
        "OVERFITTING",
        {"train": fall(2.3, 0.05, 0.12), "val": overfitted},
        "val_best",
    ),
    "large gap": (
        "GENERALIZATION_GAP",
        {"train": fall(2.3, 0.1, 0.12), "val": fall(2.3, 1.0, 0.06)},
        "gap",
    ),
    "flat and high": (
        "UNDERFITTING",
        {"train": fall(2.3, 1.6, 0.1), "val": fall(2.3, 1.62, 0.1)},
        "fallen",
    ),
    "slow": (
        "LR_TOO_LOW_OR_SMALL_MODEL",
        {"train": lambda x: 2.3 - 0.45 * x, "val": lambda x: 2.3 - 0.44 * x},
        "last_gain",
    ),
    "slow, without validation": (
        "LR_TOO_LOW_OR_SMALL_MODEL",
        {"train": lambda x: 2.3 - 0.45 * x},
        "last_gain",
    ),
    "swinging": ("OSCILLATING", {"train": swinging}, "swing"),
    "exploding": ("DIVERGED", {"train": exploding}, "best"),
    "rising": ("DIVERGED", {"train": lambda x: 2.3 + 5 * x}, "end"),
    "nan": ("DIVERGED", {"train": lambda x: 2.3 if x < 0.5 else math.nan}, "first_step"),
    "beyond sums": ("DIVERGED", {"train": lambda x: 1e160 * (1 + x)}, "nonfinite_train_loss"),
    "nan in validation": (
        "DIVERGED",
        {"train": fall(2.3, 0.3, 0.1), "val": lambda x: 2.3 if x < 0.5 else math.inf},
        "nonfinite_val_loss",
    ),
    "nine rows": ("INSUFFICIENT_DATA", {"train": fall(2.3, 0.3, 0.1), "rows": 9}, "needed"),
    "no rows": ("INSUFFICIENT_DATA", {"train": fall(2.3, 0.3, 0.1), "rows": 0}, "needed"),
}

every_seed = pytest.mark.parametrize("seed", range(8))


@every_seed
@table("shape", HEALTHY)
def test_healthy_curves_have_no_finding(shape: dict[str, Any], seed: int) -> None:
    assert diagnose(curves(seed, **shape)) == []


@every_seed
@table("row", SICK)
def test_a_sick_curve_has_its_finding_and_no_other(row: Any, seed: int) -> None:
    code, shape, key = row
    findings = diagnose(curves(seed, **shape))
    assert codes(findings) == [code]
    (finding,) = findings
    assert math.isfinite(finding.evidence[key])
    assert (finding.severity, finding.advice) == ADVICE[code]
    assert f"{code} ({finding.severity}): " in str(finding)


@pytest.fixture(scope="module")
def verdicts() -> dict[str, Counter[str]]:
    """What each simulated curve was taken for, over its seeds."""
    return {
        name: Counter(
            ", ".join(codes(diagnose(case.make(seed)))) or HEALTHY_CODE
            for seed in range(case.seeds)
        )
        for name, case in SIMULATED.items()
    }


HEALTHY_CODE = "none"


@pytest.mark.parametrize("name", SIMULATED)
def test_each_cause_is_found_whatever_the_seed(
    name: str, verdicts: dict[str, Counter[str]]
) -> None:
    case = SIMULATED[name]
    assert verdicts[name] == {", ".join(case.codes) or HEALTHY_CODE: case.seeds}


def test_the_page_has_the_table_of_causes_and_verdicts(
    verdicts: dict[str, Counter[str]],
) -> None:
    page = (Path(__file__).parent.parent / "docs/training/curves.md").read_text()
    causes: dict[str, list[str]] = {}
    for name, case in SIMULATED.items():
        causes.setdefault(", ".join(case.codes) or HEALTHY_CODE, []).append(name)
    for truth, names in causes.items():
        found = sum((verdicts[name] for name in names), Counter())
        told = ", ".join(f"{n} {code}" for code, n in found.most_common())
        assert f"| {truth} | {'; '.join(names)} | {told} |\n" in page


@every_seed
def test_a_level_above_the_start_is_not_hidden_by_the_peak_before(seed: int) -> None:
    """2.32, then eight hundred billion, then hundreds: all the noise is the peak's."""
    history, rng = History(), random.Random(seed)
    for step in range(32):
        loss = 8e11 * math.exp(-step) * rng.uniform(0.5, 2) + rng.uniform(322, 425)
        history.append(step, train_loss=loss if step else 2.32)
    (finding,) = diagnose(history)
    assert finding.code == "DIVERGED"
    assert finding.evidence["end"] > 1.5 * finding.evidence["start"]


@every_seed
def test_noise_alone_is_no_divergence(seed: int) -> None:
    """Also where the last three are above 1.5 starts by chance."""
    for spread in (0.3, 1.0, 2.0):
        rng = random.Random(seed)
        history = History()
        for step in range(60):
            history.append(step, train_loss=math.exp(rng.gauss(0, spread)))
        assert "DIVERGED" not in codes(diagnose(history))


@every_seed
@pytest.mark.parametrize("rise", [-0.3, 0.0, 0.03])
def test_overfitting_takes_a_rise(rise: float, seed: int) -> None:
    """A validation loss that ends at its best, or next to it, is not told to stop earlier."""
    val: Shape = lambda x: fall(2.3, 1.0, 0.06)(x) + rise * max(0.0, x - 0.4)  # noqa: E731
    found = diagnose(curves(seed, fall(2.3, 0.02, 0.1), val))
    assert "OVERFITTING" not in codes(found)
    for finding in found:
        assert "at_step" not in finding.evidence
        assert "or stop earlier" not in finding.advice


@every_seed
def test_a_gap_that_no_longer_matters_is_not_told(seed: int) -> None:
    """97% are right, and both losses are small: one a fifth of the other."""
    assert diagnose(curves(seed, fall(2.3, 0.02, 0.1), fall(2.3, 0.1, 0.1), spread=0.01)) == []


@every_seed
@pytest.mark.parametrize("height", [50.0, -50.0])
@pytest.mark.parametrize("at", [100, 150, 187, 199])
def test_one_point_that_is_far_off_changes_nothing(at: int, height: float, seed: int) -> None:
    off: Shape = lambda x: GOOD(x) + (height if round(x * ROWS) == at else 0.0)  # noqa: E731
    assert diagnose(curves(seed, off)) == []


@every_seed
@pytest.mark.parametrize("rows", [10, 12, 20])
def test_a_short_run_is_not_stuck(rows: int, seed: int) -> None:
    """Where a tenth is three points, a fast fall is over within it."""
    assert diagnose(curves(seed, GOOD, rows=rows, spread=0.01)) == []


@every_seed
def test_a_loss_that_has_lost_half_has_fallen(seed: int) -> None:
    """Though the noise would be enough to hide it."""
    found = codes(diagnose(curves(seed, fall(2.3, 0.5, 0.2), rows=15, spread=0.4)))
    assert "LR_TOO_HIGH_PLATEAU" not in found


def trained(lr: float, seed: int) -> History:
    """A small classifier's first 200 steps, from numbers of the CPU's generator."""
    torch.manual_seed(seed)
    with torch.device("cpu"):
        layers = [nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)]
        x = torch.randn(1024, 20)
        y = (x @ torch.randn(20, 10)).argmax(1)
        picks = torch.randint(0, 1024, (200, 32))
    model = nn.Sequential(*layers).to(DEVICE)
    optimizer = fusedopt.AdamW(model.parameters(), lr=lr)
    x, y, picks = (tensor.to(DEVICE) for tensor in (x, y, picks))
    history = History()
    for step, pick in enumerate(picks):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x[pick]), y[pick])
        loss.backward()
        optimizer.step()
        history.append(step, train_loss=loss.detach(), lr=lr)
    return history


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("lr", [0.3, 1.0, 10.0])
def test_a_rate_that_is_far_too_high(lr: float, seed: int) -> None:
    """The first steps throw the loss up by orders of magnitude, from which it falls to ln 10."""
    history = trained(lr, seed)
    assert max(history["train_loss"][:20]) > 10 * history["train_loss"][-1]
    assert codes(diagnose(history))[0] == "LR_TOO_HIGH_PLATEAU"


@pytest.mark.parametrize("seed", range(3))
def test_a_rate_that_is_right(seed: int) -> None:
    assert diagnose(trained(5e-3, seed)) == []


def test_too_few_validations_are_told() -> None:
    history = curves(0, fall(2.3, 0.3, 0.12), fall(2.3, 0.4, 0.12), rows=40)
    (finding,) = diagnose(history)
    assert finding.code == "INSUFFICIENT_DATA"
    assert finding.evidence == {"points_of_val_loss": 8, "needed": 10}


def test_evidence() -> None:
    shape: dict[str, Any] = {"train": early_drop, "lr": dropped(0.2)}
    (finding,) = diagnose(curves(0, **shape))
    assert finding.evidence["at_step"] == ROWS * 10 * 0.2
    assert (finding.evidence["lr_before"], finding.evidence["lr_after"]) == (0.1, 0.01)
    assert diagnose(curves(0, early_drop)) == []  # without the rate, nobody knows
    (finding,) = diagnose(curves(0, late))
    assert 0.28 < finding.evidence["part"] < 0.36
    (finding,) = diagnose(curves(0, lambda x: math.nan if 0.5 <= x < 0.6 else 1.0))
    assert finding.evidence == {"first_step": 1000, "nonfinite_train_loss": 20}
    (finding,) = diagnose(curves(0, fall(2.3, 0.05, 0.12), overfitted))
    assert 700 < finding.evidence["at_step"] < 950
    assert finding.evidence["val_end"] > finding.evidence["val_best"] + 0.4


@every_seed
def test_what_is_not_high_or_not_flat(seed: int) -> None:
    slow: Shape = lambda x: 2.3 - 0.45 * x  # noqa: E731
    found = codes(diagnose(curves(seed, slow, fall(2.3, 0.5, 0.1))))
    assert "LR_TOO_LOW_OR_SMALL_MODEL" not in found
    steady: Shape = lambda x: 2.3 - 0.9 * x  # noqa: E731
    assert codes(diagnose(curves(seed, steady, steady))) == ["STILL_IMPROVING"]


def test_other_names_and_order() -> None:
    history = History()
    for step in range(100):
        history.append(step, t=late(step / 100), v=0.1 * step, a=step, train_loss=math.nan)
    found = codes(diagnose(history, train="t", val="v", accuracy="a"))
    assert found == ["BAD_INIT", "OVERFITTING", "STILL_IMPROVING"]


def test_a_column_of_another_name() -> None:
    history = History()
    for step in range(100):
        history.append(step, loss=2.3, val=math.nan)
    (finding,) = diagnose(history)
    assert finding.code == "INSUFFICIENT_DATA"
    assert finding.advice.startswith("There is no column 'train_loss', but ['loss', 'val']:")
    assert codes(diagnose(history, train="loss")) == ["LR_TOO_HIGH_PLATEAU"]
    assert codes(diagnose(history, train="loss", val="val")) == ["DIVERGED"]


def test_thresholds_are_used() -> None:
    history = curves(0, fall(2.3, 1.6, 0.1), fall(2.3, 1.62, 0.1))
    assert codes(diagnose(history)) == ["UNDERFITTING"]
    assert diagnose(history, thresholds=Thresholds(high=0.8)) == []


@table(
    "wrong",
    {
        "points": ({"least_points": 4}, ValueError, "least_points must be at least 5: 4"),
        "half": ({"least_points": 9.5}, TypeError, "least_points is not an integer: 9.5"),
        "nan": ({"flat": math.nan}, ValueError, "flat must be positive: nan"),
        "inf": ({"gap": math.inf}, ValueError, "gap must be finite: inf"),
        "negative": ({"drop": -0.5}, ValueError, "drop must be positive: -0.5"),
        "text": ({"high": "x"}, TypeError, "high is not a number: 'x'"),
        "last": ({"remaining": 0}, ValueError, "remaining must be positive: 0"),
        "exploded": ({"exploded": 1.0}, ValueError, "exploded must be above 1: 1.0"),
    },
)
def test_thresholds_are_checked(wrong: Any) -> None:
    options, error, message = wrong
    with pytest.raises(error, match=message):
        Thresholds(**options)


@pytest.mark.parametrize("points", range(40))
def test_the_least_points_are_enough(points: int) -> None:
    for seed in range(20):
        rng, history = random.Random(seed), History()
        for step in range(points):
            for name in ("train_loss", "val_loss", "lr", "val_accuracy"):
                history.append(step, **{name: 2.0 + seed % 2 * rng.random() - 0.9 * step / points})
        found = codes(diagnose(history, thresholds=Thresholds(least_points=5)))
        assert ("INSUFFICIENT_DATA" in found) is (points < 5)


def test_too_high_and_too_low_look_alike() -> None:
    """The seesaw over y = 4 x^2 and the step that is too small: both losses stay."""
    losses = {}
    for lr in (0.25, 1e-9):
        x, history = 2.0, History()
        for step in range(50):
            history.append(step, train_loss=4 * x * x)
            x -= lr * 8 * x
        losses[lr] = history["train_loss"]
        (finding,) = diagnose(history)
        assert finding.code == "LR_TOO_HIGH_PLATEAU"
        assert "look alike" in finding.advice
    assert losses[0.25] == pytest.approx(losses[1e-9], rel=1e-5)


@pytest.mark.parametrize("seed", range(200))
def test_any_numbers_can_be_diagnosed(seed: int) -> None:
    rng = random.Random(seed)
    scale = rng.choice([0.0, 1e-320, 1.0, 1e200, 1.7e308])
    history = History()
    for step in range(rng.randrange(40)):
        for name in ("train_loss", "val_loss", "lr", "val_accuracy"):
            if rng.random() < 0.9:
                history.append(step, **{name: scale * rng.uniform(-1, 1) ** rng.choice([1, 2])})
    for finding in diagnose(history):
        assert finding.code in ADVICE
    assert str(history)
    assert history.line()


def test_diagnose_refuses_other_objects() -> None:
    with pytest.raises(TypeError, match=r"history is not a History: \[1.0\]"):
        diagnose([1.0])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="thresholds is not a Thresholds: 3"):
        diagnose(History(), thresholds=3)  # type: ignore[arg-type]
