"""Clipping, and what nan and inf do, against torch's own functions before a stock step."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import (
    DEVICE,
    SETTLED,
    classes,
    every_class,
    make_params,
    nothing_written,
    params_of,
    set_grads,
    table,
)
from torch import Tensor
from torch.nn import Parameter

import fusedopt
from fusedopt.cases import Case
from fusedopt.recipe import Recipe

DTYPES = {"float32": torch.float32, "float64": torch.float64, "complex64": torch.complex64}
CLIPS: dict[str, dict[str, Any]] = {
    "norm": {"max_grad_norm": 0.5},
    "norm_not_reached": {"max_grad_norm": 1e3},
    "norm_measured": {"max_grad_norm": math.inf},
    "inf_norm": {"max_grad_norm": 0.5, "grad_norm_type": math.inf},
    "value": {"max_grad_value": 0.1},
    "finite_test": {"nonfinite": "skip"},
    "finite_test_inf_norm": {"nonfinite": "raise", "grad_norm_type": math.inf},
}


def grads_of(params: list[Tensor]) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in params]


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        pytest.param(options, dtype, id=f"{name}-{dtype}")
        for name, options in CLIPS.items()
        for dtype in (torch.float32, torch.float64, torch.complex64)
        if not dtype.is_complex or not {"max_grad_value", "grad_norm_type"} & options.keys()
    ],
)
@every_class
def test_equals_the_recipe(case: Case, options: dict[str, Any], dtype: torch.dtype) -> None:
    shapes = [(4, 3), (40_001,), (), (0,), (2, 3, 2, 2), (513,)]
    params = make_params(shapes, dtype)
    ours = case.ours([{"params": params[:2]}, {"params": params[2:]}], **options)
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    recipe = Recipe(case, params, dtype=precise, **options)
    assert math.isnan(ours.grad_norm)
    for step in range(4):
        set_grads(params, step, lambda step, i: (step + i) % 4 != 0)
        before = grads_of(params)
        ours.step()
        recipe.step([before])
        torch.testing.assert_close(params, recipe.params)
        norm = torch.tensor(recipe.norm, dtype=torch.float64)
        if dtype.is_complex:  # whose squares torch sums one after the other on one thread
            norm = torch.cat([g.flatten() for g in before if g is not None]).to(torch.complex128)
            norm = norm.norm()
        torch.testing.assert_close(ours.grad_norm, norm, rtol=1e-6, atol=0, equal_nan=True)
        # Not a bit of a gradient has been written.
        torch.testing.assert_close(grads_of(params), before, rtol=0, atol=0)
    assert ours.skipped_steps == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_norm_of_half_precision_gradients_is_that_of_their_values(dtype: torch.dtype) -> None:
    params = make_params([(1000,), (33, 7)], dtype)
    ours = fusedopt.SGD(params, lr=0.1, max_grad_norm=0.25)
    set_grads(params, 0)
    exact = torch.cat([p.grad.double().flatten() for p in params])
    expected = [p.double() - 0.1 * p.grad.double() * 0.25 / (exact.norm() + 1e-6) for p in params]
    ours.step()
    # A device adds a few squares in float32 (docs/gpu.md).
    rtol = 1e-12 if ours.grad_norm.device.type == "cpu" else 2**-23
    torch.testing.assert_close(ours.grad_norm, exact.norm(), rtol=rtol, atol=0)
    torch.testing.assert_close(
        [p.double() for p in params], [e.to(dtype).double() for e in expected]
    )


def test_clipping_lasts_and_follows_its_attribute() -> None:
    """Steps that trust what they have seen clip, too; and options may change between steps."""
    case = Case("AdamW", {"lr": 0.01})
    params = make_params()
    ours, recipe = case.ours(params), Recipe(case, params, dtype=torch.float32)
    for step, norm in enumerate([None] * SETTLED + [0.1] * SETTLED + [0.7, None, 0.1]):
        ours.max_grad_norm = recipe.max_grad_norm = norm
        set_grads(params, step)
        recipe.step([grads_of(params)])
        ours.step()
        torch.testing.assert_close(params, recipe.params)
        assert math.isnan(ours.grad_norm) == (norm is None)


def test_norm_told_earlier_does_not_change() -> None:
    params = make_params()
    ours = fusedopt.SGD(params, lr=0.1, max_grad_norm=math.inf)
    told = []
    for step in range(3):
        set_grads(params, step)
        ours.step()
        told.append(ours.grad_norm)
    assert len({norm.item() for norm in told}) == 3


def test_large_and_small_gradients() -> None:
    """Sums of squares in float32 would be inf, or zero."""
    for size in (1e30, 1e-30):
        p = Parameter(torch.zeros(5000))
        p.grad = torch.full_like(p, size)
        ours = fusedopt.SGD([p], lr=1.0, max_grad_norm=1.0)
        ours.step()
        assert ours.grad_norm.item() == pytest.approx(size * math.sqrt(5000), rel=1e-6)
        assert p[0].item() == pytest.approx(-min(size, 1 / math.sqrt(5000)), rel=1e-6)


def test_norm_does_not_depend_on_threads() -> None:
    params = make_params([(300_000,), (3,), (70_001,)])
    set_grads(params, 0)
    norms, before = set(), torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            ours = fusedopt.SGD(params, lr=0.0, max_grad_norm=1.0)
            ours.step()
            norms.add(ours.grad_norm.item())
    finally:
        torch.set_num_threads(before)
    assert len(norms) == 1


# --- nan and inf -------------------------------------------------------------------------------

BAD = {"nan": math.nan, "inf": math.inf, "minus_inf": -math.inf}
WITH = {
    "alone": {},
    "norm": {"max_grad_norm": 50.0},
    "inf_norm": {"max_grad_norm": 2.0, "grad_norm_type": math.inf},
    "value": {"max_grad_value": 1.0},
    "measured": {"max_grad_norm": math.inf},
    "ema_l1": {"ema_decay": 0.9, "l1": 0.1},
}


def spoil(params: list[Tensor], value: float, at: int = -1) -> None:
    params[1].grad.view(-1)[at] = value


@table("bad", BAD)
@table("options", WITH)
@every_class
def test_skip_leaves_everything_as_it_is(case: Case, options: dict[str, Any], bad: float) -> None:
    params = make_params([(4, 3), (20_000,), ()])
    ours = case.ours(params, nonfinite="skip", **options)
    recipe = Recipe(case, params, dtype=torch.float32, nonfinite="skip", **options)
    skipped = 0
    for step in range(SETTLED + 4):
        set_grads(params, step)
        if step in (0, 1, SETTLED):  # the first steps of all, and when nothing is new any more
            spoil(params, bad, at=step * 3000)
            with nothing_written(ours):
                ours.step()
            skipped += 1
            assert not math.isfinite(ours.grad_norm)
        else:
            ours.step()
            recipe.step([grads_of(params)])
        assert ours.skipped_steps == skipped
        torch.testing.assert_close(params, recipe.params)
        if "ema_decay" in options and step > 1:
            torch.testing.assert_close([ours.state[p]["ema"] for p in params], recipe.ema)


@table("options", WITH)
@every_class
def test_raise_names_the_parameter(case: Case, options: dict[str, Any]) -> None:
    names = ["first", "second", "third"]
    params = list(zip(names, make_params([(3,), (5,), (2,)]), strict=True))
    ours = case.ours(params, nonfinite="raise", **options)
    for step in range(3):
        set_grads(params_of(ours), step)
        if step != 1:
            spoil(params_of(ours), math.nan, at=0)
            with (
                nothing_written(ours),
                pytest.raises(RuntimeError, match=r"1 of group 0 \(second\)"),
            ):
                ours.step()
        else:
            ours.step()
    assert ours.skipped_steps == 2


@table("bad", BAD)
@table("options", {k: v for k, v in WITH.items() if k != "ema_l1"})
@classes("SGD", "AdamW", "RMSprop", "Adagrad")
def test_propagate_goes_where_torch_sends_it(
    case: Case, options: dict[str, Any], bad: float
) -> None:
    params = make_params([(4, 3), (17,), ()])
    ours, recipe = (
        case.ours(params, **options),
        Recipe(case, params, dtype=torch.float32, **options),
    )
    for step in range(3):
        set_grads(params, step)
        spoil(params, bad)
        recipe.step([grads_of(params)])
        ours.step()
        torch.testing.assert_close(params, recipe.params, equal_nan=True)
    assert ours.skipped_steps == 0


def test_finite_doubles_whose_squares_overflow_are_no_reason_to_skip() -> None:
    p = Parameter(torch.ones(3, dtype=torch.float64))
    p.grad = torch.tensor([1e200, -1e200, 0.0], dtype=torch.float64)
    ours = fusedopt.SGD([p], lr=1e-200, nonfinite="skip")
    ours.step()
    assert ours.skipped_steps == 0
    torch.testing.assert_close(p.detach(), torch.tensor([0.0, 2.0, 1.0], dtype=torch.float64))


def test_gradient_that_overflows_when_divided_is_not_finite() -> None:
    p = Parameter(torch.ones(3))
    ours = fusedopt.SGD([p], lr=1.0, nonfinite="skip")
    for divisor, skipped in ((0.25, 1), (0.75, 1)):
        ours.grad_divisor = divisor
        p.grad = torch.tensor([2e38, 0.0, 1.0])
        ours.step()
        assert ours.skipped_steps == skipped
    assert torch.isfinite(p).all()


def test_one_bad_element_anywhere_is_found() -> None:
    """First, last, in a tail, in the second chunk of the norm, behind a layout."""
    p, q = Parameter(torch.zeros(40_003)), Parameter(torch.zeros(33, 7).t())
    ours = fusedopt.SGD([p, q], lr=1.0, nonfinite="skip")
    places = [0, 15, 16, 511, 512, 16_383, 16_384, 32_768, 40_000, 40_002]
    for place in places:
        p.grad, q.grad = torch.ones_like(p), torch.ones(7, 33)
        p.grad[place] = math.nan
        ours.step()
    for place in (0, 100, 230):
        p.grad, q.grad = torch.ones_like(p), torch.ones(7, 33)
        q.grad.view(-1)[place] = -math.inf
        ours.step()
    assert ours.skipped_steps == len(places) + 3
    assert not p.any()
    assert not q.any()


def test_skipped_step_draws_nothing_and_warms_nothing_up() -> None:
    """After a skipped first step a run is the one without it."""
    runs = []
    for skips in (0, 2):
        torch.manual_seed(3)
        params = make_params(dtype=torch.bfloat16)
        ours = fusedopt.Momentum(
            params, nonfinite="skip", weight_precision="master", ema_decay=0.9, ema_warmup=True
        )
        for step in range(-skips, 3):
            set_grads(params, step)
            if step < 0:
                params[0].grad.view(-1)[0] = math.inf
            ours.step()
        runs.append((params, [dict(ours.state[p]) for p in params]))
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=0)


# --- Doubles whose squares are none -------------------------------------------------------------

on_the_cpu = pytest.mark.skipif(DEVICE.type != "cpu", reason="a device sums squares up as they are")


@on_the_cpu
@pytest.mark.parametrize("size", [1e-320, 1e-200, 1e-155, 1e-100, 1e153, 1e155, 1e200, 1e300])
def test_norm_of_doubles_of_all_magnitudes(size: float) -> None:
    """Where their squares' sum is zero or infinite, too; to the last bits, with any threads."""
    numbers = torch.randn(300_000, dtype=torch.float64)
    numbers[:1000] *= 1e-12
    expected = (numbers * size / size).norm().item() * size
    p, single = Parameter(torch.zeros_like(numbers)), Parameter(torch.zeros(2))
    norms, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            ours = fusedopt.SGD([single, p], lr=1.0, max_grad_norm=size, nonfinite="skip")
            p.grad, single.grad = numbers * size, torch.zeros(2)
            ours.step()
            norms.append(ours.grad_norm.item())
    finally:
        torch.set_num_threads(before)
    assert norms == norms[:1] * 3
    assert norms[0] == pytest.approx(expected, rel=1e-14, abs=1e-322)
    if size >= 1e-150:  # below, clip_grad_norm_'s own 1e-6 is all that counts
        change = -(numbers * size) * (size / (norms[0] + 1e-6)) * 3
        torch.testing.assert_close(p.detach(), change, rtol=1e-12, atol=0)


