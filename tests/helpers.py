"""What the drop-in tests share: small models, and the same run by ours and by stock."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from fusedopt.cases import Case
from fusedopt.parity import as_stock_counts

# One row for each class; what its options do to the numbers is tested over cases.CASES.
CLASSES = [
    Case("Adam", {"lr": 0.01, "weight_decay": 0.1}),
    Case("AdamW", {"lr": 0.01, "weight_decay": 0.1}),
    Case("SGD", {"lr": 0.1, "momentum": 0.9}),
    Case("RMSprop", {"lr": 0.01, "momentum": 0.9, "centered": True}),
    Case("Adagrad", {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.1}),
    Case("Momentum", {"lr": 0.1, "dampening": 0.9}),
]

# What accumulate() keeps in a parameter's state.
ACCUMULATORS = ("grad_sum", "grad_count")

# Enough steps for an optimizer to have seen everything unchanged, and to trust what it knows.
SETTLED = 5

# Where models are, "cpu" or another device; see conftest.py.
DEVICE = torch.get_default_device()


def not_on_fake(lack: str) -> pytest.MarkDecorator:
    """Skip on the emulated GPU, for what it lacks."""
    return pytest.mark.skipif(DEVICE.type == "fake", reason=f"the emulated GPU has {lack}")


needs_host_memory = pytest.mark.skipif(DEVICE.type != "cpu", reason="of memory that is the host's")
needs_sparse = not_on_fake("no sparse tensors")
needs_zero_tensors = not_on_fake("no tensors without memory")  # torch's stand-ins for zeros
needs_running_statistics = not_on_fake("no batch norm that writes its running statistics")

SHAPES = [(4, 3), (17,), (), (2, 3, 2, 2)]


def table(name: str, rows: dict[str, Any]) -> pytest.MarkDecorator:
    """Parametrize by a dict of named rows, each a value or a pytest.param with marks."""
    return pytest.mark.parametrize(name, rows.values(), ids=rows.keys())


def classes(*names: str) -> pytest.MarkDecorator:
    """Parametrize by the rows of these classes."""
    return table("case", {case.name: case for case in CLASSES if case.name in names})


every_class = classes(*(case.name for case in CLASSES))


def every_class_with(options: dict[str, dict[str, Any]]) -> pytest.MarkDecorator:
    """Parametrize "case" and "options": all rows but those that construction refuses."""
    coarse = (torch.bfloat16, torch.uint8)  # differences of averages need more bits
    rows = [
        pytest.param(case, more, id=f"{case.name}-{name}")
        for case in CLASSES
        for name, more in options.items()
        if not (case.options.get("centered") and more.get("state_dtype") in coarse)
    ]
    return pytest.mark.parametrize(("case", "options"), rows)


def random_tensor(shape: Sequence[int], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    parts = torch.randn(*shape, 2, generator=generator, dtype=torch.float64, device="cpu")
    return (torch.view_as_complex(parts) if dtype.is_complex else parts[..., 0]).to(DEVICE, dtype)


def make_params(
    shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32
) -> list[Parameter]:
    return [Parameter(random_tensor(shape, dtype, seed)) for seed, shape in enumerate(shapes)]


def on_cpu(params: Sequence[Tensor]) -> list[Parameter]:
    return [Parameter(p.detach().cpu()) for p in params]


def params_of(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def set_grads(
    params: Sequence[Tensor], step: int, wanted: Callable[[int, int], bool] = lambda *_: True
) -> None:
    """The gradients of a step: the same for every model, whatever its history.

    ``wanted(step, index)`` says whether a parameter gets one.
    """
    for index, param in enumerate(params):
        grad = random_tensor(param.shape, param.dtype, 1000 * (step + 1) + index)
        param.grad = grad.to(param.device) if wanted(step, index) else None


def contents_of(optimizer: Optimizer) -> list[tuple[Tensor, Any]]:
    """All that a step may write: each parameter, and its state as far as there is any.

    Goes past the attribute ``state``: who asks for that makes our next step look at all of it.
    """
    state = vars(optimizer)["state"]
    contents = [(p.detach(), state.get(p, {})) for p in params_of(optimizer)]
    if type(optimizer) is torch.optim.SGD:  # keeps a counter that it has loaded, and never counts
        contents = [(p, {k: v for k, v in s.items() if k != "step"}) for p, s in contents]
    return contents


def without_window(optimizer: Optimizer) -> list[tuple[Tensor, dict[str, Any]]]:
    """What a window may not write: contents_of, less the window's own.

    State of no steps is none: a rule's state comes with the accumulators, so that checkpoints of a
    first window are what stock expects.
    """
    contents = [
        (p, {k: v for k, v in state.items() if k not in ACCUMULATORS and v is not None})
        for p, state in contents_of(optimizer)
    ]
    return [(p, state if written(state) else {}) for p, state in contents]


def assert_same(
    ours: Optimizer, stock: Optimizer, without: Sequence[str] = (), **tolerance: Any
) -> None:
    """All parameters, their state and step counters agree, by default to torch's tolerances.

    But for the state of some names.
    """
    for (p, mine), (q, theirs) in zip(contents_of(ours), contents_of(stock), strict=True):
        mine, theirs = (
            {n: value for n, value in state.items() if n not in without and value is not None}
            for state in (mine, theirs)
        )
        if not mine and theirs.get("step", 1) == 0:  # stock Adagrad creates its state early
            theirs = {}
        if not theirs and not written(mine):
            mine = {}
        mine = as_stock_counts(mine, theirs)
        torch.testing.assert_close((p, mine), (q, theirs), **tolerance)


def written(state: dict[str, Any]) -> bool:
    """Whether a step has written to a parameter's state.

    A device decides by itself to skip a step, and then the state of a first step is there as it
    was made; that of SGD without dampening, which counts no steps, is zeros.
    """
    if not state:
        return False
    if DEVICE.type == "cpu" or "step" in state:
        return bool(state.get("step", 1) != 0)
    return "momentum_buffer" not in state or bool(state["momentum_buffer"].any())


@contextmanager
def nothing_written(optimizer: Optimizer) -> Iterator[None]:
    """The block leaves parameters, state and step counters as they are, to the bit.

    A device decides by itself to skip a step. Then the state of a first step, which nobody has
    written to, is there, as stock's is, and the counters of stock's constructor are on the device.
    """
    before, keys = copy.deepcopy(contents_of(optimizer)), set(vars(optimizer)["state"])
    yield
    after = contents_of(optimizer)
    if DEVICE.type == "cpu":
        assert set(vars(optimizer)["state"]) == keys
    else:
        pairs = zip(after, before, strict=True)
        assert not any(written(state) for (_, state), (_, known) in pairs if not known)
        after = [
            (p, as_stock_counts({n: s[n] for n in known}, known) if isinstance(s, dict) else s)
            for (p, s), (_, known) in zip(after, before, strict=True)
        ]
    torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True, check_stride=True)


@contextmanager
def falls_back() -> Iterator[None]:
    """The block leaves something to torch, and says so exactly once. (Torch may warn, too.)"""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    ours = [w for w in caught if str(w.message).startswith("fusedopt.")]
    assert [w.category for w in ours] == [UserWarning]
    assert "to torch's own" in str(ours[0].message)


def state_names(optimizer: Optimizer, param: Tensor) -> list[str]:
    """The names of the state tensors that have the parameter's shape."""
    return [name for name in optimizer.state[param] if name != "step"]


