"""accumulate() and step() take the step that stock takes on the mean of the micro-batches.

The mean is computed in float64, by a list of gradients and a division.
"""

from __future__ import annotations

import contextlib
import copy
import io
import os
import pickle
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from helpers import (
    ACCUMULATORS,
    CLASSES,
    DEVICE,
    SETTLED,
    assert_same,
    classes,
    complete_state,
    contents_of,
    every_class,
    every_class_with,
    make_params,
    needs_sparse,
    needs_zero_tensors,
    nothing_written,
    on_cpu,
    params_of,
    random_tensor,
    set_grads,
    table,
    without_window,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim import optimizer as optim_base

import fusedopt
from fusedopt.cases import Case

HALF = (torch.bfloat16, torch.float16)
# Scalar, empty, and more than a tile of the kernels.
SHAPES = [(4, 3), (17,), (), (2, 0, 3), (2, 3, 2, 2), (1031,)]
DTYPES = {
    str(dtype): dtype
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64)
}


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype.is_complex else torch.float64


@contextlib.contextmanager
def only_accumulates(optimizer: Optimizer) -> Iterator[None]:
    before = copy.deepcopy(without_window(optimizer))
    versions, skipped = [p._version for p in params_of(optimizer)], int(optimizer.skipped_steps)
    yield
    torch.testing.assert_close(without_window(optimizer), before, rtol=0, atol=0)
    # A device that skips a step does so after autograd has been told of it.
    if DEVICE.type == "cpu" or optimizer.skipped_steps == skipped:
        assert [p._version for p in params_of(optimizer)] == versions


def same_bits(ours: Optimizer, other: Optimizer) -> None:
    """As to values; where a window is open, also as to that."""
    for (p, mine), (q, theirs) in zip(contents_of(ours), contents_of(other), strict=True):
        mine, theirs = (  # accumulators that hold nothing are kept, or not there at all
            {k: v for k, v in state.items() if k not in ACCUMULATORS or state["grad_count"] > 0}
            for state in (mine, theirs)
        )
        torch.testing.assert_close((p, mine), (q, theirs), rtol=0, atol=0)


class Windows:
    """The same model twice: ours takes micro-batches, stock their mean.

    For parameters in half precision, stock takes each step from where ours stands, in float32:
    ours rounds a step once, stock would after every operation.
    """

    def __init__(self, case: Case, make: Callable[[], Any] = make_params, **options: Any) -> None:
        self.ours = case.ours(make(), **options)
        self.stock = case.stock(make())
        self.drawn = 0
        self.window: list[list[Tensor | None]] = []

    @property
    def params(self) -> list[Tensor]:
        return params_of(self.ours)

    def widen_half(self) -> None:
        for (p, state), q in zip(contents_of(self.ours), params_of(self.stock), strict=True):
            if p.dtype in HALF:
                q.data = p.float()
                self.stock.state[q] = {
                    k: v.clone() if k == "step" else v.float()
                    for k, v in state.items()
                    if k not in ACCUMULATORS
                }

    def backward(self, wanted: Callable[[int, int], bool] = lambda *_: True) -> None:
        """A new micro-batch's gradients, from nowhere."""
        params = self.params
        set_grads(params, self.drawn, wanted)
        self.drawn += 1
        self.window.append(
            [None if p.grad is None else p.grad.to(wide(p.dtype), copy=True) for p in params]
        )

    def accumulate(self, n: int = 1, **how: Any) -> Windows:
        for _ in range(n):
            self.backward(**how)
            self.ours.accumulate()
            assert all(p.grad is None for p in self.params)
        return self

    def stock_step(self, divisor: float | None = None) -> None:
        for index, q in enumerate(params_of(self.stock)):
            grads = [g for micro in self.window if (g := micro[index]) is not None]
            mean = sum(grads) / (divisor or len(self.window)) if grads else None
            q.grad = None if mean is None else mean.to(q.dtype)
        self.window = []
        self.stock.step()

    def step(self, divisor: float | None = None) -> Windows:
        self.widen_half()
        self.stock_step(divisor)
        self.ours.step()
        return self.compare()

    def compare(self) -> Windows:
        # torch's tolerances for the dtype that is in use; the counters are float32's.
        assert_same(self.ours, self.stock, without=ACCUMULATORS, check_dtype=False)
        return self

    def run(self, micro_batches: int, folded: bool, **how: Any) -> Windows:
        """A window, whose last micro-batch step() finds in .grad if it is `folded`."""
        self.accumulate(micro_batches - folded, **how)
        if folded:
            self.backward(**how)
        return self.step()


def fill(optimizer: Optimizer, first: int, n: int) -> None:
    """n micro-batches."""
    for micro in range(first, first + n):
        set_grads(params_of(optimizer), micro)
        optimizer.accumulate()


folded_or_not = pytest.mark.parametrize("folded", [True, False], ids=["folded", "all_accumulated"])

# --- The mean ----------------------------------------------------------------------------------


@folded_or_not
@table("dtype", {name: dtype for name, dtype in DTYPES.items() if dtype != torch.float16})
@every_class
def test_windows_of_any_length(case: Case, dtype: torch.dtype, folded: bool) -> None:
    windows = Windows(case, lambda: make_params(SHAPES, dtype))
    for length in (2, 3, 1, 4, 4, 4, 1, 2):
        windows.run(length, folded)


@folded_or_not
@every_class
def test_windows_amid_plain_steps(case: Case, folded: bool) -> None:
    """Whether a window comes first, or meets state that has not been looked at for long."""
    windows = Windows(case)
    for plain in (0, 1, SETTLED, 0, SETTLED):
        for _ in range(plain):
            windows.run(1, folded=True)
        for _ in range(SETTLED):
            windows.run(3, folded)


@table("dtype", DTYPES)
@classes("AdamW", "SGD")
def test_sums_are_float32_and_in_order(case: Case, dtype: torch.dtype) -> None:
    """Bit for bit the sum that torch makes, in float32 or, of float64 gradients, in that."""
    wanted = {torch.float64: torch.float64, torch.complex64: torch.complex64}
    params = make_params(SHAPES, dtype)
    optimizer = case.ours(params)
    for _ in range(2):  # the second time into what the first has left
        sums = [torch.zeros_like(p, dtype=wanted.get(dtype, torch.float32)) for p in params]
        for micro in range(5):
            set_grads(params, micro)
            for p, total in zip(params, sums, strict=True):
                total.add_(p.grad)
            optimizer.accumulate()
            mine = [vars(optimizer)["state"][p]["grad_sum"] for p in params]
            torch.testing.assert_close(mine, [s.detach() for s in sums], rtol=0, atol=0)
        optimizer.step()


# With these, and gradients whose mean is a number in every dtype, a window is exact.
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "clip_norm": {"max_grad_norm": 0.5},
    "clip_max": {"max_grad_norm": 0.1, "grad_norm_type": torch.inf},
    "clip_value": {"max_grad_value": 0.25},
    "skip": {"nonfinite": "skip"},
    "master": {"weight_precision": "master"},
    "remainder": {"weight_precision": "remainder"},
    "kahan": {"weight_precision": "kahan"},
    "stochastic": {"weight_precision": "stochastic"},
    "state_float32": {"state_dtype": torch.float32},
    "state_bfloat16": {"state_dtype": torch.bfloat16},
    "state_8_bits": {"state_dtype": torch.uint8},
    "average": {"ema_decay": 0.9, "ema_warmup": True},
    "l1": {"l1": 0.1},
}


