"""What users give becomes a number in one place, which knows what is none."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from helpers import needs_host_memory, table
from torch._subclasses.fake_tensor import FakeTensorMode

from fusedopt.arguments import Check, count, finite, integer, number, one_of, positive_ratio, shown
from fusedopt.checks import check_initial_loss
from fusedopt.history import History
from fusedopt.schedule import Plateau, exponential
from fusedopt.stopping import EarlyStopping


def append(value: Any) -> float:
    history = History()
    history.append(0, loss=value)
    (found,) = history["loss"]
    assert found is not None
    return found


def stop(value: Any) -> float:
    stopper = EarlyStopping("loss")
    stopper.step({"loss": value})
    assert stopper.best_value is not None
    return stopper.best_value


def wait(value: Any) -> float:
    plateau = Plateau()
    plateau.update(value)
    assert plateau.best is not None
    return plateau.best


def look(value: Any) -> float:
    return check_initial_loss(value, expected=1.5).evidence["loss"]


TAKERS: dict[str, Callable[[Any], float]] = {
    "number": lambda value: number("loss", value),
    "append": append,
    "stop": stop,
    "wait": wait,
    "look": look,
}


def fake() -> torch.Tensor:
    with FakeTensorMode():
        return torch.zeros((), device="cpu")


NUMBERS: dict[str, Callable[[], Any]] = {
    "float": lambda: 1.5,
    "Fraction": lambda: Fraction(3, 2),
    "Decimal": lambda: Decimal("1.5"),
    "float16": lambda: np.float16(1.5),
    "longdouble": lambda: np.longdouble(1.5),
    "array": lambda: np.array(1.5),
    "array of one": lambda: np.array([[1.5]]),
    "tensor": lambda: torch.tensor(1.5),
    "tensor of one": lambda: torch.tensor([1.5], dtype=torch.bfloat16),
    "parameter": lambda: torch.nn.Parameter(torch.tensor(1.5)),
    "with a graph": lambda: torch.tensor([3.0], requires_grad=True).mean() / 2,
}


@table("make", NUMBERS)
@table("take", TAKERS)
def test_numbers_of_all_kinds(take: Callable[[Any], float], make: Callable[[], Any]) -> None:
    """Without a warning, which would be an error here."""
    found = take(make())
    assert found == 1.5
    assert type(found) is float


class Odd:
    """Looks like a tensor, and has no number."""

    dtype = None

    def __init__(self, error: Exception) -> None:
        self.error = error

    def item(self) -> float:
        raise self.error


NO_NUMBERS: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "bool": lambda: True,
    "text": lambda: "1.5",
    "bytes": lambda: b"1.5",
    "bytearray": lambda: bytearray(b"1.5"),
    "memoryview": lambda: memoryview(b"1.5"),
    "complex": lambda: 1.5 + 0j,
    "list": lambda: [1.5],
    "bool of NumPy": lambda: np.True_,
    "text of NumPy": lambda: np.str_("1.5"),
    "bytes of NumPy": lambda: np.bytes_(b"1.5"),
    "complex of NumPy": lambda: np.complex64(1.5),
    "duration": lambda: np.timedelta64(3, "ns"),
    "date": lambda: np.datetime64(3, "ns"),
    "array of bool": lambda: np.array(True),
    "array of text": lambda: np.array("1.5"),
    "array of two": lambda: np.ones(2),
    "tensor of bool": lambda: torch.tensor(True),
    "complex tensor": lambda: torch.tensor(1.5 + 0j, device="cpu"),
    "meta": lambda: torch.zeros((), device="meta"),
    "fake": fake,
    "not a tensor": lambda: torch.Tensor,
    "nothing inside": lambda: Odd(RuntimeError("none")),
}


@table("make", NO_NUMBERS)
@table("take", TAKERS)
def test_what_is_no_number(take: Callable[[Any], float], make: Callable[[], Any]) -> None:
    with pytest.raises(TypeError, match=r"(loss|metric).* is not a number: "):
        take(make())


@needs_host_memory
def test_tensors_of_other_layouts() -> None:
    assert number("loss", torch.tensor([1.5]).to_sparse()) == 1.5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's: these are in beta
        compressed = torch.tensor([[1.5]]).to_sparse_csr()
        nested = torch.nested.nested_tensor([torch.ones(1)])
        quantized = torch.quantize_per_tensor(torch.tensor([1.5]), 0.1, 0, torch.qint8)
    assert number("loss", quantized) == 1.5
    for tensor in (compressed, nested):
        with pytest.raises(TypeError, match="loss is not a number: "):
            number("loss", tensor)


@table("take", TAKERS)
def test_too_large_for_a_float(take: Callable[[Any], float]) -> None:
    for value in (10**400, Fraction(10**400), 10**5000):
        with pytest.raises(ValueError, match=r"(loss|metric).* is too large for a float: "):
            take(value)


def test_a_device_that_fails_is_no_wrong_number() -> None:
    for check in (number, integer):
        with pytest.raises(torch.AcceleratorError):
            check("loss", Odd(torch.AcceleratorError("an illegal memory access")))


@pytest.mark.parametrize(
    "value", [7, np.int8(7), np.array(7), torch.tensor([7], dtype=torch.uint8)], ids=str
)
def test_integers(value: Any) -> None:
    found = integer("n", value)
    assert found == 7
    assert type(found) is int


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, 7.0, "7", b"7", np.True_, np.float32(7), np.timedelta64(7, "ns")),
        *(Fraction(7), Decimal(7), np.ones(2, dtype=int)),
        torch.tensor(True, device="cpu"),
        torch.tensor(7.0, device="cpu"),
        torch.ones(2, dtype=torch.int64, device="cpu"),
        torch.zeros((), dtype=torch.int64, device="meta"),
    ],
    ids=lambda value: shown(value).partition("\n")[0],
)
def test_what_is_no_integer(value: Any) -> None:
    for check in (integer, count):
        with pytest.raises(TypeError, match="n is not an integer: "):
            check("n", value)


LONG: tuple[tuple[Check, str], ...] = (
    (finite, "is too large for a float: a int"),
    (count, "must be at least 0: a int"),
    (positive_ratio, "is too large for a float: a int"),
)


@pytest.mark.parametrize(("check", "message"), LONG, ids=[row[1] for row in LONG])
def test_an_integer_that_python_does_not_print(check: Check, message: str) -> None:
    with pytest.raises(ValueError, match=f"n {message}"):
        check("n", -(10**5000))


def test_choices_are_compared_with_their_like() -> None:
    check = one_of("min", None, torch.float32)
    for choice in ("min", np.str_("min"), None, torch.float32):
        assert check("mode", choice) is choice
    for other in (np.array(["min", "min"]), torch.ones(2), 1, b"min"):
        with pytest.raises(ValueError, match=r"mode must be one of 'min', None, torch\.float32: "):
            check("mode", other)


def test_a_checked_tensor_becomes_a_number() -> None:
    """Also one with a graph, which would otherwise live as long as the curve that has it."""
    curve = exponential(torch.tensor(0.5, requires_grad=True))  # type: ignore[arg-type]
    assert type(curve.gamma) is float
    assert type(curve(1)) is float
