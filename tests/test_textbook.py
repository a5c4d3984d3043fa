"""Worked examples of courses and books, and the mistakes that their code is known for."""

from __future__ import annotations

import pytest
import torch
from torch.nn import Linear, Parameter
from torch.nn.functional import mse_loss

import fusedopt

# Of how the emulated GPU leaves mse_loss to the CPU.
pytestmark = pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")


def test_one_step_down_a_parabola() -> None:
    """w^2 / 2 at 1 with a rate of 0.1."""
    w = Parameter(torch.tensor(1.0, dtype=torch.float64))
    optimizer = fusedopt.SGD([w], lr=0.1)
    (w**2 / 2).backward()
    optimizer.step()
    assert w.item() == pytest.approx(0.9, rel=1e-15)


@pytest.mark.parametrize("beta", [0.5, 0.9, 0.99])
def test_momentum_is_the_average_that_it_is_said_to_be(beta: float) -> None:
    """S_1 = g_1, S_t = beta S_(t-1) + (1 - beta) g_t; which torch's momentum is not."""
    w = Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = fusedopt.Momentum([w], lr=1.0, momentum=beta)
    average, expected = None, 0.0
    for gradient in (1.0, -2.0, 0.5, 3.0):
        w.grad = torch.full_like(w, gradient)
        optimizer.step()
        average = gradient if average is None else beta * average + (1 - beta) * gradient
        expected -= average
    assert w.item() == pytest.approx(expected, rel=1e-14)


def test_nothing_is_clipped_that_was_not_to_be() -> None:
    """Helpers that clip by value unless told otherwise change gradients that nobody saw."""
    p, q = (Parameter(torch.zeros(3)) for _ in range(2))
    ours, stock = fusedopt.SGD([p], lr=1.0), torch.optim.SGD([q], lr=1.0)
    for param in (p, q):
        param.grad = torch.tensor([1e6, -1e6, 2.0])
    ours.step()
    stock.step()
    torch.testing.assert_close(p, q, rtol=0, atol=0)


def problem() -> tuple[Linear, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return Linear(3, 1).double(), torch.randn(8, 3).double(), torch.randn(8, 1).double()


def test_micro_batches_of_different_sizes() -> None:
    """The mean of the means of 7 samples and of 1 is not the mean of 8; sums over 8 are."""
    model, x, y = problem()
    mse_loss(model(x), y).backward()
    whole = model.weight.grad.clone()

    means, x, y = problem()
    for part in (slice(7), slice(7, 8)):
        (mse_loss(means(x[part]), y[part]) / 2).backward()
    assert not torch.allclose(means.weight.grad, whole, rtol=0.01)

    sums, x, y = problem()
    before = sums.weight.detach().clone()
    optimizer = fusedopt.SGD(sums.parameters(), lr=1.0)
    for part in (slice(7), slice(7, 8)):
        mse_loss(sums(x[part]), y[part], reduction="sum").backward()
        optimizer.accumulate()
    optimizer.grad_divisor = 8
    optimizer.step()
    torch.testing.assert_close(before - sums.weight, whole, rtol=1e-12, atol=0)


def test_the_tail_of_an_epoch_is_stepped_with() -> None:
    """Five micro-batches in windows of four: the fifth is a window of its own, and its own mean."""
    model, x, y = problem()
    optimizer = fusedopt.SGD(model.parameters(), lr=0.0)
    seen = []
    for i in range(5):
        mse_loss(model(x[i : i + 1]), y[i : i + 1]).backward()
        last = model.weight.grad.clone()
        optimizer.accumulate()
        if (i + 1) % 4 == 0 or i == 4:
            for group in optimizer.param_groups:
                group["lr"] = 1.0 if i == 4 else 0.0
            before = model.weight.detach().clone()
            optimizer.step()
            seen.append(i)
    assert seen == [3, 4]
    torch.testing.assert_close(before - model.weight, last, rtol=1e-12, atol=0)
