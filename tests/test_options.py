"""The options as a user meets them: wrong values, wrong combinations, right ones."""

from __future__ import annotations

import copy
import functools
import inspect
import math
import pickle
from typing import Any

import pytest
import torch
from helpers import (
    CLASSES,
    DEVICE,
    every_class,
    make_params,
    needs_sparse,
    nothing_written,
    on_cpu,
    params_of,
    set_grads,
    table,
)
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch.nn import Parameter

import fusedopt
from fusedopt.cases import Case
from fusedopt.options import ARGUMENTS, CARRIED, OPTIONS
from fusedopt.recipe import Recipe, whole

WRONG: dict[str, dict[str, list[Any]]] = {
    "max_grad_norm": {"ValueError": [0, -1.0, math.nan], "TypeError": ["1", True, [1.0]]},
    "grad_norm_type": {"ValueError": [1.0, 3, math.nan, -math.inf], "TypeError": [None, "2"]},
    "max_grad_value": {"ValueError": [0.0, -0.5, math.nan], "TypeError": ["x", False]},
    "nonfinite": {"ValueError": ["ignore", None, True]},
    "weight_precision": {"ValueError": ["fp32", None, 1]},
    "state_dtype": {"ValueError": [torch.float16, torch.int8, "8bit", torch.float64]},
    "ema_decay": {"ValueError": [1.0, -0.1, math.nan, 2], "TypeError": ["0.9", True]},
    "ema_warmup": {"TypeError": [1, None, "yes"]},
    "l1": {"ValueError": [-1e-3, math.nan, math.inf], "TypeError": [None, "0", True]},
    "grad_divisor": {"ValueError": [0, -1, math.inf, math.nan], "TypeError": ["4", True]},
}
ROWS = [
    (name, value, error)
    for name, errors in WRONG.items()
    for error, values in errors.items()
    for value in values
]


def test_every_option_has_wrong_values() -> None:
    assert WRONG.keys() == OPTIONS.keys()


@pytest.mark.parametrize(("name", "value", "error"), ROWS, ids=str)
def test_wrong_value_is_an_error_that_names_it(name: str, value: Any, error: str) -> None:
    kind = {"ValueError": ValueError, "TypeError": TypeError}[error]
    if name in ARGUMENTS:
        with pytest.raises(kind, match=name):
            fusedopt.AdamW(make_params(), **{name: value})
    ours = fusedopt.AdamW(make_params())
    before = getattr(ours, name)
    with pytest.raises(kind, match=name):
        setattr(ours, name, value)
    assert getattr(ours, name) == before


HALF = [Parameter(torch.ones(3, dtype=torch.float16))]
COMPLEX = [Parameter(torch.ones(3, dtype=torch.complex64))]
REAL = [Parameter(torch.ones(3))]
ON_CPU = on_cpu(REAL)
PAIRS: dict[str, tuple[str, Any, dict[str, Any], list[str]]] = {
    "two_clips": ("SGD", REAL, {"max_grad_norm": 1.0, "max_grad_value": 1.0},
                  ["max_grad_norm", "max_grad_value"]),
    "warmup_of_nothing": ("SGD", REAL, {"ema_warmup": True}, ["ema_warmup", "ema_decay"]),
    "remainder_of_float16": ("SGD", HALF, {"weight_precision": "remainder"},
                             ["weight_precision", "float16"]),
    "centered_bfloat16": ("RMSprop", REAL, {"centered": True, "state_dtype": torch.bfloat16},
                          ["centered", "state_dtype"]),
    "centered_8_bits": ("RMSprop", REAL, {"centered": True, "state_dtype": torch.uint8},
                        ["centered", "state_dtype"]),
    "complex_value": ("SGD", COMPLEX, {"max_grad_value": 1.0}, ["max_grad_value", "complex"]),
    "complex_l1": ("SGD", COMPLEX, {"l1": 1.0}, ["l1", "complex"]),
    "complex_inf_norm": ("SGD", COMPLEX, {"max_grad_norm": 1.0, "grad_norm_type": math.inf},
                         ["grad_norm_type", "complex"]),
    "complex_8_bits": ("Adam", COMPLEX, {"state_dtype": torch.uint8}, ["state_dtype", "complex"]),
    "complex_bfloat16": ("Adam", COMPLEX, {"state_dtype": torch.bfloat16},
                         ["state_dtype", "complex"]),
    "amsgrad_8_bits": ("Adam", REAL, {"amsgrad": True, "state_dtype": torch.uint8},
                       ["state_dtype", "amsgrad"]),
    "capturable": ("Adam", ON_CPU, {"capturable": True, "l1": 0.5}, ["l1", "capturable"]),
    "differentiable": ("Adam", REAL, {"differentiable": True, "ema_decay": 0.9},
                       ["differentiable", "ema_decay"]),
}  # fmt: skip