@folded_or_not
@table("dtype", {str(dtype): dtype for dtype in (torch.float32, torch.bfloat16)})
@every_class_with(OPTIONS)
def test_every_option_sees_the_mean(
    case: Case, dtype: torch.dtype, options: dict[str, Any], folded: bool
) -> None:
    """The bits of a step on the mean, with the same options."""
    optimizers = []
    for micro_batches in (4, 1):
        torch.manual_seed(0)  # of the random bits
        optimizer = case.ours(make_params(dtype=dtype), **options)
        optimizers.append(optimizer)
        params = params_of(optimizer)
        for step in range(3):
            grads = [
                [(4 * random_tensor(p.shape, dtype, 100 * step + micro)).round() for p in params]
                for micro in range(4)
            ]
            if micro_batches == 1:
                grads = [[sum(parts) / 4 for parts in zip(*grads, strict=True)]]
            for micro in grads:
                for p, grad in zip(params, micro, strict=True):
                    p.grad = grad
                if len(grads) > 1 and not (folded and micro is grads[-1]):
                    optimizer.accumulate()
            optimizer.step()
            assert optimizer.skipped_steps == 0
    same_bits(*optimizers)
    torch.testing.assert_close(*(o.grad_norm for o in optimizers), rtol=0, atol=0, equal_nan=True)


def test_bfloat16_gradients_are_summed_up_better_than_by_torch() -> None:
    """Measured: 7e7 times. float32 has room for 16 bits more, and is all but exact here."""
    (p,) = make_params([(5000,)], torch.bfloat16)
    optimizer = fusedopt.SGD([p], lr=1.0)
    exact, torchs = torch.zeros(5000, dtype=torch.float64), torch.zeros_like(p)
    for micro in range(64):
        set_grads([p], micro)
        exact += p.grad
        torchs += p.grad
        optimizer.accumulate()
    mine = vars(optimizer)["state"][p]["grad_sum"]
    errors = [(total - exact).abs().mean() for total in (mine, torchs)]
    assert errors[0] * 10_000 < errors[1]


@pytest.mark.parametrize("threads", [2, 3, 7])
@classes("AdamW")
def test_same_bits_for_any_number_of_threads(case: Case, threads: int) -> None:
    before = torch.get_num_threads()
    optimizers = [case.ours(make_params([(300, 401), (5,), (33_333,)])) for _ in range(2)]
    try:
        for optimizer, n in zip(optimizers, (1, threads), strict=True):
            torch.set_num_threads(n)
            for window in range(2):
                fill(optimizer, 3 * window, 3)
                optimizer.step()
    finally:
        torch.set_num_threads(before)
    same_bits(*optimizers)


# --- grad_divisor ------------------------------------------------------------------------------

DIVISORS = {
    "int": 7,
    "float": 2.5,
    "tensor": torch.tensor(7),
    "float64_tensor": torch.tensor([2.5], dtype=torch.float64),
    "numpy": numpy.float32(2.5),
}


@folded_or_not
@table("divisor", DIVISORS)
@every_class
def test_the_divisor_may_be_given(case: Case, divisor: Any, folded: bool) -> None:
    windows = Windows(case)
    for micro_batches in (1, 3, 2):
        windows.ours.grad_divisor = divisor
        windows.accumulate(micro_batches - folded)
        if folded:
            windows.backward()
        windows.step(float(divisor))
    windows.ours.grad_divisor = None
    windows.run(3, folded)


@every_class
def test_the_divisor_also_divides_without_a_window(case: Case) -> None:
    windows = Windows(case)
    windows.ours.grad_divisor = 4
    for _ in range(SETTLED):
        windows.backward()
        windows.step(4)


