"""What arguments have to be: checks that return the value, or name the argument and what it was."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

Check = Callable[[str, Any], Any]


def shown(value: Any) -> str:
    """A value in a message: its first line, and not too much of it: it may be a whole model."""
    try:
        text = repr(value)
    except Exception:  # a repr of its own that fails; an integer of more digits than Python prints
        text = f"a {type(value).__name__}"
    line = text.partition("\n")[0][:100]
    return text if line == text else f"{line}…"


def _plain(value: Any) -> Any:
    """What a tensor or an array of one element holds; anything else is itself.

    ``item()`` leaves a tensor's graph alone, where ``float()`` warns; it waits for the device.
    """
    if not (hasattr(value, "item") and hasattr(value, "dtype")):
        return value
    if getattr(value.dtype, "kind", None) in ("m", "M"):  # NumPy's times may come out as integers
        raise TypeError
    return value.item()


def number(name: str, value: Any) -> float:
    """A real number, or a tensor or array of one: no bool, no text, nothing complex.

    This is the one place where what users give becomes a float.

    Raises:
        TypeError: It is something else, or a tensor that holds no number, as on the meta device.
        ValueError: It is too large for a float.
    """
    try:
        plain = _plain(value)
        # float() would read text, and a bool is an integer. What has neither method is no number.
        if isinstance(plain, (bool, str, bytes)) or not (
            hasattr(plain, "__float__") or hasattr(plain, "__index__")
        ):
            raise TypeError
        return float(plain)
    except OverflowError:
        raise ValueError(f"{name} is too large for a float: {shown(value)}") from None
    except torch.AcceleratorError:  # the device has failed, whatever the value is
        raise
    except (TypeError, ValueError, RuntimeError):  # of tensors of several elements, too
        raise TypeError(f"{name} is not a number: {shown(value)}") from None


def finite(name: str, value: Any) -> float:
    """Neither nan nor infinite."""
    checked = number(name, value)
    if not math.isfinite(checked):
        raise ValueError(f"{name} must be finite: {shown(value)}")
    return checked


def integer(name: str, value: Any) -> int:
    """An integer of any sign, or a tensor or array of one; no bool."""
    try:
        plain = _plain(value)
        if isinstance(plain, bool):
            raise TypeError
        return operator.index(plain)
    except torch.AcceleratorError:
        raise
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} is not an integer: {shown(value)}") from None


def count(name: str, value: Any, least: int = 0) -> int:
    """An integer, not too small."""
    whole = integer(name, value)
    if whole < least:
        raise ValueError(f"{name} must be at least {least}: {shown(value)}")
    return whole


def positive(name: str, value: Any) -> float:
    """Above zero; may be infinite."""
    checked = number(name, value)
    if not checked > 0:
        raise ValueError(f"{name} must be positive: {shown(value)}")
    return checked


def finite_positive(name: str, value: Any) -> float:
    """Above zero."""
    checked = positive(name, value)
    if checked == math.inf:
        raise ValueError(f"{name} must be finite: {shown(value)}")
    return checked


def not_negative(name: str, value: Any) -> float:
    """Zero or above."""
    checked = number(name, value)
    if not 0 <= checked < math.inf:
        raise ValueError(f"{name} must be finite and not negative: {shown(value)}")
    return checked


def below_one(name: str, value: Any) -> float:
    """In [0, 1)."""
    checked = number(name, value)
    if not 0 <= checked < 1:
        raise ValueError(f"{name} must be at least 0 and below 1: {shown(value)}")
    return checked


def ratio(name: str, value: Any) -> float:
    """In [0, 1]."""
    checked = number(name, value)
    if not 0 <= checked <= 1:
        raise ValueError(f"{name} must be between 0 and 1: {shown(value)}")
    return checked


def positive_ratio(name: str, value: Any) -> float:
    """In (0, 1]."""
    checked = ratio(name, value)
    if checked == 0:
        raise ValueError(f"{name} must be above 0: {shown(value)}")
    return checked


def flag(name: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} is not True or False: {shown(value)}")
    return value


def items(name: str, values: Any) -> list[Any]:
    """What can be iterated over, but no text."""
    if isinstance(values, (str, bytes, bytearray)) or not isinstance(values, Iterable):
        raise TypeError(f"{name} is not a sequence: {shown(values)}")
    return list(values)


def numbers(name: str, values: Any) -> list[float]:
    """A series of numbers."""
    return [number(f"{name}[{i}]", value) for i, value in enumerate(items(name, values))]


def torch_module(name: str, value: Any) -> nn.Module:
    """A model, or a part of one."""
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name} is not a torch.nn.Module: {shown(value)}")
    return value


def one_of(*choices: Any) -> Check:
    """One of some values."""

    def check(name: str, value: Any) -> Any:
        # Like with like: comparing an array gives an array, which is neither true nor false.
        if not any(isinstance(value, type(choice)) and value == choice for choice in choices):
            raise ValueError(
                f"{name} must be one of {', '.join(map(repr, choices))}: {shown(value)}"
            )
        return value

    return check


def optional(check: Check) -> Check:
    """None, or what passes another check."""
    return lambda name, value: None if value is None else check(name, value)


def check_fields(owner: object, **checks: Check) -> None:
    """Put fields through their checks; what is checked may be frozen."""
    for name, check in checks.items():
        object.__setattr__(owner, name, check(name, getattr(owner, name)))
