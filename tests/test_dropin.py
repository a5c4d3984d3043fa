"""Whatever works with the stock class works with ours: the same calls on both, compared."""

from __future__ import annotations

import copy
import inspect
import io
import itertools
import pickle
import re
import sys
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy
import pytest
import torch
from helpers import (
    CLASSES,
    DEVICE,
    SETTLED,
    Twins,
    as_stock_counts,
    assert_same,
    classes,
    complete_state,
    contents_of,
    every_class,
    falls_back,
    make_params,
    needs_host_memory,
    needs_sparse,
    nothing_written,
    on_cpu,
    params_of,
    random_tensor,
    set_grads,
    state_names,
    table,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn import Parameter
from torch.optim import Optimizer, lr_scheduler
from torch.optim import optimizer as optim_base
from torch.testing._internal.two_tensor import TwoTensor

import fusedopt
from fusedopt.cases import Case
from fusedopt.options import ARGUMENTS

STOCK = {case.name: getattr(torch.optim, case.name, torch.optim.SGD) for case in CLASSES}


# --- The class ---------------------------------------------------------------------------------


@every_class
def test_is_the_stock_class(case: Case) -> None:
    twins = Twins(case)
    assert isinstance(twins.ours, STOCK[case.name])
    assert str(inspect.signature(twins.ours.step)).startswith("(closure")
    if case.name == "Momentum":
        assert isinstance(twins.ours, fusedopt.SGD)
        return
    ours, stock = (inspect.signature(type(o)).parameters for o in twins)
    assert list(ours.values())[: len(stock)] == list(stock.values())
    assert list(ours)[len(stock) :] == ARGUMENTS
    ours, stock = case.ours(make_params(), foreach=False), twins.stock
    assert repr(ours) == repr(stock)
    assert ours.defaults == stock.defaults


def params() -> list[Parameter]:
    return make_params([(2,)])


BAD_ARGUMENTS: dict[str, Callable[[type[Optimizer]], Optimizer]] = {
    "no_arguments": lambda cls: cls(),
    "no_parameters": lambda cls: cls([]),
    "a_tensor": lambda cls: cls(torch.zeros(2)),
    "no_tensors": lambda cls: cls([1, 2]),
    "not_a_leaf": lambda cls: cls([params()[0] * 2]),
    "a_set": lambda cls: cls([{"params": set(params())}]),
    "in_two_groups": lambda cls: cls([{"params": p} for p in 2 * params()]),
    "some_with_names": lambda cls: cls([("a", params()[0]), params()[0]]),
    "unknown": lambda cls: cls(params(), learning_rate=0.1),
    "lr": lambda cls: cls(params(), lr=-1),
    "lr_of_two": lambda cls: cls(params(), lr=torch.ones(2)),
    "weight_decay": lambda cls: cls(params(), weight_decay=-1),
    "momentum": lambda cls: cls(params(), momentum=-1),
    "nesterov": lambda cls: cls(params(), nesterov=True),
    "nesterov_dampened": lambda cls: cls(params(), momentum=0.9, dampening=0.1, nesterov=True),
    "beta1": lambda cls: cls(params(), betas=(1.0, 0.999)),
    "beta2": lambda cls: cls(params(), betas=(0.9, -0.1)),
    "betas_mixed": lambda cls: cls(params(), betas=(0.9, torch.tensor(0.9))),
    "eps": lambda cls: cls(params(), eps=-1),
    "alpha": lambda cls: cls(params(), alpha=-1),
    "lr_decay": lambda cls: cls(params(), lr_decay=-1),
    "accumulator": lambda cls: cls(params(), initial_accumulator_value=-1),
    "fused_foreach": lambda cls: cls(params(), fused=True, foreach=True),
    "fused_differentiable": lambda cls: cls(params(), fused=True, differentiable=True),
    "tensor_lr_foreach": lambda cls: cls(params(), lr=torch.tensor(0.1), foreach=True),
}


def error_of(call: Callable[..., Any], *args: Any) -> tuple[type, str] | None:
    try:
        call(*args)
    except Exception as error:
        return type(error), str(error)
    return None


@table("construct", BAD_ARGUMENTS)
def test_constructor_errors_are_stocks_own(construct: Callable[..., Optimizer]) -> None:
    names = [name for name in STOCK if name != "Momentum"]  # has a signature of its own
    theirs = [error_of(construct, STOCK[name]) for name in names]
    assert any(theirs)
    assert [error_of(construct, getattr(fusedopt, name)) for name in names] == theirs


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"lr": -1}, "Invalid learning rate: -1"),
        ({"momentum": -1}, "Invalid momentum value: -1"),
        ({"weight_decay": -1}, "Invalid weight_decay value: -1"),
        ({"params": []}, "empty parameter list"),
    ],
)
def test_constructor_errors_of_momentum(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        fusedopt.Momentum(**{"params": params(), **options})


# --- Groups, closures, hooks -------------------------------------------------------------------

OWN_OPTIONS = {
    "Adam": {"betas": (0.5, 0.6), "amsgrad": True},
    "AdamW": {"betas": (0.5, 0.6), "maximize": True},
    "SGD": {"momentum": 0.0},
    "RMSprop": {"centered": False, "momentum": 0.0, "alpha": 0.5},
    "Adagrad": {"eps": 0.1, "maximize": True},
    "Momentum": {"momentum": 0.5, "dampening": 0.5},
}


@every_class
def test_groups_have_their_own_options(case: Case) -> None:
    def make() -> list[dict[str, Any]]:
        first, second, *others = make_params()
        return [
            {"params": [first], "lr": 0.5},
            {"params": iter([second]), **OWN_OPTIONS[case.name]},
            {"params": others[0], "weight_decay": 0.5},
            {"params": []},
        ]

    Twins(case, make).step(SETTLED)


@every_class
def test_add_param_group_in_mid_run(case: Case) -> None:
    def add(optimizer: Optimizer, _: list[Tensor]) -> None:
        optimizer.add_param_group({"params": make_params([(2, 5), ()]), "lr": 0.3})
        complete_state(optimizer)

    twins = Twins(case).step(SETTLED)
    twins.each(add)
    twins.step(SETTLED)
    twins.each(lambda o, _: o.add_param_group({"params": [Parameter(torch.ones(3))]}))
    twins.each(lambda o, _: complete_state(o))
    twins.step(SETTLED)


@every_class
def test_closure(case: Case) -> None:
    def step(optimizer: Optimizer, params: list[Tensor]) -> list[Any]:
        def closure() -> Tensor:
            assert torch.is_grad_enabled()
            optimizer.zero_grad()
            loss = sum(p.square().sum() for p in params)
            loss.backward()
            return loss.detach()

        with torch.no_grad():
            loss = optimizer.step(closure)
            assert not torch.is_grad_enabled()
        return loss

    twins = Twins(case)
    for _ in range(SETTLED):
        torch.testing.assert_close(*twins.each(step))
        assert_same(*twins)
    assert twins.ours.step() is None


def shared_params() -> list[Parameter]:
    """Two parameters of one memory, which only torch can update, and one on its own."""
    memory = random_tensor((6,), torch.float32, 0)
    return [Parameter(memory[:4]), Parameter(memory[2:]), Parameter(torch.ones(3))]


@table("make", {"kernels": make_params, "fallback": shared_params})
@every_class
@pytest.mark.filterwarnings("ignore:.*to torch's own")
def test_each_hook_fires_once(case: Case, make: Callable[[], list[Parameter]]) -> None:
    def run(optimizer: Optimizer, params: list[Tensor]) -> list[Any]:
        events: list[Any] = []

        def note(name: str, value: Any = None) -> Callable:
            def hook(who: Optimizer, args: tuple, kwargs: dict) -> Any:
                assert who is optimizer is args[0]
                events.append((name, len(args), list(kwargs)))
                return value

            return hook

        with_closure = ((optimizer,), {"closure": lambda: events.append("closure")})
        handles = [
            optim_base.register_optimizer_step_pre_hook(note("global pre")),
            optim_base.register_optimizer_step_post_hook(note("global post")),
            optimizer.register_step_pre_hook(note("pre")),
            optimizer.register_step_pre_hook(note("adds a closure", with_closure)),
            optimizer.register_step_post_hook(note("post")),
        ]
        for step in range(3):
            set_grads(params, step)
            optimizer.step()
        for handle in handles:
            handle.remove()
        optimizer.step()
        return events

    twins = Twins(case, make)
    mine, theirs = twins.each(run)
    assert mine == theirs
    assert len(mine) == 18
    assert_same(*twins)


# --- Schedulers --------------------------------------------------------------------------------

# One cycles momentum or betas when `cycles`: when there are any.
SCHEDULERS: dict[str, Callable[[Optimizer, bool], Any]] = {
    "LambdaLR": lambda o, _: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "MultiplicativeLR": lambda o, _: lr_scheduler.MultiplicativeLR(o, lambda _: 0.9),
    "StepLR": lambda o, _: lr_scheduler.StepLR(o, 3),
    "MultiStepLR": lambda o, _: lr_scheduler.MultiStepLR(o, [2, 5]),
    "ConstantLR": lambda o, _: lr_scheduler.ConstantLR(o, 0.5, 4),
    "LinearLR": lambda o, _: lr_scheduler.LinearLR(o, 0.1, total_iters=6),
    "ExponentialLR": lambda o, _: lr_scheduler.ExponentialLR(o, 0.8),
    "SequentialLR": lambda o, _: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1), lr_scheduler.ExponentialLR(o, 0.9)], [4]
    ),
    "CosineAnnealingLR": lambda o, _: lr_scheduler.CosineAnnealingLR(o, 5),
    "ChainedScheduler": lambda o, _: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o, 0.2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o, _: lr_scheduler.ReduceLROnPlateau(o, patience=2),
    "CyclicLR": lambda o, cycles: lr_scheduler.CyclicLR(
        o, 0.001, 0.1, step_size_up=3, cycle_momentum=cycles
    ),
    "CosineAnnealingWarmRestarts": lambda o, _: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda o, cycles: lr_scheduler.OneCycleLR(
        o, 0.1, total_steps=10, cycle_momentum=cycles
    ),
    "PolynomialLR": lambda o, _: lr_scheduler.PolynomialLR(o, 6),
    "SWALR": lambda o, _: torch.optim.swa_utils.SWALR(o, 0.05, anneal_epochs=4),
}