@classes("AdamW")
def test_means_weighted_by_tokens(case: Case) -> None:
    """The gradient of the mean over all tokens, in micro-batches of unequal length."""
    torch.manual_seed(0)
    models = [nn.Linear(6, 3).double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    ours, stock = case.ours(models[0].parameters()), case.stock(models[1].parameters())
    for step in range(SETTLED):
        xs = [random_tensor((n, 6), torch.float64, 10 * step + n) for n in (5, 1, 8, 3)]
        for x in xs:
            models[0](x).square().sum().backward()
            ours.accumulate()
        ours.grad_divisor = torch.tensor(sum(map(len, xs)))
        ours.step()
        stock.zero_grad()
        models[1](torch.cat(xs)).square().sum(1).mean().backward()
        stock.step()
    torch.testing.assert_close(params_of(ours), params_of(stock))


BAD_DIVISORS = {
    "zero": (0, ValueError),
    "negative": (-1.0, ValueError),
    "nan": (torch.nan, ValueError),
    "inf": (torch.inf, ValueError),
    "nan_tensor": (torch.tensor(torch.nan), ValueError),
    "bool": (True, TypeError),
    "text": ("3", TypeError),
    "list": ([3], TypeError),
    "complex": (1j, TypeError),
    "two": (torch.ones(2), (TypeError, ValueError)),
    "array_of_two": (numpy.ones(2), (TypeError, ValueError)),
    "complex_tensor": (torch.tensor(1j), (TypeError, ValueError)),
}


@table("bad", BAD_DIVISORS)
def test_a_wrong_divisor_is_refused(bad: tuple) -> None:
    value, error = bad
    windows = Windows(CLASSES[0])
    windows.ours.grad_divisor = 3
    with pytest.raises(error, match="grad_divisor"):
        windows.ours.grad_divisor = value
    assert windows.ours.grad_divisor == 3
    windows.accumulate(2).step(3)
    with pytest.raises(TypeError, match="grad_divisor"):
        fusedopt.SGD(make_params(), grad_divisor=2)  # set from step to step, if at all


# --- Parameters that miss micro-batches --------------------------------------------------------

# Which parameters get a gradient in a micro-batch, of windows of three.
ABSENCES: dict[str, Callable[[int, int], bool]] = {
    "one_in_the_first": lambda micro, index: index != 1 or micro % 3 == 0,
    "one_in_the_second": lambda micro, index: index != 1 or micro % 3 == 1,
    "one_in_the_last": lambda micro, index: index != 1 or micro % 3 == 2,
    "one_not_in_the_first": lambda micro, index: index != 1 or micro % 3 != 0,
    "one_not_in_the_last": lambda micro, index: index != 1 or micro % 3 != 2,
    "one_for_each": lambda micro, index: micro % 3 == index % 3,
    "one_never": lambda micro, index: index != 1,
    "all_in_the_first": lambda micro, index: micro % 3 == 0,
    "all_in_the_second": lambda micro, index: micro % 3 == 1,
    "all_in_the_last": lambda micro, index: micro % 3 == 2,
    "never": lambda micro, index: False,
    "whole_windows": lambda micro, index: (micro // 3 + index) % 2 == 0,
    "late": lambda micro, index: micro > 4 * index,
    "vanishing": lambda micro, index: micro < 7 * index + 1,
}


@folded_or_not
@table("wanted", ABSENCES)
@every_class
def test_gradients_come_and_go(case: Case, wanted: Callable, folded: bool) -> None:
    """Of the mean's divisor, a micro-batch counts also for those that it gives no gradient.

    But the last one, in .grad, only where it gives any at all.
    """
    windows = Windows(case)
    for _ in range(2 * SETTLED):
        windows.accumulate(3 - folded, wanted=wanted)
        if folded:
            windows.backward(wanted=wanted)
            if all(g is None for g in windows.window[-1]):
                windows.window.pop()
        windows.step()


@every_class
def test_without_a_gradient_in_the_window_a_parameter_is_untouched(case: Case) -> None:
    optimizer = case.ours(make_params())
    idle = params_of(optimizer)[1]
    value, version = idle.detach().clone(), idle._version
    for window in range(3):
        for micro in range(2):
            set_grads(params_of(optimizer), 2 * window + micro, lambda _, index: index != 1)
            optimizer.accumulate()
        optimizer.step()
    assert torch.equal(idle, value)
    assert idle._version == version
    state = vars(optimizer)["state"].get(idle, {})
    assert not state.keys() & set(ACCUMULATORS)
    assert state.get("step", 0) == 0  # Adagrad has some from the start
    assert bool(state) == (case.name == "Adagrad")


@every_class
def test_frozen_parameters(case: Case) -> None:
    """By real backward passes."""

    def run(accumulates: bool) -> Optimizer:
        params = make_params([(4, 3), (3,), (3,)], torch.float64)
        optimizer = case.ours(params) if accumulates else case.stock(params)
        for step in range(3):
            for micro in range(2):
                params[1].requires_grad_(step == 1)
                params[2].requires_grad_(micro == 1)
                x = random_tensor((5, 4), torch.float64, 2 * step + micro)
                loss = (x @ params[0] + params[1] * params[2]).square().mean()
                (loss if accumulates else loss / 2).backward()
                if accumulates and micro == 0:
                    optimizer.accumulate()
            optimizer.step()
            optimizer.zero_grad()
        return optimizer

    ours, stock = run(True), run(False)
    torch.testing.assert_close(params_of(ours), params_of(stock))


@every_class
def test_add_param_group_in_mid_window(case: Case) -> None:
    windows = Windows(case)
    for number in range(3):
        windows.accumulate(2)
        for optimizer in (windows.ours, windows.stock):
            optimizer.add_param_group({"params": make_params([(2, 5), ()]), "lr": 0.3})
            complete_state(optimizer)
        for micro in windows.window:
            micro += [None] * 2
        windows.run(1 + number, folded=number > 0)


@classes("AdamW", "SGD")
@pytest.mark.parametrize("idle", [None, 1], ids=["all", "one_without_state"])
def test_a_parameter_that_leaves_loses_its_window(case: Case, idle: int | None) -> None:
    """What it had accumulated must not turn up again when it comes back."""

    def wanted(_: int, index: int) -> bool:
        return index != idle

    windows = Windows(case, lambda: make_params(dtype=torch.float64))
    windows.run(2, folded=True, wanted=wanted)
    windows.accumulate(wanted=wanted)
    groups = [o.param_groups[0]["params"] for o in (windows.ours, windows.stock)]
    gone = [group.pop() for group in groups]
    windows.step()
    for group, param in zip(groups, gone, strict=True):
        group.append(param)
    saved = windows.ours.state_dict()["state"]
    assert not any("grad_sum" in state for state in saved.values())
    windows.run(2, folded=True, wanted=wanted)


# --- What accumulate() touches -----------------------------------------------------------------


@table("dtype", DTYPES)
@every_class
def test_only_the_accumulators_are_written(case: Case, dtype: torch.dtype) -> None:
    optimizer = case.ours(make_params(dtype=dtype), ema_decay=0.9, weight_precision="master")
    params = params_of(optimizer)
    for window in range(3):
        for micro in range(3):
            set_grads(params, 3 * window + micro)
            grads = [p.grad for p in params]
            before = [(g.clone(), g._version) for g in grads]
            if micro < 2:
                with only_accumulates(optimizer):
                    optimizer.accumulate()
                assert [p.grad for p in params] == [None] * len(params)
            else:
                optimizer.step()
                assert all(p.grad is g for p, g in zip(params, grads, strict=True))
            for grad, (value, version) in zip(grads, before, strict=True):
                assert torch.equal(grad, value)
                assert grad._version == version


@classes("AdamW")
def test_gradients_are_freed(case: Case) -> None:
    optimizer = case.ours(make_params())
    params = params_of(optimizer)
    for window in range(SETTLED):
        set_grads(params, window)
        grads = [weakref.ref(p.grad) for p in params]
        storages = [weakref.ref(p.grad.untyped_storage()) for p in params]
        optimizer.accumulate()
        assert not any(ref() is not None for ref in (*grads, *storages))
        optimizer.step()


@table("dtype", DTYPES)
@every_class
def test_sums_are_allocated_once(case: Case, dtype: torch.dtype) -> None:
    """4 bytes per parameter, 8 where it has 8, kept from window to window."""
    optimizer = case.ours(make_params(dtype=dtype))
    places = set()
    for window in range(2 * SETTLED):
        fill(optimizer, window, 2)
        if window % 2:
            optimizer.step()
        else:
            optimizer.zero_grad()
        state = vars(optimizer)["state"]
        places.add(tuple(state[p]["grad_sum"].data_ptr() for p in params_of(optimizer)))
    assert len(places) == 1
    for p in params_of(optimizer):
        total = state[p]["grad_sum"]
        assert total.untyped_storage().nbytes() == p.numel() * max(4, p.element_size())
        assert total.shape == p.shape


@classes("AdamW", "SGD")
def test_no_accumulators_where_nothing_is_accumulated(case: Case) -> None:
    optimizer = case.ours(make_params())
    for step in range(SETTLED):
        set_grads(params_of(optimizer), step)
        optimizer.step()
    assert not any(name in state for _, state in contents_of(optimizer) for name in ACCUMULATORS)


@every_class
def test_the_first_of_a_window_writes(case: Case) -> None:
    """What was there before, nan also, is not added to."""
    windows = Windows(case).run(2, folded=False)
    for p in windows.params:
        windows.ours.state[p]["grad_sum"].fill_(torch.nan)
    windows.run(3, folded=True)
    fill(windows.ours, 0, 1)
    for p in windows.params:
        windows.ours.state[p]["grad_sum"].fill_(torch.nan)
    windows.ours.zero_grad()
    windows.run(3, folded=True)


@classes("AdamW")
def test_graphs_live_through_accumulate(case: Case) -> None:
    """Parameters have not changed, so a loss from before can still be differentiated."""
    windows = Windows(case, lambda: make_params([(4, 3)], torch.float64))
    (p,) = windows.params
    losses = [(p * c).square().sum() for c in (1.0, 2.0, 3.0)]
    for loss in losses:
        loss.backward()
        windows.window.append([p.grad.clone()])
        windows.ours.accumulate()
    windows.step()


@classes("AdamW", "SGD")
@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_gradients_with_a_graph(case: Case) -> None:
    windows = Windows(case, lambda: make_params([(4, 3)]))
    (p,) = windows.params
    for _ in range(3):
        (p**3).sum().backward(create_graph=True)
        assert p.grad.requires_grad
        windows.window.append([p.grad.detach().double()])
        windows.ours.accumulate()
    windows.step()
    assert not vars(windows.ours)["state"][p]["grad_sum"].requires_grad


def gaps(values: Tensor) -> Tensor:
    return torch.stack([values, values.new_full(values.shape, torch.nan)], -1)[..., 0]


def unaligned(values: Tensor) -> Tensor:
    memory = torch.cat([values.new_zeros(1), values.flatten()])
    return memory[1:].view(values.shape)


def reversed_dims(values: Tensor) -> Tensor:
    dims = tuple(range(values.dim()))[::-1]
    return values.permute(dims).contiguous().permute(dims)


def channels_last(values: Tensor) -> Tensor:
    return values.contiguous(memory_format=torch.channels_last) if values.dim() == 4 else values


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda v: v,
    "gaps": gaps,
    "unaligned": unaligned,
    "transposed": reversed_dims,
    "channels_last": channels_last,
}
GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {
    **LAYOUTS,
    "transposed_gaps": lambda v: gaps(reversed_dims(v)),
    "expanded": lambda v: v.flatten()[:1].sum().expand(v.shape),
    "expanded_rows": lambda v: (v[:1] if v.dim() else v).expand(v.shape),
    "conjugated": lambda v: v.conj().resolve_conj().conj(),
    "negated": lambda v: v if v.is_complex() else torch._neg_view(gaps(-v)),
}


@table("layout", LAYOUTS)
@classes("AdamW", "SGD")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_layouts(case: Case, layout: Callable, dtype: torch.dtype) -> None:
    """All layouts of gradients within a window: the bits of contiguous ones."""
    shapes = [(4, 3), (), (1,), (2, 0), (2, 3, 4, 5), (37, 41), (5, 1, 1, 2)]
    optimizers = [
        case.ours([Parameter(layout(p.detach())) for p in make_params(shapes, dtype)]),
        case.ours(make_params(shapes, dtype)),
    ]
    for optimizer, plain in zip(optimizers, (False, True), strict=True):
        for window in range(3):
            for micro, gradient in enumerate(GRADIENTS.values()):
                for index, p in enumerate(params_of(optimizer)):
                    grad = gradient(random_tensor(p.shape, dtype, 100 * window + micro + index))
                    if plain:
                        grad = (
                            grad.resolve_conj()
                            .resolve_neg()
                            .clone(memory_format=torch.contiguous_format)
                        )
                    p.grad = grad
                if micro < len(GRADIENTS) - 1:
                    optimizer.accumulate()
            optimizer.step()
    same_bits(*optimizers)


@classes("AdamW", "SGD")
def test_layouts_change_in_mid_window(case: Case) -> None:
    """Of parameters and sums alike."""
    windows = Windows(case)
    for layout in (*LAYOUTS.values(), LAYOUTS["contiguous"]):
        windows.accumulate()
        for p in windows.params:
            p.data = layout(p.data.clone(memory_format=torch.contiguous_format))
        windows.accumulate()
        for p in windows.params:
            state = windows.ours.state[p]
            state["grad_sum"] = layout(state["grad_sum"])
        windows.run(2, folded=True)


@every_class
def test_mixed_dtypes(case: Case) -> None:
    """Parameters of all dtypes side by side give the bits that each dtype gives alone."""
    mixed = case.ours([p for dtype in DTYPES.values() for p in make_params(dtype=dtype)])
    alone = [case.ours(make_params(dtype=dtype)) for dtype in DTYPES.values()]
    for step in range(3):
        for micro in range(3):
            grads = []
            for optimizer in alone:
                set_grads(params_of(optimizer), 3 * step + micro)
                grads += [p.grad for p in params_of(optimizer)]
            for p, grad in zip(params_of(mixed), grads, strict=True):
                p.grad = grad
            if micro < 2:
                for optimizer in (mixed, *alone):
                    optimizer.accumulate()
        for optimizer in (mixed, *alone):
            optimizer.step()
    together = [contents for optimizer in alone for contents in contents_of(optimizer)]
    torch.testing.assert_close(contents_of(mixed), together, rtol=0, atol=0)


def test_float32_gradients_of_bfloat16_parameters() -> None:
    """As torch allows them by grad_dtype; they are not rounded on the way."""
    (p,) = make_params([(100,)], torch.bfloat16)
    if not hasattr(p, "grad_dtype"):
        pytest.skip("this torch has no grad_dtype")
    p.grad_dtype = torch.float32
    optimizer = fusedopt.AdamW([p])
    grads = [random_tensor((100,), torch.float32, micro) for micro in range(3)]
    for grad in grads:
        p.grad = grad
        optimizer.accumulate()
    assert torch.equal(optimizer.state[p]["grad_sum"], grads[0] + grads[1] + grads[2])


# --- Save and resume ---------------------------------------------------------------------------


def through_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def reload(case: Case, optimizer: Optimizer, relay: Callable, **options: Any) -> Optimizer:
    new = case.ours(copy.deepcopy(params_of(optimizer)), **options)
    new.load_state_dict(relay(optimizer.state_dict()))
    return new


RELAYS: dict[str, Callable[..., Optimizer]] = {
    "state_dict": lambda case, o, **options: reload(case, o, copy.deepcopy, **options),
    "file": lambda case, o, **options: reload(case, o, through_file, **options),
    "pickle": lambda case, o, **options: pickle.loads(pickle.dumps(o)),
    "deepcopy": lambda case, o, **options: copy.deepcopy(o),
}


@table("relay", RELAYS)
@every_class
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_resume_in_mid_window(case: Case, relay: Callable, dtype: torch.dtype) -> None:
    """The bits of the uninterrupted run, wherever in the second window it is cut."""
    for cut in range(5):
        whole, resumed = (case.ours(make_params(dtype=dtype)) for _ in range(2))
        for optimizer in (whole, resumed):
            fill(optimizer, 0, 4)
            optimizer.step()
            fill(optimizer, 4, cut)
        original = resumed
        resumed = relay(case, original)
        same_bits(resumed, whole)
        with nothing_written(original):
            fill(resumed, 4 + cut, 4 - cut)
            resumed.step()
        fill(whole, 4 + cut, 4 - cut)
        whole.step()
        same_bits(resumed, whole)
        for optimizer in (whole, resumed):
            fill(optimizer, 8, 2)
            set_grads(params_of(optimizer), 10)
            optimizer.step()
        same_bits(resumed, whole)


@table("relay", RELAYS)
@table("options", OPTIONS)
@classes("AdamW", "SGD", "RMSprop")
def test_resume_in_the_first_window(case: Case, options: dict[str, Any], relay: Callable) -> None:
    if case.options.get("centered"):
        case = Case("RMSprop", {"lr": 0.01, "momentum": 0.9})  # state_dtype refuses centered
    optimizers = []
    for interrupted in (False, True):
        optimizer = case.ours(make_params(dtype=torch.bfloat16), **options)
        fill(optimizer, 0, 3)
        if interrupted:
            optimizer = relay(case, optimizer, **options)
        torch.manual_seed(0)  # the random bits' seed is drawn by the first step
        fill(optimizer, 3, 1)
        optimizer.step()
        optimizers.append(optimizer)
    same_bits(*optimizers)


# A state_dict has no place for the number of micro-batches before the first that gave any gradient.
NOTHING_FIRST = ("all_in_the_last", "all_in_the_second", "never")


@table("relay", RELAYS)
@table("wanted", {k: v for k, v in ABSENCES.items() if k not in NOTHING_FIRST})
def test_resume_where_parameters_miss_micro_batches(wanted: Callable, relay: Callable) -> None:
    case = Case("SGD", {"lr": 0.1, "momentum": 0.9})
    for cut in (1, 2):
        optimizers = []
        for interrupted in (False, True):
            optimizer = case.ours(make_params())
            for micro in range(6):
                if micro == 3 + cut and interrupted:
                    optimizer = relay(case, optimizer)
                set_grads(params_of(optimizer), micro, wanted)
                optimizer.accumulate()
                if micro % 3 == 2:
                    optimizer.step()
            optimizers.append(optimizer)
        same_bits(*optimizers)


@every_class
def test_a_checkpoint_between_windows_is_stocks_own(case: Case) -> None:
    windows = Windows(case)
    for drop in (Optimizer.step, Optimizer.zero_grad):
        windows.run(2, folded=True)
        if drop is Optimizer.zero_grad:
            fill(windows.ours, 0, 2)
            windows.ours.zero_grad()
        saved = windows.ours.state_dict()
        assert not any(name in s for s in saved["state"].values() for name in ACCUMULATORS)
        assert "grad_sum" in windows.ours.state[windows.params[0]]  # kept for the next window
        windows.stock.load_state_dict(copy.deepcopy(saved))
        windows.run(3, folded=True)


@pytest.mark.parametrize("steps", [0, 1], ids=["at_once", "later"])
@every_class
def test_stock_goes_on_without_the_window(case: Case, steps: int) -> None:
    """It ignores what it does not know."""
    windows = Windows(case)
    for _ in range(steps):
        windows.run(2, folded=True)
    fill(windows.ours, 0, 2)
    stock = case.stock(copy.deepcopy(windows.params))
    stock.load_state_dict(through_file(windows.ours.state_dict()))
    for optimizer in (stock, windows.stock):
        set_grads(params_of(optimizer), 20)
        optimizer.step()
    torch.testing.assert_close(params_of(stock), params_of(windows.stock))


@every_class
def test_loading_replaces_the_window(case: Case) -> None:
    """By the checkpoint's, also when that has none."""
    windows = Windows(case).run(2, folded=True)
    boundary = copy.deepcopy(windows.ours.state_dict())
    fill(windows.ours, 0, 3)
    windows.ours.load_state_dict(boundary)
    windows.run(2, folded=True)
    windows.accumulate(2)
    saved = copy.deepcopy(windows.ours.state_dict())
    windows.ours.zero_grad()
    fill(windows.ours, 0, 3)
    windows.ours.load_state_dict(saved)
    windows.run(1, folded=True)


@table("relay", RELAYS)
def test_the_divisor_stays_with_the_window(relay: Callable) -> None:
    optimizer = fusedopt.SGD(make_params())
    optimizer.grad_divisor = 5
    fill(optimizer, 0, 1)
    assert relay(Case("SGD"), optimizer).grad_divisor == 5


# --- Clipping that no longer clips ----------------------------------------------------------------


def clip_norm(optimizer: Optimizer, last: bool) -> None:
    """A loop in which accumulate() has been put, and the clipping was left."""
    for step in range(3):
        for micro in range(2):
            set_grads(params_of(optimizer), 10 * step + micro)
            optimizer.accumulate()
        if last:
            set_grads(params_of(optimizer), step)
        norm = torch.nn.utils.clip_grad_norm_(params_of(optimizer), 0.1)
        assert (norm > 0) == last
        optimizer.step()


def clip_value(optimizer: Optimizer, last: bool) -> None:
    assert last
    for step in range(3):
        set_grads(params_of(optimizer), 10 * step)
        optimizer.accumulate()
        set_grads(params_of(optimizer), step)
        torch.nn.utils.clip_grad_value_(params_of(optimizer), 0.1)
        optimizer.step()


def clip_norm_in_one_loop(optimizer: Optimizer, last: bool) -> None:
    """accumulate() comes after step(), or is the end of all rounds but some."""
    for micro in range(6):
        set_grads(params_of(optimizer), micro)
        if last and micro % 2:
            torch.nn.utils.clip_grad_norm_(params_of(optimizer), 0.1)
            optimizer.step()
        elif last or not micro % 2:
            optimizer.accumulate()
        else:
            if optimizer is not None:
                torch.nn.utils.clip_grad_norm_(params_of(optimizer), 0.1)
            optimizer.step()


def clip_norm_after_a_helper(optimizer: Optimizer, last: bool) -> None:
    for step in range(3):
        fill(optimizer, 10 * step, 2)
        if last:
            set_grads(params_of(optimizer), step)
        torch.nn.utils.clip_grad_norm_(params_of(optimizer), 0.1)
        optimizer.step()


# (With no gradient at all, torch's clip_grad_value_() raises.)
@pytest.mark.parametrize(
    ("loop", "last"),
    [
        (clip_norm, False),
        (clip_norm, True),
        (clip_value, True),
        (clip_norm_in_one_loop, False),
        (clip_norm_in_one_loop, True),
        (clip_norm_after_a_helper, False),
        (clip_norm_after_a_helper, True),
    ],
)
def test_clipping_that_finds_no_gradients_is_told_once(loop: Callable, last: bool) -> None:
    optimizer = fusedopt.SGD(make_params())
    name = "value" if loop is clip_value else "norm"
    message = rf"clip_grad_{name}_\(\).*give the optimizer max_grad_{name}="
    with pytest.warns(UserWarning, match=message) as caught:
        loop(optimizer, last)
    assert [w.filename for w in caught] == [__file__]


def test_warnings_as_errors_leave_nothing_half_done() -> None:
    optimizer = fusedopt.SGD(make_params(), momentum=0.9)
    set_grads(params_of(optimizer), 0)
    optimizer.accumulate()
    torch.nn.utils.clip_grad_norm_(params_of(optimizer), 0.1)
    with nothing_written(optimizer), pytest.raises(UserWarning, match="clip_grad_norm_"):
        optimizer.step()
    assert optimizer.state_dict()["fusedopt"] == {"micro_batches": 1}
    optimizer.step()


def clip_each(optimizer: Optimizer) -> None:
    for step in range(3):
        for micro in range(2):
            set_grads(params_of(optimizer), 10 * step + micro)
            torch.nn.utils.clip_grad_norm_(params_of(optimizer), 0.1)
            optimizer.accumulate()
        optimizer.step()


def clip_each_in_one_loop(optimizer: Optimizer) -> None:
    for micro in range(6):
        set_grads(params_of(optimizer), micro)
        torch.nn.utils.clip_grad_norm_(params_of(optimizer), 0.1)
        if micro % 2:
            optimizer.step()
        else:
            optimizer.accumulate()


def clip_another(optimizer: Optimizer) -> None:
    """A critic's gradients, say, before a function that accumulates and steps."""
    other = make_params()
    for step in range(3):
        set_grads(other, step)
        torch.nn.utils.clip_grad_norm_(other, 0.1)
        fill_and_step(optimizer)


def fill_and_step(optimizer: Optimizer) -> None:
    fill(optimizer, 0, 2)
    optimizer.step()


def import_only(optimizer: Optimizer) -> None:
    set_grads(params_of(optimizer), 0)
    optimizer.accumulate()
    from torch.nn.utils import clip_grad_norm_  # noqa: F401

    optimizer.step()


def clip_later(optimizer: Optimizer) -> None:
    fill(optimizer, 0, 2)
    optimizer.step()
    set_grads(params_of(optimizer), 0)
    torch.nn.utils.clip_grad_norm_(params_of(optimizer), 0.1)
    optimizer.step()


@pytest.mark.parametrize(
    "loop", [clip_each, clip_each_in_one_loop, clip_another, import_only, clip_later]
)
def test_other_clipping_is_no_reason_to_warn(loop: Callable) -> None:
    loop(fusedopt.SGD(make_params()))


def test_clipping_by_the_optimizer_beside_one_that_finds_nothing_is_right() -> None:
    for options in ({"max_grad_norm": 0.1}, {"max_grad_value": 0.1}):
        clip_norm(fusedopt.SGD(make_params(), **options), False)
        with pytest.warns(UserWarning, match="clip_grad_norm_"):  # it clips the last micro-batch
            clip_norm(fusedopt.SGD(make_params(), **options), True)


# --- Dropping the window -----------------------------------------------------------------------

DROPS: dict[str, Callable[[Any], Any]] = {
    "zero_grad": lambda o: o.zero_grad(),
    "zero_grad_to_zero": lambda o: o.zero_grad(set_to_none=False),
    "found_inf": lambda o: found_inf_step(o),
    "nonfinite_skip": lambda o: nan_step(o, "skip"),
    "nonfinite_raise": lambda o: nan_step(o, "raise"),
}


def overflowed_step(optimizer: Any) -> None:
    optimizer.found_inf = torch.tensor(1.0)
    if DEVICE.type != "cpu":  # nobody reads it there: were it 0, a window would need the scale
        optimizer.grad_scale = torch.tensor(8.0)
    optimizer.step()
    vars(optimizer).pop("grad_scale", None)
    del optimizer.found_inf


def found_inf_step(optimizer: Any) -> None:
    overflowed_step(optimizer)
    assert optimizer.skipped_steps == 1


def nan_step(optimizer: Any, policy: str) -> None:
    optimizer.nonfinite = policy
    params_of(optimizer)[1].grad[3] = torch.nan
    message = "parameter 1 of group 0: its gradient holds nan or inf"
    with (
        pytest.raises(RuntimeError, match=message)
        if policy == "raise"
        else (contextlib.nullcontext())
    ):
        optimizer.step()
    optimizer.nonfinite = "propagate"
    assert optimizer.skipped_steps == 1


@table("drop", DROPS)
@pytest.mark.parametrize("steps", [0, 1, SETTLED])
@every_class
def test_a_dropped_window_leaves_no_trace(case: Case, steps: int, drop: Callable) -> None:
    windows = Windows(case)
    for _ in range(steps):
        windows.run(2, folded=True)
    state = vars(windows.ours)["state"]
    fill(windows.ours, 0, 2)
    set_grads(windows.params, 2)
    with only_accumulates(windows.ours):
        drop(windows.ours)
    for p in windows.params:
        assert state[p]["grad_count"] == 0
        p.grad = None
    with only_accumulates(windows.ours):
        windows.ours.step()  # there is nothing to do
    for _ in range(2):
        windows.run(3, folded=True)
    windows.run(1, folded=True)


@every_class
def test_a_step_ends_the_window(case: Case) -> None:
    """The next one has nothing to do, or only what is in .grad."""
    windows = Windows(case).run(3, folded=False)
    with only_accumulates(windows.ours):
        windows.ours.step()
    windows.run(1, folded=True)


@every_class
def test_zeroed_gradients_are_gradients(case: Case) -> None:
    """As in stock: zero_grad(set_to_none=False) leaves some, and they make a micro-batch."""
    windows = Windows(case).run(2, folded=True)
    for _ in range(2):
        windows.backward()
        windows.ours.zero_grad(set_to_none=False)
        windows.window = [[torch.zeros_like(p.grad) for p in windows.params]]
        windows.ours.accumulate()
        windows.run(2, folded=True)


@classes("AdamW")
def test_the_models_own_zero_grad_keeps_the_window(case: Case) -> None:
    windows = Windows(case, lambda: nn.Linear(3, 2).double().parameters())
    model = nn.Module()
    model.weights = nn.ParameterList(windows.params)
    for p, q in zip(windows.params, params_of(windows.stock), strict=True):
        q.data = p.detach().clone()
    for _ in range(3):
        windows.accumulate(2)
        set_grads(windows.params, 100)
        model.zero_grad()
        windows.run(2, folded=True)


@every_class
def test_an_inf_that_was_dropped_is_gone(case: Case) -> None:
    windows = Windows(case, nonfinite="skip").run(2, folded=True)
    for bad in range(3):  # in which of the micro-batches; in the last, it is in .grad
        for micro in range(3):
            set_grads(windows.params, micro)
            if micro == bad:
                windows.params[3].grad[1, 2] = torch.inf
            if micro < 2:
                windows.ours.accumulate()
        with only_accumulates(windows.ours):
            windows.ours.step()
        assert windows.ours.skipped_steps == bad + 1
        assert windows.ours.grad_norm == torch.inf
        windows.run(3, folded=True)
        assert windows.ours.grad_norm.isfinite()


# --- What is refused ---------------------------------------------------------------------------


def spoil_shape(p: Tensor) -> Callable[[], None]:
    data = p.data
    p.data = data[:2].clone()
    return lambda: setattr(p, "data", data)


def spoil_grad(value: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Callable[[], None]]:
    def spoil(p: Tensor) -> Callable[[], None]:
        grad = p.grad
        p.grad = value(p)
        return lambda: setattr(p, "grad", grad)

    return spoil


def spoil_data(value: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Callable[[], None]]:
    def spoil(p: Tensor) -> Callable[[], None]:
        data, p.data = p.data, value(p.data)
        return lambda: setattr(p, "data", data)

    return spoil


NOT_DENSE = r"a gradient that is not a plain dense tensor.*accumulate\(\)"

# What is done to the last parameter, which returns how to undo it; and the message.
UNFIT: dict[str, Any] = {
    "shape": (spoil_shape, r"its shape is \(2, 3\), its gradient's \(4, 3\)"),
    "sparse": pytest.param(
        (spoil_grad(lambda p: torch.ones(4, 3).to_sparse()), NOT_DENSE), marks=needs_sparse
    ),
    "no_memory": pytest.param(
        (spoil_grad(lambda p: torch._efficientzerotensor(4, 3, device=DEVICE)), NOT_DENSE),
        marks=needs_zero_tensors,
    ),
    "complex": (spoil_data(lambda d: d.to(torch.complex64)), "not both complex"),
    "expanded": (spoil_data(lambda d: d[:1].expand(4, 3)), "single memory location"),
    "overlaps_itself": (
        spoil_data(lambda d: torch.ones(7).as_strided((4, 3), (1, 1))),
        r"may overlap in memory.*accumulate\(\)",
    ),
}


def unfit_model() -> list[dict[str, Any]]:
    good, late, other, bad = make_params([(3, 2), (17,), (), (4, 3)])
    return [{"params": [good, late]}, {"params": [other, bad]}]


@table("unfit", UNFIT)
@pytest.mark.parametrize("steps", [0, SETTLED], ids=["at_once", "later"])
@pytest.mark.parametrize("accumulated", [0, 2], ids=["first", "third"])
@every_class
@pytest.mark.filterwarnings("ignore:Casting complex values")
def test_what_does_not_fit_changes_nothing(
    case: Case, unfit: tuple, steps: int, accumulated: int
) -> None:
    """The window is as it was, and so are all gradients; once it fits, the window goes on."""
    spoil, message = unfit
    windows = Windows(case, unfit_model)
    for _ in range(steps):
        windows.run(2, folded=True)
    windows.accumulate(accumulated, wanted=lambda _, index: index != 1)
    windows.backward()
    repair = spoil(windows.params[3])
    grads = [p.grad for p in windows.params]
    # Of a window, step() takes no more than accumulate() does. Without one, torch would step.
    for call in (windows.ours.accumulate, *([windows.ours.step] if accumulated else [])):
        with (
            nothing_written(windows.ours),
            pytest.raises(RuntimeError, match=f"^parameter 1 of group 1: .*{message}"),
        ):
            call()
        assert all(p.grad is g for p, g in zip(windows.params, grads, strict=True))
    repair()
    windows.ours.accumulate()
    windows.run(1, folded=True)


def test_refusals_name_named_parameters() -> None:
    memory = torch.zeros(6)
    shared = [Parameter(memory[:4]), Parameter(memory[2:])]
    optimizer = fusedopt.SGD(zip(["weight", "bias"], shared, strict=True), lr=0.1)
    set_grads(shared, 0)
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 0 \(weight\): .*share memory"):
        optimizer.accumulate()


@classes("AdamW", "SGD")
def test_parameters_that_share_memory_are_refused(case: Case) -> None:
    memory = torch.zeros(6)
    shared = [Parameter(memory[:4]), Parameter(memory[2:]), Parameter(torch.ones(3))]
    optimizer = case.ours(shared)
    set_grads(shared, 0)
    with (
        nothing_written(optimizer),
        pytest.raises(RuntimeError, match=r"parameter 0 of group 0: .*share memory; accumulate"),
    ):
        optimizer.accumulate()
    assert all(p.grad is not None for p in shared)


@pytest.mark.parametrize("option", ["differentiable", "capturable"])
def test_groups_that_are_left_to_torch_are_refused(option: str) -> None:
    params = make_params()
    if option == "capturable":  # which is not left to torch on a device
        params = on_cpu(params)
    optimizer = fusedopt.Adam(params, **{option: True})
    set_grads(params_of(optimizer), 0)
    message = rf"parameter 0 of group 0: {option}=True; accumulate\(\) does not"
    with nothing_written(optimizer), pytest.raises(RuntimeError, match=message):
        optimizer.accumulate()


@every_class
def test_not_while_the_average_is_swapped_in(case: Case) -> None:
    windows = Windows(case, ema_decay=0.5)
    compare, windows.compare = windows.compare, lambda: windows  # stock has no average
    windows.run(2, folded=True)
    windows.accumulate(2)
    windows.backward()
    grads = [p.grad for p in windows.params]
    with windows.ours.swap_ema(), nothing_written(windows.ours):
        for call in (windows.ours.accumulate, windows.ours.step):
            with pytest.raises(RuntimeError, match="swap_ema"):
                call()
    assert all(p.grad is g for p, g in zip(windows.params, grads, strict=True))
    windows.step()
    for p in windows.params:
        del windows.ours.state[p]["ema"]
    compare()


BAD_SUMS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "shape": (lambda s: s.update(grad_sum=torch.ones(2, 3)), r"\(2, 3\), not \(4, 3\)"),
    "int": (lambda s: s.update(grad_sum=torch.ones(4, 3).int()), "grad_sum"),
    "int16": (lambda s: s.update(grad_sum=torch.ones(4, 3).short()), "not a floating-point"),
    "complex": (lambda s: s.update(grad_sum=s["grad_sum"] + 1j), "not both complex"),
    "number": (lambda s: s.update(grad_sum=1.0), "grad_sum"),
    "count_float": (lambda s: s.update(grad_count=torch.tensor(2.0)), "int64"),
    "count_two": (lambda s: s.update(grad_count=torch.ones(2).long()), "int64"),
    "count_number": (lambda s: s.update(grad_count=2), "int64"),
    "sum_lost": (lambda s: s.pop("grad_sum"), "grad_sum"),
}


