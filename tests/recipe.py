"""The usual recipe around a stock optimizer, against which the options of the step are tested.

Everything is done by torch, one thing after the other, on copies of the parameters in a wider
type; whatever our step does on the way has its own line here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from cases import Case
from torch import Tensor
from torch.nn import Parameter

Grads = Sequence[Tensor | None]


class Recipe:
    """Stock's step on copies of parameters, and what is done before and after it by hand."""

    def __init__(
        self,
        case: Case,
        params: Sequence[Tensor],
        *,
        dtype: torch.dtype = torch.float64,
        max_grad_norm: float | None = None,
        grad_norm_type: float = 2.0,
        max_grad_value: float | None = None,
        nonfinite: str = "propagate",
        ema_decay: float | None = None,
        ema_warmup: bool = False,
        l1: float = 0.0,
    ) -> None:
        self.params = [
            Parameter(p.detach().clone().to(dtype.to_complex() if p.is_complex() else dtype))
            for p in params
        ]
        self.optimizer = case.stock(self.params)
        self.max_grad_norm = max_grad_norm
        self.grad_norm_type = grad_norm_type
        self.max_grad_value = max_grad_value
        self.nonfinite = nonfinite
        self.ema_decay = ema_decay
        self.ema_warmup = ema_warmup
        self.l1 = l1
        self.ema = [p.detach().clone() for p in self.params]
        self.updates = [0] * len(self.params)
        self.norm = math.nan
        self.skipped = 0

    def step(self, micro_batches: Sequence[Grads], divisor: float | None = None) -> None:
        """One step on the mean of the micro-batches' gradients."""
        for i, param in enumerate(self.params):
            grads = [b[i].to(param.dtype) for b in micro_batches if b[i] is not None]
            param.grad = sum(grads) / (divisor or len(micro_batches)) if grads else None
        active = [i for i, p in enumerate(self.params) if p.grad is not None]
        grads = [self.params[i].grad for i in active]
        self.norm = math.nan
        if self.max_grad_norm is not None or self.nonfinite != "propagate":
            some = [g for g in grads if g.numel()]  # torch has no inf-norm of nothing
            self.norm = torch.nn.utils.get_total_norm(some, self.grad_norm_type).item()
        if self.nonfinite == "skip" and not all(torch.isfinite(g).all() for g in grads):
            self.skipped += 1
            return
        if self.max_grad_norm is not None and self.max_grad_norm != math.inf:
            some = [p for p in self.params if p.numel()]
            torch.nn.utils.clip_grad_norm_(some, self.max_grad_norm, self.grad_norm_type)
        if self.max_grad_value is not None:
            torch.nn.utils.clip_grad_value_(self.params, self.max_grad_value)
        self.optimizer.step()
        lr = self.optimizer.param_groups[0]["lr"]
        with torch.no_grad():
            for i in active:
                param = self.params[i]
                if self.l1:
                    param.copy_(param.sign() * (param.abs() - lr * self.l1).clamp_min(0))
                self.updates[i] += 1
                if self.ema_decay is not None:
                    t, decay = self.updates[i], self.ema_decay
                    if self.ema_warmup:
                        decay = min(decay, (1 + t) / (10 + t))
                    self.ema[i].mul_(decay).add_(param, alpha=1 - decay)


def whole(optimizer: Any, param: Tensor) -> Tensor:
    """A parameter's weight as precise as its optimizer has it."""
    state = vars(optimizer)["state"].get(param, {})
    value = param.detach()
    if "master" in state:
        return state["master"]
    if "remainder" in state:
        bits = value.view(torch.int16).to(torch.int32) * 65536 + state["remainder"].to(torch.int32)
        return bits.view(torch.float32)
    if "kahan" in state:
        away = torch.full_like(value, torch.inf).copysign(value)
        unit = (value.nextafter(away).double() - value.double()).abs()
        return (value.double() + state["kahan"].double() * unit / 65536).float()
    return value