@table("pair", PAIRS)
def test_wrong_combination_names_both(pair: tuple[str, Any, dict[str, Any], list[str]]) -> None:
    name, params, options, words = pair
    cls = getattr(fusedopt, name)
    with pytest.raises(ValueError, match=words[0]) as error:
        cls(params, **options)
    assert all(word in str(error.value) for word in words)

    # The same when the option is set later, or the group comes later; and nothing has changed.
    ours_only = {k: v for k, v in options.items() if k in OPTIONS}
    stock_only = {k: v for k, v in options.items() if k not in OPTIONS}
    if len(ours_only) == 1:
        ours = cls(params, **stock_only)
        (option, value), *_ = ours_only.items()
        before = getattr(ours, option)
        with pytest.raises(ValueError, match=words[0]):
            setattr(ours, option, value)
        assert getattr(ours, option) == before
    if params[0].dtype != torch.float32:
        ours = cls([Parameter(torch.ones(2))], **options)
        with pytest.raises(ValueError, match=words[0]):
            ours.add_param_group({"params": params})
        assert len(ours.param_groups) == 1


@table(
    "param",
    {
        "sparse": pytest.param(
            lambda: torch.sparse_coo_tensor([[0]], [1.0], (3,), check_invariants=True),
            marks=needs_sparse,
        ),
        "wrapper": None,
    },
)
@pytest.mark.parametrize(
    "name", [name for name in ARGUMENTS if name not in ("grad_norm_type", "ema_warmup")]
)  # those two mean nothing alone
def test_what_torch_would_have_to_take_is_refused(name: str, param: Any) -> None:
    """The stock implementation knows nothing of our options: an error, not a silent loss."""
    value = {
        "nonfinite": "skip", "weight_precision": "master", "state_dtype": torch.bfloat16,
    }.get(name, 0.5)  # fmt: skip
    ours = fusedopt.Adagrad([torch.nn.Parameter(torch.ones(3))], **{name: value})
    p = params_of(ours)[0]
    if param is None:
        ours.param_groups[0]["differentiable"] = True
        p.grad = torch.ones(3)
    else:
        p.grad = param()
    with nothing_written(ours), pytest.raises(RuntimeError, match=rf"parameter 0.*{name}"):
        ours.step()


# --- Options that groups carry --------------------------------------------------------------------

SOME = {
    "max_grad_norm": 0.5, "grad_norm_type": math.inf, "max_grad_value": 0.5, "nonfinite": "skip",
    "weight_precision": "master", "state_dtype": torch.bfloat16, "ema_decay": 0.5,
    "ema_warmup": True, "grad_divisor": 2.0,
}  # fmt: skip


def carrying(n: int, **options: Any) -> list[dict[str, Any]]:
    """Groups, of which the first n carry these options."""
    groups = [{"params": [p]} for p in make_params()]
    for group in groups[:n]:
        group.update(options)
    return groups


def test_some_is_all_that_groups_may_carry() -> None:
    assert SOME.keys() == CARRIED == OPTIONS.keys() - {"l1"}


@pytest.mark.parametrize("name", sorted(SOME.keys() - {"ema_warmup"}))
@pytest.mark.parametrize("n", [1, 2, 3])
def test_option_in_some_groups_is_refused(name: str, n: int) -> None:
    """It would be of all."""
    with pytest.raises(ValueError, match=rf"param group {n} has no {name}.*one for all groups"):
        fusedopt.SGD(carrying(n, **{name: SOME[name]}), lr=0.1)


@pytest.mark.parametrize("name", SOME)
def test_option_in_all_groups_is_the_optimizers(name: str) -> None:
    """As wrappers that keep an optimizer's arguments in its groups have it."""
    options = {**({"ema_decay": 0.5} if name == "ema_warmup" else {}), name: SOME[name]}
    carried = fusedopt.SGD(carrying(4, **options), lr=0.1)
    told = fusedopt.SGD(carrying(0), lr=0.1)
    for option, value in options.items():
        setattr(told, option, value)
        assert getattr(carried, option) == value
    for step in range(4):
        for optimizer in (carried, told):
            torch.manual_seed(step)
            set_grads(params_of(optimizer), step)
            optimizer.step()
    torch.testing.assert_close(params_of(carried), params_of(told), rtol=0, atol=0)