@table("bad", BAD_SUMS)
@pytest.mark.parametrize("call", ["accumulate", "step"])
def test_accumulators_are_checked(bad: tuple, call: str) -> None:
    spoil, message = bad
    optimizer = fusedopt.AdamW(unfit_model())
    fill(optimizer, 0, 2)
    set_grads(params_of(optimizer), 2)
    spoil(optimizer.state[params_of(optimizer)[3]])
    with (
        nothing_written(optimizer),
        pytest.raises(RuntimeError, match=f"^parameter 1 of group 1: .*{message}"),
    ):
        getattr(optimizer, call)()


@every_class
@pytest.mark.filterwarnings("ignore:.*to torch's own")
def test_torch_takes_over_once_the_window_is_over(case: Case) -> None:
    """Accumulators that hold nothing do not keep it from creating its state."""
    windows = Windows(case)
    fill(windows.ours, 0, 2)
    windows.ours.zero_grad()
    for optimizer in (windows.ours, windows.stock):
        first, *_, last = params_of(optimizer)
        first.data = last.data.view(-1)[2:14].view(4, 3)
    for _ in range(3):
        windows.run(1, folded=True)


# --- Around it ---------------------------------------------------------------------------------


@every_class
def test_accumulate_is_no_step(case: Case) -> None:
    """No hook of a step runs, and no scheduler complains."""
    events: list[str] = []
    optimizer = case.ours(make_params())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    handles = [
        optim_base.register_optimizer_step_pre_hook(lambda *_: events.append("global")),
        optimizer.register_step_pre_hook(lambda *_: events.append("pre")),
        optimizer.register_step_post_hook(lambda *_: events.append("post")),
    ]
    fill(optimizer, 0, 3)
    assert events == []
    optimizer.step()
    for handle in handles:
        handle.remove()
    assert sorted(events) == ["global", "post", "pre"]
    scheduler.step()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        other = case.ours(make_params())
        scheduler = torch.optim.lr_scheduler.StepLR(other, 1)
        fill(other, 0, 1)
        scheduler.step()  # before any step: here torch does complain
    assert any("before `optimizer.step()`" in str(w.message) for w in caught)


