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

from fusedopt.device import on_device
from fusedopt.extension import kernels

NORM_TYPES = {2.0: kernels.NormType.two, math.inf: kernels.NormType.infinity}
WEIGHT_PRECISIONS = kernels.WeightPrecision.__members__
STATE_DTYPES = (None, torch.float32, torch.bfloat16, torch.uint8)
NONFINITE = ("propagate", "skip", "raise")


def _number(name: str, value: Any) -> float:
    try:
        if isinstance(value, (bool, str)):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, RuntimeError):  # of tensors of several elements, too
        raise TypeError(f"{name} is not a number: {value!r}") from None


def _positive(name: str, value: Any) -> float | None:
    if value is None:
        return None
    number = _number(name, value)
    if not number > 0:
        raise ValueError(f"{name} must be positive: {value!r}")
    return number


def _finite_positive(name: str, value: Any) -> float | None:
    number = _positive(name, value)
    if number == math.inf:
        raise ValueError(f"{name} must be finite: {value!r}")
    return number


def _not_negative(name: str, value: Any) -> float:
    number = _number(name, value)
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} must be finite and not negative: {value!r}")
    return number


def _below_one(name: str, value: Any) -> float:
    number = _number(name, value)
    if not 0 <= number < 1:
        raise ValueError(f"{name} must be at least 0 and below 1: {value!r}")
    return number


def _decay(name: str, value: Any) -> float | None:
    return None if value is None else _below_one(name, value)


def _norm_type(name: str, value: Any) -> float:
    number = _number(name, value)
    if number not in NORM_TYPES:
        raise ValueError(f"{name} must be 2.0 or inf: {value!r}")
    return number


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} is not True or False: {value!r}")
    return value


def _one_of(*choices: Any) -> Callable[[str, Any], Any]:
    def check(name: str, value: Any) -> Any:
        if not any(value is choice or value == choice for choice in choices):
            raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}: {value!r}")
        return value

    return check


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

    max_grad_norm = Option(None, _positive)
    grad_norm_type = Option(2.0, _norm_type)
    max_grad_value = Option(None, _positive)
    nonfinite = Option("propagate", _one_of(*NONFINITE))
    weight_precision = Option("nearest", _one_of(*WEIGHT_PRECISIONS))
    state_dtype = Option(None, _one_of(*STATE_DTYPES))
    ema_decay = Option(None, _decay)
    ema_warmup = Option(False, _flag)
    l1 = Option(0.0, _not_negative)
    grad_divisor = Option(None, _finite_positive)

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
            _not_negative("l1 of a parameter group", group["l1"])
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