def test_option_in_groups_that_differ_is_refused() -> None:
    groups = carrying(4, max_grad_norm=1.0)
    groups[2]["max_grad_norm"] = 2.0
    with pytest.raises(ValueError, match=r"group 2.*max_grad_norm=2\.0.*1\.0"):
        fusedopt.SGD(groups, lr=0.1)
    with pytest.raises(ValueError, match=r"group 0.*max_grad_norm=1\.0.*3\.0"):
        fusedopt.SGD(carrying(4, max_grad_norm=1.0), lr=0.1, max_grad_norm=3.0)
    with pytest.raises(ValueError, match="max_grad_norm must be positive"):
        fusedopt.SGD(carrying(4, max_grad_norm=-1.0), lr=0.1)


def test_group_that_is_added_may_carry_the_same() -> None:
    ours = fusedopt.SGD(carrying(0)[:2], lr=0.1, max_grad_norm=1.0)
    ours.add_param_group({"params": make_params()[2:3], "max_grad_norm": 1.0})
    with pytest.raises(ValueError, match=r"group 3.*max_grad_norm=2\.0"):
        ours.add_param_group({"params": make_params()[3:], "max_grad_norm": 2.0})
    assert len(ours.param_groups) == 3


def test_option_changes_in_groups_that_carry_it_by_the_attribute() -> None:
    ours = fusedopt.SGD(carrying(4, max_grad_norm=1.0), lr=0.1)
    for step in range(4):
        set_grads(params_of(ours), step)
        ours.step()
        ours.max_grad_norm = 2.0 + step
        assert {group["max_grad_norm"] for group in ours.param_groups} == {2.0 + step}
    # By hand in a group: one would be obeyed, and nobody could tell which.
    ours.param_groups[1]["max_grad_norm"] = 7.0
    set_grads(params_of(ours), 4)
    with nothing_written(ours), pytest.raises(ValueError, match=r"group 1.*7\.0.*5\.0"):
        ours.step()
    with pytest.raises(ValueError, match="must be positive"):
        ours.max_grad_norm = 0.0
    assert ours.max_grad_norm == 5.0
    assert ours.param_groups[0]["max_grad_norm"] == 5.0
    ours.param_groups[1]["max_grad_norm"] = 5.0
    ours.step()
    # In place of another key, so that there are as many.
    del ours.param_groups[2]["max_grad_norm"], ours.param_groups[2]["differentiable"]
    ours.param_groups[2].update(max_grad_norm=7.0, differentiable=False)
    with nothing_written(ours), pytest.raises(ValueError, match="group 2"):
        ours.step()


# --- Numbers that no step can use -----------------------------------------------------------------


@pytest.mark.parametrize("betas", [(0.9, 0.999, 0.9), [0.9, 0.999, 0.9]], ids=str)
def test_betas_that_are_three_are_refused_at_once(betas: Any) -> None:
    with pytest.raises(ValueError, match="betas must be two numbers"):
        fusedopt.Adam(make_params(), betas=betas)
    ours = fusedopt.Adam(make_params())
    with pytest.raises(ValueError, match="betas must be two numbers"):
        ours.add_param_group({"params": [Parameter(torch.ones(1))], "betas": betas})


BAD_NUMBERS: dict[str, tuple[str, str, Any]] = {
    "betas.0": ("Adam", "betas", (1.0, 0.9)),
    "betas.1": ("AdamW", "betas", (0.9, 1.0)),
    "betas.negative": ("Adam", "betas", (-0.1, 0.9)),
    "betas.nan": ("Adam", "betas", (math.nan, 0.9)),
    "betas.three": ("Adam", "betas", (0.9, 0.99, 0.999)),
    "betas.tensor": ("Adam", "betas", (0.9, torch.tensor(1.0, device="cpu"))),
    "lr": ("RMSprop", "lr", math.nan),
    "momentum": ("SGD", "momentum", math.nan),
    "eps": ("Adagrad", "eps", math.nan),
}


