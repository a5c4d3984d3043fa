"""Parity with stock torch, measured, and the rules by which a measurement passes.

Three optimizers get the same parameters and the same gradients: ours; the stock class as a
for-loop, in the dtype that it competes in; and the stock class in float64 (complex128), the
reference. What stock has no option for is done around it by :class:`fusedopt.recipe.Recipe`.
Errors are distances from the reference, in units in the last place (ulp) of what is stored.

**A whole run** is compared at its end, where everything is kept in the precision that it is
computed in: float32, float64, complex; and weights of 16 bits that have a hidden part: their whole
weights, with a stock run in float32. Of it,

- weights and state agree with stock's within ``torch.testing``'s default tolerances, wherever ours
  are not nearer to the reference, and step counters are equal;
- in float32 and complex64 they are as near to the reference as stock's (below), in float64 and
  complex128 as near as :data:`EXACT` says;
- a weight of 16 bits is its whole weight, rounded.

**Single steps** are compared where something is rounded to fewer bits after each: stock and the
reference go on from what our last step has left. Of each step,

- what is rounded to the nearest is at most one unit away from the reference, and more than 99.95%
  of it at most 0.52: the float64 result, rounded once;
- what is rounded at random is at most 1.01 units away, and right in the mean, wherever between two
  neighbours the reference lies: neither the sum of the errors nor their correlation with those of
  rounding to the nearest is farther from zero than five standard errors;
- a result that nearly cancels to zero may be as far away as stock's, or as float32's resolution
  at the size of the inputs;
- what is kept in float32 beside these is as near to the reference as stock's in float32 (below);
- step counters are equal.

**As near as stock's**: of all errors, in units in the last place, the median, the 90% and the 99%
quantile are at most stock's, but for what :data:`ALLOWANCES` allows, with its reasons. (The largest
are a matter of luck: where a denominator or a sum all but vanishes, any rounding is magnified.)

**Luck.** For the same reason a few values in ten thousand may be outside of the bounds above, if
they are other ones with other numbers: a row in which some are is measured anew, twice, and fails
when a value is outside all three times, or when :data:`OUTSIDE` of them are. A fault strikes again.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from fusedopt.cases import HALF, Case
from fusedopt.extension import kernels
from fusedopt.recipe import Recipe, whole
from fusedopt.state import HIDDEN

RUN_STEPS = 100
PIPELINE_RUN_STEPS = 40
SINGLE_STEPS = 12
SLICE = 2**20  # elements that take part at a time

# How many times stock's errors ours may be, at each of these shares of values beyond; and what so
# many values scatter, of which as many standard errors are allowed.
TAILS = (0.5, 0.1, 0.01)
STANDARD_ERRORS = 3
ALLOWANCES = {
    # A histogram's bins are 0.8% wide.
    "real": 1.02,
    # Stock's complex kernels round in other places.
    "complex": 1.1,
    # The factor of a clip is rounded once for all values, by stock and by ours, and Kahan's
    # weights are rounded twice: luck that does not average out.
    "pipeline": 1.5,
    # Of states with such options. They are squares of what is clipped; and the mean of
    # micro-batches is their sum times a rounded reciprocal, with stock a quotient.
    "state": 2.0,
}
# Where stock computes as the reference does: ulp, at these shares. (Torch sums the squares of
# complex numbers one after the other: all that is clipped by their norm is 70 units off.)
EXACT = (128.0, 1024.0, 8192.0)
# The share of values outside of the bounds above which it is no luck; four are in any case.
OUTSIDE = 0.0005
ANEW = (1_000_003, 2_000_003)  # added to the seed
COARSE = (torch.bfloat16, torch.uint8)  # state dtypes that are rounded at random

Kind = Literal["wide", "nearest", "random"]
# In units: what most values keep to, and what all do.
_REACH: dict[Kind, tuple[float, float]] = {"nearest": (0.52, 1.0), "random": (1.01, 1.01)}
_OUTLIERS = 0.0005  # the share that need not keep to the first


def name_of(dtype: torch.dtype) -> str:
    """Such as "float32"."""
    return str(dtype).removeprefix("torch.")


class Layout(NamedTuple):
    """A parameter to be made.

    Attributes:
        shape: Its shape.
        offset: How many elements after the beginning of an allocation it begins.
    """

    shape: tuple[int, ...]
    offset: int = 0

    @property
    def elements(self) -> int:
        """How many it has."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape)) or "()"
        return f"{shape}@{self.offset}" if self.offset else shape