def test_no_scheduler_is_missing() -> None:
    assert set(lr_scheduler.__all__) - {"LRScheduler"} <= SCHEDULERS.keys()


@table("make", SCHEDULERS)
@every_class
@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float_lr", "tensor_lr"])
def test_schedulers(case: Case, make: Callable, tensor_lr: bool) -> None:
    lr = torch.tensor(0.02) if tensor_lr else 0.02
    twins = Twins(Case(case.name, {**case.options, "lr": lr}))
    cycles = case.name != "Adagrad"
    schedulers = [make(optimizer, cycles) for optimizer in twins]
    for _ in range(9):
        twins.step()
        for scheduler in schedulers:
            metric = (1.0,) if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else ()
            scheduler.step(*metric)


# --- Options that are tensors ------------------------------------------------------------------

TENSOR_OPTIONS = {
    "Adam": {"betas": (torch.tensor(0.8), torch.tensor(0.9))},
    "AdamW": {"betas": (torch.tensor([0.8]), torch.tensor([0.9], dtype=torch.float64))},
    "SGD": {"weight_decay": torch.tensor(0.1)},
    "RMSprop": {"lr": torch.tensor([0.1])},
    "Adagrad": {"lr": torch.tensor(0.1, dtype=torch.float64)},
    "Momentum": {"lr": torch.tensor(1)},
}


@every_class
def test_options_may_be_tensors(case: Case) -> None:
    options = {**case.options, "lr": torch.tensor(0.1), **TENSOR_OPTIONS[case.name]}
    twins = Twins(Case(case.name, options)).step(SETTLED)
    for optimizer in twins:
        optimizer.param_groups[0]["lr"] = torch.tensor(0.03)
    twins.step()


MUTABLE = {
    "tensor_lr": ("lr", lambda: torch.tensor(0.5), lambda lr: lr.mul_(0.5)),
    "array_lr": ("lr", lambda: numpy.array(0.5), lambda lr: numpy.multiply(lr, 0.5, out=lr)),
    "list_of_betas": ("betas", lambda: [0.5, 0.6], lambda betas: betas.reverse()),
    "tensor_betas": (
        "betas",
        lambda: (torch.tensor(0.5), torch.tensor(0.6)),
        lambda betas: betas[0].mul_(0.8),
    ),
}


@table("mutable", MUTABLE)
def test_options_changed_in_place_count(mutable: tuple[str, Callable, Callable]) -> None:
    name, make, change = mutable
    twins = Twins(Case("AdamW", {"lr": 0.1})).step(SETTLED)
    for optimizer in twins:
        optimizer.param_groups[0][name] = make()
    for _ in range(3):
        twins.step(SETTLED)
        for optimizer in twins:
            change(optimizer.param_groups[0][name])
    twins.step()


# --- Copies and checkpoints --------------------------------------------------------------------


def through_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


COPIES = {
    "pickle": lambda o: pickle.loads(pickle.dumps(o)),
    "deepcopy": copy.deepcopy,
}


@table("duplicate", COPIES)
@every_class
def test_copies_of_an_optimizer_go_on_alone(case: Case, duplicate: Callable) -> None:
    twins = Twins(case).step(SETTLED)
    originals = list(twins)
    twins.ours, twins.stock = map(duplicate, originals)
    with nothing_written(originals[0]):
        twins.step(SETTLED)
    assert type(twins.ours) is type(originals[0])


RELAYS = [
    ("ours", "ours"),
    ("ours", "stock"),
    ("stock", "ours"),
    ("stock", "ours", "stock"),
    ("ours", "stock", "ours"),
]


# Each class as it is, and with fused=True if it takes that.
with_fused = pytest.mark.parametrize(
    ("case", "options"),
    [
        pytest.param(case, options, id="-".join([case.name, *options]))
        for case in CLASSES
        for options in ({}, {"fused": True})
        if not options or "fused" in inspect.signature(getattr(fusedopt, case.name)).parameters
    ],
)


@with_fused
@pytest.mark.parametrize("relay", RELAYS, ids="-".join)
def test_checkpoints_pass_between_ours_and_stock(
    case: Case, relay: tuple[str, ...], options: dict[str, Any]
) -> None:
    """Each runner takes over the weights and a saved file; the end is stock's of one long run."""
    params, saved = make_params(), None
    for leg, runner in enumerate(relay):
        params = copy.deepcopy(params)
        optimizer = getattr(case, runner)(params, **({} if runner == "stock" else options))
        if saved is not None:
            optimizer.load_state_dict(saved)
        for step in range(SETTLED):
            set_grads(params, SETTLED * leg + step)
            optimizer.step()
        saved = through_file(optimizer.state_dict())

    reference = case.stock(make_params())
    for step in range(SETTLED * len(relay)):
        set_grads(params_of(reference), step)
        reference.step()
    assert_same(optimizer, reference)


@every_class
def test_load_state_dict_in_mid_run_goes_back(case: Case) -> None:
    twins = Twins(case).step(SETTLED)
    saved = [copy.deepcopy(o.state_dict()) for o in twins]
    twins.step(SETTLED)
    for optimizer, state in zip(twins, saved, strict=True):
        optimizer.load_state_dict(state)
    twins.step(SETTLED)


