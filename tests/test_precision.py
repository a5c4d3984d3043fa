"""Weights and state in few bits: what is kept beside the rounded weight, 8-bit state, switching."""

from __future__ import annotations

import contextlib
import copy
import io
import math
from typing import Any

import pytest
import torch
from helpers import (
    DEVICE,
    SETTLED,
    classes,
    contents_of,
    every_class,
    make_params,
    set_grads,
    table,
)
from torch import Tensor
from torch.nn import Parameter

import fusedopt
from fusedopt.cases import Case
from fusedopt.recipe import Recipe, whole

BF16, F16 = torch.bfloat16, torch.float16
PRECISIONS = ["master", "remainder", "stochastic", "kahan"]
HIDDEN = {"master", "remainder", "kahan"}
SHAPES = [(4, 3), (1037,), (), (2, 3, 2, 2), (0,)]


def half_params(dtype: torch.dtype = BF16, shapes: list[tuple[int, ...]] = SHAPES) -> list[Any]:
    return make_params(shapes, dtype)


def uncentered(case: Case) -> Case:
    """Centered RMSprop does not go with coarse state."""
    return Case(case.name, {k: v for k, v in case.options.items() if k != "centered"})


def train(optimizer: Any, params: list[Tensor], steps: range) -> None:
    for step in steps:
        set_grads(params, step)
        optimizer.step()


def bits(tensors: list[Tensor]) -> list[list[int]]:
    return [t.detach().reshape(-1).view(-1, 1).view(torch.uint8).tolist() for t in tensors]


# --- The whole weight -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@every_class
def test_master_is_training_in_float32(case: Case, dtype: torch.dtype) -> None:
    """The float32 run on the same gradients; the parameter is its weight, rounded."""
    params = half_params(dtype)
    ours = case.ours(params, weight_precision="master")
    wide = [Parameter(p.detach().float()) for p in params]
    reference = case.ours(wide)
    for step in range(30):
        set_grads(params, step)
        for p, w in zip(params, wide, strict=True):
            w.grad = p.grad.float()
        ours.step()
        reference.step()
    masters = [ours.state[p]["master"] for p in params]
    # A bfloat16's master moves off a tie now and then, by the last bit.
    exact = {"rtol": 0, "atol": 0} if dtype == F16 else {"rtol": 1e-6, "atol": 1e-7}
    torch.testing.assert_close(masters, [w.detach() for w in wide], **exact)
    torch.testing.assert_close(
        [m.to(dtype) for m in masters], [p.detach() for p in params], rtol=0, atol=0
    )
    for p in params:
        states = [v for n, v in ours.state[p].items() if v.shape == p.shape and n != "step"]
        assert all(v.dtype == torch.float32 for v in states)


@every_class
def test_remainder_is_master(case: Case) -> None:
    """Bit for bit, in the weights and in the state."""
    runs = []
    for precision in ("master", "remainder"):
        params = half_params()
        ours = case.ours(params, weight_precision=precision)
        train(ours, params, range(60))
        runs.append((params, [whole(ours, p) for p in params], ours))
    assert bits(runs[0][0]) == bits(runs[1][0])
    assert bits(runs[0][1]) == bits(runs[1][1])
    for p, q in zip(runs[0][0], runs[1][0], strict=True):
        mine, theirs = dict(runs[0][2].state[p]), dict(runs[1][2].state[q])
        assert mine.pop("master").dtype == torch.float32
        assert theirs.pop("remainder").dtype == torch.int16
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_weight_on_a_tie_rounds_to_even_and_is_told_apart() -> None:
    """Every bfloat16 around one, and a step to exactly half-way between it and the next."""
    for sign in (1.0, -1.0):
        for step_sign in (1.0, -1.0):
            start = torch.arange(1.0, 2.0, 2**-7) * sign
            results = []
            for precision in ("master", "remainder"):
                p = Parameter(start.bfloat16())
                ours = fusedopt.SGD([p], lr=1.0, weight_precision=precision)
                p.grad = torch.full_like(p, -step_sign * 2**-8)
                ours.step()
                tie = start + step_sign * 2**-8
                assert bits([p.detach()]) == bits([tie.bfloat16()])
                p.grad = torch.zeros_like(p)
                ours.step()  # nothing is lost on the way through memory
                torch.testing.assert_close(whole(ours, p), tie, rtol=2**-23, atol=0)
                results.append(whole(ours, p))
            assert bits(results[:1]) == bits(results[1:])


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [(p, dtype) for p in PRECISIONS for dtype in (BF16, F16) if (p, dtype) != ("remainder", F16)],
    ids=str,
)
@pytest.mark.parametrize("name", ["SGD", "AdamW", "Momentum", "RMSprop", "Adagrad"])
def test_updates_too_small_for_the_format(name: str, precision: str, dtype: torch.dtype) -> None:
    """2000 updates far below the distance between neighbours end where float32 ends."""
    torch.manual_seed(1)
    unit = torch.finfo(dtype).eps
    # 2000 steps together move a weight near 1.5 by some ten units. (Adagrad's steps decay.)
    lr = {"Adagrad": 0.12, "SGD": 1e-2, "Momentum": 1e-2}.get(name, 1e-2) * unit
    start = torch.linspace(1.25, 1.75, 2000).to(dtype)
    runs: dict[str, tuple[Any, Tensor]] = {}
    for key, kind in (("float32", torch.float32), ("nearest", dtype), (precision, dtype)):
        p = Parameter(start.clone().to(kind))
        options = (
            {} if key == "float32" else {"weight_precision": key, "state_dtype": torch.float32}
        )
        ours = getattr(fusedopt, name)([p], lr=lr, **options)
        for _ in range(2000):
            p.grad = torch.full_like(p, 0.5)
            ours.step()
        runs[key] = ours, p
    moved = start.double() - runs["float32"][1].detach().double()
    assert moved.min() > 3 * unit
    assert torch.equal(runs["nearest"][1].detach(), start)
    ours, p = runs[precision]
    error = whole(ours, p).double() - runs["float32"][1].detach().double()
    if precision == "stochastic":  # right in the mean; each is a random walk of whole units
        assert error.mean().abs() < 5 * error.std() / math.sqrt(len(error)) + unit / 100
        assert 0.1 * unit < error.std() < 8 * unit
    else:
        assert error.abs().max() <= 2000 * 2**-24


