"""Checkpoints: nothing is lost without a word, and what is refused changes nothing."""

from __future__ import annotations

import copy
import math
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    CLASSES,
    SETTLED,
    Twins,
    classes,
    every_class,
    make_params,
    needs_host_memory,
    needs_sparse,
    not_on_fake,
    nothing_written,
    params_of,
    set_grads,
    table,
    through_a_file,
)
from torch import Tensor
from torch.nn import Parameter
from torch.utils import _pytree as pytree

import fusedopt
from fusedopt.cases import Case
from fusedopt.options import RECORD

BF16 = torch.bfloat16
COARSE = (BF16, torch.uint8)


def train(optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        set_grads(params_of(optimizer), step)
        optimizer.step()


def same(one: Any, other: Any) -> None:
    (mine, spec), (theirs, other_spec) = pytree.tree_flatten(one), pytree.tree_flatten(other)
    assert spec == other_spec
    for a, b in zip(mine, theirs, strict=True):
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        else:
            assert a == b


def attributes(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """All that a checkpoint could change, but for what the extension remembers."""
    own = {**vars(optimizer), "state": vars(optimizer)["state"]}
    return {n: v for n, v in own.items() if n not in ("_stepper", "_state_seen", "_configured")}


# --- The options of the step ----------------------------------------------------------------------

OPTION_SETS: dict[str, dict[str, Any]] = {
    "master": {"weight_precision": "master", "ema_decay": 0.9},
    "remainder": {"weight_precision": "remainder", "ema_decay": 0.9, "ema_warmup": True},
    "kahan": {"weight_precision": "kahan", "max_grad_norm": 0.5, "nonfinite": "skip"},
    "stochastic": {"weight_precision": "stochastic", "max_grad_value": 0.1},
    "bf16_state": {"weight_precision": "remainder", "state_dtype": BF16},
    "8_bit_state": {"weight_precision": "remainder", "state_dtype": torch.uint8, "l1": 1e-3},
    "inf_norm": {"max_grad_norm": 0.5, "grad_norm_type": math.inf, "nonfinite": "raise"},
}


def fits(case: Case, options: dict[str, Any]) -> bool:
    return not (case.options.get("centered") and options.get("state_dtype") in COARSE)


@table("options", OPTION_SETS)
@every_class
def test_options_come_with_the_checkpoint(case: Case, options: dict[str, Any]) -> None:
    """A constructor that was not told them goes on with the same bits."""
    if not fits(case, options):
        options = {**options, "state_dtype": torch.float32}
    ours = case.ours(make_params(dtype=BF16), **options)
    train(ours, range(3))
    params = copy.deepcopy(params_of(ours))
    saved = through_a_file(ours.state_dict())
    other = case.ours(params)
    other.load_state_dict(saved)
    for name, value in options.items():
        assert getattr(other, name) == value
    for optimizer in (ours, other):
        train(optimizer, range(3, 6))
    same(params_of(other), params_of(ours))
    same(other.state_dict(), ours.state_dict())


def test_options_that_are_off_are_not_recorded() -> None:
    ours = fusedopt.AdamW(make_params())
    assert ours.state_dict().keys() == {"state", "param_groups"}
    ours.max_grad_norm = 0.5
    assert ours.state_dict()[RECORD] == {"max_grad_norm": 0.5}
    assert "max_grad_norm" not in ours.state_dict()["param_groups"][0]


@every_class
def test_stock_ignores_the_record(case: Case) -> None:
    twins = Twins(case).step(SETTLED)
    twins.ours.max_grad_norm = 1e9
    saved = twins.ours.state_dict()
    assert RECORD in saved
    twins.stock.load_state_dict(through_a_file(saved))
    twins.step(SETTLED)


def test_what_was_set_counts() -> None:
    saved = fusedopt.SGD(make_params(), max_grad_norm=0.5, nonfinite="skip", l1=0.25).state_dict()
    ours = fusedopt.SGD(make_params(), max_grad_norm=None)
    ours.nonfinite = "raise"
    ours.load_state_dict(saved)
    assert (ours.max_grad_norm, ours.nonfinite, ours.l1) == (None, "raise", 0.25)
    ours.l1 = 0.125  # set now, so the next checkpoint does not change it
    for other in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        other.load_state_dict(saved)
        assert (other.max_grad_norm, other.nonfinite, other.l1) == (None, "raise", 0.125)


def test_each_checkpoint_counts_anew() -> None:
    """Whatever was loaded before it, into this optimizer or into what it is a copy of."""
    first = fusedopt.SGD(make_params(), max_grad_norm=0.5, nonfinite="skip").state_dict()
    second = fusedopt.SGD(make_params(), max_grad_value=0.25).state_dict()
    plain = torch.optim.SGD(make_params()).state_dict()
    ours = fusedopt.SGD(make_params(), ema_decay=0.9)
    ours.load_state_dict(first)
    for other in (ours, copy.deepcopy(ours)):
        other.load_state_dict(second)
        assert other.max_grad_norm is None
        assert (other.max_grad_value, other.nonfinite) == (0.25, "propagate")
        other.load_state_dict(plain)
        assert other.max_grad_value is None
        assert other.ema_decay == 0.9
        train(other, range(2))


@pytest.mark.parametrize(
    ("mine", "saved", "wanted"),
    [
        ({"max_grad_value": 0.5}, {"max_grad_norm": 1.0}, {"max_grad_norm": None}),
        ({"max_grad_norm": 0.5}, {"max_grad_value": 1.0}, {"max_grad_value": None}),
        ({"max_grad_value": None}, {"max_grad_norm": 1.0}, {"max_grad_norm": 1.0}),
        ({"ema_decay": None}, {"ema_decay": 0.9, "ema_warmup": True}, {"ema_warmup": False}),
        ({"ema_decay": 0.5}, {"ema_decay": 0.9, "ema_warmup": True}, {"ema_warmup": True}),
    ],
)
def test_what_does_not_go_with_what_was_set_is_left(
    mine: dict[str, Any], saved: dict[str, Any], wanted: dict[str, Any]
) -> None:
    ours = fusedopt.SGD(make_params(), **mine)
    ours.load_state_dict(fusedopt.SGD(make_params(), **saved).state_dict())
    for name, value in {**mine, **wanted}.items():
        assert getattr(ours, name) == value


def checkpoint(**options: Any) -> dict[str, Any]:
    ours = fusedopt.AdamW(make_params(dtype=BF16), **options)
    train(ours, range(2))
    return through_a_file(ours.state_dict())


@pytest.mark.parametrize("name", ["master", "remainder", "kahan"])
def test_hidden_part_that_is_dropped_is_told(name: str) -> None:
    saved = checkpoint(weight_precision=name)
    ours = fusedopt.AdamW(make_params(dtype=BF16), weight_precision="nearest")
    with pytest.warns(UserWarning, match=rf"state\['{name}'\] of 4 param.*'nearest'") as caught:
        ours.load_state_dict(saved)
    assert [w.filename for w in caught] == [__file__]
    assert all(name not in state for state in ours.state.values())


def test_everything_that_is_dropped_is_told_at_once() -> None:
    saved = checkpoint(weight_precision="remainder", ema_decay=0.9)
    ours = fusedopt.AdamW(make_params(dtype=BF16), weight_precision="stochastic", ema_decay=None)
    with pytest.warns(
        UserWarning, match=r"remainder.*ema.*ema_decay is None.*stochastic"
    ) as caught:
        ours.load_state_dict(saved)
    assert len(caught) == 1
    assert all("ema" in state for state in ours.state.values())  # until a step: it may yet be set
    train(ours, range(1))
    assert all("ema" not in state for state in ours.state.values())


def test_float32_weights_have_no_place_for_a_remainder() -> None:
    saved = checkpoint(weight_precision="remainder")
    ours = fusedopt.AdamW(make_params())
    with pytest.warns(UserWarning, match=r"state\['remainder'\] of 4"):
        ours.load_state_dict(saved)


def test_bits_that_another_library_has_cast_are_told() -> None:
    saved = checkpoint(weight_precision="remainder")
    for state in saved["state"].values():
        state["remainder"] = state["remainder"].bfloat16()
    ours = fusedopt.AdamW(make_params(dtype=BF16))
    with pytest.warns(UserWarning, match=r"state\['remainder'\] of 4"):
        ours.load_state_dict(saved)
    train(ours, range(2))


def test_state_without_a_record() -> None:
    """What has copied state and groups alone: hidden parts tell how weights were kept."""
    for name in ("master", "remainder", "kahan"):
        saved = checkpoint(weight_precision=name)
        del saved[RECORD]
        ours = fusedopt.AdamW(make_params(dtype=BF16))
        ours.load_state_dict(saved)
        assert ours.weight_precision == name
    saved = checkpoint(ema_decay=0.9)
    del saved[RECORD]
    with pytest.warns(UserWarning, match=r"state\['ema'\] of 4"):  # but not how slow it was
        fusedopt.AdamW(make_params(dtype=BF16)).load_state_dict(saved)


def test_a_copy_drops_averages_that_lag_behind_too() -> None:
    ours = fusedopt.AdamW(make_params(dtype=BF16), ema_decay=None)
    with pytest.warns(UserWarning, match="ema"):
        ours.load_state_dict(checkpoint(ema_decay=0.9))
    ours = copy.deepcopy(ours)
    train(ours, range(1))
    assert all("ema" not in state for state in ours.state.values())


def test_groups_that_carry_options_are_obeyed() -> None:
    def groups(**options: Any) -> list[dict[str, Any]]:
        return [{"params": [p], **options} for p in make_params()]

    saved = fusedopt.SGD(groups(max_grad_norm=0.5)).state_dict()
    del saved[RECORD]
    ours = fusedopt.SGD(groups())
    ours.load_state_dict(saved)
    assert ours.max_grad_norm == 0.5
    strict = fusedopt.SGD(groups(), max_grad_norm=0.25)
    strict.load_state_dict(saved)
    assert strict.max_grad_norm == 0.25
    assert {group["max_grad_norm"] for group in strict.param_groups} == {0.25}
    for optimizer in (ours, strict):
        train(optimizer, range(2))
    saved["param_groups"][1]["max_grad_norm"] = 0.125
    with pytest.raises(ValueError, match=r"the checkpoint's param group 1.*max_grad_norm"):
        ours.load_state_dict(saved)


def test_a_group_may_lack_what_another_carries() -> None:
    """When the constructor was told, or when it was added later."""
    first, second = make_params()[:2]
    told = fusedopt.SGD([{"params": [first], "max_grad_norm": 1.0}, {"params": [second]}],
                        max_grad_norm=1.0)  # fmt: skip
    added = fusedopt.SGD([{"params": [first], "max_grad_norm": 1.0}])
    added.add_param_group({"params": [second]})
    for ours in (told, added):
        ours.load_state_dict(copy.deepcopy(ours.state_dict()))
        assert ours.max_grad_norm == 1.0
        train(ours, range(2))


@table(
    "option",
    {
        "max_grad_norm": ("max_grad_norm", 1.5, 2.0),
        "nonfinite": ("nonfinite", "skip", "propagate"),
        "grad_divisor": ("grad_divisor", 4.0, 2.0),
    },
)
def test_a_group_that_is_set_back_is_noticed(option: tuple[str, Any, Any]) -> None:
    name, value, other = option
    ours = fusedopt.SGD([{"params": make_params(), name: value}])
    train(ours, range(2))
    setattr(ours, name, other)
    ours.param_groups[0][name] = value
    set_grads(params_of(ours), 2)
    message = re.escape(f"{name}={value!r}, the optimizer {other!r}")
    with nothing_written(ours), pytest.raises(ValueError, match=message):
        ours.step()


# --- Windows --------------------------------------------------------------------------------------


@pytest.mark.parametrize("divisor", [None, 8.0])
@pytest.mark.parametrize("fresh", [False, True])
def test_the_divisor_is_that_of_the_loaded_window(divisor: float | None, fresh: bool) -> None:
    ours = fusedopt.SGD(make_params())
    ours.grad_divisor = divisor
    set_grads(params_of(ours), 0)
    ours.accumulate()
    saved = copy.deepcopy(ours.state_dict())
    assert saved[RECORD].pop("grad_divisor", None) == divisor
    assert saved[RECORD] == {"micro_batches": 1}
    saved = copy.deepcopy(ours.state_dict())
    ours.step()
    if fresh:
        ours = fusedopt.SGD(make_params())
    ours.grad_divisor = 3.0
    ours.load_state_dict(saved)
    assert ours.grad_divisor == divisor


def test_without_a_window_the_divisor_that_was_set_stays() -> None:
    ours, other = fusedopt.SGD(make_params()), fusedopt.SGD(make_params())
    ours.grad_divisor = 8.0
    other.load_state_dict(ours.state_dict())
    assert other.grad_divisor == 8.0
    other.grad_divisor = 3.0
    other.load_state_dict(ours.state_dict())
    assert other.grad_divisor == 3.0


def test_a_first_micro_batch_without_gradients_counts_after_loading() -> None:
    ours, other = fusedopt.SGD(make_params()), fusedopt.SGD(make_params())
    ours.accumulate()
    other.load_state_dict(through_a_file(ours.state_dict()))
    for optimizer in (ours, other):
        train(optimizer, range(1))
    same(params_of(other), params_of(ours))
    alone = fusedopt.SGD(make_params())
    train(alone, range(1))
    assert not torch.equal(params_of(alone)[0], params_of(ours)[0])


def test_a_window_that_stock_has_carried_along_is_over() -> None:
    ours = fusedopt.AdamW(make_params())
    train(ours, range(1))
    ours.accumulate()
    stock = torch.optim.AdamW(make_params())
    stock.load_state_dict(copy.deepcopy(ours.state_dict()))
    train(stock, range(1, 3))
    back, fresh = fusedopt.AdamW(copy.deepcopy(params_of(stock))), copy.deepcopy(stock)
    with pytest.warns(
        UserWarning, match=r"state\['grad_sum'\] of 4 .*a window whose micro-batches"
    ):
        back.load_state_dict(copy.deepcopy(stock.state_dict()))
    for optimizer in (back, fresh):
        train(optimizer, range(3, 4))
    torch.testing.assert_close(params_of(back), params_of(fresh))
    assert "grad_sum" not in back.state[params_of(back)[0]]


# --- Refused checkpoints --------------------------------------------------------------------------


def damaged(**options: Any) -> Callable[[Callable[[dict[str, Any]], Any]], Any]:
    """A good checkpoint of AdamW with these options, and what is done to it."""

    def row(damage: Callable[[dict[str, Any]], Any]) -> tuple[dict[str, Any], Any]:
        return options, damage

    return row


def set_state(name: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda saved: saved["state"][3].update({name: value})


def set_group(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda saved: saved["param_groups"][0].update(values)


def set_record(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda saved: saved.update({RECORD: values})


FLOAT8 = torch.float8_e4m3fn

REFUSED: dict[str, Any] = {
    "shape": (damaged()(set_state("exp_avg", torch.zeros(4))), r"parameter 3 .*exp_avg.*\(4,\)"),
    "sparse": pytest.param(
        (
            damaged()(
                set_state("exp_avg_sq", torch.zeros(2, 3, 2, 2, device="cpu").to_sparse())
            ),
            "parameter 3 .*exp_avg_sq.*dense",
        ),
        marks=needs_sparse,
    ),
    "complex": (
        damaged()(set_state("exp_avg", torch.zeros(2, 3, 2, 2, dtype=torch.complex64))),
        "parameter 3 .*exp_avg.*complex",
    ),
    "no_tensor": (damaged()(set_state("exp_avg", "x")), "parameter 3 .*exp_avg.*dense tensor"),
    "state_is_no_dict": (
        damaged()(lambda saved: saved["state"].update({3: [1.0]})),
        r"state\[3\].*not a dict",
    ),
    "step_of_two": (damaged()(set_state("step", torch.zeros(2))), "parameter 3 .*step"),
    "codes_without_scales": (
        damaged()(set_state("exp_avg", torch.zeros(2, 3, 2, 2, dtype=torch.uint8))),
        "parameter 3 .*exp_avg_scale",
    ),
    "too_few_scales": (
        damaged()(
            lambda saved: saved["state"][3].update(
                exp_avg=torch.zeros(2, 3, 2, 2, dtype=torch.uint8), exp_avg_scale=torch.ones(3)
            )
        ),
        "parameter 3 .*exp_avg_scale",
    ),
    "master": (
        damaged(weight_precision="master")(set_state("master", torch.zeros(5))),
        "parameter 3 .*master",
    ),
    "remainder": (
        damaged(weight_precision="remainder")(
            set_state("remainder", torch.zeros(5, dtype=torch.int16))
        ),
        "parameter 3 .*remainder",
    ),
    "ema": (damaged(ema_decay=0.9)(set_state("ema", torch.zeros(5))), "parameter 3 .*ema"),
    "grad_count": (
        damaged()(set_state("grad_count", torch.zeros(2, dtype=torch.int64))),
        "parameter 3 .*grad_count",
    ),
    "l1": (damaged()(set_group(l1=-1.0)), "l1 of a parameter group"),
    "betas": (damaged()(set_group(betas=(0.9, 0.99, 0.999))), "betas must be two numbers"),
    "differentiable": (damaged(l1=0.1)(set_group(differentiable=True)), "differentiable=True"),
    "capturable": pytest.param(
        (damaged(l1=0.1)(set_group(capturable=True)), "capturable=True"),
        marks=needs_host_memory,  # on a device it goes with the options
    ),
    "amsgrad": (
        damaged(state_dtype=torch.uint8)(set_group(amsgrad=True)),
        r"torch\.uint8.*amsgrad.*came with the checkpoint",
    ),
    "betas_of_one": (damaged()(set_group(betas=(1.0, 0.9))), "betas must be at least 0"),
    "lr_is_nan": (damaged()(set_group(lr=math.nan)), "lr must be a number"),
    "lr_is_none": (damaged()(set_group(lr=None)), "lr is not a number"),
    "eps_is_text": (damaged()(set_group(eps="x")), "eps is not a number"),
    "lacking": (
        damaged()(lambda saved: saved["state"][3].pop("exp_avg_sq")),
        "parameter 3 .*lacks 'exp_avg_sq'",
    ),
    "half_a_window": (
        damaged()(set_state("grad_sum", torch.zeros(2, 3, 2, 2))),
        "parameter 3 .*grad_count",
    ),
    "seed_is_no_tensor": (damaged()(set_state("seed", 3)), "parameter 3 .*seed"),
    "step_is_nan": (damaged()(set_state("step", torch.tensor(math.nan))), "parameter 3 .*count"),
    "step_is_negative": (damaged()(set_state("step", torch.tensor(-1.0))), "parameter 3 .*count"),
    "no_lr": (damaged()(lambda saved: saved["param_groups"][0].pop("lr")), "has no lr"),
    "bad_option": (damaged()(set_record(max_grad_norm=-1.0)), "checkpoint's.*max_grad_norm"),
    "bad_pair": (
        damaged()(set_record(max_grad_norm=1.0, max_grad_value=1.0)),
        "exclude one another.*came with the checkpoint",
    ),
    "no_record": (damaged()(lambda saved: saved.update({RECORD: 3})), "not a dict: 3"),
    "a_group_without_params": (
        damaged()(lambda saved: saved["param_groups"].append({})),
        r"param_groups\[1\].*list 'params'",
    ),
    "a_group_is_a_number": (
        damaged()(lambda saved: saved["param_groups"].append(3)),
        r"param_groups\[1\].*not a dict",
    ),
    "params_is_none": (damaged()(set_group(params=None)), r"param_groups\[0\].*list 'params'"),
    "a_window_of_none": (
        damaged()(lambda saved: saved["state"][3].update(grad_sum=None, grad_count=None)),
        "parameter 3 .*grad_sum.*dense tensor",
    ),
    "too_many_micro_batches": (damaged()(set_record(micro_batches=10**400)), "micro_batches"),
    "float8": (
        damaged()(set_state("exp_avg", torch.zeros(2, 3, 2, 2, device="cpu").to(FLOAT8))),
        "parameter 3 .*exp_avg.*float8",
    ),
    "complex_scales": (
        damaged(state_dtype=torch.uint8)(
            lambda saved: saved["state"][3].update(
                exp_avg=torch.zeros(2, 3, 2, 2, dtype=torch.uint8),
                exp_avg_scale=torch.ones(1, dtype=torch.complex64),
            )
        ),
        "parameter 3 .*exp_avg_scale",
    ),
    "odd_option_names": (damaged()(set_record(**{"max_grad_norm": -1.0, "z": 1})), "max_grad_norm"),
    "sizes": (
        damaged()(lambda saved: saved["param_groups"][0]["params"].pop()),
        "doesn't match the size",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Casting complex")  # torch's, as it casts before we look
@table("refused", REFUSED)
@pytest.mark.parametrize("steps", [0, SETTLED])
def test_refused_checkpoint_changes_nothing(refused: tuple[Any, str], steps: int) -> None:
    (options, damage), message = refused
    saved = checkpoint(**options)
    damage(saved)
    ours, untouched = (fusedopt.AdamW(make_params(dtype=BF16), ema_decay=0.5) for _ in range(2))
    for optimizer in (ours, untouched):
        train(optimizer, range(steps))
        optimizer.accumulate()
    before = attributes(ours)
    contents = copy.deepcopy(before["param_groups"][0])
    with nothing_written(ours), pytest.raises((ValueError, TypeError), match=message):
        ours.load_state_dict(saved)
    after = attributes(ours)
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)
    same(after["param_groups"][0], contents)
    for optimizer in (ours, untouched):
        train(optimizer, range(steps, steps + 2))
    same(params_of(ours), params_of(untouched))
    same(ours.state_dict(), untouched.state_dict())


@pytest.mark.parametrize("wrong", [None, "file.pt", {}, {"state": {}}, {"weight": torch.ones(1)},
                                   {"state": [], "param_groups": []}])  # fmt: skip
def test_what_is_no_optimizers_state_is_told(wrong: Any) -> None:
    ours = fusedopt.AdamW(make_params())
    with pytest.raises(ValueError, match="state_dict is not an optimizer's"):
        ours.load_state_dict(wrong)
    train(ours, range(2))


def test_options_of_a_later_version_are_told() -> None:
    saved = checkpoint()
    saved[RECORD] = {"lookahead": 5, 3: 4}
    ours = fusedopt.AdamW(make_params(dtype=BF16))
    with pytest.warns(UserWarning, match=r"option 3=4 \(unknown\).*lookahead=5 \(unknown\)"):
        ours.load_state_dict(saved)


def test_what_a_users_hook_refuses_changes_nothing() -> None:
    def refuse(_: Any) -> None:
        raise RuntimeError("not this one")

    ours, untouched = (fusedopt.AdamW(make_params(dtype=BF16)) for _ in range(2))
    handle = ours.register_load_state_dict_post_hook(refuse)
    with nothing_written(ours), pytest.raises(RuntimeError, match="not this one"):
        ours.load_state_dict(checkpoint(weight_precision="kahan"))
    handle.remove()
    assert ours.weight_precision == "nearest"
    for optimizer in (ours, untouched):
        train(optimizer, range(3))
    same(params_of(ours), params_of(untouched))


def test_a_users_hook_may_unwrap_the_checkpoint() -> None:
    ours = fusedopt.AdamW(make_params(dtype=BF16))
    handle = ours.register_load_state_dict_pre_hook(lambda _, saved: saved["optimizer"])
    ours.load_state_dict({"optimizer": checkpoint(weight_precision="kahan")})
    assert ours.weight_precision == "kahan"
    with nothing_written(ours), pytest.raises(ValueError, match="state_dict is not an optimizer's"):
        ours.load_state_dict({"optimizer": {}})
    handle.remove()
    with pytest.raises(ValueError, match="state_dict is not an optimizer's"):
        ours.load_state_dict({"optimizer": checkpoint()})


def expanded(value: Tensor) -> Tensor:
    return value.flatten()[0].expand(value.shape)


def gapped(value: Tensor) -> Tensor:
    return torch.stack([value, value], dim=-1)[..., 0]


def reversed_dims(value: Tensor) -> Tensor:
    dims = tuple(reversed(range(value.dim())))
    return value.permute(dims).contiguous().permute(dims)


def negated(value: Tensor) -> Tensor:
    return torch._neg_view(-value) if value.is_floating_point() else value


LAYOUTS = {
    "expanded": expanded, "gapped": gapped, "reversed": reversed_dims, "negated": negated
}  # fmt: skip


@table("layout", LAYOUTS)
@table("options", {"plain": {}, "ema": {"ema_decay": 0.5}, "8_bits": {"state_dtype": torch.uint8}})
def test_state_in_any_layout_is_that_of_its_values(
    layout: Callable[[Tensor], Tensor], options: dict[str, Any]
) -> None:
    shapes = [(60, 40), (5,), ()]  # of several blocks, and of one
    ours, other = (fusedopt.AdamW(make_params(shapes), **options) for _ in range(2))
    train(ours, range(3))
    codes = [copy.deepcopy(ours.state[p]) for p in params_of(ours)]
    saved = ours.state_dict()
    for i, state in enumerate(codes):  # with the codes of 8 bits as they are
        # (Their blocks are in the order of their memory.)
        same = ("step", "seed", *(k for k in state if layout is reversed_dims and "exp" in k))
        keep = same if options.get("state_dtype") == torch.uint8 else ("step", "seed")
        saved["state"][i] = {k: v if k in keep else layout(v) for k, v in state.items()}
    plain = copy.deepcopy(saved)
    for state in plain["state"].values():
        for name, value in state.items():
            state[name] = value.resolve_neg().contiguous()
    saved["state"][0]["exp_avg"].requires_grad_(options == {})
    ours.load_state_dict(saved)
    other.load_state_dict(plain)
    with torch.no_grad():
        for mine, theirs in zip(params_of(ours), params_of(other), strict=True):
            theirs.copy_(mine)
    for optimizer in (ours, other):
        train(optimizer, range(3, 6))
    assert torch.equal(params_of(ours)[0], params_of(other)[0])
    copy.deepcopy(ours.state_dict())


@needs_host_memory
def test_scales_of_another_dtype_are_taken_for_any_state_dtype() -> None:
    ours = fusedopt.AdamW(make_params(), state_dtype=torch.uint8)
    train(ours, range(2))
    saved = ours.state_dict()
    for i, p in enumerate(params_of(ours)):
        saved["state"][i] = {
            k: v.double() if k.endswith("_scale") else v for k, v in ours.state[p].items()
        }
    values = ours.state_dict()["state"][0]["exp_avg"]
    for dtype in (torch.float32, torch.uint8):
        other = fusedopt.AdamW(make_params(), state_dtype=dtype)
        other.load_state_dict(saved)
        torch.testing.assert_close(
            other.state_dict()["state"][0]["exp_avg"].float(), values.float(), rtol=0, atol=0
        )


def test_where_there_are_no_kernels_the_counter_stays_as_stock_has_it() -> None:
    saved = checkpoint()
    made = []
    for cls in (fusedopt.AdamW, torch.optim.AdamW):
        optimizer = cls([Parameter(torch.empty_like(p, device="meta")) for p in make_params()])
        optimizer.load_state_dict(copy.deepcopy(saved))
        made.append([state["step"] for state in optimizer.state.values()])
    same(made[0], made[1])
    assert all(step.device == other.device for step, other in zip(*made, strict=True))


FOREIGN = [
    (mine, other)
    for mine in CLASSES
    for other in CLASSES
    if mine != other
    and not {mine.name, other.name} <= {"Adam", "AdamW"}
    and not {mine.name, other.name} <= {"SGD", "Momentum"}
]


@pytest.mark.parametrize(("mine", "other"), FOREIGN, ids=lambda case: case.name)
def test_checkpoint_of_another_rule_is_named(mine: Case, other: Case) -> None:
    saved = other.stock(make_params()).state_dict()
    ours = mine.ours(make_params())
    train(ours, range(1))
    if mine.name in ("SGD", "Momentum") and other.name == "RMSprop":
        mine_needs = "dampening"
    else:
        mine_needs = {"Adam": "betas", "AdamW": "betas", "RMSprop": "alpha",
                      "Adagrad": "lr_decay"}.get(mine.name, "momentum")  # fmt: skip
    message = rf"has no .*{mine_needs}.*, which {mine.name} needs; it has .*lr"
    with nothing_written(ours), pytest.raises(ValueError, match=message):
        ours.load_state_dict(saved)
    train(ours, range(1, 3))


# --- Counters and what else there may be ----------------------------------------------------------

COUNTERS = [torch.int32, torch.int64, torch.uint8, torch.float16, BF16, torch.float64]


@pytest.mark.parametrize("by_hand", [False, True], ids=["loaded", "by_hand"])
@pytest.mark.parametrize("dtype", COUNTERS, ids=str)
@classes("Adam", "RMSprop", "Adagrad")
def test_counters_of_another_type(case: Case, dtype: torch.dtype, by_hand: bool) -> None:
    twins = Twins(case).step(SETTLED)
    for optimizer in twins:
        saved = copy.deepcopy(optimizer.state_dict())
        for i, state in saved["state"].items():
            state["step"] = state["step"].to(dtype)
            if by_hand:
                optimizer.state[params_of(optimizer)[i]]["step"] = state["step"]
        if not by_hand:
            optimizer.load_state_dict(saved)
    for _ in range(SETTLED):
        twins.set_grads()
        for optimizer in twins:
            optimizer.step()
        for (p, mine), (q, theirs) in zip(
            *([(p, o.state[p]) for p in params_of(o)] for o in twins), strict=True
        ):
            torch.testing.assert_close(p, q)
            assert float(mine["step"]) == float(theirs["step"])
            assert mine["step"].dtype in (torch.float32, torch.float64)


def test_a_counter_that_float32_cannot_hold() -> None:
    """fused=True has torch cast it to float32 on the way."""
    ours = fusedopt.AdamW(make_params(), fused=True)
    train(ours, range(1))
    saved = ours.state_dict()
    for state in saved["state"].values():
        state["step"] = torch.tensor(2.0**24 + 1, dtype=torch.float64)
    ours.load_state_dict(saved)
    train(ours, range(1))
    assert {float(state["step"]) for state in ours.state.values()} == {2.0**24 + 2}


@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_a_complex_counter_is_refused() -> None:
    ours = fusedopt.AdamW(make_params())
    train(ours, range(1))
    for dtype in (torch.complex64, torch.complex32):
        ours.state[params_of(ours)[0]]["step"] = torch.ones((), dtype=dtype)
        set_grads(params_of(ours), 1)
        with nothing_written(ours), pytest.raises((RuntimeError, ValueError), match="step"):
            ours.step()


@every_class
def test_state_of_no_parameter(case: Case) -> None:
    """As stock, which has it in checkpoints and gives it back."""
    twins = Twins(case)
    for optimizer in twins:
        optimizer.state["epoch"] = 1
        optimizer.state["notes"] = {"ema": "of another kind", "grad_count": "none"}
    twins.step(SETTLED)
    for optimizer in twins:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert optimizer.state["epoch"] == 1
        assert optimizer.state["notes"]["ema"] == "of another kind"
    twins.step(SETTLED)
    ours = twins.ours
    ours.ema_decay = 0.9
    train(ours, range(1))
    ours.accumulate()
    ours.zero_grad()
    ours.ema_decay = None
    assert "ema" not in ours.state[params_of(ours)[0]]
    assert ours.state["notes"]["ema"] == "of another kind"


# --- Through what others do with checkpoints ------------------------------------------------------


needs_distributed = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this torch has no distributed"
)


@needs_distributed
def test_distributed_checkpoints_of_hidden_weights(tmp_path: Path) -> None:
    """They take state and groups only, which is enough for the weights."""
    from torch.distributed.checkpoint import state_dict as dcp

    def new(seed: int, **options: Any) -> tuple[torch.nn.Module, Any]:
        torch.manual_seed(seed)
        model = torch.nn.Linear(8, 4, device="cpu").bfloat16()
        return model, fusedopt.AdamW(model.parameters(), lr=1e-4, **options)

    model, ours = new(0, weight_precision="remainder")
    train(ours, range(3))
    saved = dcp.get_state_dict(model, ours)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.save(saved, tmp_path / "file")
        saved = torch.load(tmp_path / "file", weights_only=True)
    other, theirs = new(1, weight_precision="remainder")
    dcp.set_state_dict(other, theirs, model_state_dict=saved[0], optim_state_dict=saved[1])
    for optimizer in (ours, theirs):
        train(optimizer, range(3, 6))
    same(params_of(theirs), params_of(ours))


@needs_distributed
@not_on_fake("no process groups")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.distributed.optim's own
def test_zero_redundancy_optimizer(tmp_path: Path) -> None:
    """It hands an optimizer's arguments to it twice: as arguments, and in the groups."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's own
            zero, back = (
                ZeroRedundancyOptimizer(
                    make_params(), optimizer_class=fusedopt.AdamW, lr=0.01, max_grad_norm=0.5
                )
                for _ in range(2)
            )
        plain = fusedopt.AdamW(make_params(), lr=0.01, max_grad_norm=0.5)
        for step in range(4):
            for optimizer in (zero, plain):
                set_grads(params_of(optimizer), step)
                optimizer.step()
            for group in (*zero.param_groups, *plain.param_groups):
                group["lr"] *= 0.5
        same(params_of(zero), params_of(plain))
        zero.consolidate_state_dict()
        saved = through_a_file(zero.state_dict())
        assert saved["param_groups"][0]["max_grad_norm"] == 0.5
        for p, q in zip(params_of(back), params_of(zero), strict=True):
            p.data.copy_(q)
        back.load_state_dict(saved)
        for optimizer in (back, plain):
            train(optimizer, range(4, 6))
        same(params_of(back), params_of(plain))
        # Its groups are copied into ours before each step: there both have to be changed.
        zero.param_groups[0]["max_grad_norm"] = 2.0
        set_grads(params_of(zero), 4)
        with pytest.raises(ValueError, match=r"max_grad_norm=2\.0.*0\.5"):
            zero.step()
        zero.optim.max_grad_norm = 2.0
        zero.step()
    finally:
        torch.distributed.destroy_process_group()


@needs_distributed
@not_on_fake("no process groups")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_share_of_the_parameters_has_no_norm_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    def of_two(zero: Any, make: Any = ZeroRedundancyOptimizer._init_local_optimizer) -> None:
        zero.world_size = 2
        make(zero)

    monkeypatch.setattr(ZeroRedundancyOptimizer, "_init_local_optimizer", of_two)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1
    )
    try:
        for options in ({"max_grad_norm": 1.0}, {"nonfinite": "skip"}):
            with pytest.warns(UserWarning, match="with 2 processes, clip before"):
                ZeroRedundancyOptimizer(
                    make_params(), optimizer_class=fusedopt.AdamW, lr=0.1, **options
                )
        ZeroRedundancyOptimizer(
            make_params(), optimizer_class=fusedopt.AdamW, lr=0.1, max_grad_value=1.0
        )
    finally:
        torch.distributed.destroy_process_group()


def test_loading_does_not_write_to_the_checkpoint() -> None:
    saved = checkpoint(weight_precision="remainder", state_dtype=torch.uint8)
    before = copy.deepcopy(saved)
    for options in ({}, {"weight_precision": "kahan"}, {"state_dtype": torch.float32}):
        ours = fusedopt.AdamW([Parameter(p.bfloat16()) for p in make_params()], **options)
        ours.load_state_dict(copy.copy(saved))
        same(saved, before)
