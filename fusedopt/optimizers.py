"""The optimizers: data and documentation. The arithmetic is in ``csrc/rules.h``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fusedopt import device
from fusedopt.optimizer import FusedOptimizer
from fusedopt.state import like


class Adam(FusedOptimizer, torch.optim.Adam):
    """Adam (Kingma & Ba 2015, Algorithm 1), a drop-in replacement of ``torch.optim.Adam``.

    Takes the arguments of :class:`torch.optim.Adam` and keeps its state: ``step`` (0-dim),
    ``exp_avg``, ``exp_avg_sq`` and, with ``amsgrad`` (Reddi et al. 2018, Algorithm 2),
    ``max_exp_avg_sq``, each of the parameter's shape and, unless ``state_dtype`` says otherwise,
    dtype. ``foreach`` and ``fused`` change nothing, but for parameters that are left to torch.

    Raises:
        ValueError: An argument is out of its range.
    """

    _family = "adam"
    _stock = torch.optim.Adam


class AdamW(FusedOptimizer, torch.optim.AdamW):
    """AdamW (Loshchilov & Hutter 2019, Algorithm 2), a drop-in for ``torch.optim.AdamW``.

    :class:`Adam` whose weight decay multiplies the weight by ``1 - lr * weight_decay`` instead of
    entering the gradient.

    Raises:
        ValueError: An argument is out of its range.
    """

    _family = "adam"
    _stock = torch.optim.AdamW


class SGD(FusedOptimizer, torch.optim.SGD):
    """Stochastic gradient descent, a drop-in replacement of ``torch.optim.SGD``.

    With ``momentum`` (Sutskever et al. 2013, in torch's form) keeps ``momentum_buffer``, of the
    parameter's shape and, unless ``state_dtype`` says otherwise, dtype.

    Raises:
        ValueError: An argument is out of its range, or Nesterov momentum has no momentum.
    """

    _family = "sgd"
    _stock = torch.optim.SGD

    def _new_state(self, param: Tensor, name: str, dtype: torch.dtype) -> Tensor:
        # The CPU's first update writes the buffer without reading it. (Codes of 8 bits are made
        # from a value on the CPU, wherever they will be.)
        if param.device.type == "cpu" and self.state_dtype != torch.uint8:
            return like(param, dtype)
        return super()._new_state(param, name, dtype)

    def _new_entries(
        self, param: Tensor, group: dict[str, Any], state: dict[str, Any], name: str
    ) -> dict[str, Tensor]:
        entries = super()._new_entries(param, group, state, name)
        # A device tells the first update, which is not dampened, by its counter. So a buffer that
        # someone has dropped takes the counter with it.
        starts = state.get("momentum_buffer") is None and group["momentum"] and group["dampening"]
        if "step" in {name, *state} and starts and device.on_device(param):
            zero = torch.zeros((), dtype=self._step_dtype(param, group), device=param.device)
            entries["step"] = zero
        return entries


class Momentum(SGD):
    """Gradient descent along an exponentially weighted average of the gradients.

    s_1 = g_1, then s_t = b s_(t-1) + (1 - b) g_t, and w <- w - lr s_t, with b the momentum: the
    average stays on the gradient's scale, where ``torch.optim.SGD(momentum=b)`` sums up to
    1 / (1 - b) times as much. It is SGD whose dampening equals its momentum, and loads and writes
    SGD's checkpoints.

    Args:
        params: Parameters, named parameters or parameter groups.
        lr: Learning rate, at least 0 (default: 1e-3).
        momentum: b, at least 0 (default: 0.9).
        dampening: None: follows the momentum, also when a scheduler changes it. A number stays.
        weight_decay: L2 penalty, at least 0 (default: 0).
        maximize: Ascend instead (default: False).
        **options: Those of the step (:class:`fusedopt.optimizer.FusedOptimizer`).

    Raises:
        ValueError: An argument is out of its range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        dampening: float | None = None,
        weight_decay: float | Tensor = 0,
        *,
        maximize: bool = False,
        **options: Any,
    ) -> None:
        self._follows = dampening is None  # for add_param_group, which the base class calls
        super().__init__(
            params,
            lr,
            momentum,
            momentum if dampening is None else dampening,
            weight_decay,
            maximize=maximize,
            **options,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its ``dampening`` follows its momentum unless it is given a number."""
        group = dict(param_group)
        if "dampening_follows" not in self.defaults:
            self.defaults["dampening_follows"] = self._follows
        follows = self.defaults["dampening_follows"]
        if "dampening" in group:
            follows = group["dampening_follows"] = group["dampening"] is None
        if follows:
            group["dampening"] = group.get("momentum", self.defaults["momentum"])
        super().add_param_group(group)

    def state_dict(self) -> dict[str, Any]:
        """As stock's; the dampening is that of the next step."""
        self._follow()
        return super().state_dict()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore; a checkpoint of SGD follows when its dampening equals its momentum."""
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("dampening_follows", group["dampening"] == group["momentum"])

    def _follow(self) -> None:
        for group in self.param_groups:
            if group.get("dampening_follows"):
                group["dampening"] = group["momentum"]

    def _fused_step(self, stream: bool = False) -> None:
        self._follow()
        super()._fused_step(stream)


class RMSprop(FusedOptimizer, torch.optim.RMSprop):
    """RMSprop (Tieleman & Hinton 2012), a drop-in replacement of ``torch.optim.RMSprop``.

    Keeps ``step``, ``square_avg``, with ``momentum`` also ``momentum_buffer``, and with
    ``centered`` (Graves 2013, equations 38 to 45) also ``grad_avg``. ``eps`` is added to the
    root.

    Raises:
        ValueError: An argument is out of its range.
    """

    _family = "rmsprop"
    _stock = torch.optim.RMSprop


class Adagrad(FusedOptimizer, torch.optim.Adagrad):
    """Adagrad (Duchi, Hazan & Singer 2011), a drop-in replacement of ``torch.optim.Adagrad``.

    Keeps ``step`` and ``sum``, which starts as ``initial_accumulator_value``. ``eps`` is added to
    the root.

    Raises:
        ValueError: An argument is out of its range.
    """

    _family = "adagrad"
    _stock = torch.optim.Adagrad

    def _new_state(self, param: Tensor, name: str, dtype: torch.dtype) -> Tensor:
        value = self.defaults["initial_accumulator_value"]
        return like(param, dtype).fill_(complex(value, value) if param.is_complex() else value)
