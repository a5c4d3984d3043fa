"""What arguments have to be: checks that return the value, or name the argument and what it was."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

Check = Callable[[str, Any], Any]


def shown(value: Any) -> str:
    """A value in a message: its first line, and not too much of it: it may be a whole model."""
    text = repr(value)
    line = text.partition("\n")[0][:100]
    return text if line == text else f"{line}…"


def number(name: str, value: Any) -> float:
    """A number, or a tensor of one."""
    try:
        if isinstance(value, (bool, str)):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, RuntimeError):  # of tensors of several elements, too
        raise TypeError(f"{name} is not a number: {shown(value)}") from None


def finite(name: str, value: Any) -> float:
    """Neither nan nor infinite."""
    checked = number(name, value)
    if not math.isfinite(checked):
        raise ValueError(f"{name} must be finite: {value!r}")
    return checked


def integer(name: str, value: Any) -> int:
    """An integer of any sign."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is not an integer: {shown(value)}") from None


def count(name: str, value: Any, least: int = 0) -> int:
    """An integer, not too small."""
    whole = integer(name, value)
    if whole < least:
        raise ValueError(f"{name} must be at least {least}: {value!r}")
    return whole


def positive(name: str, value: Any) -> float:
    """Above zero; may be infinite."""
    checked = number(name, value)
    if not checked > 0:
        raise ValueError(f"{name} must be positive: {value!r}")
    return checked


def finite_positive(name: str, value: Any) -> float:
    """Above zero."""
    checked = positive(name, value)
    if checked == math.inf:
        raise ValueError(f"{name} must be finite: {value!r}")
    return checked


def not_negative(name: str, value: Any) -> float:
    """Zero or above."""
    checked = number(name, value)
    if not 0 <= checked < math.inf:
        raise ValueError(f"{name} must be finite and not negative: {value!r}")
    return checked


def below_one(name: str, value: Any) -> float:
    """In [0, 1)."""
    checked = number(name, value)
    if not 0 <= checked < 1:
        raise ValueError(f"{name} must be at least 0 and below 1: {value!r}")
    return checked


def ratio(name: str, value: Any) -> float:
    """In [0, 1]."""
    checked = number(name, value)
    if not 0 <= checked <= 1:
        raise ValueError(f"{name} must be between 0 and 1: {value!r}")
    return checked


def positive_ratio(name: str, value: Any) -> float:
    """In (0, 1]."""
    if ratio(name, value) == 0:
        raise ValueError(f"{name} must be above 0: {value!r}")
    return float(value)


def flag(name: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} is not True or False: {shown(value)}")
    return value


def items(name: str, values: Any) -> list[Any]:
    """What can be iterated over, but no text."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"{name} is not a sequence: {shown(values)}")
    return list(values)


def torch_module(name: str, value: Any) -> nn.Module:
    """A model, or a part of one."""
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name} is not a torch.nn.Module: {shown(value)}")
    return value


def one_of(*choices: Any) -> Check:
    """One of some values."""

    def check(name: str, value: Any) -> Any:
        if not any(value is choice or value == choice for choice in choices):
            raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}: {value!r}")
        return value

    return check


def optional(check: Check) -> Check:
    """None, or what passes another check."""
    return lambda name, value: None if value is None else check(name, value)


def check_fields(owner: object, **checks: Check) -> None:
    """Put fields through their checks; what is checked may be frozen."""
    for name, check in checks.items():
        object.__setattr__(owner, name, check(name, getattr(owner, name)))