@every_class
def test_state_keeps_its_dtype_on_load(case: Case) -> None:
    """float32 state serves a bfloat16 model, and gives the float32 update, rounded once."""
    wide = case.ours([Parameter(p.data.bfloat16().float()) for p in make_params()])
    set_grads(params_of(wide), 0)
    wide.step()
    for p in params_of(wide):
        p.data = p.data.bfloat16().float()
    narrow = case.ours([Parameter(p.data.bfloat16()) for p in params_of(wide)])
    narrow.load_state_dict(through_file(wide.state_dict()))

    set_grads(params_of(narrow), 1)
    for p, q in zip(params_of(wide), params_of(narrow), strict=True):
        p.grad = q.grad.float()
    wide.step()
    narrow.step()
    for p, q in zip(params_of(wide), params_of(narrow), strict=True):
        assert torch.equal(p.bfloat16(), q)
        for name in state_names(wide, p):
            assert torch.equal(narrow.state[q][name], wide.state[p][name])


@every_class
def test_hooks_of_users_around_checkpoints(case: Case) -> None:
    def reload(optimizer: Optimizer, params: list[Tensor]) -> list[str]:
        events = []

        def halve(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            events.append("halve")
            state = {
                i: {k: v if k == "step" else v / 2 for k, v in entries.items()}
                for i, entries in state_dict["state"].items()
            }
            return {**state_dict, "state": state}

        def double(who: Optimizer) -> None:
            events.append("double")
            for name in state_names(who, params[0]):
                who.state[params[0]][name] = who.state[params[0]][name] * 2

        optimizer.register_load_state_dict_pre_hook(halve)
        optimizer.register_load_state_dict_post_hook(double)
        optimizer.register_load_state_dict_post_hook(double, prepend=True)
        optimizer.register_state_dict_pre_hook(lambda _: events.append("before saving"))
        optimizer.register_state_dict_post_hook(lambda *_: events.append("after saving"))
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        return events

    twins = Twins(case).step(SETTLED)
    mine, theirs = twins.each(reload)
    assert mine == theirs == ["before saving", "after saving", "halve", "double", "double"]
    twins.step()


@every_class
def test_a_refused_checkpoint_changes_nothing(case: Case) -> None:
    twins = Twins(case).step()
    smaller = case.stock(make_params()[:2]).state_dict()
    with nothing_written(twins.ours):
        mine, theirs = (error_of(o.load_state_dict, smaller) for o in twins)
    assert mine == theirs is not None
    twins.ours.load_state_dict(twins.ours.state_dict())


@every_class
def test_distributed_checkpoints(case: Case) -> None:
    from torch.distributed.checkpoint import state_dict as dcp

    def relay(make: Callable[..., Optimizer]) -> Any:
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        saved = None
        for _ in range(2):
            optimizer = make(model.parameters())
            if saved is not None:
                dcp.set_optimizer_state_dict(model, optimizer, saved)
            for step in range(3):
                set_grads(params_of(optimizer), step)
                optimizer.step()
            saved = dcp.get_optimizer_state_dict(model, optimizer)
        return saved["state"]

    mine, theirs = relay(case.ours), relay(case.stock)
    mine = {name: as_stock_counts(state, theirs.get(name, {})) for name, state in mine.items()}
    torch.testing.assert_close(mine, theirs)


# --- Gradients that are not there --------------------------------------------------------------

PATTERNS: dict[str, Callable[[int, int], bool]] = {
    "never": lambda step, index: False,
    "never_for_one": lambda step, index: index != 1,
    "late": lambda step, index: step >= index,
    "very_late": lambda step, index: index != 1 or step > SETTLED + 1,
    "vanishing": lambda step, index: step < 2 * index + 1,
    "alternating": lambda step, index: (step + index) % 2 == 0,
    "every_third": lambda step, index: step % 3 == index % 3,
}


@table("wanted", PATTERNS)
@every_class
def test_gradients_come_and_go(case: Case, wanted: Callable[[int, int], bool]) -> None:
    Twins(case).step(2 * SETTLED, wanted=wanted)


@every_class
def test_frozen_parameters(case: Case) -> None:
    def make() -> list[Parameter]:
        return [p.requires_grad_(index != 1) for index, p in enumerate(make_params())]

    twins = Twins(case, make).step(SETTLED, wanted=lambda _, index: index != 1)
    twins.each(lambda _, params: params[1].requires_grad_(True))
    twins.step(SETTLED)
    twins.each(lambda _, params: params[2].requires_grad_(False))
    twins.step(wanted=lambda _, index: index != 2)
    twins.step()  # frozen, but its last gradient is still there: stock steps on


@every_class
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(case: Case, set_to_none: bool) -> None:
    twins = Twins(case).step(SETTLED)
    for optimizer in twins:
        optimizer.zero_grad(set_to_none)
        assert all(
            p.grad is None if set_to_none else not p.grad.any() for p in params_of(optimizer)
        )
        optimizer.step()
    assert_same(*twins)


# --- Whatever is changed between two steps -----------------------------------------------------


def for_each_state(change: Callable[[dict[str, Tensor], str], None]) -> Callable:
    """The edit that does `change(a parameter's state, a name)` to all state but the steps."""

    def edit(optimizer: Optimizer, params: list[Tensor]) -> None:
        for param in params:
            for name in state_names(optimizer, param):
                change(optimizer.state[param], name)

    return edit


def for_each_param(change: Callable[[Tensor], Any]) -> Callable:
    return lambda _, params: [change(param) for param in params]


def assign(tensor: Tensor, value: Tensor) -> None:
    tensor.data = value


def transposed(tensor: Tensor) -> Tensor:
    """The same numbers in the opposite order of memory."""
    dims = tuple(range(tensor.dim()))[::-1]
    return tensor.detach().permute(dims).contiguous().permute(dims)


def resize_storage(tensor: Tensor) -> None:
    """Frees the memory, and puts the data elsewhere."""
    storage = tensor.untyped_storage()
    data = storage.clone()
    storage.resize_(0)
    keep = torch.ones(data.nbytes(), dtype=torch.uint8)  # takes the freed place
    storage.resize_(data.nbytes())
    storage.copy_(data)
    del keep


def clear_state(optimizer: Optimizer, _: list[Tensor]) -> None:
    optimizer.state.clear()
    complete_state(optimizer)


def forget_one(optimizer: Optimizer, params: list[Tensor]) -> None:
    optimizer.state.pop(params[1], None)
    complete_state(optimizer)


def new_dicts(optimizer: Optimizer, _: list[Tensor]) -> None:
    optimizer.state = cloned_state(optimizer)


def cloned_state(optimizer: Optimizer) -> defaultdict[Tensor, dict[str, Tensor]]:
    return defaultdict(
        dict, {p: {k: v.clone() for k, v in s.items()} for p, s in vars(optimizer)["state"].items()}
    )


def set_state(optimizer: Optimizer, _: list[Tensor]) -> None:
    optimizer.__setstate__({"state": cloned_state(optimizer)})


def load_no_state(optimizer: Optimizer, _: list[Tensor]) -> None:
    """A checkpoint from before the first step."""
    number = itertools.count()
    groups = [
        {**group, "params": [next(number) for _ in group["params"]]}
        for group in optimizer.param_groups
    ]
    optimizer.load_state_dict({"state": {}, "param_groups": groups})
    complete_state(optimizer)


def no_buffers(optimizer: Optimizer, params: list[Tensor]) -> None:
    """As stock's fused SGD leaves its state when the first step is skipped."""
    if isinstance(optimizer, torch.optim.SGD):
        for param in params:
            optimizer.state[param]["momentum_buffer"] = None


def one_buffer(optimizer: Optimizer, params: list[Tensor]) -> None:
    """All state becomes views of one tensor, at odd offsets."""
    buffer, used = torch.zeros(1000), 1
    for param in params:
        for name in state_names(optimizer, param):
            view = buffer[used : used + param.numel()].view_as(param)
            optimizer.state[param][name] = view.copy_(optimizer.state[param][name])
            used += param.numel()


def set_steps(optimizer: Optimizer, params: list[Tensor]) -> None:
    for number, param in enumerate(params):
        if "step" in optimizer.state[param]:
            optimizer.state[param]["step"] = torch.tensor([2.0, 30.0])[number % 2]
            optimizer.state[param]["step"] += 1


def new_parameter(optimizer: Optimizer, params: list[Tensor]) -> None:
    optimizer.param_groups[0]["params"][0] = Parameter(params[0].detach() / 2)
    complete_state(optimizer)


def insert_parameter(optimizer: Optimizer, _: list[Tensor]) -> None:
    optimizer.param_groups[0]["params"].insert(1, Parameter(torch.ones(2, 2)))
    complete_state(optimizer)


def split_group(optimizer: Optimizer, _: list[Tensor]) -> None:
    param = optimizer.param_groups[0]["params"].pop()
    state = optimizer.state[param]
    optimizer.add_param_group({"params": [param], "lr": 0.2})
    optimizer.state[param] = state


def set_option(name: str, value: Any) -> Callable:
    def edit(optimizer: Optimizer, _: list[Tensor]) -> None:
        if name in optimizer.param_groups[0]:
            optimizer.param_groups[0][name] = value

    return edit


def set_params(change: Callable[[list[Tensor]], Any]) -> Callable:
    def edit(optimizer: Optimizer, params: list[Tensor]) -> None:
        optimizer.param_groups[0]["params"] = change(params)

    return edit


EDITS: dict[str, Callable[[Optimizer, list[Tensor]], Any]] = {
    "param_replaced": for_each_param(lambda p: assign(p, p.data / 2)),
    "param_transposed": for_each_param(lambda p: assign(p, transposed(p))),
    "param_in_place": for_each_param(lambda p: p.data.mul_(2)),
    "param_storage": for_each_param(lambda p: resize_storage(p.data)),
    "param_shared_with_processes": for_each_param(lambda p: p.share_memory_()),
    "param_new": new_parameter,
    "param_inserted": insert_parameter,
    "param_moved_to_a_group": split_group,
    "params_reversed": set_params(lambda params: params[::-1]),
    "params_reversed_in_place": lambda o, _: o.param_groups[0]["params"].reverse(),
    "params_fewer": set_params(lambda params: params[1:3]),
    "params_none": set_params(lambda params: []),
    "params_a_tuple": set_params(tuple),
    "group_replaced": lambda o, _: o.param_groups.__setitem__(0, {**o.param_groups[0]}),
    "groups_replaced": lambda o, _: setattr(o, "param_groups", copy.copy(o.param_groups)),
    "lr": set_option("lr", 0.5),
    "lr_int": set_option("lr", 1),
    "lr_numpy": set_option("lr", numpy.float32(0.3)),
    "weight_decay": set_option("weight_decay", 0.5),
    "maximize": set_option("maximize", True),
    "momentum_off": set_option("momentum", 0.0),
    "nesterov": set_option("nesterov", True),
    "betas_list": set_option("betas", [0.3, 0.4]),
    "flags_none": lambda o, p: [
        set_option(f, None)(o, p) for f in ("amsgrad", "nesterov", "maximize")
    ],
    "state_replaced": for_each_state(lambda state, name: state.update({name: state[name] * 2})),
    "state_data": for_each_state(lambda state, name: assign(state[name], state[name] * 2)),
    "state_transposed": for_each_state(
        lambda state, name: state.update({name: transposed(state[name])})
    ),
    "state_data_transposed": for_each_state(
        lambda state, name: assign(state[name], transposed(state[name]))
    ),
    "state_in_place": for_each_state(lambda state, name: state[name].mul_(2)),
    "state_set": for_each_state(lambda state, name: state[name].set_(state[name] * 2)),
    "state_storage": for_each_state(lambda state, name: resize_storage(state[name])),
    "state_shared_with_processes": for_each_state(lambda s, name: s[name].share_memory_()),
    "state_in_one_buffer": one_buffer,
    "state_cleared": clear_state,
    "state_of_one_deleted": forget_one,
    "state_dicts_replaced": new_dicts,
    "state_by_setstate": set_state,
    "state_of_a_new_run": load_no_state,
    "state_none": no_buffers,
    "state_reordered": lambda o, _: setattr(
        o, "state", defaultdict(dict, reversed(o.state.items()))
    ),
    "steps": set_steps,
    "nothing_but_a_look": lambda o, params: repr(o.state[params[0]]),
}


def go_on(twins: Twins) -> None:
    twins.step(SETTLED)


def go_on_without_some_gradients(twins: Twins) -> None:
    """What was changed is only met later."""
    twins.step(2, wanted=lambda step, index: index in (1, 2))
    twins.step(SETTLED)


def go_on_after_a_failure(twins: Twins, steps: int = SETTLED) -> None:
    """As before, when a step stops half way through its checks."""
    twins.set_grads()
    groups = twins.ours.param_groups
    for place in (0, len(groups)):
        groups.insert(place, {**groups[0], "lr": "fast"})
        with pytest.raises(TypeError, match=f"param group {place}: lr is not a number"):
            twins.ours.step()
        del groups[place]
    twins.step(steps)


SEQUELS = {
    "all": go_on,
    "some_gradients": go_on_without_some_gradients,
    "after_a_failure": go_on_after_a_failure,
}


def edit_twice(case: Case, edit: Callable, sequel: Callable) -> None:
    twins = Twins(case).step(SETTLED)
    for _ in range(2):
        twins.each(edit)
        sequel(twins)


@table("edit", EDITS)
@every_class
def test_edits_between_steps(case: Case, edit: Callable) -> None:
    edit_twice(case, edit, go_on)


@table("edit", EDITS)
@classes("AdamW", "SGD")
@table("sequel", {name: SEQUELS[name] for name in ("some_gradients", "after_a_failure")})
def test_edits_that_are_met_later(case: Case, edit: Callable, sequel: Callable) -> None:
    edit_twice(case, edit, sequel)


@every_class
def test_parameters_and_state_change_their_dtype(case: Case) -> None:
    def cast(optimizer: Optimizer, params: list[Tensor]) -> None:
        for param in params:
            param.grad = None
            param.data = param.data.to(dtype)
            for name in state_names(optimizer, param):
                optimizer.state[param][name] = optimizer.state[param][name].to(dtype)

    twins = Twins(case, lambda: make_params(dtype=torch.float64)).step(SETTLED)
    dtype = torch.float32
    twins.each(cast)
    twins.step(SETTLED)


@pytest.mark.parametrize("name", ["SGD", "Momentum", "RMSprop"])
def test_momentum_goes_off_and_on(name: str) -> None:
    twins = Twins(Case(name, {"lr": 0.1, "momentum": 0.9})).step(SETTLED)
    for momentum in (0.0, 0.5, 0.0, 0.9):
        for optimizer in twins:
            optimizer.param_groups[0]["momentum"] = momentum
            if name == "Momentum":
                twins.stock.param_groups[0]["dampening"] = momentum
        twins.step(2)


# What a user may hold on to, given an optimizer's state, a parameter and a state's name, and the
# change made through it later, without asking for `optimizer.state` again.
HELD: dict[str, Any] = {
    "tensor_data": (lambda state, p, name: state[p][name], lambda t, *_: assign(t, t * 2)),
    "tensor_data_transposed": (
        lambda state, p, name: state[p][name],
        lambda t, *_: assign(t, transposed(t)),
    ),
    "tensor_in_place": (lambda state, p, name: state[p][name], lambda t, *_: t.mul_(2)),
    "tensor_set": (lambda state, p, name: state[p][name], lambda t, *_: t.set_(t * 2)),
    "tensor_resized": (
        lambda state, p, name: state[p][name],
        lambda t, *_: t.resize_(1000).fill_(1).resize_(4, 3),
    ),
    "tensor_swapped": (
        lambda state, p, name: state[p][name],
        lambda t, *_: torch.utils.swap_tensors(t, t * 2),
    ),
    "tensor_shared_with_processes": (
        lambda state, p, name: state[p][name],
        lambda t, *_: t.share_memory_(),
    ),
    "numpy": pytest.param(
        (lambda state, p, name: state[p][name].numpy(), lambda a, *_: a.fill(0.5)),
        marks=needs_host_memory,
    ),
    "storage": (
        lambda state, p, name: state[p][name].untyped_storage(),
        lambda storage, *_: resize_storage(torch.empty(0).set_(storage)),
    ),
    "view": (
        lambda state, p, name: state[p][name][:1],
        lambda view, *_: resize_storage(view),
    ),
    "detached": (
        lambda state, p, name: state[p][name].detach(),
        lambda alias, *_: resize_storage(alias),
    ),
    "weak_reference": (
        lambda state, p, name: weakref.ref(state[p][name]),
        lambda ref, *_: ref() is not None and assign(ref(), ref() * 2),
    ),
    "script_list": (
        lambda state, p, name: torch.ScriptList([state[p][name]]),
        lambda held, *_: assign(held[0], held[0] * 2),
    ),
    "dict": (
        lambda state, p, name: state[p],
        lambda held, p, name: held.update({name: held[name] * 2}),
    ),
    "dict_method": (
        lambda state, p, name: state[p].__setitem__,
        lambda set_item, p, name: set_item(name, torch.ones(4, 3)),
    ),
    "dict_values": (
        lambda state, p, name: state[p].values(),
        lambda values, *_: [assign(v, v * 2) for v in values],
    ),
    "state": (
        lambda state, p, name: state,
        lambda held, p, name: held.update({p: {k: v * 2 for k, v in held[p].items()}}),
    ),
    "state_method": (
        lambda state, p, name: state.get,
        lambda get, p, name: [assign(v, v * 2) for v in get(p, {}).values()],
    ),
    "state_values": (
        lambda state, p, name: state.values(),
        lambda values, *_: [assign(v, v * 2) for entries in values for v in entries.values()],
    ),
}


@table("held", HELD)
@classes("Adam", "SGD")
@pytest.mark.parametrize("settled", [0, SETTLED], ids=["at_once", "later"])
@pytest.mark.parametrize("released", [False, True], ids=["kept", "released"])
@table("sequel", SEQUELS)
def test_what_was_held_may_change(
    case: Case, held: tuple, settled: int, released: bool, sequel: Callable
) -> None:
    grab, change = held
    twins = Twins(case).step(SETTLED)
    name = state_names(twins.ours, params_of(twins.ours)[0])[0]
    handles = twins.each(lambda o, params: grab(o.state, params[0], name))
    twins.step(settled)
    for number, optimizer in enumerate(twins):
        change(handles[number], params_of(optimizer)[0], name)
    if released:
        handles.clear()
    sequel(twins)


# Of the tables above, what can be done in any order: nothing that takes parameters or buffers away,
# makes memory that cannot be resized, or swaps what others hold.
ANY_TIME = [
    name
    for name in EDITS
    if not name.startswith("params_")
    and "processes" not in name
    and name not in ("param_moved_to_a_group", "state_none")
]
GRABS = [
    name for name in HELD if name not in ("numpy", "tensor_swapped") and "processes" not in name
]
ACTIONS = st.one_of(
    st.tuples(st.just("step"), st.integers(1, SETTLED)),
    st.tuples(st.just("step without"), st.sets(st.integers(0, 3))),
    st.tuples(st.just("fail"), st.just(None)),
    st.tuples(st.just("edit"), st.sampled_from(ANY_TIME)),
    st.tuples(st.just("grab"), st.sampled_from(GRABS)),
    st.tuples(st.just("change"), st.integers(0, 3)),
    st.tuples(st.just("release"), st.integers(0, 3)),
)


@settings(
    max_examples=150, deadline=None, derandomize=True, database=None, report_multiple_bugs=False
)
@given(
    case=st.sampled_from([case for case in CLASSES if case.name in ("AdamW", "SGD")]),
    actions=st.lists(ACTIONS, min_size=8, max_size=30),
)
def test_random_histories(case: Case, actions: list[tuple[str, Any]]) -> None:
    twins = Twins(case).step(2)
    held: list[tuple[Callable, str, list[Any]]] = []
    for action, what in actions:
        if action == "step":
            twins.step(what)
        elif action == "step without":
            twins.step(wanted=lambda _, index, without=what: index not in without)
        elif action == "fail":
            go_on_after_a_failure(twins, 0)
        elif action == "edit":
            twins.each(EDITS[what])
        elif action == "grab" and (names := state_names(twins.ours, params_of(twins.ours)[0])):
            grab, change = HELD[what]
            name = names[0]
            handles = twins.each(lambda o, params, g=grab, n=name: g(o.state, params[0], n))
            held.append((change, name, handles))
            del handles
        elif action == "change" and what < len(held):
            change, name, handles = held[what]
            for number, optimizer in enumerate(twins):
                change(handles[number], params_of(optimizer)[0], name)
            del handles
        elif action == "release" and what < len(held):
            del held[what]
    twins.step(2)


@classes("Adam", "Adagrad")
def test_a_held_step_counter_may_change(case: Case) -> None:
    twins = Twins(case).step(SETTLED)
    steps = twins.each(lambda o, params: o.state[params[0]]["step"])
    for change in (
        lambda t: t.fill_(20),
        lambda t: assign(t, torch.tensor(3.0, device=t.device)),
        Tensor.zero_,
    ):
        twins.step(SETTLED)
        for step in steps:
            change(step)
        twins.step(SETTLED)


@every_class
def test_a_wrapper_that_shares_the_attributes(case: Case) -> None:
    """As Lightning's: another object of a derived class with the same attributes."""

    def wrap(optimizer: Optimizer, _: list[Tensor]) -> Optimizer:
        wrapper = object.__new__(type("Wrapper", (type(optimizer),), {}))
        vars(wrapper).update(vars(optimizer))
        return wrapper

    twins = Twins(case).step(SETTLED)
    originals = list(twins)
    twins.ours, twins.stock = twins.each(wrap)
    twins.step(SETTLED)
    for optimizer in twins:
        for p in params_of(optimizer):
            for name in state_names(optimizer, p):
                optimizer.state[p][name] = optimizer.state[p][name] * 2
    twins.ours, twins.stock = originals
    twins.step(SETTLED)


# --- Autograd ----------------------------------------------------------------------------------


@every_class
def test_autograd_knows_that_parameters_changed(case: Case) -> None:
    used, idle = make_params([(3,), (3,)])
    optimizer = case.ours([used, idle])
    for step in range(SETTLED):
        losses = [p.square().sum() for p in (used, idle)]
        version = idle._version
        set_grads([used], step)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            losses[0].backward()
        losses[1].backward()  # nothing happened to this one
        assert idle._version == version
        idle.grad = None


@every_class
def test_gradients_are_only_read(case: Case) -> None:
    twins = Twins(Case(case.name, {**case.options, "weight_decay": 0.1}))
    for _ in range(SETTLED):
        twins.set_grads()
        grads = [p.grad for p in params_of(twins.ours)]
        before = [(g.clone(), g._version) for g in grads]
        twins.ours.step()
        for p, grad, (value, version) in zip(params_of(twins.ours), grads, before, strict=True):
            assert p.grad is grad
            assert torch.equal(grad, value)
            assert grad._version == version


@every_class
def test_one_optimizer_per_parameter_steps_in_backward(case: Case) -> None:
    def train(make: Callable[..., Optimizer]) -> list[Parameter]:
        params = make_params()
        optimizers = {p: make([p]) for p in params}

        def update(p: Tensor) -> None:
            optimizers[p].step()
            optimizers[p].zero_grad()

        for p in params:
            p.register_post_accumulate_grad_hook(update)
        for _ in range(SETTLED):
            sum(p.square().sum() for p in params).backward()
        return params

    torch.testing.assert_close(train(case.ours), train(case.stock))


@every_class
def test_no_grad_and_inference_mode(case: Case) -> None:
    twins = Twins(case).step()
    for mode in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        with mode():
            twins.step(SETTLED)
    twins.step()


@with_fused
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_step_counters_follow_the_default_dtype(
    case: Case, options: dict[str, Any], dtype: torch.dtype
) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        twins = Twins(case)
        twins.ours = case.ours(make_params(), **options)
        reference = case.stock(make_params(), **options)
        for optimizer in (twins.ours, reference):
            set_grads(params_of(optimizer), 0)
            optimizer.step()
        pairs = zip(contents_of(twins.ours), contents_of(reference), strict=True)
        for (_, mine), (_, theirs) in pairs:
            steps = as_stock_counts(mine, theirs).get("step"), theirs.get("step")
            assert getattr(steps[0], "dtype", None) == getattr(steps[1], "dtype", None)
        twins = Twins(case).step(SETTLED)
    finally:
        torch.set_default_dtype(before)


# --- Threads -----------------------------------------------------------------------------------

LARGE = [(300, 401), (5,), (17, 1001), (33333,)]  # above the size where threads are used


def train_large(case: Case, dtype: torch.dtype = torch.float32) -> list[Any]:
    optimizer = case.ours(make_params(LARGE, dtype))
    for step in range(3):
        set_grads(params_of(optimizer), step)
        optimizer.step()
    return contents_of(optimizer)


@pytest.fixture
def _restored_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@every_class
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("_restored_threads")
def test_same_bits_for_any_number_of_threads(case: Case, dtype: torch.dtype) -> None:
    results = []
    for threads in (1, 1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(train_large(case, dtype))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0)


@every_class
def test_two_optimizers_in_two_threads(case: Case) -> None:
    alone = train_large(case)
    with ThreadPoolExecutor(2) as pool:
        for result in pool.map(train_large, [case] * 4):
            torch.testing.assert_close(result, alone, rtol=0, atol=0)


class Watched:
    """A stepper that notes whether another Python thread got anywhere while it computed."""

    def __init__(self, stepper: Any, progress: list[int]) -> None:
        self.stepper, self.progress, self.advanced = stepper, progress, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stepper, name)

    def __enter__(self) -> None:
        self.stepper.__enter__()

    def __exit__(self, *error: object) -> None:
        self.stepper.__exit__(*error)

    def run(self, *args: Any) -> Any:
        before = self.progress[0]
        result = self.stepper.run(*args)
        self.advanced |= self.progress[0] > before
        return result