@every_class
def test_a_closure_may_accumulate(case: Case) -> None:
    windows = Windows(case)

    def closure() -> float:
        windows.accumulate(2)
        windows.backward()
        return 3.0

    for _ in range(3):
        assert windows.ours.step(closure) == 3.0
        windows.stock_step()
        windows.compare()


@every_class
def test_accumulate_within_backward(case: Case) -> None:
    """One optimizer per parameter, so that no two gradients are alive at once."""
    params = make_params(dtype=torch.float64)
    optimizers = {p: case.ours([p]) for p in params}
    for p in params:
        p.register_post_accumulate_grad_hook(lambda p: optimizers[p].accumulate())
    stock = case.stock(make_params(dtype=torch.float64))
    for step in range(3):
        for scale in (1.0, 2.0, 4.0):
            (sum(p.square().sum() for p in params) * scale).backward()
            assert all(p.grad is None for p in params)
            (sum(p.square().sum() for p in params_of(stock)) * scale / 3).backward()
        for optimizer in optimizers.values():
            optimizer.step()
        stock.step()
        stock.zero_grad()
        torch.testing.assert_close(params, params_of(stock))
        assert step >= 0


@every_class
def test_two_optimizers_of_the_same_parameters(case: Case) -> None:
    """Whoever comes first takes the gradients; the other has its own window."""
    windows = Windows(case)
    other = fusedopt.SGD(windows.params, lr=0.0)
    for _ in range(3):
        windows.accumulate()
        set_grads(windows.params, 50)
        other.accumulate()
        windows.run(2, folded=True)
        other.step()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@classes("AdamW", "SGD")