@on_the_cpu
@pytest.mark.parametrize("size", [1e-250, 1e250])
def test_norm_of_such_doubles_after_unscaling(size: float) -> None:
    p = Parameter(torch.zeros(3, dtype=torch.complex128))
    ours = fusedopt.SGD([p], lr=0.0, max_grad_norm=1.0)
    ours.grad_divisor = 65536.0
    p.grad = torch.full_like(p, size * (3 + 4j))
    ours.accumulate()
    p.grad = torch.full_like(p, size * (3 + 4j))
    ours.step()
    expected = 2 * 5 * size * math.sqrt(3) / 65536
    assert ours.grad_norm.item() == pytest.approx(expected, rel=1e-15, abs=0)


@on_the_cpu
def test_norm_of_floats_beside_such_doubles() -> None:
    p, q = Parameter(torch.zeros(4, dtype=torch.float64)), Parameter(torch.zeros(9))
    ours = fusedopt.SGD([p, q], lr=0.0, max_grad_norm=1.0)
    for size in (1e-250, 1e-30, 1.0, 1e30, 1e250):
        p.grad, q.grad = torch.full_like(p, size), torch.full_like(q, 2.0)
        ours.step()
        expected = math.hypot(2 * size, 6.0)
        assert ours.grad_norm.item() == pytest.approx(expected, rel=1e-14, abs=0)
    p.grad, q.grad = torch.zeros_like(p), torch.zeros_like(q)
    ours.step()
    assert ours.grad_norm == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@table("norm", {"alone": {}, "two": {"max_grad_norm": 1.0}, "value": {"max_grad_value": 1.0}})
def test_finite_gradients_whose_sum_is_not(dtype: torch.dtype, norm: dict[str, Any]) -> None:
    """What counts is what the rule would get."""
    p = Parameter(torch.ones(5, dtype=dtype))
    ours = fusedopt.SGD([p], lr=1.0, nonfinite="skip", **norm)
    largest = torch.finfo(dtype).max
    for _ in range(2):
        p.grad = torch.full_like(p, largest)
        ours.accumulate()
    ours.step()
    assert ours.skipped_steps == 1
    assert not math.isfinite(ours.grad_norm)
    assert torch.equal(p.detach(), torch.ones_like(p))