def test_python_threads_run_while_a_step_computes() -> None:
    p = Parameter(torch.zeros(4_000_000))
    optimizer = fusedopt.AdamW([p])
    p.grad = torch.ones_like(p)
    optimizer.step()

    progress, done = [0], threading.Event()
    watched = vars(optimizer)["_stepper"] = Watched(vars(optimizer)["_stepper"], progress)

    def count() -> None:
        while not done.wait(1e-5):
            progress[0] += 1

    # Python itself never makes a thread wait for another one in this test: the counter advances
    # within run() only if that gives the interpreter's lock away.
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    thread = threading.Thread(target=count)
    thread.start()
    try:
        for _ in range(200):  # a busy machine may not find time for the thread at once
            optimizer.step()
            if watched.advanced:
                break
    finally:
        done.set()
        sys.setswitchinterval(interval)
        thread.join()
    assert watched.advanced


# --- torch.compile, GradScaler -----------------------------------------------------------------


@every_class
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's
def test_compiled_training(case: Case) -> None:
    def train(make: Callable[..., Optimizer], transform: Callable) -> list[Parameter]:
        params = make_params([(4, 3), (3,)])
        optimizer = make(params)

        def step(x: Tensor) -> Tensor:
            optimizer.zero_grad()
            loss = (x @ params[0] + params[1]).square().mean()
            loss.backward()
            optimizer.step()
            return loss.detach()

        step = transform(step)
        losses = [step(random_tensor((5, 4), torch.float32, i)) for i in range(SETTLED)]
        return [*params, *losses]

    torch._dynamo.reset()
    ours = train(case.ours, lambda f: torch.compile(f, backend="eager"))
    torch.testing.assert_close(ours, train(case.stock, lambda f: f))