@pytest.mark.parametrize("precision", ["master", "remainder", "kahan"])
def test_overwritten_weight_wins(precision: str) -> None:
    params = half_params()
    ours = fusedopt.SGD(params, lr=1e-4, weight_precision=precision)
    train(ours, params, range(SETTLED))
    with torch.no_grad():
        for p in params:
            p.mul_(-3.0)
        params[1][::2] = 0.0  # as pruning does
        params[1][1::4] = 1.0  # where the numbers below are nearer than those above
    before = [p.detach().float() for p in params]
    grads = []
    for p in params:
        p.grad = torch.full_like(p, 0.5)
        grads.append(p.grad.float())
    ours.step()
    for p, b, g in zip(params, before, grads, strict=True):
        expected = b - 1e-4 * g
        # 16 bits alone cannot tell: what is hidden stays, which is less than half the distance to
        # the next bfloat16.
        tolerance = 1e-6 if precision == "master" else 2**-7
        torch.testing.assert_close(whole(ours, p).float(), expected, rtol=tolerance, atol=1e-9)
        torch.testing.assert_close(p.detach(), expected.bfloat16(), rtol=tolerance, atol=1e-9)


def test_overwritten_zeros_stay_near_zero() -> None:
    """Zero with a negative remainder would read as nan."""
    p = Parameter(torch.randn(4096).bfloat16())
    ours = fusedopt.SGD([p], lr=1e-3, weight_precision="remainder")
    for _ in range(3):
        p.grad = torch.randn_like(p)
        ours.step()
    p.data.zero_()
    p.data[::2] = -0.0
    p.grad = torch.zeros_like(p)
    ours.step()
    assert p.detach().float().abs().max() == 0
    assert whole(ours, p).abs().max() < 1e-37


@pytest.mark.parametrize("precision", ["master", "remainder", "kahan", "stochastic"])
def test_special_values(precision: str) -> None:
    """inf, nan, zeros and the largest numbers go where float32 sends them."""
    largest = torch.finfo(BF16).max
    start = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, largest, -largest, 1e-40])
    p, q = Parameter(start.bfloat16()), Parameter(start.bfloat16().float())
    ours = fusedopt.SGD([p], lr=1.0, weight_precision=precision)
    stock = torch.optim.SGD([q], lr=1.0)
    for _ in range(3):
        for param, optimizer in ((p, ours), (q, stock)):
            param.grad = torch.zeros_like(param)
            optimizer.step()
        torch.testing.assert_close(p.detach().float(), q.detach(), rtol=0, atol=0, equal_nan=True)


# --- Stochastic rounding --------------------------------------------------------------------------


def stochastic_run(threads: int = 2, seed: int = 0, steps: int = 5, **options: Any) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        torch.manual_seed(seed)
        params = make_params([(200_000,), (3, 5), (1000,)], BF16)
        ours = fusedopt.AdamW(params, lr=1e-3, **options)
        train(ours, params, range(steps))
    finally:
        torch.set_num_threads(before)
    return ours, params