def test_no_grad_and_inference_mode(case: Case, mode: Callable) -> None:
    windows = Windows(case)
    with mode():
        fill(windows.ours, 0, 2)
    windows.ours.zero_grad()
    with mode():
        windows.accumulate(2)
    windows.run(1, folded=True)
    with mode():
        windows.accumulate(2)
    windows.run(2, folded=False)


@classes("AdamW", "SGD")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a.*functools.lru_cache")
def test_compiled_training(case: Case) -> None:
    def train(optimizer: Any, transform: Callable) -> list[Tensor]:
        weight, bias = params_of(optimizer)

        def window(xs: list[Tensor]) -> None:
            for x in xs:
                (x @ weight + bias).square().mean().backward()
                optimizer.accumulate()
            optimizer.step()

        window = transform(window)
        for step in range(3):
            window([random_tensor((5, 4), torch.float32, 2 * step + i) for i in range(2)])
        return params_of(optimizer)

    torch._dynamo.reset()
    ours = [case.ours(make_params([(4, 3), (3,)])) for _ in range(2)]
    compiled = train(ours[0], lambda f: torch.compile(f, backend="eager"))
    torch.testing.assert_close(compiled, train(ours[1], lambda f: f))


# --- Random histories --------------------------------------------------------------------------


class Model:
    """What the documentation says, in a few lines of Python and float64."""

    def __init__(self, case: Case) -> None:
        self.optimizer = case.stock(make_params(dtype=torch.float64))
        self.params = params_of(self.optimizer)
        self.grads: list[Tensor | None] = [None] * len(self.params)
        self.forget()

    def forget(self) -> None:
        self.sums: list[Tensor | None] = [None] * len(self.params)
        self.count = 0

    def add(self) -> None:
        for i, grad in enumerate(self.grads):
            if grad is not None:
                self.sums[i] = grad if self.sums[i] is None else self.sums[i] + grad
        self.count += 1

    def accumulate(self) -> None:
        self.add()
        self.grads = [None] * len(self.params)

    def step(self, divisor: float | None) -> None:
        if any(grad is not None for grad in self.grads):
            self.add()
        for p, total in zip(self.params, self.sums, strict=True):
            p.grad = None if total is None else total / (divisor or self.count)
        self.optimizer.step()
        self.forget()

    def zero_grad(self, set_to_none: bool) -> None:
        self.grads = [None if set_to_none or g is None else g * 0 for g in self.grads]
        self.forget()


