"""Checks pass on models that are right, fail on those that are not, and leave no trace."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import DEVICE, table
from torch import Tensor

import fusedopt
from fusedopt.checks import check_initial_loss, overfit_batch

CLASSES = 10


@table(
    "row",
    {
        "exact": (math.log(10), {"num_classes": 10}, True, "ln(10) is 2.303"),
        "tensor": (torch.tensor(2.3, device="cpu"), {"num_classes": 10}, True, "2.3"),
        "near": (2.8, {"num_classes": 10}, True, "2.8"),
        "too large": (2.9, {"num_classes": 10}, False, "too sure of wrong answers"),
        "too small": (1.7, {"num_classes": 10}, False, "labels leak"),
        "narrow": (2.4, {"num_classes": 10, "rtol": 0.01}, False, "too sure"),
        "expected": (-4.5, {"expected": -5.0}, True, "expected is -5"),
        "zero": (3e-4, {"expected": 0.0}, True, "expected is 0"),
        "not zero": (-0.1, {"expected": 0.0}, False, "expected is 0"),
        "not at all": (0.04, {"expected": 0.0, "atol": 0.05}, True, "expected is 0"),
        "nan": (math.nan, {"num_classes": 10}, False, "bad data"),
        "inf": (math.inf, {"expected": 1.0}, False, "bad data"),
        "-inf": (-math.inf, {"expected": 1.0}, False, "bad data"),
    },
)
def test_initial_loss(row: Any) -> None:
    loss, options, passed, message = row
    check = check_initial_loss(loss, **options)
    assert bool(check) is check.passed is passed
    assert message in check.message
    assert check.evidence["loss"] == pytest.approx(float(loss), nan_ok=True)
    assert check.losses == []


def test_initial_loss_of_a_real_model() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(64, 8), torch.randint(0, CLASSES, (64,))
    model = torch.nn.Linear(8, CLASSES)
    assert check_initial_loss(torch.nn.functional.cross_entropy(model(x), y), num_classes=CLASSES)
    with torch.no_grad():
        model.weight *= 30
    loss = torch.nn.functional.cross_entropy(model(x), y)
    assert not check_initial_loss(loss, num_classes=CLASSES)


@table(
    "wrong",
    {
        "neither": ((1.0,), {}, ValueError, "either num_classes or expected: None and None"),
        "both": ((1.0,), {"num_classes": 2, "expected": 1.0}, ValueError, "either .*: 2 and 1.0"),
        "one class": ((1.0,), {"num_classes": 1}, ValueError, "num_classes .* least 2: 1"),
        "half class": ((1.0,), {"num_classes": 2.5}, TypeError, "num_classes .* integer: 2.5"),
        "rtol": ((1.0,), {"expected": 1.0, "rtol": 0}, ValueError, "rtol must be positive: 0"),
        "inf": (
            (1.0,),
            {"expected": 1.0, "rtol": math.inf},
            ValueError,
            "rtol must be finite",
        ),
        "atol": ((1.0,), {"expected": 1.0, "atol": -1}, ValueError, "atol must be .*negative: -1"),
        "nan": ((1.0,), {"expected": math.nan}, ValueError, "expected must be finite: nan"),
        "text": (("x",), {"expected": 1.0}, TypeError, "loss is not a number: 'x'"),
    },
)
def test_initial_loss_refuses(wrong: Any) -> None:
    args, options, error, message = wrong
    with pytest.raises(error, match=message):
        check_initial_loss(*args, **options)


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(
            torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, CLASSES)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def setting(**options: Any) -> tuple[Net, Any, tuple[Tensor, Tensor], Any]:
    torch.manual_seed(0)
    with torch.device("cpu"):  # the same numbers everywhere
        model = Net()
        x, y = torch.randn(8, 8), torch.randint(0, CLASSES, (8,))
    model.to(DEVICE)
    optimizer = fusedopt.AdamW(model.parameters(), **{"lr": 1e-2, **options})
    batch = x.to(DEVICE), y.to(DEVICE)

    def closure(batch: tuple[Tensor, Tensor]) -> Tensor:
        return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])

    return model, optimizer, batch, closure


def test_a_right_model_learns_a_batch_and_forgets_it() -> None:
    model, optimizer, batch, closure = setting()
    before = [p.detach().clone() for p in model.parameters()]
    check = overfit_batch(closure, batch, optimizer, stateful=(model,))
    assert check
    assert check.losses[0] > 2 > 0.1 >= check.losses[-1]
    assert all(loss > 0.1 for loss in check.losses[:-1])  # it stopped at once
    assert check.evidence["steps"] == len(check.losses) < 200
    assert all(map(torch.equal, before, model.parameters()))
    assert not optimizer.state
    again = overfit_batch(closure, batch, optimizer, stateful=(model,))
    assert again.losses == check.losses


def test_what_goes_wrong_is_told() -> None:
    model, optimizer, batch, closure = setting()
    others = fusedopt.AdamW(Net().parameters())
    check = overfit_batch(closure, batch, others, stateful=(model,), steps=3)
    assert not check
    assert "another model's" in check.message
    assert check.losses == [check.losses[0]] * 3

    check = overfit_batch(lambda b: -closure(b), batch, optimizer, stateful=(model,), target=-1e9)
    assert "more steps" in check.message
    check = overfit_batch(closure, batch, optimizer, stateful=(model,), steps=2)
    assert "more steps or another" in check.message
    optimizer.param_groups[0]["maximize"] = True
    check = overfit_batch(closure, batch, optimizer, stateful=(model,), steps=20)
    assert "it rose" in check.message

    check = overfit_batch(lambda b: closure(b) * math.nan, batch, optimizer, stateful=(model,))
    assert not check
    assert "bad data" in check.message
    assert len(check.losses) == 1


def test_labels_that_do_not_belong_are_found() -> None:
    """A bug that no learning curve of a healthy loop shows: the same input, different labels."""
    model, optimizer, (x, y), closure = setting()
    x = x[:1].expand(8, 8)
    assert not overfit_batch(closure, (x, y), optimizer, stateful=(model,))


@table(
    "wrong",
    {
        "closure": ({"closure": 3}, TypeError, "closure is not callable: 3"),
        "optimizer": ({"optimizer": None}, TypeError, "optimizer is not a torch.*: None"),
        "steps": ({"steps": 0}, ValueError, "steps must be at least 1: 0"),
        "bool steps": ({"steps": True}, TypeError, "steps is not an integer: True"),
        "target": ({"target": math.inf}, ValueError, "target must be finite: inf"),
        "stateful": ({"stateful": torch.nn.Identity()}, TypeError, r"stateful .*\(model,\)"),
        "scaler": ({"scaler": 1}, TypeError, "scaler is not a GradScaler: 1"),
    },
)
def test_overfit_batch_refuses(wrong: Any) -> None:
    options, error, message = wrong
    model, optimizer, batch, closure = setting()
    options = {"closure": closure, "batch": batch, "optimizer": optimizer, **options}
    with pytest.raises(error, match=message):
        overfit_batch(**{"stateful": (model,), **options})


def test_with_a_scaler() -> None:
    model, optimizer, batch, closure = setting()
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=8.0, growth_interval=2)
    state = scaler.state_dict()
    plain = overfit_batch(closure, batch, optimizer, stateful=(model,))
    scaled = overfit_batch(closure, batch, optimizer, stateful=(model,), scaler=scaler)
    assert scaled.losses == pytest.approx(plain.losses, rel=1e-4)
    assert scaler.state_dict() == state