# 0-dim, empty, one element, tails of every vector width, more than one tile, matrices (the last one
# has values enough for their mean square to be no matter of luck), and a view that begins between
# two vectors' boundaries.
LAYOUTS = (
    *(
        Layout(shape)
        for shape in ((), (0,), (1,), (3,), (17,), (31,), (4097,), (33, 7), (128, 129))
    ),
    Layout((100,), 1),
)


def make_params(
    layouts: Sequence[Layout] = LAYOUTS,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> list[Parameter]:
    """Normally distributed parameters, the same on every device; every second is 64 times smaller.

    Of those, the same update is many more units in the last place.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    params = []
    for layout in layouts:
        memory = _random((layout.elements + layout.offset,), dtype, device, generator)
        memory[1::2] *= 2.0**-6
        params.append(Parameter(memory[layout.offset :].view(layout.shape)))
    return params


def random_grads(params: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Normally distributed gradients in the parameters' dtypes, from a generator on the CPU.

    One in 16 is always zero, as those of an embedding's unused rows are, and one is small: beside
    these, ``eps`` matters.
    """
    grads = []
    for p in params:
        grad = _random(p.shape, p.dtype, p.device, generator)
        values = grad.view(-1)
        values[5::16] = 0
        for i, size in enumerate((1e-4, 1e-6, 1e-8)):
            values[11 + 16 * i :: 48] *= size
        grads.append(grad)
    return grads


def _random(
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device | str,
    generator: torch.Generator,
) -> Tensor:
    values = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    if dtype.is_complex:
        values = torch.complex(values, values.flip(0) if values.dim() else -values)
    return values.to(device, dtype)


def ulp(x: Tensor, eps: float, tiny: float) -> Tensor:
    """The distance between neighbours of abs(x), in float64.

    Args:
        x: Where.
        eps: That distance at 1.
        tiny: The smallest magnitude that has the format's full precision.
    """
    return eps * 2 ** x.abs().double().clamp_min(tiny).log2().floor()


def as_stock_counts(mine: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """A parameter's state as ours has it, with its counter as and where stock's has it.

    On a device ours are there, too, in float64, and SGD with dampening has one.
    """
    mine = dict(mine)
    step = mine.get("step")
    if isinstance(step, Tensor) and step.device.type != "cpu":
        del mine["step"]
        if isinstance(theirs.get("step"), Tensor):
            mine["step"] = step.to(theirs["step"])
    return mine


class Errors:
    """Distances from the reference, over tensors, steps and slices.

    Attributes:
        count: How many.
        largest: The largest, in the values' own unit.
        largest_ulp: The largest in units in the last place.
        largest_relative: The largest beside the reference's magnitude, where that is not zero.
    """

    def __init__(self) -> None:
        self.count = 0
        self.largest = self.largest_ulp = self.largest_relative = 0.0
        self._squares = self._drift = self._pull = self._nearest = 0.0
        self._rounded = 0
        # How many have which upper half of a float32's bits: enough for a median.
        self._counts = torch.zeros(2**15, dtype=torch.int64, device="cpu")

    def add(self, error: Tensor, reference: Tensor, unit: Tensor, lowest: float = 0) -> None:
        """More of them: signed errors, what they are errors of, and its ulp; flat, float64.

        Biases leave out what is less than ``lowest`` units.
        """
        if not error.numel():
            return
        away = _distance(error)
        in_ulp = _distance(away / unit)  # of nan, the unit is nan
        nonzero = reference != 0
        relative = away[nonzero] / reference[nonzero].abs()
        self.count += away.numel()
        self.largest = max(self.largest, away.max().item())
        self.largest_ulp = max(self.largest_ulp, in_ulp.max().item())
        self.largest_relative = max(
            self.largest_relative, relative.max().item() if relative.numel() else 0.0
        )
        self._squares += away.square().sum().item()
        # Near zero an error is many units: it counts, but as one.
        signed = (error / unit).clamp(-1, 1)
        nearest = (reference / unit).round() - reference / unit
        some = reference.abs() >= lowest * unit
        signed, nearest = signed[some], nearest[some]
        self._rounded += len(signed)
        self._drift += signed.sum().item()
        self._pull += signed.dot(nearest).item()
        self._nearest += nearest.square().sum().item()
        self._counts += (in_ulp.float().view(torch.int32) >> 16).bincount(minlength=2**15).cpu()

    def ulp_exceeded_by(self, share: float) -> float:
        """What such a share of the errors exceeds, in ulp, to half a percent."""
        place = int((self._counts.cumsum(0) < (1 - share) * self.count).sum())
        if place >= _INFINITE:
            return math.inf
        middle = 2**15 if place else 0  # between the first and the last with these bits
        return torch.tensor((place << 16) + middle, dtype=torch.int32).view(torch.float32).item()

    @property
    def biases(self) -> tuple[float, float]:
        """Of values that are rounded at random: how far off in the mean they are.

        Returns:
            The sum of the errors, and their correlation with those of rounding to the nearest, in
            standard errors.
        """
        half = 0.5  # a unit: the standard deviation of one rounding, at most
        return (
            self._drift / (half * math.sqrt(self._rounded)) if self._rounded else 0.0,
            self._pull / (half * math.sqrt(self._nearest)) if self._nearest else 0.0,
        )

    def as_json(self) -> dict[str, float]:
        """The numbers."""
        return {
            "largest_ulp": self.largest_ulp,
            **{f"{1 - share:.0%}_ulp": self.ulp_exceeded_by(share) for share in TAILS},
            "largest_relative": self.largest_relative,
            "largest": self.largest,
            "root_mean_square": math.sqrt(self._squares / self.count) if self.count else 0.0,
        }


_INFINITE = 0x7F80  # the upper half of infinity's bits


def _distance(error: Tensor) -> Tensor:
    """Absolute values; nan is infinitely far away."""
    return error.abs().nan_to_num(nan=torch.inf, posinf=torch.inf)


@dataclass
class Values:
    """What has been seen of the weights, or of a state: errors by name of the contestant.

    Attributes:
        kind: How it is rounded.
        ours: Our errors.
        stock: Stock's.
        outliers: How many of ours are farther away than most may be.
        outside: Which of ours are outside of the bounds for all: their places.
    """

    kind: Kind
    ours: Errors
    stock: Errors
    outliers: int = 0
    outside: set[int] = field(default_factory=set)


@dataclass
class Result:
    """What was measured of one case in one dtype.

    Attributes:
        case: The case.
        dtype: The parameters' dtype.
        stock_dtype: The dtype that stock computed in.
        steps: How many were made.
        whole_run: Whether they were compared at their end, not one by one.
        elements: Of all parameters.
        values: ``"weight"``, and the states by their names.
        counters_equal: Whether all step counters are stock's; None: stock has none.
        again: By name, how many values were outside of the bounds with other numbers, too; None:
            none were outside.
        problems: Why it fails, a sentence each; empty when it passes.
    """

    case: Case
    dtype: torch.dtype
    stock_dtype: torch.dtype
    steps: int
    whole_run: bool
    elements: int
    values: dict[str, Values] = field(default_factory=dict)
    counters_equal: bool | None = None
    again: dict[str, int] | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether there are no problems."""
        return not self.problems

    @property
    def stock_is_exact(self) -> bool:
        """Whether stock computes as the reference does: there is nothing to be nearer to."""
        return self.stock_dtype in (torch.float64, torch.complex128)

    @property
    def worst_state(self) -> str | None:
        """The name of the state with our largest error, in ulp; None without state."""
        states = self.values.keys() - {"weight"}
        return max(states, key=lambda name: self.values[name].ours.largest_ulp, default=None)

    def as_json(self) -> dict[str, Any]:
        """All of it; errors are in ulp where the name says so."""
        return {
            "case": str(self.case),
            "optimizer": self.case.name,
            "options": {**self.case.options, **self.case.pipeline},
            "micro_batches": self.case.micro_batches,
            "dtype": self.dtype,
            "stock_dtype": self.stock_dtype,
            "compared": "the end of the run" if self.whole_run else "each step",
            "steps": self.steps,
            "elements": self.elements,
            "values": {
                name: {
                    "rounding": v.kind,
                    "outside": len(v.outside),
                    "outside_with_all_seeds": None if self.again is None else self.again[name],
                    "ours": v.ours.as_json(),
                    "stock": v.stock.as_json(),
                }
                for name, v in self.values.items()
            },
            "step_counters_equal": self.counters_equal,
            "verdict": "pass" if self.passed else "FAIL",
            "problems": self.problems,
        }


def measure(
    case: Case,
    dtype: torch.dtype,
    layouts: Sequence[Layout] = LAYOUTS,
    *,
    device: torch.device | str = "cpu",
    steps: int | None = None,
    seed: int = 0,
) -> Result:
    """Measure a case, and judge it.

    Parameters take part in slices of at most :data:`SLICE` elements (but a parameter is never
    divided), each with optimizers of its own, which bounds the memory that is needed.

    Args:
        case: The optimizer and its options.
        dtype: The parameters' dtype.
        layouts: The parameters.
        device: Where they are.
        steps: How many; None: of a whole run :data:`RUN_STEPS`, or :data:`PIPELINE_RUN_STEPS` with
            options that stock has not; else :data:`SINGLE_STEPS`.
        seed: Of parameters and gradients.

    Raises:
        ValueError: The optimizer refuses an option with this dtype.
    """
    result = _measured(case, dtype, layouts, torch.device(device), steps, seed)
    if any(values.outside for values in result.values.values()):
        anew = [
            _measured(case, dtype, layouts, torch.device(device), steps, seed + more)
            for more in ANEW
        ]
        result.again = {
            name: len(values.outside.intersection(*(other.values[name].outside for other in anew)))
            for name, values in result.values.items()
        }
    _judge(result)
    return result


def _measured(
    case: Case,
    dtype: torch.dtype,
    layouts: Sequence[Layout],
    device: torch.device,
    steps: int | None,
    seed: int,
) -> Result:
    options = case.pipeline
    hidden = options.get("weight_precision") in HIDDEN
    whole_run = hidden or (dtype not in HALF and options.get("state_dtype") is None)
    # Where ours keeps something in float32 beside 16 bits, it is measured by stock in float32.
    beside = {"weight_precision", "state_dtype", "ema_decay"} & options.keys()
    stock_dtype = torch.float32 if dtype in HALF and beside else dtype
    if steps is None:
        run_steps = RUN_STEPS if case.plain else PIPELINE_RUN_STEPS
        steps = run_steps if whole_run else SINGLE_STEPS
    elements = sum(layout.elements for layout in layouts)
    result = Result(case, dtype, stock_dtype, steps, whole_run, elements)
    first = 0
    with _reproducible(seed), _ours_alone(result), _threads(elements):
        for number, part in enumerate(_slices(layouts)):
            _Trial(result, part, device, seed + 1000 * number, first).run()
            first += 2 * sum(layout.elements for layout in part)
    return result


def _slices(layouts: Sequence[Layout]) -> Iterator[list[Layout]]:
    part: list[Layout] = []
    elements = 0
    for layout in layouts:
        if part and elements + layout.elements > SLICE:
            yield part
            part, elements = [], 0
        part.append(layout)
        elements += layout.elements
    yield part


@contextmanager
def _reproducible(seed: int) -> Iterator[None]:
    """Stochastic rounding takes its seed from torch's generator."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


@contextmanager
def _threads(elements: int) -> Iterator[None]:
    """One thread for few elements, as in our steps: more would wait for one another."""
    before = torch.get_num_threads()
    try:
        if elements < 2**16:
            torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _ours_alone(result: Result) -> Iterator[None]:
    """What is left to torch would be torch, compared with itself."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        if str(warning.message).startswith("fusedopt."):
            result.problems.append(str(warning.message))
        else:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )


class _Trial:
    """Our optimizer, stock's and the reference on one slice."""

    def __init__(
        self,
        result: Result,
        layouts: Sequence[Layout],
        device: torch.device,
        seed: int,
        first: int,
    ) -> None:
        self.result = result
        self.first = first  # the place of its first value among those of all slices
        case = result.case
        own = ("weight_precision", "state_dtype")  # which only say how ours are kept
        around = {n: v for n, v in case.pipeline.items() if n not in own}
        self.params = make_params(layouts, result.dtype, device, seed)
        self.generator = torch.Generator("cpu").manual_seed(seed + 1)
        self.ours = case.ours(self.params)
        real = result.stock_dtype.to_real()
        self.stock = Recipe(case, self.params, dtype=real, **around)
        self.exact = Recipe(case, self.params, **around)

    def run(self) -> None:
        """All steps, and all comparisons."""
        for _ in range(self.result.steps):
            if not self.result.whole_run:
                for other in (self.stock, self.exact):
                    other.resume(self.ours)
            self.step()
            if not self.result.whole_run:
                self.record()
        if self.result.whole_run:
            self.compare_forms()
            self.record()

    def step(self) -> None:
        batches = [
            random_grads(self.params, self.generator) for _ in range(self.result.case.micro_batches)
        ]
        for other in (self.stock, self.exact):
            other.step(batches)
        for i, grads in enumerate(batches):
            for param, grad in zip(self.params, grads, strict=True):
                param.grad = grad
            if i < len(batches) - 1:
                self.ours.accumulate()
        self.ours.step()

    def _state(self, other: Recipe) -> list[dict[str, Tensor]]:
        """Stock's state, of each parameter, and its average."""
        states = []
        for param, ema in zip(other.params, other.ema, strict=True):
            state = {n: v for n, v in other.optimizer.state[param].items() if v is not None}
            if other.ema_decay is not None:
                state["ema"] = ema
            states.append(state)
        return states

    def _our_state(self) -> list[dict[str, Tensor]]:
        saved = self.ours.state_dict()["state"]
        return [saved.get(i, {}) for i in range(len(self.params))]

    def compare_forms(self) -> None:
        """Dtypes and shapes; and whether weights of 16 bits are what their whole ones round to."""
        weights = [whole(self.ours, p) for p in self.params]
        self._compare("weights", weights, [p.detach() for p in self.stock.params])
        if self.result.case.plain:  # or ours also has counters, hidden parts, ...
            for mine, theirs in zip(self._our_state(), self._state(self.stock), strict=True):
                self._compare("state", as_stock_counts(mine, theirs), theirs)
        for param, weight in zip(self.params, weights, strict=True):
            if weight.dtype != param.dtype:
                away = (param.detach().double() - weight.double()).abs()
                if not torch.all(away <= 0.5 * self._unit(weight.double(), param.dtype)):
                    self.result.problems.append("a weight is not its whole weight, rounded")

    def _compare(self, what: str, mine: Any, theirs: Any) -> None:
        try:  # all but the values, which are judged together
            torch.testing.assert_close(
                mine, theirs, rtol=0, atol=math.inf, equal_nan=True, check_stride=False
            )
        except AssertionError as error:
            reason = "; ".join(line for line in str(error).splitlines() if line)
            self.result.problems.append(f"{what} differ from stock's: {reason}")

    def record(self) -> None:
        """Note the errors of weights and states as they are now, and compare counters."""
        mine = [whole(self.ours, p) for p in self.params]
        self._record("weight", mine, self.stock.params, self.exact.params)
        states = self._our_state(), self._state(self.stock), self._state(self.exact)
        for name in sorted(states[-1][0].keys() - {"step"}):
            if all(name in state for state in states[0]):
                self._record(name, *([state[name] for state in each] for each in states))
            else:
                self.result.problems.append(f"ours has no state {name!r}")
        for state, theirs in zip(*states[:2], strict=True):
            if "step" in theirs:
                equal = "step" in state and float(state["step"]) == float(theirs["step"])
                self.result.counters_equal = equal and self.result.counters_equal is not False

    def _record(
        self,
        name: str,
        ours: Sequence[Tensor],
        stocks: Sequence[Tensor],
        exacts: Sequence[Tensor],
    ) -> None:
        mine, theirs, reference = (_flat(tensors) for tensors in (ours, stocks, exacts))
        kind = self._kind(name, ours[0].dtype)
        if name not in self.result.values:
            self.result.values[name] = Values(kind, Errors(), Errors())
        values = self.result.values[name]
        unit = self._unit(reference, ours[0].dtype)
        lowest = 0
        if kind == "random" and self.result.case.pipeline.get("state_dtype") == torch.uint8:
            unit = self._unit_of_codes(name, reference)
            lowest = 8  # below, codes do not lie equally far apart, and no square becomes zero
        # Where the result is nan or infinite, and ours is, there is nothing to measure.
        known = ~((mine == reference) | (mine.isnan() & reference.isnan())) | reference.isfinite()
        places = known.nonzero().flatten()
        mine, theirs, reference, unit = (x[known] for x in (mine, theirs, reference, unit))
        error, stock_error = mine - reference, theirs - reference
        values.ours.add(error, reference, unit, lowest)
        values.stock.add(stock_error, reference, unit)
        if kind == "wide":
            # Infinite where stock's is: then ours may be.
            close = (mine - theirs).abs() <= self._tolerance(theirs, ours[0].dtype)
            near = error.abs() <= _distance(stock_error)
            inside = close | near | (mine == theirs)
        else:
            most, every = _REACH[kind]
            # Inputs are of size 1, but a clip's factor or a small root may have changed that.
            size = (
                1.0
                if self.result.case.plain or not len(reference)
                else (max(1.0, reference.abs().max().item()))
            )
            resolution = torch.full_like(unit, 8 * torch.finfo(torch.float32).eps * size)
            bound = torch.stack([every * unit, _distance(stock_error), resolution]).amax(0)
            inside = error.abs() <= bound
            values.outliers += int((~(error.abs() <= most * unit)).sum())
        values.outside.update((self.first + places[~inside]).tolist())

    @staticmethod
    def _tolerance(x: Tensor, dtype: torch.dtype) -> Tensor:
        """Torch's, of a float64 copy of numbers of this dtype."""
        rtol, atol = torch.testing._comparison.default_tolerances(dtype)
        return atol + rtol * x.abs()

    def _kind(self, name: str, dtype: torch.dtype) -> Kind:
        options = self.result.case.pipeline
        if name not in ("weight", "ema") and options.get("state_dtype") in COARSE:
            return "random"
        if name == "weight" and options.get("weight_precision") == "stochastic":
            return "random"
        return "nearest" if dtype in HALF else "wide"

    def _unit_of_codes(self, name: str, reference: Tensor) -> Tensor:
        """That of a state in 8 bits: csrc/quantize.h."""
        scales = [
            self.ours.state[p][f"{name}_scale"].repeat_interleave(kernels.BLOCK)[: p.numel()]
            for p in self.params
        ]
        square = kernels.family_states(self.ours._family)[name]
        lowest = torch.cat(scales).double() * (2.0**-30 if square else 2.0**-14)
        return torch.maximum(ulp(reference, 2.0**-3, 2.0**-120), lowest)

    @staticmethod
    def _unit(x: Tensor, dtype: torch.dtype) -> Tensor:
        info = torch.finfo(dtype)
        return ulp(x, info.eps, info.tiny)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """All values in one row, in float64; of complex ones both parts."""
    row = torch.cat([t.detach().flatten() for t in tensors])
    return (torch.view_as_real(row) if row.is_complex() else row).double().flatten()


def _judge(result: Result) -> None:
    """Add what the numbers have against it to a result's problems."""
    problems = result.problems
    for name, values in result.values.items():
        if values.kind == "wide":
            problems += _judge_wide(result, name, values)
        many = len(values.outside) > max(4, OUTSIDE * values.ours.count)
        if many or (result.again and result.again[name]):
            bounds = (
                "within torch's tolerances of stock's, nor nearer to float64's"
                if values.kind == "wide"
                else "the float64 result, rounded"
            )
            problems.append(
                f"{name}: {len(values.outside)} of {values.ours.count} values are not {bounds} "
                f"(largest error: {values.ours.largest_ulp:.3g} ulp"
                + (")" if many else "), some with any numbers")
            )
        if values.kind == "random" and not max(map(abs, values.ours.biases)) <= 5:
            drift, pull = values.ours.biases
            problems.append(
                f"{name}: rounding at random is not right in the mean: {drift:.3g} standard errors "
                f"away, {pull:.3g} drawn to the nearest"
            )
    for kind, (most, _) in _REACH.items():
        rounded = [v for v in result.values.values() if v.kind == kind]
        count, outliers = sum(v.ours.count for v in rounded), sum(v.outliers for v in rounded)
        if outliers >= max(2, _OUTLIERS * count):
            problems.append(
                f"{outliers} of {count} values are more than {most} ulp away from the float64 "
                "result"
            )
    if result.counters_equal is False:
        problems.append("step counters differ from stock's")


def _judge_wide(result: Result, name: str, values: Values) -> Iterator[str]:
    """As near to float64 as stock."""
    row = "complex" if result.dtype.is_complex else "real"
    if not result.case.plain:
        row = "pipeline" if name == "weight" else "state"
    for share, exact in zip(TAILS, EXACT, strict=True):
        beyond = values.ours.count * share
        if beyond < 16:  # luck
            continue
        ours = values.ours.ulp_exceeded_by(share)
        stock = values.stock.ulp_exceeded_by(share)
        most = exact
        if not result.stock_is_exact:
            # A result that is rounded once is as near as can be.
            most = max(0.51, stock * (ALLOWANCES[row] + STANDARD_ERRORS / math.sqrt(beyond)))
        if not ours <= most:
            yield (
                f"{name}: {share:.0%} of the errors are above {ours:.3g} ulp, of stock's above "
                f"{stock:.3g}; {most:.3g} are allowed"
            )