@table("bad", BAD_NUMBERS)
@pytest.mark.parametrize("steps", [0, 3])
def test_numbers_set_in_mid_run_that_no_step_can_use(bad: tuple[str, str, Any], steps: int) -> None:
    name, key, value = bad
    ours = getattr(fusedopt, name)(make_params())
    for step in range(steps + 1):
        set_grads(params_of(ours), step)
        if step < steps:
            ours.step()
    before = ours.param_groups[0][key]
    ours.param_groups[0][key] = value
    with nothing_written(ours), pytest.raises(ValueError, match=f"param group 0: {key} must be"):
        ours.step()
    ours.param_groups[0][key] = before
    ours.step()


def test_checkpoint_whose_groups_do_not_fit_the_options_is_refused() -> None:
    saved = fusedopt.RMSprop(make_params(), centered=True).state_dict()
    with pytest.raises(ValueError, match="centered"):
        fusedopt.RMSprop(make_params(), state_dtype=torch.uint8).load_state_dict(saved)


def test_setting_an_option_does_not_make_the_next_step_look_at_all_again() -> None:
    """As it does when the state is asked for."""
    ours = fusedopt.AdamW(make_params())
    for step in range(4):
        set_grads(params_of(ours), step)
        ours.step()
        ours.grad_divisor, ours.max_grad_norm = 1.0 + step, 1.0 + step
        assert "_state_seen" in vars(ours)


def test_signature_and_documentation_tell_the_options() -> None:
    for case in CLASSES:
        cls = getattr(fusedopt, case.name)
        parameters = inspect.signature(cls).parameters
        for name in ARGUMENTS:
            assert parameters[name].kind == inspect.Parameter.KEYWORD_ONLY
            assert parameters[name].default == OPTIONS[name].default
        assert next(iter(parameters)) == "params"
    for name in ARGUMENTS:
        assert f"{name}:" in fusedopt.optimizer.FusedOptimizer.__doc__
    with pytest.raises(TypeError):
        fusedopt.AdamW(make_params(), max_norm=1.0)


def test_subclass_with_a_constructor_keeps_its_own_signature() -> None:
    class Mine(fusedopt.AdamW):
        def __init__(self, params: Any, warm: int = 3) -> None:
            super().__init__(params, max_grad_norm=1.0)

    assert list(inspect.signature(Mine).parameters) == ["params", "warm"]
    assert Mine(make_params()).max_grad_norm == 1.0


@every_class
def test_options_survive_copies(case: Case) -> None:
    options = {
        "max_grad_norm": 0.5, "nonfinite": "skip", "ema_decay": 0.9, "ema_warmup": True, "l1": 0.1,
        "weight_precision": "kahan", "state_dtype": torch.float32,
    }  # fmt: skip
    ours = case.ours(make_params(), **options)
    ours.grad_divisor = 3.0
    set_grads(params_of(ours), 0)
    params_of(ours)[0].grad.fill_(math.inf)
    ours.step()
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        for name, value in {**options, "grad_divisor": 3.0}.items():
            assert getattr(other, name) == value
        assert other.skipped_steps == 1
        assert other.grad_norm == math.inf
        set_grads(params_of(other), 1)
        other.step()
        assert 0 < other.grad_norm < math.inf
    assert not OPTIONS.keys() & ours.state_dict().keys()
    assert not OPTIONS.keys() & ours.state_dict()["param_groups"][0].keys()


def test_options_that_are_off_leave_no_trace() -> None:
    ours = fusedopt.AdamW(make_params())
    set_grads(params_of(ours), 0)
    ours.step()
    assert set(ours.state[params_of(ours)[0]]) == {"step", "exp_avg", "exp_avg_sq"}


# --- All together ---------------------------------------------------------------------------------