def complete_state(optimizer: Optimizer) -> None:
    """Give stock Adagrad, which does so in its constructor only, the state that it lacks."""
    if type(optimizer) is torch.optim.Adagrad:
        start = optimizer.defaults["initial_accumulator_value"]
        fresh = torch.optim.Adagrad(params_of(optimizer), initial_accumulator_value=start)
        for param, state in fresh.state.items():
            optimizer.state[param] = optimizer.state.get(param) or state


def through_a_file(state: Any) -> Any:
    """What comes back from a file that may hold nothing but plain data."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class Twins:
    """The same model twice: trained by ours and by stock torch's for-loop.

    ``make()`` gives the parameters or groups, and is called once for each.
    """

    def __init__(self, case: Case, make: Callable[[], Any] = make_params, **options: Any) -> None:
        self.ours = case.ours(make(), **options)
        self.stock = case.stock(make(), **options)
        self.steps = 0

    def __iter__(self) -> Iterator[Optimizer]:
        return iter((self.ours, self.stock))

    def each(self, change: Callable[[Optimizer, list[Tensor]], Any]) -> list[Any]:
        """Do the same to both: ``change(optimizer, its parameters)``."""
        return [change(optimizer, params_of(optimizer)) for optimizer in self]

    def set_grads(self, **how: Any) -> None:
        for optimizer in self:
            set_grads(params_of(optimizer), self.steps, **how)
        self.steps += 1

    def step(self, n: int = 1, **how: Any) -> Twins:
        """Take n steps, and compare everything after each."""
        for _ in range(n):
            self.set_grads(**how)
            for optimizer in self:
                optimizer.step()
            assert_same(*self)
        return self