ACTIONS = st.one_of(
    st.tuples(st.just("backward"), st.sets(st.integers(0, 3), min_size=1)),
    st.tuples(st.just("backward"), st.just({0, 1, 2, 3})),
    st.tuples(st.just("accumulate"), st.just(None)),
    st.tuples(st.just("accumulate"), st.just(None)),
    st.tuples(st.just("step"), st.sampled_from([None, None, None, 2.5])),
    st.tuples(st.just("zero_grad"), st.booleans()),
    st.tuples(st.just("reload"), st.sampled_from(sorted(RELAYS))),
    st.tuples(st.just("fail"), st.sampled_from(["accumulate", "step"])),
    st.tuples(st.just("skip"), st.just(None)),
    st.tuples(st.just("look"), st.just(None)),
)


@settings(
    max_examples=200, deadline=None, derandomize=True, database=None, report_multiple_bugs=False
)
@given(case=st.sampled_from(CLASSES), actions=st.lists(ACTIONS, min_size=6, max_size=40))
def test_random_histories(case: Case, actions: list[tuple[str, Any]]) -> None:
    ours, model = case.ours(make_params(dtype=torch.float64)), Model(case)
    for number, (action, what) in enumerate([*actions, ("step", None)]):
        params = params_of(ours)
        if action == "backward":  # as autograd: added to what is there
            for i in what:
                grad = random_tensor(params[i].shape, torch.float64, 10 * number + i)
                params[i].grad = grad.clone() if params[i].grad is None else params[i].grad + grad
                model.grads[i] = grad if model.grads[i] is None else model.grads[i] + grad
        elif action == "accumulate":
            ours.accumulate()
            model.accumulate()
        elif action == "step":
            ours.grad_divisor = what
            ours.step()
            model.step(what)
            ours.grad_divisor = None
        elif action == "zero_grad":
            ours.zero_grad(what)
            model.zero_grad(what)
        elif action == "reload":
            # A state_dict does not know of micro-batches that gave no gradient at all.
            if "pickle" in what or model.count == 0 or any(s is not None for s in model.sums):
                grads = [p.grad for p in params]
                ours = RELAYS[what](case, ours)
                for p, grad in zip(params_of(ours), grads, strict=True):
                    p.grad = grad
        elif action == "fail":
            repair = spoil_data(lambda d: d[:1].clone())(params[3])
            if params[3].grad is not None:
                with pytest.raises(RuntimeError, match="its shape is"):
                    getattr(ours, what)()
            repair()
        elif action == "skip":
            overflowed_step(ours)
            model.forget()
        elif action == "look":
            repr(ours.state)
        torch.testing.assert_close(params_of(ours), model.params)
        assert [p.grad is None for p in params_of(ours)] == [g is None for g in model.grads]
        mine = [s for _, s in contents_of(ours) if "grad_count" in s and s["grad_count"] > 0]
        assert len(mine) == sum(total is not None for total in model.sums)


