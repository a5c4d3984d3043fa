"""THE TABLE: every rule with the options that change its arithmetic, as (class, options) rows.

A new optimizer gets every parity test by adding its rows here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

import fusedopt


@dataclass(frozen=True)
class Case:
    """One optimizer with one set of options."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        options = ",".join(f"{k}={v}" for k, v in self.options.items())
        return f"{self.name}({options})"

    def ours(self, params: Any, **more: Any) -> torch.optim.Optimizer:
        return getattr(fusedopt, self.name)(params, **self.options, **more)

    def stock(self, params: Any, **more: Any) -> torch.optim.Optimizer:
        options = {"foreach": False, **self.options, **more}
        if self.name != "Momentum":
            return getattr(torch.optim, self.name)(params, **options)
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
