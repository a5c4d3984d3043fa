"""What is measured: cases, optimizers, and the contenders that step them.

All contenders of a case share its gradients and have parameters and state of their own.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import io
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import fusedopt
from fusedopt.models import Model
from fusedopt.optimizer import FusedOptimizer

Step = Callable[[], object]

CPU = torch.device("cpu")
MAX_NORM = 1e9  # no gradient is that large; torch multiplies them by 1, which takes as long
COPIED_AT_ONCE = 1 << 30


@dataclass(frozen=True)
class Optimizer:
    """A stock optimizer and our twin, with options that give the same updates."""

    name: str
    stock: Callable[..., torch.optim.Optimizer]
    ours: type[FusedOptimizer]
    states: int  # tensors per parameter
    options: dict[str, Any]
    stock_options: dict[str, Any] = field(default_factory=dict)  # that only the stock class needs


# Learning rates are so small that nothing grows or vanishes over the steps that a benchmark takes.
_ADAM = {"lr": 1e-5, "betas": (0.9, 0.999), "eps": 1e-8}
OPTIMIZERS = {
    optimizer.name: optimizer
    for optimizer in (
        Optimizer(
            "adamw",
            torch.optim.AdamW,
            fusedopt.AdamW,
            states=2,
            options={**_ADAM, "weight_decay": 0.01},
        ),
        Optimizer(
            "adam",
            torch.optim.Adam,
            fusedopt.Adam,
            states=2,
            options={**_ADAM, "weight_decay": 0.0},
        ),
        Optimizer(
            "sgd",
            torch.optim.SGD,
            fusedopt.SGD,
            states=1,
            options={"lr": 1e-5, "momentum": 0.9},
        ),
        Optimizer(
            "momentum",
            torch.optim.SGD,
            fusedopt.Momentum,
            states=1,
            options={"lr": 1e-5, "momentum": 0.9},
            stock_options={"dampening": 0.9},
        ),
        Optimizer(
            "rmsprop",
            torch.optim.RMSprop,
            fusedopt.RMSprop,
            states=1,
            options={"lr": 1e-5, "alpha": 0.99, "eps": 1e-8},
        ),
        Optimizer(
            "adagrad",
            torch.optim.Adagrad,
            fusedopt.Adagrad,
            states=1,
            options={"lr": 1e-5, "eps": 1e-10},
        ),
    )
}


@dataclass(frozen=True)
class Case:
    """A model's update.

    Attributes:
        model: Its parameters.
        optimizer: What updates them.
        device: Where.
        dtype: Of all parameters, instead of the model's own (which are float32 if it has none).
        clip: With the gradients' norm clipped before, or in the step.
    """

    model: Model
    optimizer: Optimizer
    device: torch.device = CPU
    dtype: torch.dtype | None = None
    clip: bool = False

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """One per parameter."""
        if self.dtype is None and self.model.dtypes is not None:
            return self.model.dtypes
        return len(self.model.shapes) * (self.dtype or torch.float32,)

    @property
    def bytes_of_parameters(self) -> int:
        """Bytes of all parameters; gradients, and each state tensor, have as many."""
        sizes = zip(self.model.shapes, self.dtypes, strict=True)
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in sizes)

    @property
    def bytes_per_step(self) -> int:
        """Bytes that a step cannot avoid to move.

        All is read, and all but the gradients is written; a norm reads these once more.
        """
        return self.bytes_of_parameters * (2 * (1 + self.optimizer.states) + 1 + self.clip)


class Gradients:
    """A case's gradients, and the parameters of all contenders, which share them."""

    def __init__(self, case: Case) -> None:
        self._group_each = case.model.group_each
        self._params: list[list[nn.Parameter]] = []
        generator = torch.Generator(case.device).manual_seed(0)
        self.tensors: list[Tensor] = [
            torch.randn(shape, dtype=dtype, device=case.device, generator=generator)
            for shape, dtype in zip(case.model.shapes, case.dtypes, strict=True)
        ]

    def parameters(self) -> list[Any]:
        """New parameters, or groups of one parameter each, that have these gradients."""
        # Any finite numbers of usual size will do.
        params = [nn.Parameter(grad.clone()) for grad in self.tensors]
        self._params.append(params)
        self.give()
        return [{"params": [param]} for param in params] if self._group_each else params

    def give(self) -> None:
        """Let all parameters have the gradients, whatever they have now."""
        for params in self._params:
            for param, grad in zip(params, self.tensors, strict=True):
                param.grad = grad

    def move(self) -> None:
        """Put the gradients elsewhere in memory, as every backward pass does."""
        self.tensors = [grad.clone() for grad in self.tensors]
        self.give()


class AbsentError(Exception):
    """A contender does not exist here; the message says why."""