# --- Data parallel -----------------------------------------------------------------------------

RANKS, MICRO_BATCHES = 2, 3


def make_model() -> nn.Module:
    """On the CPU, where the new processes are, whatever the device of this one."""
    torch.manual_seed(0)
    with torch.device("cpu"):
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def loss_of(model: nn.Module, step: int, micro: int, rank: int) -> Tensor:
    x = random_tensor((4, 4), torch.float64, 100 * step + 10 * micro + rank)
    return model(x.cpu()).square().mean()


# The loops: whether a micro-batch is without synchronization, whether it is accumulated, and what
# is done before the step. Arguments: is it the last of the window?
LOOPS: dict[str, tuple[Callable, Callable, Callable]] = {
    # Every micro-batch is reduced, and accumulated or folded.
    "reduce_each": (lambda last: False, lambda last: not last, lambda o: None),
    "reduce_and_accumulate_each": (lambda last: False, lambda last: True, lambda o: None),
    # DDP's own: .grad adds up under no_sync(), the last micro-batch reduces it all.
    "sum_in_grad": (
        lambda last: not last,
        lambda last: False,
        lambda o: setattr(o, "grad_divisor", MICRO_BATCHES),
    ),
    # Nothing is reduced but the sums, by hand, once in a window, in float32.
    "reduce_sums": (lambda last: True, lambda last: True, lambda o: reduce_sums(o)),
    # WRONG: accumulate() has taken from .grad what the last micro-batch should have reduced.
    "local_sums": (lambda last: not last, lambda last: not last, lambda o: None),
}


def reduce_sums(optimizer: Any) -> None:
    for p in params_of(optimizer):
        torch.distributed.all_reduce(optimizer.state[p]["grad_sum"])
    optimizer.grad_divisor = MICRO_BATCHES * RANKS


def train_one_rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS
    )
    results: dict[str, list[Tensor]] = {}
    for name, (unsynchronized, accumulated, finish) in LOOPS.items():
        for views in (False, True):
            model = nn.parallel.DistributedDataParallel(make_model(), gradient_as_bucket_view=views)
            optimizer = fusedopt.AdamW(model.parameters(), lr=0.01)
            for step in range(3):
                for micro in range(MICRO_BATCHES):
                    last = micro == MICRO_BATCHES - 1
                    with model.no_sync() if unsynchronized(last) else contextlib.nullcontext():
                        loss_of(model, step, micro, rank).backward()
                    if accumulated(last):
                        optimizer.accumulate()
                finish(optimizer)
                optimizer.step()
                optimizer.zero_grad()
            results[f"{name} {views}"] = [p.detach() for p in model.parameters()]
    torch.save(results, f"{folder}/{rank}")
    torch.distributed.barrier()
    # Taken down in order, gloo may wait for a thread that waits for the interpreter's lock.
    os._exit(0)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed")
def test_data_parallel(tmp_path: Path) -> None:
    """Loops that give what one process gives on the whole batch, and one that does not."""
    ranks = torch.multiprocessing.spawn(train_one_rank, (str(tmp_path),), nprocs=RANKS, join=False)
    for _ in range(120):
        if ranks.join(timeout=1):
            break
    else:
        for process in ranks.processes:
            process.kill()
        pytest.fail("the processes wait for one another")
    model = make_model()
    stock = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=False)
    for step in range(3):
        stock.zero_grad()
        for micro in range(MICRO_BATCHES):
            for rank in range(RANKS):
                (loss_of(model, step, micro, rank) / (MICRO_BATCHES * RANKS)).backward()
        stock.step()
    first, second = (torch.load(tmp_path / str(rank)) for rank in range(RANKS))
    assert len(first) == 2 * len(LOOPS)
    whole = [p.detach() for p in model.parameters()]
    for name, params in first.items():
        if name.startswith("local_sums"):  # the ranks have parted
            assert any((p - q).abs().max() > 1e-3 for p, q in zip(params, whole, strict=True))
            assert any(
                (p - q).abs().max() > 1e-3 for p, q in zip(params, second[name], strict=True)
            )
        else:
            torch.testing.assert_close(params, whole, msg=name)
            torch.testing.assert_close(params, second[name], rtol=0, atol=0, msg=name)


def test_a_checkpoint_of_the_first_window_repeats_its_random_bits() -> None:
    torch.manual_seed(0)
    start = torch.randn(4097).bfloat16()
    results = []
    saved: dict[str, Any] = {}
    for resumes in (False, True):
        param = Parameter(start.clone())
        ours = fusedopt.AdamW(
            [param], lr=1e-3, weight_precision="stochastic", state_dtype=torch.uint8
        )
        param.grad = start.square()
        if resumes:
            ours.load_state_dict(saved)
        else:
            ours.accumulate()
            saved = copy.deepcopy(ours.state_dict())
            param.grad = start.square()
        ours.step()
        results.append(param.detach())
    assert torch.equal(*results)
