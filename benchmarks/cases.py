"""What is measured: parameter shapes, optimizers, and the contenders that step them.

All contenders of a case share its gradients and have parameters and state of their own.
"""

from __future__ import annotations

import functools
import inspect
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import fusedopt

Shape = tuple[int, ...]
Step = Callable[[], None]


@dataclass(frozen=True)
class Case:
    """A model, as an optimizer sees it. All parameters are float32."""

    name: str
    shapes: tuple[Shape, ...]
    group_each: bool = False  # one parameter group per tensor

    @property
    def elements(self) -> int:
        """Elements of all parameters together."""
        return sum(math.prod(shape) for shape in self.shapes)


def _gpt2() -> tuple[Shape, ...]:
    """GPT-2 124M; as in the original, linear weights are (in, out) and the head is tied."""
    width = 768
    norm: tuple[Shape, ...] = ((width,), (width,))

    def linear(inputs: int, outputs: int) -> tuple[Shape, ...]:
        return (inputs, outputs), (outputs,)

    attention = linear(width, 3 * width) + linear(width, width)
    mlp = linear(width, 4 * width) + linear(4 * width, width)
    embeddings = ((50257, width), (1024, width))
    return embeddings + 12 * (norm + attention + norm + mlp) + norm


def _resnet50() -> tuple[Shape, ...]:
    """ResNet-50 (v1.5, as torchvision's) for 1000 classes."""

    def conv(inputs: int, outputs: int, size: int) -> tuple[Shape, ...]:
        return (outputs, inputs, size, size), (outputs,), (outputs,)  # and its batch norm

    shapes = conv(3, 64, 7)
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += conv(channels, width, 1) + conv(width, width, 3) + conv(width, 4 * width, 1)
            if block == 0:
                shapes += conv(channels, 4 * width, 1)
            channels = 4 * width
    return (*shapes, (1000, channels), (1000,))


CASES = {
    case.name: case
    for case in (
        Case("1x50M", ((50_000_000,),)),
        Case("gpt2-124m", _gpt2()),
        Case("resnet50-like", _resnet50()),
        Case("1000x64", 1000 * ((64,),)),
        Case("1000x4096", 1000 * ((4096,),)),
        Case("3000x3500", 3000 * ((3500,),)),  # the case of pytorch issue 3929
        Case("1000x64-groups", 1000 * ((64,),), group_each=True),
    )
}

# Next to nothing to compute or to move: what remains is the work of the host.
HOST_CASE = Case("1000x2", 1000 * ((2,),))


@dataclass(frozen=True)
class Optimizer:
    """A stock optimizer and our twin, with options that give the same updates."""

    name: str
    stock: type[torch.optim.Optimizer]
    ours: type[torch.optim.Optimizer]
    states: int  # tensors per parameter
    options: dict[str, Any]
    stock_options: dict[str, Any] = field(default_factory=dict)  # that only the stock class needs
    deepspeed_options: dict[str, Any] | None = None  # None: DeepSpeed has no such CPU optimizer

    def bytes_per_step(self, case: Case) -> int:
        """Bytes that a step cannot avoid to move: all is read, all but the gradient written."""
        return 4 * case.elements * (2 * (1 + self.states) + 1)

    def bytes_held(self, case: Case) -> int:
        """Bytes of parameters, gradients and state."""
        return 4 * case.elements * (2 + self.states)


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
            deepspeed_options={"adamw_mode": True},
        ),
        Optimizer(
            "adam",
            torch.optim.Adam,
            fusedopt.Adam,
            states=2,
            options={**_ADAM, "weight_decay": 0.0},
            deepspeed_options={"adamw_mode": False},
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


class AbsentError(Exception):
    """A contender does not exist here; the message says why."""


def gradients(case: Case) -> list[Tensor]:
    """The case's gradients: the same at each call."""
    generator = torch.Generator().manual_seed(0)
    return [1e-3 * torch.randn(shape, generator=generator) for shape in case.shapes]


def _parameters(case: Case, grads: list[Tensor]) -> list[Any]:
    """New parameters, or groups of one parameter each, that have these gradients."""
    params = []
    for grad in grads:
        param = torch.nn.Parameter(grad.clone())  # any finite numbers of usual size will do
        param.grad = grad
        params.append(param)
    return [{"params": [param]} for param in params] if case.group_each else params


def _torch(
    implementation: str | None, case: Case, optimizer: Optimizer, grads: list[Tensor]
) -> Step:
    if implementation is None:
        options = {"foreach": False}
    elif implementation in inspect.signature(optimizer.stock).parameters:
        options = {implementation: True}
    else:
        raise AbsentError(f"torch.optim.{optimizer.stock.__name__} has no {implementation}=True")
    params = _parameters(case, grads)
    return optimizer.stock(params, **optimizer.options, **optimizer.stock_options, **options).step


def _deepspeed(case: Case, optimizer: Optimizer, grads: list[Tensor]) -> Step:
    if optimizer.deepspeed_options is None:
        raise AbsentError(f"DeepSpeed has no {optimizer.name} for the CPU")
    new = _load_deepspeed()
    if isinstance(new, str):
        raise AbsentError(new)
    return new(_parameters(case, grads), **optimizer.options, **optimizer.deepspeed_options).step


@functools.cache
def _load_deepspeed() -> Callable[..., Any] | str:
    """DeepSpeed's class once it has compiled its extension, or why there is none.

    That takes a compiler and about a minute at its first use on a machine, and may fail in any
    number of ways, none of which is our benchmark's.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            DeepSpeedCPUAdam([torch.nn.Parameter(torch.zeros(1))])
    except Exception as error:
        message = str(error).strip().partition("\n")[0]  # a failed build's goes on for pages
        return f"{type(error).__name__}: {message}"
    return DeepSpeedCPUAdam


def _ours(case: Case, optimizer: Optimizer, grads: list[Tensor]) -> Step:
    return optimizer.ours(_parameters(case, grads), **optimizer.options).step


def _limit(case: Case, optimizer: Optimizer, grads: list[Tensor]) -> Step:
    """Our own step with a rule that moves the same bytes and computes nothing of use."""
    ours: Any = optimizer.ours(_parameters(case, grads), **optimizer.options)
    ours.step()  # SGD's state is not initialised before
    return functools.partial(ours._fused_step, stream=True)


# Each returns the function that takes one step, or raises AbsentError.
CONTENDERS: dict[str, Callable[[Case, Optimizer, list[Tensor]], Step]] = {
    "for-loop": functools.partial(_torch, None),
    "foreach": functools.partial(_torch, "foreach"),
    "fused": functools.partial(_torch, "fused"),
    "DeepSpeed": _deepspeed,
    "ours": _ours,
    "limit": _limit,
}
STOCK = ("for-loop", "foreach", "fused")

# What is measured unless cases or optimizers are named.
DEFAULT_GRID = {
    "adamw": tuple(CASES),
    **dict.fromkeys(
        ("sgd", "momentum", "rmsprop", "adagrad"),
        ("1x50M", "resnet50-like", "1000x64", "1000x4096"),
    ),
}