@table(
    "options",
    {
        "stochastic": {"weight_precision": "stochastic"},
        "8_bits": {"state_dtype": torch.uint8},
        "both": {"weight_precision": "stochastic", "state_dtype": torch.uint8},
    },
)
def test_random_bits_depend_on_the_seed_only(options: dict[str, Any]) -> None:
    first = bits(stochastic_run(1, **options)[1])
    for threads in (2, 3, 8):
        assert bits(stochastic_run(threads, **options)[1]) == first
    assert bits(stochastic_run(seed=1, **options)[1]) != first


@table(
    "options",
    {
        "stochastic": {"weight_precision": "stochastic"},
        "8_bits": {"weight_precision": "remainder", "state_dtype": torch.uint8},
        "kahan": {"weight_precision": "kahan", "ema_decay": 0.9, "ema_warmup": True},
        "master": {"weight_precision": "master"},
    },
)
@every_class
def test_resumed_run_has_the_same_bits(case: Case, options: dict[str, Any]) -> None:
    case = uncentered(case)
    torch.manual_seed(0)
    params = half_params(shapes=[(500,), (4, 3), ()])
    ours = case.ours(params, **options)
    train(ours, params, range(4))
    buffer = io.BytesIO()
    torch.save({"params": [p.detach() for p in params], "optimizer": ours.state_dict()}, buffer)
    copied = copy.deepcopy((ours, params))
    train(ours, params, range(4, 8))

    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    torch.manual_seed(99)
    again = [Parameter(p) for p in saved["params"]]
    resumed = case.ours(again, **options)
    resumed.load_state_dict(saved["optimizer"])
    for optimizer, own in ((resumed, again), copied):
        train(optimizer, own, range(4, 8))
        torch.testing.assert_close(contents_of(optimizer), contents_of(ours), rtol=0, atol=0)


def test_stochastic_rounding_differs_between_parameters_and_steps() -> None:
    torch.manual_seed(0)
    params = [Parameter(torch.full((4000,), 1.0, dtype=BF16)) for _ in range(2)]
    ours = fusedopt.SGD(params, lr=2**-9, weight_precision="stochastic")
    ups = []
    for _ in range(3):
        for p in params:
            p.data.fill_(1.0)
            p.grad = torch.full_like(p, -1.0)  # a quarter of the way to the next bfloat16
        ours.step()
        ups += [(p.detach() > 1).double() for p in params]
    for i, up in enumerate(ups):
        assert abs(up.mean() - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 4000)
        for other in ups[:i]:
            assert abs(((up - 0.25) * (other - 0.25)).mean()) < 5 * 0.1875 / math.sqrt(4000)


# --- State ----------------------------------------------------------------------------------------

RULE_STATE = {"exp_avg", "exp_avg_sq", "momentum_buffer", "square_avg", "sum"}
DTYPES = {"float32": torch.float32, "bfloat16": BF16, "8_bits": torch.uint8}


