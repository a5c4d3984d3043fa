"""The options of a step that torch's optimizers do not have.

They belong to the optimizer, not to its parameter groups: plain attributes that may be changed
between steps and that ``state_dict`` leaves out. What each does is in ``docs/pipeline.md``.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch

from fusedopt.arguments import (
    below_one,
    finite_positive,
    flag,
    not_negative,
    number,
    one_of,
    optional,
    positive,
)
from fusedopt.device import on_device
from fusedopt.extension import kernels

NORM_TYPES = {2.0: kernels.NormType.two, math.inf: kernels.NormType.infinity}
WEIGHT_PRECISIONS = kernels.WeightPrecision.__members__
STATE_DTYPES = (None, torch.float32, torch.bfloat16, torch.uint8)
NONFINITE = ("propagate", "skip", "raise")


def _norm_type(name: str, value: Any) -> float:
    checked = number(name, value)
    if checked not in NORM_TYPES:
        raise ValueError(f"{name} must be 2.0 or inf: {value!r}")
    return checked


class Option:
    """An attribute that is checked when it is set."""

    def __init__(self, default: Any, check: Callable[[str, Any], Any]) -> None:
        self.default = default
        self.check = check

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None else instance.__dict__.get(self.name, self.default)

    def __set__(self, instance: Any, value: Any) -> None:
        self.set_all(instance, {self.name: value})

    @staticmethod
    def set_all(instance: StepOptions, values: dict[str, Any]) -> None:
        """Set some options, or none of them when they are wrong by themselves or together."""
        checked = {name: getattr(type(instance), name).check(name, v) for name, v in values.items()}
        before = {n: instance.__dict__[n] for n in checked if n in instance.__dict__}
        changed = {name for name, value in checked.items() if value != getattr(instance, name)}
        instance.__dict__.update(checked)
        try:
            instance._check_options()
            instance._options_changed(changed)
        except BaseException:
            for name in checked:
                instance.__dict__.pop(name)
            instance.__dict__.update(before)
            raise


class StepOptions:
    """The options, what combinations of them mean, and what they cannot be combined with."""

    max_grad_norm = Option(None, optional(positive))
    grad_norm_type = Option(2.0, _norm_type)
    max_grad_value = Option(None, optional(positive))
    nonfinite = Option("propagate", one_of(*NONFINITE))
    weight_precision = Option("nearest", one_of(*WEIGHT_PRECISIONS))
    state_dtype = Option(None, one_of(*STATE_DTYPES))
    ema_decay = Option(None, optional(below_one))
    ema_warmup = Option(False, flag)
    l1 = Option(0.0, not_negative)
    grad_divisor = Option(None, optional(finite_positive))

    def _check_options(self) -> None:
        if self.max_grad_norm is not None and self.max_grad_value is not None:
            raise ValueError(
                f"max_grad_norm={self.max_grad_norm} and max_grad_value={self.max_grad_value} "
                "exclude one another"
            )
        if self.ema_warmup and self.ema_decay is None:
            raise ValueError("ema_warmup=True needs an ema_decay; it is None")
        for group in getattr(self, "param_groups", []):
            self._check_group(group)

    def _check_group(self, group: dict[str, Any]) -> None:
        """ValueError when the options do not fit a parameter group."""
        used = self._used()
        if used and group.get("differentiable"):
            raise ValueError(f"{used[0]} does not work with differentiable=True")
        if used and group.get("capturable") and not all(map(on_device, group["params"])):
            raise ValueError(f"{used[0]} does not work with capturable=True, except on CUDA")
        for name in OPTIONS:
            if name in group and name != "l1":
                raise ValueError(f"{name} is an option of the optimizer, not of a parameter group")
        if group.get("amsgrad") and self.state_dtype == torch.uint8:
            raise ValueError(
                "state_dtype=torch.uint8 does not work with amsgrad=True: the largest of averages "
                "that are rounded at random is larger than any of them"
            )
        if group.get("centered") and self.state_dtype in (torch.bfloat16, torch.uint8):
            raise ValueError(
                f"state_dtype={self.state_dtype} does not work with centered=True: the difference "
                "of two rounded averages may be negative, and its root is taken"
            )
        if "l1" in group:
            not_negative("l1 of a parameter group", group["l1"])
        dtypes = {p.dtype for p in group["params"]}
        if self.weight_precision == "remainder" and torch.float16 in dtypes:
            raise ValueError(
                "weight_precision='remainder' does not work with torch.float16 parameters, whose "
                "bits are not the upper half of a float32; 'master' does"
            )
        if any(dtype.is_complex for dtype in dtypes):
            l1 = group.get("l1", self.l1)
            for text, wrong in (
                (f"max_grad_value={self.max_grad_value}", self.max_grad_value is not None),
                (f"l1={l1}", l1 != 0),
                ("grad_norm_type=inf", self.grad_norm_type == math.inf and self._measures()),
                (
                    f"state_dtype={self.state_dtype}",
                    self.state_dtype in (torch.bfloat16, torch.uint8),
                ),
            ):
                if wrong:
                    raise ValueError(f"{text} does not work with complex parameters")

    def _measures(self) -> bool:
        """Whether a step has to look at all gradients before it updates."""
        return self.max_grad_norm is not None or self.nonfinite != "propagate"

    def _used(self) -> list[str]:
        """The options in use that stock torch does not have, as text."""
        return [
            f"{name}={getattr(self, name)!r}"
            for name, option in OPTIONS.items()
            if getattr(self, name) != option.default
        ]

    def _options_changed(self, names: set[str]) -> None:
        raise NotImplementedError

    def _kernel_options(self) -> kernels.StepOptions:
        """The options as the extension takes them."""
        options = kernels.StepOptions()
        options.norm_type = NORM_TYPES[self.grad_norm_type]
        if self.max_grad_norm is not None:
            options.max_grad_norm = self.max_grad_norm
        if self.max_grad_value is not None:
            options.max_grad_value = self.max_grad_value
        options.weight_precision = WEIGHT_PRECISIONS[self.weight_precision]
        options.random_state = self.state_dtype in (torch.bfloat16, torch.uint8)
        if self.ema_decay is not None:
            options.ema_decay = self.ema_decay
        options.ema_warmup = self.ema_warmup
        options.l1 = self.l1
        return options


OPTIONS = {name: value for name, value in vars(StepOptions).items() if isinstance(value, Option)}

# grad_divisor is set from step to step, if at all, and is no argument.
ARGUMENTS = [name for name in OPTIONS if name != "grad_divisor"]


def with_options(signature: inspect.Signature) -> inspect.Signature:
    """A constructor's signature with the options at its end, in place of ``**options``."""
    return signature.replace(
        parameters=[
            *(p for p in signature.parameters.values() if p.kind != p.VAR_KEYWORD),
            *(
                inspect.Parameter(
                    name, inspect.Parameter.KEYWORD_ONLY, default=OPTIONS[name].default
                )
                for name in ARGUMENTS
            ),
        ]
    )