def scaled_step(
    optimizer: Optimizer, scaler: torch.amp.GradScaler, grads: list[Tensor], clip: bool
) -> None:
    optimizer.zero_grad()
    params = params_of(optimizer)
    loss = sum((p * g).sum() for p, g in zip(params, grads, strict=True))
    scaler.scale(loss).backward()
    if clip:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(params, 0.5)
    before = [p.grad.clone() for p in params]
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close([p.grad for p in params], before, equal_nan=True)


@every_class
@pytest.mark.parametrize("clip", [False, True], ids=["plain", "unscaled_by_hand"])
@pytest.mark.parametrize("bad", [set(), {0}, {0, 1, 4}], ids=str)
def test_grad_scaler(case: Case, clip: bool, bad: set[int]) -> None:
    """As stock without a scaler, which leaves out the steps in `bad`, where gradients overflow."""
    ours, stock = case.ours(make_params()), case.stock(make_params())
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=1024.0, growth_interval=2)
    for step in range(2 * SETTLED):
        set_grads(params_of(stock), step)
        grads = [p.grad.clone() for p in params_of(stock)]
        if step in bad:
            grads[1][3] = torch.inf
            with nothing_written(ours):
                scaled_step(ours, scaler, grads, clip)
        else:
            scaled_step(ours, scaler, grads, clip)
            if clip:
                nn.utils.clip_grad_norm_(params_of(stock), 0.5)
            stock.step()
        assert_same(ours, stock)
    assert not {"grad_scale", "found_inf"} & vars(ours).keys()


