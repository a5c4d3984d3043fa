"""The average of the weights that a step keeps, its swap, and proximal L1."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from helpers import (
    SETTLED,
    every_class,
    make_params,
    needs_host_memory,
    nothing_written,
    set_grads,
    table,
)
from torch import nn
from torch.nn import Parameter

import fusedopt
from fusedopt.cases import Case
from fusedopt.recipe import Recipe, whole

EMA = {"ema_decay": 0.9}


def trained(
    case: Case, params: list[Parameter], steps: int = SETTLED, **options: Any
) -> torch.optim.Optimizer:
    ours = case.ours(params, **options)
    for step in range(steps):
        set_grads(params, step)
        ours.step()
    return ours


@table("warmup", {"constant": False, "warmup": True})
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
@every_class
def test_ema_is_the_average_of_the_weights(case: Case, dtype: torch.dtype, warmup: bool) -> None:
    options = {"ema_decay": 0.95, "ema_warmup": warmup}
    params = make_params([(4, 3), (1037,), (), (0,)], dtype)
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    ours, recipe = case.ours(params, **options), Recipe(case, params, dtype=precise, **options)
    for step in range(12):
        # One parameter comes late, one misses steps: each average follows its own updates.
        set_grads(params, step, lambda step, i: i != 1 or (step > 3 and step % 2 == 0))
        recipe.step([[p.grad for p in params]])
        ours.step()
    averages = [ours.state[p]["ema"] for p in params]
    torch.testing.assert_close(averages, recipe.ema)
    torch.testing.assert_close(params, recipe.params)


@pytest.mark.parametrize("precision", ["nearest", "master", "remainder", "kahan", "stochastic"])
def test_ema_of_a_rounded_weight_is_that_of_the_whole_one(precision: str) -> None:
    torch.manual_seed(0)
    params = make_params([(64, 5)], torch.bfloat16)
    ours = fusedopt.AdamW(params, lr=1e-4, weight_precision=precision, **EMA)
    average = params[0].detach().float()
    for step in range(20):
        set_grads(params, step)
        ours.step()
        average = torch.lerp(average, whole(ours, params[0]).float(), 0.1)
    ema = ours.state[params[0]]["ema"]
    assert ema.dtype == torch.float32
    if precision in ("master", "remainder", "kahan"):
        torch.testing.assert_close(ema, average, rtol=1e-6, atol=1e-7)
    else:  # the weight before its rounding
        torch.testing.assert_close(ema, average, rtol=2**-8, atol=1e-6)


def test_ema_begins_with_the_whole_weight_of_a_checkpoint() -> None:
    params = make_params([(64, 5)], torch.bfloat16)
    ours = trained(Case("SGD", {"lr": 1e-4}), params, weight_precision="remainder")
    exact = whole(ours, params[0]).clone()
    ours.ema_decay = 0.999
    for group in ours.param_groups:
        group["lr"] = 0.0
    set_grads(params, 9)
    ours.step()
    torch.testing.assert_close(ours.state[params[0]]["ema"], exact, rtol=1e-7, atol=0)


def test_swap_holds_the_averages_and_gives_back_every_bit() -> None:
    params = make_params()
    ours = trained(Case("AdamW", {"lr": 0.1}), params, **EMA)
    with nothing_written(ours):
        before = [p.data_ptr() for p in params]
        with ours.swap_ema():
            for p in params:
                torch.testing.assert_close(p.detach(), ours.state[p]["ema"], rtol=0, atol=0)
            assert [p.data_ptr() for p in params] == before
    set_grads(params, SETTLED)
    ours.step()


def test_swap_gives_back_after_an_exception() -> None:
    params = make_params()
    ours = trained(Case("SGD", {"lr": 0.1, "momentum": 0.9}), params, **EMA)

    def evaluate() -> None:
        with ours.swap_ema():
            params[0].data.zero_()  # whatever happened to them meanwhile
            raise KeyboardInterrupt

    with nothing_written(ours), pytest.raises(KeyboardInterrupt):
        evaluate()
    with ours.swap_ema():  # and may be entered again
        pass


def test_swap_of_half_precision_weights_keeps_their_hidden_part() -> None:
    runs = []
    for swaps in (False, True):
        params = make_params([(64, 5)], torch.bfloat16)
        ours = trained(Case("AdamW", {"lr": 0.01}), params, weight_precision="master", **EMA)
        if swaps:
            with ours.swap_ema():
                assert params[0].dtype == torch.bfloat16
        for step in range(SETTLED, 2 * SETTLED):
            set_grads(params, step)
            ours.step()
        runs.append([params[0].detach(), ours.state[params[0]]["master"]])
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=0)


def test_swap_is_a_better_model_on_noisy_gradients() -> None:
    """What averaging is for: SGD at a constant rate hovers about the minimum."""
    torch.manual_seed(0)
    p = Parameter(torch.zeros(1000))
    ours = fusedopt.SGD([p], lr=0.3, ema_decay=0.99, ema_warmup=True)
    for _ in range(300):
        p.grad = p.detach() - 1 + torch.randn(1000)
        ours.step()
    own = (p.detach() - 1).norm().item()
    with ours.swap_ema():
        averaged = (p.detach() - 1).norm().item()
    assert averaged < own / 3


def test_parameter_without_an_update_keeps_its_value_in_the_swap() -> None:
    params = make_params([(3,), (4,)])
    ours = fusedopt.SGD(params, lr=0.1, **EMA)
    with ours.swap_ema():
        pass
    set_grads(params, 0, lambda _, i: i == 0)
    ours.step()
    untouched = params[1].detach().clone()
    with ours.swap_ema():
        assert torch.equal(params[1], untouched)


def test_misuse_of_the_swap_is_an_error() -> None:
    params = make_params()
    ours = fusedopt.SGD(params, lr=0.1)
    with pytest.raises(RuntimeError, match="ema_decay"), ours.swap_ema():
        pass
    ours.ema_decay = 0.9
    set_grads(params, 0)
    ours.step()
    checkpoint = ours.state_dict()
    with ours.swap_ema():
        for misuse in (
            ours.step,
            ours.accumulate,
            lambda: ours.load_state_dict(checkpoint),
            lambda: ours.swap_ema().__enter__(),
        ):
            with nothing_written(ours), pytest.raises(RuntimeError, match="swap_ema"):
                misuse()


def test_swap_gives_back_when_a_parameter_was_exchanged() -> None:
    params = make_params([(3,), (4,)])
    ours = trained(Case("SGD", {"lr": 0.1}), params, **EMA)
    with nothing_written(ours), ours.swap_ema():
        params[0].data = torch.zeros(5)
    set_grads(params, SETTLED)
    ours.step()


@needs_host_memory
def test_swap_gives_back_whatever_became_of_the_parameters() -> None:
    """Each its own memory, also where they share it; and those without an average, too."""
    params = make_params([(4,), (3,), (2,), (5,)])
    ours = trained(Case("SGD", {"lr": 0.1}), params[:3], **EMA)
    ours.add_param_group({"params": params[3:]})
    with torch.no_grad():
        params[2].data = params[0].data[1:3]
    before, places = [p.detach().clone() for p in params], [p.data_ptr() for p in params]
    with ours.swap_ema():
        params[0].data = params[0].data.double()
        with torch.inference_mode():
            params[1].data = torch.zeros(3)
        params[2].data = torch.zeros(7)
        with torch.no_grad():
            params[3].zero_()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    assert [p.data_ptr() for p in params] == places
    assert not any(p.is_inference() for p in params)


def test_an_average_of_another_shape_is_not_broadcast() -> None:
    params = make_params([(3,), (4,)])
    ours = trained(Case("SGD", {"lr": 0.1}), params, **EMA)
    ours.state[params[1]]["ema"] = torch.zeros(())
    with (
        nothing_written(ours),
        pytest.raises(ValueError, match="parameter 1 of group 0 has the sh"),
    ):
        ours.swap_ema().__enter__()
    ours.state[params[1]]["ema"] = torch.zeros(4)
    with ours.swap_ema():
        pass


def test_average_begins_anew_when_it_was_switched_off() -> None:
    params = make_params([(3,)])
    ours = trained(Case("SGD", {"lr": 0.1}), params, **EMA)
    ours.ema_decay = None
    assert "ema" not in ours.state[params[0]]


def test_ema_survives_checkpoints_and_copies() -> None:
    params = make_params()
    ours = trained(Case("AdamW", {"lr": 0.1}), params, **EMA)
    copies = copy.deepcopy((ours, params))
    resumed_params = [Parameter(p.detach().clone()) for p in params]
    resumed = fusedopt.AdamW(resumed_params, lr=0.1, **EMA)
    resumed.load_state_dict(copy.deepcopy(ours.state_dict()))
    for optimizer, own in ((ours, params), copies, (resumed, resumed_params)):
        set_grads(own, SETTLED)
        optimizer.step()
    for optimizer, own in (copies, (resumed, resumed_params)):
        for p, q in zip(params, own, strict=True):
            torch.testing.assert_close(ours.state[p], optimizer.state[q], rtol=0, atol=0)


def test_model_evaluates_with_its_averages() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    ours = fusedopt.AdamW(model.parameters(), lr=0.1, ema_decay=0.8)
    reference = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.8)
    )
    reference.update_parameters(model)  # the first is a copy
    x = torch.randn(5, 3)
    for _ in range(10):
        ours.zero_grad()
        model(x).square().mean().backward()
        ours.step()
        reference.update_parameters(model)
    with ours.swap_ema(), torch.no_grad():
        torch.testing.assert_close(model(x), reference(x))


# --- Proximal L1 ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@every_class
def test_l1_is_soft_thresholding_after_the_rule(case: Case, dtype: torch.dtype) -> None:
    params = make_params(dtype=dtype)
    ours, recipe = case.ours(params, l1=0.5), Recipe(case, params, dtype=dtype, l1=0.5)
    for step in range(10):
        set_grads(params, step)
        recipe.step([[p.grad for p in params]])
        ours.step()
        torch.testing.assert_close(params, recipe.params)
    zeros = sum(int((p == 0).sum()) for p in params)
    assert zeros == sum(int((p == 0).sum()) for p in recipe.params)


def test_l1_finds_the_sparse_solution() -> None:
    """Of least squares with an orthonormal design the solution is known: soft thresholding."""
    torch.manual_seed(0)
    target = torch.randn(500) * torch.logspace(-2, 0, 500)
    p = Parameter(torch.zeros(500))
    ours = fusedopt.SGD([p], lr=0.1, l1=0.2, max_grad_norm=100.0)
    for _ in range(200):
        p.grad = p.detach() - target
        ours.step()
    expected = target.sign() * (target.abs() - 0.2).clamp_min(0)
    torch.testing.assert_close(p.detach(), expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(p == 0, expected == 0)


def test_l1_of_a_group_wins() -> None:
    params = make_params([(50,), (50,)])
    ours = fusedopt.SGD([{"params": params[:1]}, {"params": params[1:], "l1": 0.0}], lr=0.1, l1=1e3)
    expected = params[1].detach().clone()
    for p in params:
        p.grad = torch.zeros_like(p)
    ours.step()
    assert not params[0].any()
    assert torch.equal(params[1], expected)
    ours.param_groups[1]["l1"] = -1.0
    with nothing_written(ours), pytest.raises(ValueError, match="param group 1: l1"):
        ours.step()


def test_l1_keeps_nan_and_follows_the_schedule() -> None:
    p = Parameter(torch.tensor([1.0, -1.0, math.nan, math.inf, 0.05]))
    ours = fusedopt.SGD([p], lr=0.1, l1=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(ours, lambda step: 0.5**step)
    for _ in range(2):
        p.grad = torch.zeros_like(p)
        ours.step()
        schedule.step()
    expected = torch.tensor([0.85, -0.85, math.nan, math.inf, 0.0])
    torch.testing.assert_close(p.detach(), expected, equal_nan=True)


def test_an_average_that_no_step_follows_is_dropped() -> None:
    """Loaded without ema_decay it waits for the option, but not longer than to the next step."""
    params = make_params([(5,)])
    saved = trained(Case("AdamW", {}), params, **EMA).state_dict()
    average = saved["state"][0]["ema"]
    for late in (False, True):
        ours = fusedopt.AdamW(params)
        ours.load_state_dict(copy.deepcopy(saved))
        torch.testing.assert_close(ours.state[params[0]]["ema"], average, rtol=0, atol=0)
        if late:
            set_grads(params, 0)
            ours.step()
            assert "ema" not in ours.state[params[0]]
        ours.ema_decay = 0.5
        before = params[0].detach().clone()
        set_grads(params, 1)
        ours.step()
        expected = (before if late else average).lerp(params[0].detach(), 0.5)
        torch.testing.assert_close(ours.state[params[0]]["ema"], expected)