def _clipped(optimizer: torch.optim.Optimizer, clip: bool) -> Step:
    if not clip:
        return optimizer.step
    params = [p for group in optimizer.param_groups for p in group["params"]]

    def step() -> None:
        nn.utils.clip_grad_norm_(params, MAX_NORM, foreach=True)
        optimizer.step()

    return step


def _torch(implementation: str | None, case: Case, gradients: Gradients) -> Step:
    kind = case.optimizer
    if implementation is None:
        options = {"foreach": False}
    elif implementation in inspect.signature(kind.stock).parameters:
        options = {implementation: True}
    else:
        raise AbsentError(f"torch's {kind.name} has no {implementation}=True")
    params = gradients.parameters()
    return _clipped(kind.stock(params, **kind.options, **kind.stock_options, **options), case.clip)


def _compiled(case: Case, gradients: Gradients) -> Step:
    kind = case.optimizer
    torch.compiler.reset()  # or, after a few cases, torch would stop compiling, without a word
    optimizer = kind.stock(gradients.parameters(), **kind.options, **kind.stock_options)
    step: Step = torch.compile(_clipped(optimizer, case.clip))
    return step


def _ours(case: Case, gradients: Gradients) -> Step:
    return _our_optimizer(case, gradients).step


def _our_optimizer(case: Case, gradients: Gradients) -> FusedOptimizer:
    options: dict[str, Any] = {"max_grad_norm": MAX_NORM} if case.clip else {}
    return case.optimizer.ours(gradients.parameters(), **case.optimizer.options, **options)


def _limit(case: Case, gradients: Gradients) -> Step:
    """As many bytes, and nothing computed of use."""
    if case.device.type != "cpu":
        return copy(case.bytes_per_step, case.device)
    # Our own step with another rule, which reads and writes the same.
    ours = _our_optimizer(case, gradients)
    ours.step()  # SGD's state is not initialised before
    return functools.partial(ours._fused_step, stream=True)