OPTION_SETS = st.fixed_dictionaries(
    {},
    optional={
        "max_grad_norm": st.sampled_from([0.3, 5.0, math.inf]),
        "grad_norm_type": st.sampled_from([2.0, math.inf]),
        "max_grad_value": st.sampled_from([0.2, 2.0]),
        "nonfinite": st.sampled_from(["propagate", "skip"]),
        "ema_decay": st.sampled_from([0.5, 0.99]),
        "ema_warmup": st.booleans(),
        "l1": st.sampled_from([0.0, 0.05]),
    },
)
PRECISE = {  # what is compared with float64 arithmetic, and how closely
    torch.float32: [(None, "nearest", 2e-4)],
    torch.float64: [(None, "nearest", 1e-10)],
    torch.bfloat16: [(None, "master", 2e-4), (None, "remainder", 2e-4), (None, "kahan", 3e-4),
                     (None, "stochastic", 0.2), (torch.bfloat16, "remainder", 0.2),
                     (torch.uint8, "remainder", 0.7), (None, "nearest", 0.2)],
    torch.float16: [(None, "master", 2e-4), (None, "kahan", 3e-4), (torch.uint8, "kahan", 0.7)],
}  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_combination_equals_its_recipe(data: st.DataObject) -> None:
    """Clip, accumulate, scale, skip, round, average, shrink: whatever is asked for together."""
    torch.manual_seed(0)
    case = data.draw(st.sampled_from(CLASSES))
    options = data.draw(OPTION_SETS)
    assume(not {"max_grad_norm", "max_grad_value"} <= options.keys())
    assume("ema_decay" in options or not options.get("ema_warmup"))
    dtype = data.draw(st.sampled_from(list(PRECISE)))
    state_dtype, precision, tolerance = data.draw(st.sampled_from(PRECISE[dtype]))
    coarse = {"state_dtype": state_dtype, "weight_precision": precision}
    if case.name == "RMSprop":
        # Its first steps divide by the root of a difference: too sensitive to compare.
        case = Case("RMSprop", {"lr": 0.01, "momentum": 0.9, "eps": 0.1})
    if case.name in ("Adam", "AdamW"):
        case = Case(case.name, {**case.options, "eps": 0.1})
    scale = data.draw(st.sampled_from([None, 4.0, 1024.0]))

    params = make_params([(7, 5), (600,), ()], dtype)
    ours, recipe = case.ours(params, **options, **coarse), Recipe(case, params, **options)
    generator = torch.Generator("cpu").manual_seed(data.draw(st.integers(0, 1000)))
    draw = functools.partial(torch.randint, generator=generator, device="cpu")
    for step in range(data.draw(st.integers(1, 5))):
        batches = []
        n = data.draw(st.integers(1, 3))
        folded = data.draw(st.booleans())
        spoilt = options.get("nonfinite") == "skip" and data.draw(st.booleans())
        for k in range(n):
            # Powers of two, exact in every dtype, also scaled.
            grads = [
                (draw(-6, 3, p.shape).double().exp2() * (draw(0, 2, p.shape) * 2 - 1)).to(DEVICE)
                for p in params
            ]
            if spoilt and k == 0:
                grads[step % 3].view(-1)[-1] = math.nan
            missing = int(draw(0, 6, ()))
            batches.append([None if i == missing else g for i, g in enumerate(grads)])
            for p, g in zip(params, batches[-1], strict=True):
                p.grad = None if g is None else (g * (scale or 1)).to(dtype)
            if k < n - 1 or not folded:
                ours.accumulate()
        if scale is not None:
            ours.grad_scale, ours.found_inf = torch.tensor(scale), torch.tensor(0.0)
        # With all of them frozen out, the last micro-batch still counts when it was accumulated.
        folds = folded and any(p.grad is not None for p in params)
        ours.step()
        if scale is not None:
            del ours.grad_scale, ours.found_inf
        recipe.step(batches, n if folds or not folded else n - 1)
        if not math.isnan(recipe.norm):
            assert ours.grad_norm.item() == pytest.approx(recipe.norm, rel=1e-5)

    assert ours.skipped_steps == recipe.skipped
    for i, (p, q) in enumerate(zip(params, recipe.params, strict=True)):
        mine, exact = whole(ours, p).double(), q.detach()
        torch.testing.assert_close(mine, exact, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(p.detach(), whole(ours, p).to(dtype), rtol=0, atol=0)
        if "ema_decay" in options and "ema" in ours.state[p]:
            average = ours.state[p]["ema"].double()
            torch.testing.assert_close(average, recipe.ema[i], rtol=tolerance, atol=tolerance)


def test_printing_shows_what_is_in_use() -> None:
    params = [torch.nn.Parameter(torch.ones(3))]
    plain = repr(fusedopt.AdamW(params))
    assert plain == repr(torch.optim.AdamW(params))
    optimizer = fusedopt.AdamW(params, max_grad_norm=1.0, state_dtype=torch.bfloat16)
    assert repr(optimizer) == plain[:-1] + "max_grad_norm=1.0\nstate_dtype=torch.bfloat16\n)"
