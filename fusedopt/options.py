"""The options of a step that torch's optimizers do not have.

They belong to the optimizer, not to its parameter groups: plain attributes that may be changed
between steps. ``state_dict`` records those in use under the key ``RECORD``, which stock ignores.
Groups may carry them, as wrappers of optimizers want it, when all groups agree. What each does is
in ``docs/pipeline.md``.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Sequence
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
    shown,
)
from fusedopt.device import on_device
from fusedopt.extension import kernels

NORM_TYPES = {2.0: kernels.NormType.two, math.inf: kernels.NormType.infinity}
WEIGHT_PRECISIONS = kernels.WeightPrecision.__members__
STATE_DTYPES = (None, torch.float32, torch.bfloat16, torch.uint8)
NONFINITE = ("propagate", "skip", "raise")

# Where a checkpoint has the options.
RECORD = "fusedopt"


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
        own = instance.__dict__
        before = {n: own[n] for n in (*checked, "_from_checkpoint") if n in own}
        carried = [
            (group, name, group[name])
            for group in own.get("param_groups", [])
            for name in CARRIED & checked.keys() & group.keys()
        ]
        changed = {name for name, value in checked.items() if value != getattr(instance, name)}
        undo: list[Callable[[], None]] = []
        try:
            own.update(checked, _from_checkpoint=instance._from_checkpoint - checked.keys())
            for group, name, _ in carried:
                group[name] = checked[name]
            instance._check_options()
            instance._options_changed(changed, undo)
        except BaseException:
            for call in reversed(undo):
                call()
            for name in (*checked, "_from_checkpoint"):
                own.pop(name, None)
            own.update(before)
            for group, name, value in carried:
                group[name] = value
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

    # Those that nobody has set: a checkpoint has.
    _from_checkpoint: frozenset[str] = frozenset()

    def _check_options(self) -> None:
        if self.max_grad_norm is not None and self.max_grad_value is not None:
            raise ValueError(
                f"max_grad_norm={self.max_grad_norm} and max_grad_value={self.max_grad_value} "
                "exclude one another"
            )
        if self.ema_warmup and self.ema_decay is None:
            raise ValueError("ema_warmup=True needs an ema_decay; it is None")
        for index, group in enumerate(getattr(self, "param_groups", [])):
            self._check_group(group, index)

    def _check_group(self, group: dict[str, Any], index: int) -> None:
        """ValueError when the options do not fit a parameter group."""
        used = self._used()
        if used and group.get("differentiable"):
            raise ValueError(f"{used[0]} does not work with differentiable=True")
        if used and group.get("capturable") and not all(map(on_device, group["params"])):
            raise ValueError(f"{used[0]} does not work with capturable=True, except on CUDA")
        check_carried(self.__dict__, group, index)
        if "betas" in group:  # stock looks at the first two, and fails in the step
            betas = group["betas"]
            if hasattr(betas, "__len__") and len(betas) != 2:
                raise ValueError(f"betas must be two numbers: {shown(betas)}")
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

    def _in_use(self) -> dict[str, Any]:
        """The options that are not what stock torch does."""
        values = {name: getattr(self, name) for name in OPTIONS}
        return {name: value for name, value in values.items() if value != OPTIONS[name].default}

    def _used(self) -> list[str]:
        """The same as text."""
        return [f"{name}={value!r}" for name, value in self._in_use().items()]

    def _load_options(self, recorded: dict[str, Any], in_window: bool) -> list[str]:
        """Take over a checkpoint's options, but for those that have been set here.

        Of a checkpoint within a window, ``grad_divisor`` is always taken, also when that is None.
        Returns the options that nobody here knows, as text.
        """
        own = self.__dict__
        windows = {"grad_divisor"} if in_window else set()
        replaced = self._from_checkpoint | windows
        explicit = OPTIONS.keys() & own.keys() - replaced
        taken: dict[str, Any] = {}
        unknown = recorded.keys() - OPTIONS.keys()
        for name in recorded.keys() - unknown:
            if name in explicit:
                continue
            if name in _EXCLUDED_BY:
                other, excludes = _EXCLUDED_BY[name]
                if other in explicit and excludes(own[other]):
                    continue
            try:
                taken[name] = OPTIONS[name].check(name, recorded[name])
            except (TypeError, ValueError) as error:
                raise ValueError(f"the checkpoint's options of the step: {error}") from None
        for name in replaced:
            own.pop(name, None)
        own.update(taken, _from_checkpoint=frozenset(taken))
        for group in own["param_groups"]:
            group.update({name: getattr(self, name) for name in CARRIED & group.keys()})
        try:
            self._check_options()
        except ValueError as error:
            came = [f"{n}={v!r}" for n, v in taken.items() if f"{n}=" in str(error)]
            hint = f" ({', '.join(came)} came with the checkpoint; give the constructor another)"
            raise ValueError(f"{error}{hint if came else ''}") from None
        return [f"the option {n}={shown(recorded[n])} (unknown)" for n in sorted(unknown, key=str)]

    def _options_changed(self, names: set[str], undo: list[Callable[[], None]]) -> None:
        """Do what follows from the change of some; adds to ``undo`` what takes it back."""
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


def check_carried(attributes: dict[str, Any], group: dict[str, Any], index: int) -> None:
    """ValueError when an option that a group carries is not the optimizer's.

    Args:
        attributes: The optimizer's ``__dict__``.
        group: Its parameter group,
        index: and which it is.
    """
    for name in CARRIED & group.keys():
        value = attributes.get(name, OPTIONS[name].default)
        if group[name] != value:
            raise ValueError(
                f"param group {index} has {name}={group[name]!r}, the optimizer {value!r}: "
                f"{_ONE_FOR_ALL}; set it on the optimizer, and in the groups of a wrapper"
            )


def carried_by(groups: Sequence[dict[str, Any]], whose: str = "") -> dict[str, Any]:
    """The options that parameter groups carry. ValueError unless those that do agree."""
    carried = {name: value for group in groups for name, value in group.items() if name in CARRIED}
    for index, group in enumerate(groups):
        for name in carried.keys() & group.keys():
            if group[name] != carried[name]:
                raise ValueError(
                    f"{whose}param group {index} has {name}={group[name]!r}, another "
                    f"{name}={carried[name]!r}: {_ONE_FOR_ALL}"
                )
    return carried


def check_that_all_carry(groups: Sequence[dict[str, Any]], given: Collection[str]) -> None:
    """ValueError when an option is in some of a constructor's groups, and was not given to it."""
    for name in carried_by(groups).keys() - given:
        for index, group in enumerate(groups):
            if name not in group:
                raise ValueError(f"param group {index} has no {name}, another has: {_ONE_FOR_ALL}")


_ONE_FOR_ALL = "an option of the step is one for all groups"

# What an option that has been set makes of one in a checkpoint that does not go with it: nothing.
_EXCLUDED_BY: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "max_grad_norm": ("max_grad_value", lambda value: value is not None),
    "max_grad_value": ("max_grad_norm", lambda value: value is not None),
    "ema_warmup": ("ema_decay", lambda value: value is None),
}


OPTIONS = {name: value for name, value in vars(StepOptions).items() if isinstance(value, Option)}

# l1 may differ between groups.
CARRIED = OPTIONS.keys() - {"l1"}

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