def copy(moved: int, device: torch.device) -> Step:
    """A copy within a device's memory that moves so many bytes: half are read, half written."""
    whole, rest = divmod(moved // 2, COPIED_AT_ONCE)
    size = COPIED_AT_ONCE if whole else rest
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def step() -> None:
        for _ in range(whole):
            target.copy_(source)
        target[:rest].copy_(source[:rest])

    return step


@dataclass(frozen=True)
class Peer:
    """Another library's optimizer.

    Attributes:
        name: The contender's.
        path: Module and class.
        optimizers: Which of ``OPTIMIZERS`` it is, and the arguments that make it so beside
            theirs.
        devices: The types of devices that it is for.
    """

    name: str
    path: str
    optimizers: dict[str, dict[str, Any]]
    devices: tuple[str, ...] = ("cuda",)

    @property
    def package(self) -> str:
        """What it is imported from."""
        return self.path.partition(".")[0].partition(":")[0]

    def new(self, params: list[Any], options: dict[str, Any]) -> torch.optim.Optimizer:
        """One of its optimizers."""
        module, _, name = self.path.partition(":")
        made: torch.optim.Optimizer = getattr(importlib.import_module(module), name)(
            params, **options
        )
        return made


_ADAMW_MODE: dict[str, dict[str, Any]] = {
    "adamw": {"adam_w_mode": True},
    "adam": {"adam_w_mode": False},
}
_TE = "transformer_engine.pytorch.optimizers"
_PLAIN: dict[str, Any] = {"kahan_sum": False}  # which optimi adds for 16 bits
_ANY = ("cpu", "cuda")
# torchao's optimizers are left out: all keep state in fewer bits, so none does the same work.
PEERS = (
    Peer(
        "DeepSpeed",
        "deepspeed.ops.adam:DeepSpeedCPUAdam",
        {"adamw": {"adamw_mode": True}, "adam": {"adamw_mode": False}},
        devices=("cpu",),
    ),
    Peer(
        "DeepSpeed",
        "deepspeed.ops.adagrad:DeepSpeedCPUAdagrad",
        {"adagrad": {}},
        devices=("cpu",),
    ),
    Peer("DeepSpeed", "deepspeed.ops.adam:FusedAdam", _ADAMW_MODE),
    Peer("Apex", "apex.optimizers:FusedAdam", _ADAMW_MODE),
    Peer("Apex", "apex.optimizers:FusedSGD", {"sgd": {}, "momentum": {"dampening": 0.9}}),
    Peer("Apex", "apex.optimizers:FusedAdagrad", {"adagrad": {}}),
    Peer("TransformerEngine", f"{_TE}:FusedAdam", _ADAMW_MODE),
    Peer("TransformerEngine", f"{_TE}:FusedSGD", {"sgd": {}, "momentum": {"dampening": 0.9}}),
    Peer("bitsandbytes", "bitsandbytes.optim:AdamW", {"adamw": {}}, _ANY),
    Peer("bitsandbytes", "bitsandbytes.optim:Adam", {"adam": {}}, _ANY),
    Peer("bitsandbytes", "bitsandbytes.optim:SGD", {"sgd": {}}, _ANY),
    Peer("bitsandbytes", "bitsandbytes.optim:RMSprop", {"rmsprop": {}}, _ANY),
    Peer("bitsandbytes", "bitsandbytes.optim:Adagrad", {"adagrad": {}}, _ANY),
    Peer("optimi", "optimi:AdamW", {"adamw": _PLAIN}, _ANY),
    Peer("optimi", "optimi:Adam", {"adam": _PLAIN}, _ANY),
    Peer("optimi", "optimi:SGD", {"sgd": _PLAIN}, _ANY),
)


def _peer(name: str, case: Case, gradients: Gradients) -> Step:
    fault = fault_of(name, case)
    if fault:
        raise AbsentError(fault)
    kind = case.optimizer
    peer = _find_peer(name, kind.name, case.device)
    options = {**kind.options, **peer.optimizers[kind.name]}
    with _quiet():
        return _clipped(peer.new(gradients.parameters(), options), case.clip)


def fault_of(name: str, case: Case) -> str:
    """Why a contender cannot take part, as far as that can be known before; or nothing."""
    if not any(peer.name == name for peer in PEERS):
        return ""
    return _fault(name, case.optimizer.name, case.device)


def _find_peer(name: str, optimizer: str, device: torch.device) -> Peer:
    for peer in PEERS:
        if peer.name == name and optimizer in peer.optimizers and device.type in peer.devices:
            return peer
    raise AbsentError(f"has no {optimizer} for {device.type}")


@functools.cache
def _fault(name: str, optimizer: str, device: torch.device) -> str:
    """Why a peer cannot take part; empty when it can.

    Some compile what they need when first used, which takes minutes and may fail in any number of
    ways, none of which is our benchmark's.
    """
    peer = None
    try:
        peer = _find_peer(name, optimizer, device)
        with _quiet():
            same = _does_the_same(peer, OPTIMIZERS[optimizer], device)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and peer and error.name == peer.package:
            return "not installed"
        return reason(error)
    return "" if same else f"its {optimizer} is another one than torch's"


def _does_the_same(peer: Peer, kind: Optimizer, device: torch.device) -> bool:
    """Whether a peer's updates are stock torch's, but for rounding."""
    case = Case(Model("small", ((3, 5), (300,))), kind, device)
    options = {**kind.options, "lr": 0.01}

    def updated(new: Callable[[list[Any]], torch.optim.Optimizer]) -> Tensor:
        gradients = Gradients(case)
        params = gradients.parameters()
        optimizer = new(params)
        for _ in range(3):
            before = [grad.clone() for grad in gradients.tensors]
            optimizer.step()
            for grad, unchanged in zip(gradients.tensors, before, strict=True):
                if not torch.equal(grad, unchanged):
                    raise AbsentError(
                        f"its {kind.name} overwrites gradients; contenders share them"
                    )
                grad.mul_(-0.7)  # with constant ones, averages of them would go unnoticed
        return torch.cat([param.detach().flatten() for param in params])

    start = torch.cat([grad.flatten() for grad in Gradients(case).tensors])
    stock = updated(lambda p: kind.stock(p, **options, **kind.stock_options, foreach=False))
    other = updated(lambda p: peer.new(p, {**options, **peer.optimizers[kind.name]}))
    return bool((other - stock).abs().max() <= 1e-3 * (stock - start).abs().max())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def reason(error: BaseException) -> str:
    """An exception in one line."""
    message = str(error).strip().partition("\n")[0]  # a failed build's goes on for pages
    return message if isinstance(error, AbsentError) else f"{type(error).__name__}: {message}"


# Each returns the function that takes one step, or raises AbsentError.
CONTENDERS: dict[str, Callable[[Case, Gradients], Step]] = {
    "for-loop": functools.partial(_torch, None),
    "foreach": functools.partial(_torch, "foreach"),
    "fused": functools.partial(_torch, "fused"),
    "compiled": _compiled,
    **{name: functools.partial(_peer, name) for name in dict.fromkeys(p.name for p in PEERS)},
    "ours": _ours,
    "limit": _limit,
}
TORCH = ("for-loop", "foreach", "fused", "compiled")
# Compiling takes minutes for a model of many tensors.
DEFAULT_CONTENDERS = tuple(name for name in CONTENDERS if name != "compiled")
