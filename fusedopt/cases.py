"""THE TABLE: every rule with the options that change its arithmetic, as (class, options) rows.

A new optimizer gets every parity test, and its rows in ``fusedopt parity``, by adding them here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

import fusedopt

HALF = (torch.bfloat16, torch.float16)
REAL = (torch.float64, torch.float32, *HALF)
DTYPES = (*REAL, torch.complex64, torch.complex128)


@dataclass(frozen=True)
class Case:
    """One optimizer with one set of options.

    Attributes:
        name: The class, of ``fusedopt`` and (but for Momentum) of ``torch.optim``.
        options: Arguments that both take.
        pipeline: Arguments that only ours takes (:class:`fusedopt.options.StepOptions`).
        micro_batches: How many gradients a step is the mean of; all but the last go through
            ``accumulate()``.
        dtypes: The parameters' dtypes that the case makes sense for.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    pipeline: dict[str, Any] = field(default_factory=dict)
    micro_batches: int = 1
    dtypes: tuple[torch.dtype, ...] = DTYPES

    def __str__(self) -> str:
        options = [f"{k}={v}" for k, v in {**self.options, **self.pipeline}.items()]
        options += [f"micro_batches={self.micro_batches}"] * (self.micro_batches > 1)
        return f"{self.name}({','.join(options)})"

    @property
    def plain(self) -> bool:
        """Whether stock has all of it."""
        return not self.pipeline and self.micro_batches == 1

    def ours(self, params: Any, **more: Any) -> Any:
        """Our optimizer."""
        return getattr(fusedopt, self.name)(params, **self.options, **self.pipeline, **more)

    def stock(self, params: Any, **more: Any) -> torch.optim.Optimizer:
        """The stock class, as a for-loop, without the pipeline's options."""
        options = {"foreach": False, **self.options, **more}
        made: torch.optim.Optimizer
        if self.name != "Momentum":
            made = getattr(torch.optim, self.name)(params, **options)
            return made
        momentum = options.setdefault("momentum", 0.9)
        options.setdefault("dampening", momentum)
        return torch.optim.SGD(params, **options)


CASES = [
    *(
        Case("AdamW", options)
        for options in (
            {},
            {"lr": 0.01, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1},
            {"lr": 0.01, "amsgrad": True, "weight_decay": 0.05},
            {"maximize": True, "weight_decay": 0.1},
        )
    ),
    Case("Adam"),
    Case("Adam", {"lr": 0.01, "betas": [0.0, 0.9]}),
    Case("Adam", {"lr": 0.01, "amsgrad": True, "weight_decay": 0.05, "maximize": True}),
    Case("Adam", {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    Case("SGD", {"lr": 0.1}),
    Case("SGD", {"lr": 0.05, "weight_decay": 0.1, "maximize": True}),
    Case("SGD", {"lr": 0.05, "momentum": 0.9}),
    Case("SGD", {"lr": 0.05, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.01}),
    Case("SGD", {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    Case("SGD", {"lr": 0.05, "momentum": 0.9, "maximize": True}),
    Case("Momentum", {"lr": 0.05}),
    Case("Momentum", {"lr": 0.05, "momentum": 0.99, "weight_decay": 0.1}),
    *(
        Case("RMSprop", {"lr": 0.01, **options})
        for options in (
            {},
            {"alpha": 0.9, "eps": 1e-6, "weight_decay": 0.1},
            {"momentum": 0.9},
            {"centered": True},
            {"momentum": 0.5, "centered": True, "weight_decay": 0.01, "maximize": True},
        )
    ),
    *(
        Case("Adagrad", options)
        for options in (
            {},
            {"lr": 0.1, "lr_decay": 0.01, "weight_decay": 0.1},
            {"lr": 0.1, "initial_accumulator_value": 0.5, "eps": 1e-6, "maximize": True},
        )
    ),
]

# One row of options for each rule, that all of the pipeline goes with.
_RULES: list[tuple[str, dict[str, Any]]] = [
    ("AdamW", {"lr": 0.01, "weight_decay": 0.1}),
    ("Adam", {"lr": 0.01, "weight_decay": 0.1}),
    ("SGD", {"lr": 0.05, "momentum": 0.9}),
    ("Momentum", {"lr": 0.05}),
    ("RMSprop", {"lr": 0.01, "momentum": 0.9}),
    ("Adagrad", {"lr": 0.1, "initial_accumulator_value": 0.125}),
]

# What torch's users do around the step: our options, micro-batches, the dtypes that take them.
_STAGES: list[tuple[dict[str, Any], int, tuple[torch.dtype, ...]]] = [
    ({"max_grad_norm": 10.0}, 1, DTYPES),
    ({"max_grad_norm": 0.5, "grad_norm_type": math.inf}, 1, REAL),
    ({"max_grad_value": 0.5}, 1, REAL),
    ({"nonfinite": "skip"}, 1, DTYPES),
    ({"l1": 0.1}, 1, REAL),
    ({"ema_decay": 0.95}, 1, DTYPES),
    ({"ema_decay": 0.95, "ema_warmup": True}, 1, DTYPES),
    ({}, 3, DTYPES),
    ({"weight_precision": "master"}, 1, HALF),
    ({"weight_precision": "remainder"}, 1, (torch.bfloat16,)),
    ({"weight_precision": "kahan"}, 1, HALF),
    ({"weight_precision": "stochastic"}, 1, HALF),
    ({"state_dtype": torch.float32}, 1, HALF),
    ({"state_dtype": torch.bfloat16}, 1, (torch.float32, torch.bfloat16)),
    ({"state_dtype": torch.uint8}, 1, (torch.float32, torch.bfloat16)),
]

PIPELINE = [
    Case(name, options, stage, micro_batches, dtypes)
    for name, options in _RULES
    for stage, micro_batches, dtypes in _STAGES
]