@table("state_dtype", DTYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, BF16, F16], ids=str)
@classes("Adam", "AdamW", "SGD", "Adagrad", "Momentum")
def test_state_dtype(case: Case, dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    params = half_params(dtype)
    ours = case.ours(params, state_dtype=state_dtype)
    train(ours, params, range(3))
    for p in params:
        for name, value in ours.state[p].items():
            if name in RULE_STATE:
                assert value.dtype == state_dtype
            if name.endswith("_scale"):
                assert value.dtype == torch.float32
                assert value.numel() == -(-p.numel() // 256)
                assert torch.all(value.frexp().mantissa == 0.5)  # powers of two


@table("state_dtype", {"bfloat16": BF16, "8_bits": torch.uint8})
@classes("Adam", "AdamW", "SGD", "Adagrad", "Momentum")
def test_first_step_rounds_the_state_once(case: Case, state_dtype: torch.dtype) -> None:
    """What is stored after one step is what float32 state would be, to the format's resolution."""
    shapes = [(1037,), (16, 64), ()]
    if case.name == "Adagrad":  # the sum's start is rounded, too: to itself
        case = Case("Adagrad", {"lr": 0.1, "initial_accumulator_value": 0.125})
    params, wide = make_params(shapes), make_params(shapes)
    coarse, fine = case.ours(params, state_dtype=state_dtype), case.ours(wide)
    train(coarse, params, range(1))
    train(fine, wide, range(1))
    # The first update uses the state before it is rounded.
    torch.testing.assert_close(params, wide, rtol=0, atol=0)
    resolution = 2**-7 if state_dtype == BF16 else 1 / 8
    exported = coarse.state_dict()["state"]
    for i, p in enumerate(wide):
        for name, value in fine.state[p].items():
            if name == "step" or value.shape != p.shape:
                continue
            stored = exported[i][name].float()
            small = value.abs().max() * 2**-14  # below it, signed 8-bit averages underflow
            error = (stored - value).abs() - resolution * value.abs()
            assert torch.all((error <= 0) | (value.abs() < small))
            assert torch.all((stored != 0) | (value.abs() < small))


def spirals(turns: float = 1.25, n: int = 400) -> tuple[Tensor, Tensor]:
    """Two interleaved spirals: no straight line tells them apart."""
    t = torch.linspace(0.2, 1, n)
    angle = t * turns * 2 * math.pi
    arm = torch.stack([t * angle.cos(), t * angle.sin()], 1)
    return torch.cat([arm, -arm]), torch.arange(2).repeat_interleave(n)


@pytest.mark.parametrize("name", ["Adam", "AdamW", "Momentum", "SGD", "RMSprop", "Adagrad"])
def test_training_with_coarse_state_ends_where_float32_ends(name: str) -> None:
    x, y = spirals()
    lr = {"SGD": 0.1, "Momentum": 1.0, "Adagrad": 0.05}.get(name, 0.005)
    options = {"momentum": 0.9} if name == "SGD" else {}
    losses = {}
    for state_dtype in (None, BF16, torch.uint8):
        torch.manual_seed(0)
        with torch.device("cpu"):  # the same numbers everywhere
            model = torch.nn.Sequential(
                torch.nn.Linear(2, 64), torch.nn.Tanh(), torch.nn.Linear(64, 64), torch.nn.Tanh(),
                torch.nn.Linear(64, 2),
            ).to(DEVICE)  # fmt: skip
        ours = getattr(fusedopt, name)(
            model.parameters(), lr=lr, state_dtype=state_dtype, max_grad_norm=1.0, **options
        )
        for _ in range(700):
            ours.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(x), y)
            loss.backward()
            ours.step()
        losses[state_dtype] = loss.item()
    assert losses[None] < 0.15  # it has learnt
    for state_dtype in (BF16, torch.uint8):
        assert losses[state_dtype] < 1.3 * losses[None] + 0.02


def test_8_bit_state_follows_a_change_of_memory_format() -> None:
    """Blocks are runs of memory, so the state is laid out anew when its parameter is."""
    runs = []
    for change in (False, True):
        torch.manual_seed(0)
        p = Parameter(torch.randn(8, 6, 5, 5))
        ours = fusedopt.AdamW([p], lr=0.01, state_dtype=torch.uint8)
        for step in range(4):
            if change and step == 2:
                p.data = p.data.to(memory_format=torch.channels_last)
            set_grads([p], step)
            ours.step()
        runs.append(p.detach().contiguous())
        assert ours.state[p]["exp_avg"].stride() == p.stride()
    torch.testing.assert_close(runs[0], runs[1], rtol=0.05, atol=0.005)


@pytest.mark.parametrize(
    "make", [lambda: torch.randn(64, 33).t(), lambda: torch.randn(40, 80)[:, ::2]]
)
def test_8_bit_state_of_other_layouts(make: Any) -> None:
    torch.manual_seed(0)
    p = make()
    q = p.clone(memory_format=torch.contiguous_format)
    size = torch.logspace(-1, 1, p.shape[0])[:, None]  # each row has a scale of its own
    averages = []
    for param in (p, q):
        param.requires_grad_()
        ours = fusedopt.Momentum([param], lr=0.1, state_dtype=torch.uint8)
        for step in range(5):
            set_grads([param], step)
            param.grad.mul_(size)
            ours.step()
        averages.append(ours.state_dict()["state"][0]["momentum_buffer"].float())
    # Rounded five times, at random, to neighbours an eighth apart.
    error = (averages[0] - averages[1]).abs()
    assert torch.all(error <= 0.35 * averages[1].abs() + 0.35 * size)
    torch.testing.assert_close(averages[0].norm(), averages[1].norm(), rtol=0.02, atol=0)


# --- Checkpoints ----------------------------------------------------------------------------------


@table("options", {"state": {"state_dtype": torch.uint8}, "bfloat16": {"state_dtype": BF16}})
@every_class
def test_stock_continues_our_checkpoint(case: Case, options: dict[str, Any]) -> None:
    case = uncentered(case)
    params = make_params()
    ours = case.ours(params, **options)
    train(ours, params, range(5))
    stock_params = [Parameter(p.detach().clone()) for p in params]
    stock = case.stock(stock_params)
    stock.load_state_dict(copy.deepcopy(ours.state_dict()))
    train(ours, params, range(5, 8))
    train(stock, stock_params, range(5, 8))
    tolerance = 0.5 if options["state_dtype"] == torch.uint8 else 0.05
    for p, q in zip(params, stock_params, strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance * 0.1, atol=tolerance * 0.1)


@pytest.mark.parametrize("precision", ["master", "remainder", "kahan", "stochastic"])
@classes("AdamW", "SGD", "Adagrad")
def test_stock_loads_what_we_keep_beside(case: Case, precision: str) -> None:
    """Stock ignores our entries, and gives back what we then load."""
    params = half_params()
    ours = case.ours(params, weight_precision=precision, ema_decay=0.9)
    train(ours, params, range(5))
    stock = case.stock([Parameter(p.detach().clone()) for p in params])
    stock.load_state_dict(copy.deepcopy(ours.state_dict()))
    train(stock, [p for g in stock.param_groups for p in g["params"]], range(5, 7))
    back_params = [Parameter(p.detach().clone()) for g in stock.param_groups for p in g["params"]]
    back = case.ours(back_params, weight_precision=precision)
    with pytest.warns(UserWarning, match=r"'ema'\] of 5 parameter\(s\)"):  # stock knows no decay
        back.load_state_dict(copy.deepcopy(stock.state_dict()))
    train(back, back_params, range(7, 8))
    train(stock, [p for g in stock.param_groups for p in g["params"]], range(7, 8))
    for p, group_param in zip(back_params, stock.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(p, group_param, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("new", ["nearest", *PRECISIONS])
@pytest.mark.parametrize("old", ["nearest", *PRECISIONS])
def test_switching_weight_precision_at_load(old: str, new: str) -> None:
    """The whole weight goes over as far as both can hold it; nothing stale stays behind."""
    case = Case("AdamW", {"lr": 1e-3})
    params = half_params(shapes=[(64, 33), (5,)])
    ours = case.ours(params, weight_precision=old)
    train(ours, params, range(4))
    checkpoint = copy.deepcopy(ours.state_dict())
    exact = [whole(ours, p).float().clone() for p in params]

    # The optimizer may be loaded before the weights are.
    other_params = [Parameter(torch.zeros_like(p)) for p in params]
    other = case.ours(other_params, weight_precision=new)
    lost = old in HIDDEN and new not in HIDDEN
    warns = pytest.warns(UserWarning, match=rf"{old}.*weight_precision='{new}'")
    with warns if lost else contextlib.nullcontext():
        other.load_state_dict(checkpoint)
    with torch.no_grad():
        for q, p in zip(other_params, params, strict=True):
            q.copy_(p)
    for group in other.param_groups:
        group["lr"] = 0.0  # a step that changes nothing but makes the new form
    set_grads(other_params, 4)
    other.step()
    for p, q, w in zip(params, other_params, exact, strict=True):
        state = other.state[q]
        assert {n for n in HIDDEN if n in state} == ({new} & HIDDEN)
        if {old, new} <= HIDDEN:
            torch.testing.assert_close(whole(other, q).float(), w, rtol=2**-23, atol=0)
        assert torch.equal(q, p)
        moments = state["exp_avg"].dtype
        assert moments == (torch.float32 if new != "nearest" else ours.state[p]["exp_avg"].dtype)


@pytest.mark.parametrize("new", [None, torch.float32, BF16, torch.uint8], ids=str)
@pytest.mark.parametrize("old", [None, torch.float32, BF16, torch.uint8], ids=str)
@classes("Adam", "SGD", "Adagrad")
def test_switching_state_dtype_at_load(case: Case, old: Any, new: Any) -> None:
    params = make_params([(64, 33), (5,)])
    ours = case.ours(params, state_dtype=old)
    train(ours, params, range(4))
    before = copy.deepcopy(ours.state_dict())
    other_params = [Parameter(p.detach().clone()) for p in params]
    other = case.ours(other_params, state_dtype=new)
    other.load_state_dict(copy.deepcopy(before))
    dtype = new or torch.float32  # None: nothing coarser than the parameter
    exported = other.state_dict()["state"]
    for i, q in enumerate(other_params):
        for name, value in before["state"][i].items():
            if name in ("step", "seed"):
                continue
            assert other.state[q][name].dtype == dtype
            rtol = {torch.uint8: 1 / 16, BF16: 2**-8}.get(dtype, 0)  # to the nearest
            if old == torch.uint8:  # nothing is coarser
                rtol = 0
            small = value.float().abs().max() * 2**-14
            error = (exported[i][name].double() - value.double()).abs()
            assert torch.all((error <= rtol * value.double().abs()) | (value.abs() < small))
    train(other, other_params, range(4, 6))


def test_options_may_change_in_mid_run() -> None:
    params = half_params(shapes=[(64, 33), (5,)])
    ours = fusedopt.AdamW(params, lr=1e-3, weight_precision="master")
    train(ours, params, range(3))
    exact = [whole(ours, p).clone() for p in params]
    ours.weight_precision = "remainder"
    for group in ours.param_groups:
        group["lr"] = 0.0
    train(ours, params, range(3, 4))
    assert bits([whole(ours, p) for p in params]) == bits(exact)
    ours.state_dtype = torch.uint8
    assert all(ours.state[p]["exp_avg"].dtype == torch.uint8 for p in params)
    train(ours, params, range(4, 6))
    ours.state_dtype = torch.float32
    assert all(ours.state[p]["exp_avg"].dtype == torch.float32 for p in params)
    assert all("exp_avg_scale" not in ours.state[p] for p in params)
    train(ours, params, range(6, 8))
    ours.weight_precision = "nearest"
    train(ours, params, range(8, 9))
    assert all("remainder" not in ours.state[p] for p in params)


def test_8_bit_state_reaches_the_bytes_it_promises() -> None:
    p = Parameter(torch.randn(1_000_000))
    ours = fusedopt.AdamW([p], state_dtype=torch.uint8)
    p.grad = torch.randn_like(p)
    ours.step()
    held = sum(v.numel() * v.element_size() for v in ours.state[p].values())
    assert held / p.numel() < 2.05  # two codes, and two scales to 256 elements


@table("state_dtype", {"bfloat16": BF16, "8_bits": torch.uint8})
@pytest.mark.parametrize("name", ["AdamW", "RMSprop", "Adagrad", "Momentum"])
def test_coarse_state_follows_slow_averages(name: str, state_dtype: torch.dtype) -> None:
    """Rounded to the nearest, an average that moves by a thousandth per step would stand still."""
    options = {"momentum": 0.995} if name == "Momentum" else {}
    if name == "RMSprop":
        options = {"alpha": 0.999}
    means = {}
    for dtype in (None, state_dtype):
        torch.manual_seed(0)
        p = Parameter(torch.zeros(2048))
        ours = getattr(fusedopt, name)([p], lr=1e-4, state_dtype=dtype, **options)
        for size, steps in ((10.0, 50), (0.1, 3000)):
            for _ in range(steps):
                p.grad = (torch.randn(2048) + 1) * size
                ours.step()
        state = ours.state_dict()["state"][0]
        means[dtype] = {n: state[n].double().mean().item() for n in RULE_STATE & state.keys()}
    assert means[None]
    for key, mean in means[None].items():
        assert means[state_dtype][key] == pytest.approx(mean, rel=0.05)


def test_8_bit_state_follows_changes_of_a_millionth() -> None:
    """Sixteen random bits would lose them: values in 8 bits are an eighth apart."""
    torch.manual_seed(0)
    p = Parameter(torch.zeros(8192))
    ours = fusedopt.Adagrad([p], lr=0.0, initial_accumulator_value=1.0, state_dtype=torch.uint8)
    p.grad = torch.full((8192,), 1e-3)
    for _ in range(5000):
        ours.step()
    growth = ours.state_dict()["state"][0]["sum"].double().mean().item() - 1
    assert growth == pytest.approx(5000 * 1e-6, rel=0.3)


def test_state_that_stock_has_cast_is_widened() -> None:
    """A master copy in bfloat16 would be none."""
    p = Parameter(torch.ones(8).bfloat16())
    ours = fusedopt.SGD([p], lr=1e-4, weight_precision="master", ema_decay=0.9)
    train(ours, [p], range(1))
    stock = torch.optim.SGD([Parameter(p.detach().clone())], lr=1e-4)
    stock.load_state_dict(ours.state_dict())
    ours.load_state_dict(stock.state_dict())
    assert {ours.state[p][name].dtype for name in ("master", "ema")} == {torch.float32}


def test_model_that_becomes_float16_is_refused_with_remainders() -> None:
    p = Parameter(torch.ones(8).bfloat16())
    ours = fusedopt.SGD([p], lr=1e-4, weight_precision="remainder")
    train(ours, [p], range(2))
    p.data = p.data.half()
    p.grad = None
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 0.*float16"):
        ours.step()


@table("bad", {"dtype": lambda p: torch.zeros(p.numel(), dtype=torch.uint8),
               "shape": lambda p: torch.zeros(p.numel() - 1, dtype=torch.int16)})  # fmt: skip
def test_hidden_part_of_another_kind_is_refused_before_it_is_read(bad: Any) -> None:
    p = Parameter(torch.ones(1003).bfloat16())
    ours = fusedopt.SGD([p], lr=1e-4, weight_precision="remainder")
    train(ours, [p], range(2))
    ours.ema_decay = 0.5  # its first value is read from the hidden part
    ours.state[p]["remainder"] = bad(p)
    set_grads([p], 2)
    before = p.detach().clone()
    with pytest.raises((RuntimeError, ValueError), match=r"remainder|hidden"):
        ours.step()
    assert torch.equal(p, before)
    assert "ema" not in ours.state[p]


def test_checkpoint_of_another_shape_is_refused() -> None:
    p, q = Parameter(torch.ones(3)), Parameter(torch.ones(4, 3))
    saved = fusedopt.AdamW([p])
    train(saved, [p], range(1))
    with pytest.raises(ValueError, match=r"exp_avg.*\(3,\).*\(4, 3\)"):
        fusedopt.AdamW([q], state_dtype=torch.uint8).load_state_dict(saved.state_dict())


@table("missing", {"scale": "exp_avg_scale", "seed": None})
def test_damaged_8_bit_state_is_an_error_that_names_it(missing: str | None) -> None:
    p = Parameter(torch.randn(300))
    ours = fusedopt.AdamW([p], state_dtype=torch.uint8)
    p.grad = torch.randn_like(p)
    ours.step()
    before = p.detach().clone()
    if missing:
        del ours.state[p][missing]
        with pytest.raises(RuntimeError, match=r"parameter 0 of group 0.*exp_avg_scale"):
            ours.step()
    else:
        ours.state[p]["exp_avg_scale"] = torch.ones(1)
        with pytest.raises(RuntimeError, match=r"parameter 0 of group 0.*scale of state"):
            ours.step()
    assert torch.equal(p, before)


@every_class
def test_state_of_the_recipe_in_float64(case: Case) -> None:
    """float64 parameters keep float64 arithmetic around every stage."""
    params = make_params(dtype=torch.float64)
    ours = case.ours(params, max_grad_norm=0.7, ema_decay=0.9, l1=0.01)
    recipe = Recipe(case, params, max_grad_norm=0.7, ema_decay=0.9, l1=0.01)
    for step in range(5):
        set_grads(params, step)
        recipe.step([[p.grad for p in params]])
        ours.step()
    torch.testing.assert_close(params, recipe.params, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close([ours.state[p]["ema"] for p in params], recipe.ema)


def test_scales_do_not_follow_the_default_dtype() -> None:
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        param = Parameter(torch.ones(300, dtype=torch.float32))
        optimizer = fusedopt.AdamW([param], state_dtype=torch.uint8)
        for _ in range(2):
            param.grad = torch.ones_like(param)
            optimizer.step()
        assert optimizer.state[param]["exp_avg_scale"].dtype == torch.float32
    finally:
        torch.set_default_dtype(before)


# --- Step counters --------------------------------------------------------------------------------

END = 2**24  # where a float32 counter stops: the next number is not one


def set_counters(optimizer: Any, count: float, dtype: torch.dtype = torch.float32) -> None:
    for state in optimizer.state.values():
        state["step"] = torch.tensor(count, dtype=dtype, device=state["step"].device)


def drift(start: float, **options: Any) -> Tensor:
    """Where weights or averages are after 200 steps from a counter, when rounding decides."""
    torch.manual_seed(0)
    if "weight_precision" in options:
        p = Parameter(torch.full((512,), 1.0, dtype=BF16))
        ours = fusedopt.SGD([p], lr=2**-9, **options)
        p.grad = torch.full_like(p, -1.0)
    else:  # of the averages of squares, not their scale's owner
        p = Parameter(torch.zeros(512))
        ours = fusedopt.Adam([p], lr=0.0, **options)
        p.grad = torch.full_like(p, 0.5)
        p.grad[::256] = 1.0
    ours.step()
    set_counters(ours, start)
    for _ in range(200):
        ours.step()
    moved = p.detach() if p.dtype == BF16 else ours.state_dict()["state"][0]["exp_avg_sq"]
    return moved.double()[1:256]


@table(
    "options",
    {
        "weights": {"weight_precision": "stochastic"},
        "bfloat16": {"state_dtype": BF16},
        "8_bits": {"state_dtype": torch.uint8},
    },
)
def test_random_bits_differ_in_all_steps_of_long_runs(options: dict[str, Any]) -> None:
    """Were they the same from some step on, each element would round one way for ever."""
    early, late = drift(1, **options), drift(END - 3, **options)
    assert early.std() > 0
    assert 0.7 < late.std() / early.std() < 1.4
    assert abs(late.mean() - early.mean()) < 0.3 * early.std()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@table(
    "case",
    {
        "Adam": Case("Adam", {"lr": 0.01, "betas": (0.9, 1 - 1e-8)}),
        "AdamW": Case("AdamW", {"lr": 0.01, "betas": (1 - 1e-7, 1 - 1e-8)}),
        "Adagrad": Case("Adagrad", {"lr": 0.5, "lr_decay": 1.0}),
    },
)
def test_counters_count_as_doubles_do(case: Case, dtype: torch.dtype) -> None:
    """Stock's numbers when its counters are doubles, whatever ours were at first."""
    params = make_params(dtype=torch.float64)
    ours = case.ours(params)
    stock_params = [Parameter(p.detach().clone()) for p in params]
    stock = case.stock(stock_params)
    for optimizer, own in ((ours, params), (stock, stock_params)):
        train(optimizer, own, range(1))
        mine = optimizer is ours
        set_counters(optimizer, END - 3, dtype if mine else torch.float64)
        train(optimizer, own, range(1, 61))
    torch.testing.assert_close(params, stock_params, rtol=1e-13, atol=1e-13)
    assert {ours.state[p]["step"].item() for p in params} == {END + 57}


def test_ema_warmup_goes_on_in_long_runs() -> None:
    p = Parameter(torch.zeros(3, dtype=torch.float64))
    ours = fusedopt.SGD([p], lr=1.0, ema_decay=1 - 1e-9, ema_warmup=True)
    p.grad = torch.full_like(p, -1.0)
    ours.step()
    set_counters(ours, END - 3)
    ours.state[p]["ema"].zero_()
    expected = 0.0
    for t in range(END - 2, END + 60):
        ours.step()
        expected += (p[0].item() - expected) * 9 / (10 + t)
    assert ours.state[p]["ema"][0].item() == pytest.approx(expected, rel=1e-8)


@classes("Adam", "Adagrad", "RMSprop")
def test_checkpoint_of_a_long_run(case: Case) -> None:
    """Stock goes on from it, and so do we, to the bit."""
    params = make_params()
    ours = case.ours(params, state_dtype=BF16 if case.name == "Adam" else None)
    train(ours, params, range(1))
    set_counters(ours, END - 1)
    train(ours, params, range(1, 4))
    saved = copy.deepcopy(ours.state_dict())
    again, others = ([Parameter(p.detach().clone()) for p in params] for _ in range(2))
    resumed, stock = case.ours(again, state_dtype=ours.state_dtype), case.stock(others)
    for optimizer, own in ((resumed, again), (stock, others)):
        optimizer.load_state_dict(copy.deepcopy(saved))
        counters = [optimizer.state[p]["step"] for p in own]
        assert {(c.dtype, c.item()) for c in counters} == {(torch.float64, END + 2)}
        train(optimizer, own, range(4, 6))
        assert {optimizer.state[p]["step"].item() for p in own} == {END + 4}
    train(ours, params, range(4, 6))
    torch.testing.assert_close(contents_of(resumed), contents_of(ours), rtol=0, atol=0)


def test_a_held_counter_goes_on() -> None:
    params = make_params()
    ours = fusedopt.Adam(params)
    train(ours, params, range(1))
    set_counters(ours, END - 1)
    held = [ours.state[p]["step"] for p in params]
    train(ours, params, range(1, 4))
    assert {counter.item() for counter in held} == {END + 2}
    held[0].fill_(7)
    train(ours, params, range(4, 5))
    assert [ours.state[p]["step"].item() for p in params] == [8, *[END + 3] * (len(params) - 1)]


def test_counters_that_several_parameters_share_stay_shared() -> None:
    params = make_params([(3,), (3,)])
    ours = fusedopt.Adam(params)
    train(ours, params, range(1))
    counter = torch.tensor(float(END - 4))
    for p in params:
        ours.state[p]["step"] = counter
    with pytest.warns(UserWarning, match="share memory"):
        train(ours, params, range(1, 2))
    assert counter.item() == END - 2


@pytest.mark.parametrize("count", [-7.0, 0.5, -1e300, 1e300, math.inf, math.nan], ids=str)
def test_counters_set_to_what_no_steps_are(count: float) -> None:
    """Only random bits depend on it here; they differ from step to step where the counter does."""
    p = Parameter(torch.full((4096,), 1.0, dtype=BF16))
    ours = fusedopt.SGD([p], lr=2**-9, weight_precision="stochastic")
    p.grad = torch.full_like(p, -1.0)
    ours.step()
    set_counters(ours, count, torch.float64)
    ups = []
    for _ in range(3):
        p.data.fill_(1.0)
        ours.step()
        ups.append(p.detach() > 1)
        assert abs(ups[-1].double().mean() - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 4096)
    counts = math.isfinite(count) and abs(count) < 2**53
    assert all(torch.equal(up, ups[0]) != counts for up in ups[1:])
