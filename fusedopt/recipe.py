"""The usual recipe around a stock optimizer, against which the options of the step are measured.

Everything is done by torch, one thing after the other, on copies of the parameters in a wider
type; whatever our step does on the way has its own line here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from fusedopt.cases import Case
from fusedopt.extension import kernels

Grads = Sequence[Tensor | None]


class Recipe:
    """Stock's step on copies of parameters, and what is done before and after it by hand.

    Args:
        case: The optimizer; of its options only those that stock has are looked at.
        params: What to start from.
        dtype: The copies' type, in which everything is computed; of complex parameters it is that
            of the real parts.
        max_grad_norm: As our optimizers' option of that name, and so are all that follow.
        grad_norm_type: 2.0 or inf.
        max_grad_value: None: don't.
        nonfinite: ``"propagate"`` or ``"skip"``.
        ema_decay: None: no average.
        ema_warmup: Whether the decay grows from step to step.
        l1: 0.0: none.

    Attributes:
        params: The copies.
        optimizer: The stock optimizer.
        ema: The averages, one per parameter.
        norm: Of all gradients in the last step, before clipping; nan when it was not measured.
        skipped: How many steps were skipped.
    """

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
        """One step on the mean of the micro-batches' gradients, or their sum over a divisor."""
        for i, param in enumerate(self.params):
            grads = [g.to(param.dtype) for b in micro_batches if (g := b[i]) is not None]
            total: Any = sum(grads)
            param.grad = total / (divisor or len(micro_batches)) if grads else None
        active = [i for i, p in enumerate(self.params) if p.grad is not None]
        present = [p.grad for p in self.params if p.grad is not None]
        self.norm = math.nan
        if self.max_grad_norm is not None or self.nonfinite != "propagate":
            some = [g for g in present if g.numel()]  # torch has no inf-norm of nothing
            self.norm = torch.nn.utils.get_total_norm(some, self.grad_norm_type).item()
        if self.nonfinite == "skip" and not all(torch.isfinite(g).all() for g in present):
            self.skipped += 1
            return
        if self.max_grad_norm is not None and self.max_grad_norm != math.inf:
            clipped = [p for p in self.params if p.numel()]
            torch.nn.utils.clip_grad_norm_(clipped, self.max_grad_norm, self.grad_norm_type)
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
                    self.ema[i].lerp_(param, 1 - decay)  # as torch.optim.swa_utils

    @torch.no_grad()
    def resume(self, ours: Any) -> None:
        """Go on from what one of our optimizers has: weights, state, counters and averages."""
        saved = ours.state_dict()["state"]
        known = set(kernels.family_states(ours._family))
        if not isinstance(self.optimizer, torch.optim.SGD):  # it counts no steps, ours may
            known.add("step")
        copies = {
            i: {
                n: v.clone().cpu() if n == "step" else v.clone() for n, v in s.items() if n in known
            }
            for i, s in saved.items()
        }
        groups = self.optimizer.state_dict()["param_groups"]
        # Loading casts the state to the parameters' type.
        self.optimizer.load_state_dict({"state": copies, "param_groups": groups})
        params = [p for group in ours.param_groups for p in group["params"]]
        for i, (mine, param) in enumerate(zip(self.params, params, strict=True)):
            mine.copy_(whole(ours, param))
            state = saved.get(i, {})
            self.ema[i].copy_(state.get("ema", mine))
            self.updates[i] = int(state.get("step", 0))


def whole(optimizer: Any, param: Tensor) -> Tensor:
    """A parameter's weight as precise as its optimizer has it.

    Returns:
        float32 when there is a hidden part beside a parameter of 16 bits; else the parameter.
    """
    state: dict[str, Tensor] = vars(optimizer)["state"].get(param, {})
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
