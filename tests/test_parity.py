"""Parity with stock torch, measured: every case of the table, every dtype, awkward sizes.

How it is measured and when it passes is fusedopt/parity.py; that it can fail is tested in
test_parity_command.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from helpers import DEVICE
from torch import Tensor

from fusedopt.cases import CASES, PIPELINE, Case
from fusedopt.parity import make_params, measure, random_grads

ROWS = [(case, dtype) for case in CASES for dtype in case.dtypes]


@pytest.mark.parametrize(("case", "dtype"), ROWS, ids=str)
def test_every_case_passes(case: Case, dtype: torch.dtype) -> None:
    """100 steps in full precision, 12 single ones in 16 bits."""
    result = measure(case, dtype, device=DEVICE)
    assert result.problems == []
    assert result.passed
    assert result.counters_equal is (None if case.name in ("SGD", "Momentum") else True)
    assert result.steps == (12 if dtype in (torch.bfloat16, torch.float16) else 100)


@pytest.mark.parametrize("case", PIPELINE, ids=str)
def test_every_option_of_the_pipeline_passes(case: Case) -> None:
    """Fewer steps than `fusedopt parity` takes: each option has tests of its own."""
    for dtype in case.dtypes:
        result = measure(case, dtype, device=DEVICE, steps=20)
        assert result.problems == [], dtype


def set_grads(optimizer: torch.optim.Optimizer, seed: int) -> None:
    params = params_of(optimizer)
    grads = random_grads(params, torch.Generator("cpu").manual_seed(seed))
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad


def state_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Tensor]]:
    return [
        {name: value for name, value in optimizer.state[p].items() if value is not None}
        for p in params_of(optimizer)
    ]


def params_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


@pytest.mark.parametrize("name", ["Adam", "SGD", "RMSprop", "Adagrad"])
def test_mixed_dtypes_in_one_group(name: str) -> None:
    """Parameters of all dtypes side by side give the bits that each dtype gives alone."""
    case = Case(name, {"lr": 0.01, "weight_decay": 0.1})
    dtypes = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64]
    mixed = case.ours([p for dtype in dtypes for p in make_params(dtype=dtype, device=DEVICE)])
    alone = [case.ours(make_params(dtype=dtype, device=DEVICE)) for dtype in dtypes]
    for seed in range(5):
        for optimizer in alone:
            set_grads(optimizer, seed)
            optimizer.step()
        grads = [p.grad for o in alone for p in o.param_groups[0]["params"]]
        for p, grad in zip(mixed.param_groups[0]["params"], grads, strict=True):
            p.grad = grad
        mixed.step()
    together = [p for o in alone for p in params_of(o)]
    torch.testing.assert_close(params_of(mixed), together, rtol=0, atol=0)
    torch.testing.assert_close(
        state_of(mixed), [s for o in alone for s in state_of(o)], rtol=0, atol=0
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_nan_and_inf_go_where_stock_sends_them(case: Case) -> None:
    values = torch.tensor([1.0, math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-42, 1e18])
    ours = case.ours([torch.nn.Parameter(torch.linspace(-1, 1, 8))])
    stock = case.stock([torch.nn.Parameter(torch.linspace(-1, 1, 8))])
    for _ in range(3):
        for optimizer in (ours, stock):
            optimizer.param_groups[0]["params"][0].grad = values.clone()
            optimizer.step()
    torch.testing.assert_close(params_of(ours), params_of(stock), equal_nan=True)