@every_class
def test_grad_scaler_with_parameters_left_to_torch(case: Case) -> None:
    ours, stock = case.ours(shared_params()), case.stock(shared_params())
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=1024.0)
    with falls_back():
        for step in range(SETTLED):
            set_grads(params_of(stock), step)
            ours.zero_grad()
            for p, q in zip(params_of(ours), params_of(stock), strict=True):
                scaler.scale((p * q.grad).sum()).backward()
            scaler.step(ours)
            scaler.update()
            stock.step()
            assert_same(ours, stock)


# --- What is left to torch ---------------------------------------------------------------------


class Bag(nn.Module):
    """An embedding with sparse gradients before a dense layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(10, 3, sparse=True)
        self.layer = nn.Linear(3, 2)

    def set_grads(self, step: int) -> None:
        self.zero_grad()
        index = torch.tensor([step % 10, 3, 3, 7])
        self.layer(self.embedding(index)).square().sum().backward()


@needs_sparse
@pytest.mark.parametrize(
    "case",
    [
        Case("SGD", {"lr": 0.1}),
        Case("SGD", {"lr": 0.1, "momentum": 0.9}),
        Case("SGD", {"lr": 0.1, "maximize": True}),
        Case("Momentum", {"lr": 0.1}),
        Case("Adagrad", {"lr": 0.1, "initial_accumulator_value": 0.1, "lr_decay": 0.1}),
    ],
    ids=str,
)
def test_sparse_gradients(case: Case) -> None:
    models = Bag(), Bag()
    ours, stock = case.ours(models[0].parameters()), case.stock(models[1].parameters())
    with falls_back():
        for step in range(SETTLED):
            for model, optimizer in zip(models, (ours, stock), strict=True):
                model.set_grads(step)
                optimizer.step()
            assert_same(ours, stock)


@needs_sparse
@pytest.mark.parametrize("name", ["Adam", "AdamW", "RMSprop"])
@pytest.mark.parametrize("dense_steps", [0, SETTLED], ids=["at_once", "later"])
@pytest.mark.parametrize("last", [False, True], ids=["sparse_first", "sparse_last"])
@pytest.mark.filterwarnings("ignore:.*to torch's own")
def test_sparse_gradients_are_refused_as_by_stock(name: str, dense_steps: int, last: bool) -> None:
    model = Bag()
    params = list(model.parameters())[:: -1 if last else 1]
    ours, stock = getattr(fusedopt, name)(params), STOCK[name](copy.deepcopy(params))
    for step in range(dense_steps):
        set_grads(params, step)
        ours.step()
    model.set_grads(0)
    for p, q in zip(params, params_of(stock), strict=True):
        q.grad = p.grad
    with nothing_written(ours):
        mine = error_of(ours.step)
    assert mine == error_of(stock.step) is not None


@needs_sparse
@pytest.mark.parametrize("name", ["Adam", "AdamW", "RMSprop"])
@pytest.mark.filterwarnings("ignore:.*to torch's own")
def test_a_refusal_also_leaves_the_others_that_torch_takes(name: str) -> None:
    model, others = Bag(), shared_params()
    optimizer = getattr(fusedopt, name)([*others, *model.parameters()])
    set_grads(others, 0)
    model.set_grads(0)
    with nothing_written(optimizer), pytest.raises(RuntimeError, match="sparse gradients"):
        optimizer.step()


@pytest.mark.parametrize(
    "case",
    [
        Case("Adam", {"weight_decay": 0.1}),
        Case("AdamW", {"weight_decay": 0.1}),
        Case("SGD", {"momentum": 0.9, "nesterov": True}),
        Case("RMSprop", {"momentum": 0.9}),
        Case("Adagrad", {"lr_decay": 0.1}),
    ],
    ids=str,
)
def test_differentiable(case: Case) -> None:
    def through_two_steps(make: Callable[..., Optimizer]) -> list[Tensor]:
        weight, *grads = (t.detach().requires_grad_() for t in make_params([(4, 3)] * 3))
        p = weight.clone()
        optimizer = make([p], differentiable=True)
        for grad in grads:
            p.grad = grad
            optimizer.step()
        p.square().sum().backward()
        return [p.detach(), weight.grad, *(g.grad for g in grads)]

    with falls_back():
        ours = through_two_steps(case.ours)
    torch.testing.assert_close(ours, through_two_steps(case.stock))
    assert all(gradient.any() for gradient in ours)


@every_class
def test_meta_parameters(case: Case) -> None:
    with torch.device("meta"):
        p = Parameter(torch.zeros(2, 3))
        p.grad = torch.zeros(2, 3)
    optimizer = case.ours([p, *make_params()])
    reference = case.stock(make_params())
    with falls_back():
        for step in range(SETTLED):
            set_grads(params_of(optimizer)[1:], step)
            set_grads(params_of(reference), step)
            optimizer.step()
            reference.step()
    torch.testing.assert_close(params_of(optimizer)[1:], params_of(reference))
    assert {t.device.type for k, t in optimizer.state[p].items() if k != "step"} == {"meta"}


@every_class
def test_wrapper_subclasses(case: Case) -> None:
    """A tensor made of others: its own memory, if any, holds nothing."""

    def make() -> list[Parameter]:
        first, second, third = make_params([(2, 3), (2, 3), (4,)])
        return [Parameter(TwoTensor(first.data, second.data)), third]

    def parts(optimizer: Optimizer) -> list[Tensor]:
        wrapper, plain = params_of(optimizer)
        return [wrapper.data.a, wrapper.data.b, plain.data]

    ours, stock = case.ours(make()), case.stock(make())
    with falls_back():
        for step in range(SETTLED):
            for optimizer in (ours, stock):
                wrapper, plain = params_of(optimizer)
                a, b = (random_tensor((2, 3), torch.float32, 10 * step + i) for i in range(2))
                wrapper.grad = TwoTensor(a, b)
                set_grads([plain], step)
                optimizer.step()
    torch.testing.assert_close(parts(ours), parts(stock))


@every_class
def test_fake_tensors(case: Case) -> None:
    def describe(optimizer: Optimizer, params: list[Tensor]) -> dict[str, tuple]:
        for grad in (torch.ones(2, 3), torch.zeros(2, 3)):
            params[0].grad = grad
            optimizer.step()
        return {k: (type(v), v.shape, v.dtype) for k, v in optimizer.state[params[0]].items()}

    with FakeTensorMode(), falls_back():
        mine, theirs = Twins(case, lambda: [Parameter(torch.zeros(2, 3))]).each(describe)
    assert mine == theirs


class Tagged(Parameter):
    """A subclass that is a plain tensor all the same."""


@every_class
def test_plain_subclasses_need_no_fallback(case: Case) -> None:
    Twins(case, lambda: [Tagged(p.detach()) for p in make_params()]).step(SETTLED)


@every_class
def test_parameters_that_share_memory(case: Case) -> None:
    with falls_back():
        Twins(case, shared_params).step(SETTLED)


@every_class
def test_parameters_that_come_to_share_memory(case: Case) -> None:
    twins = Twins(case).step(SETTLED)
    twins.each(lambda _, params: assign(params[1], params[3].data.view(-1)[2:19]))
    with falls_back():
        twins.step(SETTLED)
    twins.each(lambda _, params: assign(params[1], params[1].data.clone()))
    twins.step(SETTLED)


@every_class
def test_memory_shared_since_a_failed_step(case: Case) -> None:
    twins = Twins(case).step(SETTLED)
    twins.each(lambda _, params: assign(params[1], params[3].data.view(-1)[2:19]))
    twins.set_grads()
    last = params_of(twins.ours)[3]
    data, last.data = last.data, torch.ones(2)
    with pytest.raises(RuntimeError, match="its shape is"):
        twins.ours.step()
    last.data = data
    with falls_back():
        twins.step(SETTLED)


@every_class
def test_two_optimizers_of_the_same_parameters(case: Case) -> None:
    twins, other = Twins(case), Case("SGD", {"lr": 0.1, "momentum": 0.5})
    others = [other.ours(params_of(twins.ours)), other.stock(params_of(twins.stock))]
    for _ in range(SETTLED):
        twins.step()
        for optimizer in others:
            optimizer.step()
        assert_same(*others)
        assert_same(*twins)


def twice() -> list[Parameter]:
    return [p for p in make_params() for _ in range(2)]


@every_class
@pytest.mark.filterwarnings("ignore:.*duplicate parameters", "ignore:.*to torch's own")
def test_a_parameter_twice_in_a_group(case: Case) -> None:
    Twins(case, twice).step(SETTLED)


@classes("Adam", "AdamW", "SGD", "RMSprop", "Adagrad")
@pytest.mark.parametrize("foreach", [None, True], ids=str)
@pytest.mark.filterwarnings("ignore:.*duplicate parameters", "ignore:.*to torch's own")
def test_torch_takes_over_by_its_for_loop(case: Case, foreach: bool | None) -> None:
    """Foreach would give other numbers for a parameter that is there twice."""
    twins = Twins(case, twice)
    twins.ours = case.ours(twice(), foreach=foreach)
    twins.step(SETTLED)


@every_class
@pytest.mark.parametrize("steps", [0, SETTLED], ids=["at_once", "later"])
@pytest.mark.filterwarnings("ignore:.*to torch's own")
def test_a_parameter_that_overlaps_itself_is_refused(case: Case, steps: int) -> None:
    """As torch refuses to write to an expanded tensor."""
    first, second = make_params([(3,), (4,)])
    optimizer = case.ours([first, second])
    for step in range(steps):
        set_grads([first, second], step)
        optimizer.step()
    second.data = torch.ones(1).expand(4)
    set_grads([first, second], steps)
    with nothing_written(optimizer), pytest.raises(RuntimeError, match="single memory location"):
        optimizer.step()
    second.data = torch.ones(4)
    optimizer.step()


@pytest.mark.parametrize("name", ["Adam", "AdamW", "RMSprop"])
@pytest.mark.filterwarnings("ignore:.*to torch's own")
def test_capturable_is_refused_as_by_stock(name: str) -> None:
    """On the CPU; on a device, it is not refused."""
    ours = getattr(fusedopt, name)(on_cpu(params()), capturable=True)
    stock = STOCK[name](on_cpu(params()), capturable=True, foreach=False)
    for optimizer in (ours, stock):
        set_grads(params_of(optimizer), 0)
    with nothing_written(ours):
        mine = error_of(ours.step)
    assert mine == error_of(stock.step) is not None


# --- Bad steps ---------------------------------------------------------------------------------


def first_state(optimizer: Optimizer, param: Tensor) -> str:
    return state_names(optimizer, param)[0]


def replace_state(value: Callable[[Tensor], Any]) -> Callable:
    def spoil(optimizer: Optimizer, param: Tensor) -> None:
        name = first_state(optimizer, param)
        optimizer.state[param][name] = value(optimizer.state[param][name])

    return spoil


def replace_step(value: Any) -> Callable:
    return lambda optimizer, param: optimizer.state[param].update(step=value)


BAD_STEPS: dict[str, tuple[Callable[[Optimizer, Tensor], None], str]] = {
    "shape": (
        lambda _, p: assign(p, torch.ones(2, 5)),
        r"its shape is \(2, 5\), its gradient's \(4, 3\)",
    ),
    "dimensions": (lambda _, p: assign(p, torch.ones(12)), "its shape is"),
    "complex": (lambda _, p: assign(p, p.data.to(torch.complex64)), "not both complex"),
    "state_shape": (replace_state(lambda t: t[:2]), r"has the shape \(2, 3\), not \(4, 3\)"),
    "state_dims": (replace_state(lambda t: t.view(-1)), "has the shape"),
    "state_int": (replace_state(Tensor.int), "is not a dense floating-point tensor"),
    "state_complex": (replace_state(lambda t: t.to(torch.complex64)), "not both complex"),
    "state_on_meta": (replace_state(lambda t: t.to("meta")), "is not a dense floating-point"),
    "state_sparse": (replace_state(Tensor.to_sparse), "is not a dense floating-point"),
    "state_number": (replace_state(lambda _: 1.0), "is not a dense floating-point tensor"),
    "state_not_a_dict": (lambda o, p: o.state.update({p: [1]}), "its state is not a dict"),
}

# Where steps are counted. (SGD's only state is created when it is missing, as by stock.)
BAD_COUNTED_STEPS = {
    "state_deleted": (lambda o, p: o.state[p].pop(first_state(o, p)), "lacks"),
    "step_deleted": (lambda o, p: o.state[p].pop("step"), "lacks"),
    "step_number": (replace_step(3), r"state\['step'\] is not a"),
    "step_two": (replace_step(torch.ones(2)), r"state\['step'\] is not a"),
    "step_on_meta": (replace_step(torch.ones((), device="meta")), r"state\['step'\] is not a"),
}


def bad_model(named: bool) -> list[dict[str, Any]]:
    """Two groups; of "late", nothing is known until the bad step."""
    good, late, other, bad = make_params([(3, 2), (17,), (), (4, 3)])
    groups = [[("good", good), ("late", late)], [("other", other), ("bad", bad)]]
    if not named:
        groups = [[param for _, param in group] for group in groups]
    return [{"params": group} for group in groups]


@pytest.mark.parametrize(
    ("case", "spoil", "message"),
    [
        pytest.param(
            case,
            spoil,
            message,
            id=f"{case.name}-{name}",
            marks=[needs_sparse] if name == "state_sparse" else [],
        )
        for case in CLASSES
        for name, (spoil, message) in {
            **BAD_STEPS,
            **({} if case.name in ("SGD", "Momentum") else BAD_COUNTED_STEPS),
        }.items()
    ],
)
@pytest.mark.parametrize("named", [False, True], ids=["unnamed", "named"])
@pytest.mark.filterwarnings("ignore:Casting complex values")
def test_bad_steps_name_the_parameter_and_write_nothing(
    case: Case, spoil: Callable, message: str, named: bool
) -> None:
    optimizer = case.ours(bad_model(named))
    params = params_of(optimizer)
    for step in range(SETTLED):
        set_grads(params, step, wanted=lambda _, index: index != 1)
        optimizer.step()
    set_grads(params, SETTLED)
    spoil(optimizer, params[-1])
    place = "parameter 1 of group 1" + (" (bad)" if named else "")
    with (
        nothing_written(optimizer),
        pytest.raises(RuntimeError, match=f"^{re.escape(place)}: .*{message}"),
    ):
        optimizer.step()


@every_class
def test_a_bad_first_step_writes_nothing(case: Case) -> None:
    optimizer = case.ours(bad_model(named=False))
    params = params_of(optimizer)
    set_grads(params, 0)
    params[-1].data = torch.ones(2, 5)
    with nothing_written(optimizer), pytest.raises(RuntimeError, match="its shape is"):
        optimizer.step()
    params[-1].data = torch.ones(4, 3)
    optimizer.step()


BAD_OPTIONS = {
    "no_number": (lambda group: group.update(lr="fast"), TypeError),
    "missing": (lambda group: group.pop("lr"), KeyError),
    "no_params": (lambda group: group.pop("params"), KeyError),
}


@table("bad", BAD_OPTIONS)
@every_class
def test_bad_groups_write_nothing(case: Case, bad: tuple) -> None:
    spoil, error = bad
    optimizer = case.ours(bad_model(named=False))
    params = params_of(optimizer)
    for step in range(2):
        set_grads(params, step)
        optimizer.step()
    before = copy.deepcopy(contents_of(optimizer))
    group = optimizer.param_groups[1]
    kept = dict(group)
    spoil(group)
    with pytest.raises(error, match="group 1"):
        optimizer.step()
    group.update(kept)
    torch.testing.assert_close(contents_of(optimizer), before, rtol=0, atol=0)
    optimizer.step()


# --- Faults of stock torch 2.13, which ours must not share -------------------------------------
#
# Each test compares ours, with fused=True, with the for-loop. Whether the stock of the day still
# has the fault is printed (pytest -rP shows it), and fails nothing.

every_fused_class = classes("Adam", "AdamW", "SGD", "Adagrad")


def outcome(optimizer: Optimizer, train: Callable[[Optimizer], None]) -> list[Tensor] | Exception:
    try:
        train(optimizer)
    except Exception as error:
        return error
    return [p.detach() for p in params_of(optimizer)]


def check_fault(
    case: Case,
    make: Callable[[], list[Parameter]],
    train: Callable[[Optimizer], None],
) -> list[Tensor]:
    """Half precision is compared with the float32 for-loop, rounded once."""
    dtype = make()[0].dtype
    reference = case.stock([Parameter(p.detach().float()) for p in make()])
    train(reference)
    expected = [p.detach().to(dtype) for p in params_of(reference)]
    fused = outcome(case.stock(make(), fused=True), train)
    error = error_of(torch.testing.assert_close, fused, expected)
    print(f"stock's fused step {'has this fault' if error else 'is right'}")
    ours = outcome(case.ours(make(), fused=True), train)
    torch.testing.assert_close(ours, expected)
    return ours


@every_fused_class
def test_fault_1_strides_of_the_gradient(case: Case) -> None:
    def train(optimizer: Optimizer) -> None:
        for step in range(3):
            params_of(optimizer)[0].grad = random_tensor((3, 4), torch.float32, step).t()
            optimizer.step()

    check_fault(case, lambda: make_params([(4, 3)]), train)


@every_fused_class
def test_fault_2_a_late_gradient(case: Case) -> None:
    def train(optimizer: Optimizer) -> None:
        for step in range(4):
            set_grads(params_of(optimizer), step, wanted=PATTERNS["late"])
            optimizer.step()

    check_fault(case, make_params, train)


@every_fused_class
def test_fault_3_a_skipped_first_step(case: Case) -> None:
    def train(optimizer: Optimizer) -> None:
        scaler = torch.amp.GradScaler(DEVICE.type, init_scale=1024.0)
        # Memory that stock does not initialize had better not be zero by chance.
        del [torch.full((64,), torch.nan) for _ in range(50)][:]
        for step in range(3):
            (p,) = params_of(optimizer)
            p.grad = scaler.scale(random_tensor((64,), torch.float32, step))
            if step == 0:
                p.grad[0] = torch.inf
            scaler.step(optimizer)
            scaler.update()

    check_fault(case, lambda: make_params([(64,)]), train)


@every_fused_class
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fault_4_half_precision_moves(case: Case, dtype: torch.dtype) -> None:
    def make() -> list[Parameter]:
        return make_params([(64,)], dtype)

    def train(optimizer: Optimizer) -> None:
        (p,) = params_of(optimizer)
        p.grad = random_tensor((64,), dtype, 1).to(p.dtype)
        optimizer.step()

    (after,) = check_fault(case, make, train)
    assert (after != make()[0]).any()
